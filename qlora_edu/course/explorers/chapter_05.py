"""The explorer of chapter 5: how much of an update survives a merge, by its size and shape."""

from functools import cache

import matplotlib.pyplot as plt
import torch
from ipywidgets import Dropdown, SelectionSlider
from torch import Tensor

from qlora_edu.blockwise import BLOCKSIZES
from qlora_edu.course.explorers.core import Explorer
from qlora_edu.course.plots import PALETTE, figure_png, label_line
from qlora_edu.qlora import MERGE_TARGETS, merge_weight, surviving_share
from qlora_edu.quantized import QuantizedTensor, quantize

SIDE = 256
UPDATE_SIZES = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)
RANKS = (1, 4, 16, 64, 256)
MERGE_NAMES = dict(zip(MERGE_TARGETS, ("4 bits", "dequantised", "original"), strict=True))
MERGE_COLORS = {
    "4-bit": PALETTE["quantized"],
    "dequantized": PALETTE["highlight"],
    "original": PALETTE["base"],
}


@cache
def _layer(blocksize: int) -> tuple[Tensor, QuantizedTensor, Tensor]:
    """A normal weight [256, 256], in NF4 with double quantisation, and read back."""
    weight = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(55))
    quantized = quantize(weight, blocksize=blocksize)
    return weight, quantized, quantized.dequantize()


@cache
def _direction(r: int) -> Tensor:
    """A product B · A of normal matrices, scaled to a root mean square of 1."""
    generator = torch.Generator().manual_seed(r)
    update = torch.randn(SIDE, r, generator=generator)
    update = update @ torch.randn(r, SIDE, generator=generator)
    return update / update.square().mean().sqrt()


@cache
def merge_outcome(into: str, size: float, r: int = 16, blocksize: int = 64) -> tuple[float, float]:
    """Merge an update into a normal weight of standard deviation 1, and see what has become of it.

    Returns the share of the update that survives, and the distance (in rms) from the weight
    that was trained: the dequantised one plus the update. `size` is the update's root mean square.

    >>> share, distance = merge_outcome("4-bit", 0.01)
    >>> round(share, 1), round(distance, 2)
    (0.0, 0.01)
    """
    original, quantized, read_back = _layer(blocksize)
    update = size * _direction(r)
    merged = merge_weight(quantized, update, into, original).float()
    share = surviving_share(original if into == "original" else read_back, merged, update)
    return share, (merged - read_back - update).square().mean().sqrt().item()


def render_merge_survival(size: float = 0.03, r: int = 16, blocksize: int = 64) -> bytes:
    """Draw what survives each of three merges, and the error each leaves behind."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(2, 3))
    outcomes = {into: merge_outcome(into, size, r, blocksize) for into in MERGE_TARGETS}
    shares = [100 * share for share, _ in outcomes.values()]
    colors = [MERGE_COLORS[into] for into in MERGE_TARGETS]
    bars = left.bar([MERGE_NAMES[into] for into in MERGE_TARGETS], shares, color=colors, width=0.62)
    labels = [f"{100 * share:.3g} %\noff by {100 * off:.2g} %" for share, off in outcomes.values()]
    left.bar_label(bars, labels, padding=3, fontsize=10)
    left.set(ylim=(0, 125), yticks=range(0, 101, 25), ylabel="update that survives (%)")
    left.set_xlabel("merged into; off: distance from what\nwas trained, in % of the weight")

    sizes = [100 * one for one in UPDATE_SIZES]
    curves = [[100 * merge_outcome(into, one, r, blocksize)[0] for one in UPDATE_SIZES]
              for into in ("original", "4-bit")]  # fmt: skip
    right.plot(sizes, curves[0], color=PALETTE["highlight"], linewidth=5, alpha=0.5)
    right.plot(sizes, curves[0], color=PALETTE["base"])
    right.plot(sizes, curves[1], "o-", color=PALETTE["quantized"], markersize=4)
    ring = {"mfc": "none", "mec": PALETTE["ink"], "mew": 2, "markersize": 14}
    right.plot(100 * size, shares[0], "o", **ring)
    label_line(right, "into 16 bits, either base", 0.1, 107, PALETTE["base"], offset=(2, 0))
    label_line(right, "into 4 bits", 20, 60, PALETTE["quantized"], offset=(4, 0))
    right.set(xscale="log", ylim=(-5, 125), yticks=range(0, 101, 25))
    right.set_xlabel("size of the update (% of the weight, root mean square)")
    right.set_xticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    figure.suptitle(
        f"Update of {100 * size:g} %, rank {r}, blocks of {blocksize}: "
        f"merged into 4 bits, {shares[0]:.2g} % of it survives",
        x=0.01,
        ha="left",
    )
    return figure_png(figure)


def merge_explorer() -> Explorer:
    """Make the explorer of chapter 5: size and rank of the update, and the block size."""
    wide = {"description_width": "90px"}
    sizes = [(f"{100 * size:g} %", size) for size in UPDATE_SIZES]
    return Explorer(
        render_merge_survival,
        size=SelectionSlider(options=sizes, value=0.03, description="update size", style=wide),
        r=SelectionSlider(options=RANKS, value=16, description="rank", style=wide),
        blocksize=Dropdown(options=BLOCKSIZES, value=64, description="block size"),
    )
