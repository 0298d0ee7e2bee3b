"""The explorer of chapter 0: size and rank against the memory of four ways to fine-tune."""

from ipywidgets import Dropdown, SelectionSlider

from qlora_edu.course.figures import LLAMA_SHAPES, draw_training_memory
from qlora_edu.course.plots import figure_png
from qlora_edu.course.widgets.core import Explorer

RANKS = (8, 16, 32, 64, 128, 256)


def render_training_memory(size: str = "7B", rank: int = 64) -> bytes:
    """Memory of four ways to fine-tune a LLaMA, as PNG bytes.

    Raises:
        KeyError: for a size that is not in `LLAMA_SHAPES`.

    >>> render_training_memory("13B", 16)[:4]
    b'\\x89PNG'
    """
    return figure_png(draw_training_memory(size, rank))


def memory_explorer() -> Explorer:
    """Size and rank against the memory of four methods."""
    return Explorer(
        render_training_memory,
        size=Dropdown(options=list(LLAMA_SHAPES), value="7B", description="LLaMA"),
        rank=SelectionSlider(options=RANKS, value=64, description="rank r"),
    )
