"""The explorer of chapter 6: model, card and method against the four moments of a step."""

import matplotlib.pyplot as plt
from ipywidgets import Dropdown, SelectionSlider
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from qlora_edu.course.explorers.core import Explorer
from qlora_edu.course.plots import PALE_ORANGE, PALETTE, figure_png, paint
from qlora_edu.memory import GIB, MODELS, RESERVE, MemoryPlan, plan_memory
from qlora_edu.planner.fake_step import METHODS

CARDS_GB = (8, 12, 16, 24, 40, 48, 80)
RANKS = (8, 64, 256)
LENGTHS = (128, 512, 2048, 8192)
BATCHES = (1, 4, 16)
ADAPTED = tuple(name for name in MODELS if name != "gpt2")  # its layers are no nn.Linear


def render_budget(
    model: str = "llama-7b",
    card: int = 24,
    method: str = "qlora",
    r: int = 64,
    max_length: int = 512,
    batch_size: int = 4,
) -> bytes:
    """Draw the memory of a training step, moment by moment, against a card.

    `r` is the bottleneck of Houlsby's adapters, and nothing for a full fine-tuning.
    """
    size = {"full": {}, "houlsby": {"bottleneck": r}}.get(method, {"r": r})
    plan = plan_memory(model, method, batch_size=batch_size, max_length=max_length, **size)
    return figure_png(draw_budget(plan, card))


def budget_explorer() -> Explorer:
    """Make the explorer of chapter 6; a model, method or rank takes a second at first."""
    return Explorer(
        render_budget,
        model=Dropdown(options=ADAPTED, value="llama-7b", description="model"),
        card=SelectionSlider(options=CARDS_GB, value=24, description="card (GB)"),
        method=Dropdown(options=METHODS, value="qlora", description="method"),
        r=SelectionSlider(options=RANKS, value=64, description="rank"),
        max_length=SelectionSlider(options=LENGTHS, value=512, description="max_length"),
        batch_size=SelectionSlider(options=BATCHES, value=4, description="batch_size"),
    )


ROW_STYLES = {
    "quantised weights": (PALETTE["quantized"], ""),
    "quantisation constants": ("#083D7F", ""),
    "linear weights": (PALETTE["base"], ""),
    "embeddings and head": ("#5F5F5F", ""),
    "norms and the rest": ("#5F5F5F", ""),
    "adapters": (PALETTE["adapter"], ""),
    "optimizer states": (PALE_ORANGE, "////"),
    "gradients": (PALETTE["gradient"], ""),
    "activations": ("#C4C4C4", ""),
    "logits and loss": (PALETTE["highlight"], ""),
    "dequantised weights": ("#8FBFE0", ""),
    "workspace": ("#B7A8D6", ""),
}
"""Colour and hatch of each row of a memory ledger."""


def row_style(row: str, method: str) -> dict[str, object]:
    """How to paint a row of the ledger; what is trained is orange, whatever it is."""
    if method == "full" and row in ("linear weights", "embeddings and head", "norms and the rest"):
        row = "adapters"
    return paint(*ROW_STYLES[row])


def draw_budget(plan: MemoryPlan, card_gib: float) -> Figure:
    """A training step's memory at each of its four moments, against the memory of a card."""
    figure, ax = plt.subplots(figsize=(10, 4))
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
    shown: dict[str, Rectangle] = {}
    for y, (moment, rows) in enumerate(plan.moments.items()):
        left, at_peak = 0.0, moment == plan.peak_moment
        for row in ROW_STYLES:
            width = rows.get(row, 0) / GIB
            if not width:
                continue
            style = row_style(row, plan.settings.method)
            ax.barh(y, width, left=left, height=0.62, **style)
            left += width
            if width > 0.002 * plan.peak_bytes / GIB:
                shown[row] = Rectangle((0, 0), 1, 1, **style)
        if at_peak:
            frame = {"facecolor": "none", "edgecolor": PALETTE["ink"], "linewidth": 1.6}
            ax.barh(y, left, height=0.74, zorder=4, **frame)
        text = f" {left:,.1f} GiB" + (", the peak" if at_peak else "")
        weight = "bold" if at_peak else "normal"
        ax.text(left + 0.004 * plan.peak_bytes / GIB, y, text, va="center", weight=weight, bbox=box)
    green = PALETTE["device"]
    ax.axvline(card_gib, color=green, linestyle="--")
    ax.axvspan(card_gib - RESERVE / GIB, card_gib, color=green, alpha=0.2, linewidth=0)
    side = "left" if card_gib < 0.7 * plan.peak_bytes / GIB else "right"
    label = f" {card_gib:g} GB card, with its reserve "
    ax.text(card_gib, -0.62, label, color=green, ha=side, va="center", fontsize=10, bbox=box)
    ax.set(yticks=range(len(plan.moments)), yticklabels=list(plan.moments))
    ax.set(ylim=(len(plan.moments) - 0.5, -0.9))
    ax.set(xlim=(0, max(1.26 * plan.peak_bytes / GIB, 1.03 * card_gib)))
    kind = {"full": "", "houlsby": f", bottleneck {plan.settings.bottleneck}"}
    kind = kind.get(plan.settings.method, f", r = {plan.settings.r}")
    rows_of = f"{plan.batch_size} row{'s' * (plan.batch_size > 1)} of {plan.max_length:,} tokens"
    ax.set_xlabel(f"GiB on the device; {rows_of}{kind}, {plan.optim}")
    ax.grid(False)
    names = [row for row in ROW_STYLES if row in shown]
    figure.legend(
        [shown[row] for row in names], names, loc="outside lower center", ncols=5, fontsize=9
    )
    ax.set_title(plan.sentence(card_gib), fontsize=11.5)
    return figure
