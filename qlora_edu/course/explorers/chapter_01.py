"""The explorer of chapter 1: bits, offset and distribution move NF4's bins."""

from functools import cache

import matplotlib.pyplot as plt
import torch
from ipywidgets import Dropdown, IntSlider, SelectionSlider
from torch import Tensor

from qlora_edu.codebooks import assign, entropy_bits, level_usage, nf4_levels
from qlora_edu.course.explorers.core import Explorer
from qlora_edu.course.plots import PALETTE, figure_png

OFFSETS = (
    0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96,
    0.9677083, 0.975, 0.98, 0.985, 0.99, 0.995, 0.999, 0.9999,
)  # fmt: skip
BLOCKSIZE = 64
DRAWS = {
    "normal": torch.randn,
    # Four degrees of freedom: tails as heavy as those of layers with outliers.
    "Student t": lambda *shape, generator: (
        torch.randn(*shape, generator=generator)
        / torch.randn(4, *shape, generator=generator).square().mean(dim=0).sqrt()
    ),
    "uniform": lambda *shape, generator: torch.rand(*shape, generator=generator) * 2 - 1,
    "Laplace": lambda *shape, generator: (
        torch.rand(*shape, generator=generator).log()
        - torch.rand(*shape, generator=generator).log()
    ),
}


@cache
def scaled_weights(distribution: str, blocks: int = 32768) -> Tensor:
    """Draw weights from one of `DRAWS` and divide each block of 64 by its absmax, as NF4 does."""
    draw = DRAWS[distribution]
    weights = draw(blocks, BLOCKSIZE, generator=torch.Generator().manual_seed(64))
    return weights / weights.abs().amax(dim=1, keepdim=True)


def render_nf4_bins(
    bits: int = 4, offset: float = 0.9677083, distribution: str = "normal"
) -> bytes:
    """Draw NormalFloat's levels and bins under the density of scaled weights, and their use."""
    scaled, levels = scaled_weights(distribution), nf4_levels(bits, offset)
    usage = level_usage(assign(scaled, levels), len(levels))
    edges = torch.cat([levels[:1], (levels[:-1] + levels[1:]) / 2, levels[-1:]])
    # The largest of each block lies on -1 or 1 exactly: a spike, which a density cannot show.
    inside = scaled[scaled.abs() < 1]
    heights = torch.histc(inside, 60, -1, 1) / scaled.numel() * 30
    heights = (heights + heights.flip(0)) / 2  # every distribution here is symmetric
    centres = (torch.arange(60) + 0.5) / 30 - 1

    figure, (top, bottom) = plt.subplots(
        2, sharex=True, figsize=(9, 5.4), height_ratios=(3, 2), gridspec_kw={"hspace": 0.08}
    )
    top.fill_between(centres, heights, color=PALETTE["base"], alpha=0.3, linewidth=0)
    top.plot(centres, heights, color=PALETTE["base"])
    top.vlines(edges[1:-1], 0, heights.max() * 1.08, color="#BBBBBB", linewidth=0.8)
    top.vlines(levels, 0, heights.max() * 0.12, color=PALETTE["quantized"], linewidth=3)
    top.set(ylabel="density", yticks=[], xlim=(-1.02, 1.02), ylim=(0, None))
    top.set_title(
        f"{distribution} weights, {bits} bits, offset {offset:.7g}: levels hold "
        f"{usage.min():.1%} to {usage.max():.1%},\nentropy {entropy_bits(usage):.3f} of {bits} bits"
    )
    bottom.bar(
        edges[:-1], 100 * usage, edges.diff(), align="edge", color=PALETTE["quantized"], ec="white"
    )
    bottom.axhline(100 / len(levels), color=PALETTE["highlight"], linestyle="--")
    room = 130 * usage.max().item()
    note = f"dashed: equal use, {100 / len(levels):.3g} %"
    bottom.text(1, 0.98 * room, note, va="top", ha="right", color=PALETTE["highlight"])
    bottom.set(ylabel="use (% of weights)", ylim=(0, room))
    bottom.set_xlabel(f"weight / absmax of its block of {BLOCKSIZE}")
    return figure_png(figure)


def nf4_explorer() -> Explorer:
    """Make the explorer of chapter 1: bits, offset and distribution move the bins."""
    return Explorer(
        render_nf4_bins,
        bits=IntSlider(4, min=2, max=6, description="bits"),
        offset=SelectionSlider(options=OFFSETS, value=0.9677083, description="offset"),
        distribution=Dropdown(options=list(DRAWS), description="weights"),
    )
