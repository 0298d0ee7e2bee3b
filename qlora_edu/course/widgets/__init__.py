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
from qlora_edu.course.widgets.chapter_04 import (
    lora_explorer,
    low_rank_errors,
    render_low_rank,
    synthetic_update,
)
from qlora_edu.course.widgets.chapter_05 import (
    MERGE_NAMES,
    UPDATE_SIZES,
    merge_explorer,
    merge_outcome,
    render_merge_survival,
)
from qlora_edu.course.widgets.chapter_06 import budget_explorer, render_budget
from qlora_edu.course.widgets.chapter_07 import (
    paging_explorer,
    record_trace,
    render_paging,
    replay_trace,
)
from qlora_edu.course.widgets.chapter_08 import (
    STUDY_COLOURS,
    STUDY_MEASURES,
    STUDY_WAYS,
    load_study,
    render_study,
    study_explorer,
    study_pairs,
    study_values,
    study_verdict,
)
from qlora_edu.course.widgets.chapter_09 import render_trained_tokens, tokens_explorer
from qlora_edu.course.widgets.chapter_10 import (
    JUDGES,
    RATINGS,
    load_tournament,
    longer_judge,
    render_tournament,
    tournament_explorer,
    tournament_games,
    tournament_ratings,
)
from qlora_edu.course.widgets.core import Explorer
from qlora_edu.course.widgets.playground import Playground, playground

__all__ = [
    "Playground",
    "DRAWS",
    "Explorer",
    "FLOAT32",
    "JUDGES",
    "MERGE_NAMES",
    "OFFSETS",
    "RATINGS",
    "STUDY_COLOURS",
    "STUDY_MEASURES",
    "STUDY_WAYS",
    "UPDATE_SIZES",
    "bits_with_constants",
    "budget_explorer",
    "constants_explorer",
    "load_study",
    "load_tournament",
    "longer_judge",
    "lora_explorer",
    "low_rank_errors",
    "memory_explorer",
    "merge_explorer",
    "merge_outcome",
    "nf4_explorer",
    "nf4_rms_error",
    "outlier_explorer",
    "paging_explorer",
    "playground",
    "record_trace",
    "render_budget",
    "render_constants",
    "render_low_rank",
    "render_merge_survival",
    "render_nf4_bins",
    "render_outlier_map",
    "render_paging",
    "render_study",
    "render_tournament",
    "render_trained_tokens",
    "render_training_memory",
    "replay_trace",
    "scaled_weights",
    "study_explorer",
    "study_pairs",
    "study_values",
    "study_verdict",
    "synthetic_update",
    "tokens_explorer",
    "tournament_explorer",
    "tournament_games",
    "tournament_ratings",
]
