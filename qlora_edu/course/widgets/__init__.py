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
from qlora_edu.course.widgets.chapter_09 import render_trained_tokens, tokens_explorer
from qlora_edu.course.widgets.core import Explorer

__all__ = [
    "DRAWS",
    "OFFSETS",
    "Explorer",
    "memory_explorer",
    "nf4_explorer",
    "render_nf4_bins",
    "render_trained_tokens",
    "render_training_memory",
    "scaled_weights",
    "tokens_explorer",
]
