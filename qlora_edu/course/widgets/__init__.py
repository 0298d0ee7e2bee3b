"""Sliders that move a picture: `widgets.nf4_explorer()` and its siblings, one a chapter.

`core` holds the `Explorer`; each `chapter_NN` module holds the pure `render_*` functions and the
explorer of one notebook.
"""

from qlora_edu.course.widgets.chapter_00 import memory_explorer, render_training_memory
from qlora_edu.course.widgets.chapter_01 import (
    DRAWS,
    OFFSETS,
    nf4_explorer,
    render_nf4_bins,
    scaled_weights,
)
from qlora_edu.course.widgets.chapter_02 import outlier_explorer, render_outlier_map
from qlora_edu.course.widgets.chapter_03 import (
    FLOAT32,
    bits_with_constants,
    constants_explorer,
    nf4_rms_error,
    render_constants,
)
from qlora_edu.course.widgets.chapter_09 import render_trained_tokens, tokens_explorer
from qlora_edu.course.widgets.core import Explorer

__all__ = [
    "DRAWS",
    "FLOAT32",
    "OFFSETS",
    "Explorer",
    "bits_with_constants",
    "constants_explorer",
    "memory_explorer",
    "nf4_explorer",
    "nf4_rms_error",
    "outlier_explorer",
    "render_constants",
    "render_nf4_bins",
    "render_outlier_map",
    "render_trained_tokens",
    "render_training_memory",
    "scaled_weights",
    "tokens_explorer",
]
