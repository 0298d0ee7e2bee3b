"""The explorer of chapter 6: model, card and method against the four moments of a step."""

from ipywidgets import Dropdown, SelectionSlider

from qlora_edu.course.figures import draw_budget
from qlora_edu.course.plots import figure_png
from qlora_edu.course.widgets.core import Explorer
from qlora_edu.memory import MODELS, plan_memory
from qlora_edu.rehearsal import METHODS

CARDS_GB = (8, 12, 16, 24, 40, 48, 80)
RANKS = (8, 64, 256)
LENGTHS = (128, 512, 2048, 8192)
BATCHES = (1, 4, 16)
ADAPTED = tuple(name for name in MODELS if name != "gpt2")  # its layers are no nn.Linear


def render_budget(
    model: str = "llama-7b",
    card: int = 24,
    method: str = "qlora",
    rank: int = 64,
    length: int = 512,
    batch: int = 4,
) -> bytes:
    """Draw the memory of a training step, moment by moment, against a card.

    Args:
        model: one of `ADAPTED`.
        card: its memory in GB, as it is sold.
        method: one of `METHODS`.
        rank: of LoRA and QLoRA, or the bottleneck of Houlsby's adapters; full ones have none.
        length, batch: tokens of a row, and rows of a step.

    Raises:
        PlanError: for a model or a method that cannot be planned.

    >>> render_budget("qwen2.5-0.5b", card=8, method="full")[:4]
    b'\\x89PNG'
    """
    size = {"full": {}, "houlsby": {"bottleneck": rank}}.get(method, {"r": rank})
    plan = plan_memory(model, method, batch=batch, length=length, **size)
    return figure_png(draw_budget(plan, card))


def budget_explorer() -> Explorer:
    """Make the explorer of chapter 6; each model, method or rank takes a second at its first turn.

    >>> sorted(budget_explorer().controls)
    ['batch', 'card', 'length', 'method', 'model', 'rank']
    """
    return Explorer(
        render_budget,
        model=Dropdown(options=ADAPTED, value="llama-7b", description="model"),
        card=SelectionSlider(options=CARDS_GB, value=24, description="card (GB)"),
        method=Dropdown(options=METHODS, value="qlora", description="method"),
        rank=SelectionSlider(options=RANKS, value=64, description="rank"),
        length=SelectionSlider(options=LENGTHS, value=512, description="length"),
        batch=SelectionSlider(options=BATCHES, value=4, description="batch"),
    )
