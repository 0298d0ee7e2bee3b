"""Sliders that move a picture, and the figures of each chapter: `explorers.nf4_explorer()`.

`core` holds the `Explorer`; each `chapter_NN` module holds the pure `render_*` and `draw_*`
functions and the explorer of one notebook. A chapter is loaded when one of its names is first used.
"""

from importlib import import_module

_NAMES = {
    "chapter_00": (
        "render_training_memory memory_explorer METHODS training_gigabytes draw_training_memory"
    ),
    "chapter_01": "OFFSETS DRAWS scaled_weights render_nf4_bins nf4_explorer",
    "chapter_02": "render_outlier_map outlier_explorer draw_blocks_and_bytes",
    "chapter_03": "FLOAT32 nf4_rms_error bits_with_constants render_constants constants_explorer",
    "chapter_04": "synthetic_update low_rank_errors render_low_rank lora_explorer",
    "chapter_05": "UPDATE_SIZES MERGE_NAMES merge_outcome render_merge_survival merge_explorer",
    "chapter_06": "render_budget budget_explorer ROW_STYLES row_style draw_budget",
    "chapter_07": "record_trace replay_trace draw_tiers render_paging paging_explorer",
    "chapter_08": (
        "STUDY_WAYS STUDY_MEASURES STUDY_COLOURS load_study study_values study_pairs "
        "draw_runs draw_difference render_study study_explorer"
    ),
    "chapter_09": "render_trained_tokens tokens_explorer draw_trained_tokens",
    "chapter_10": (
        "RATINGS longer_judge JUDGES load_tournament tournament_games tournament_ratings "
        "draw_ratings render_tournament tournament_explorer"
    ),
    "core": "Explorer",
    "playground": "Playground playground",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [*_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
