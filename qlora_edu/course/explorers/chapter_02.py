"""The explorer of chapter 2: block size, outlier strength and format against the error map."""

from functools import cache

import matplotlib.pyplot as plt
import torch
from ipywidgets import Dropdown, SelectionSlider
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from qlora_edu.blockwise import BLOCKSIZES, block_absmax, pack_nibbles, read_back, split_blocks
from qlora_edu.codebooks import affine_int4, assign, get_levels
from qlora_edu.course.explorers.core import Explorer
from qlora_edu.course.plots import PALE_BLUE, PALE_GREY, PALETTE, figure_png
from qlora_edu.quantized import check_blocksize

SIDE = 64  # the largest block, 4096, is then the whole matrix
OUTLIER = (27, 21)  # row and column
STRENGTHS = (1, 3, 10, 30, 100, 300, 1000)
FORMATS = {
    "NF4": "nf4",
    "FP4 E2M1": "fp4-e2m1",
    "FP4 E3M0": "fp4-e3m0",
    "AF4": "af4",
    "INT4": "int4",
    "affine INT4": None,  # two constants per block, and no table
}


@cache
def _normal_matrix() -> Tensor:
    return torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(64))


def matrix_with_outlier(strength: float) -> Tensor:
    """Draw 64 × 64 normal weights, one of which is `strength` standard deviations large."""
    weight = _normal_matrix().clone()
    weight[OUTLIER] = float(strength)
    return weight


@cache
def _levels(name: str, blocksize: int) -> Tensor:
    return get_levels(name, blocksize)


def read_back_as(weight: Tensor, blocksize: int, format: str) -> Tensor:
    """Quantise a matrix in one of `FORMATS` and read it back.

    >>> read_back_as(torch.eye(8), 64, "INT4").equal(torch.eye(8))
    True
    """
    check_blocksize(blocksize)
    table = FORMATS[format]
    if table is None:
        return affine_int4(weight, blocksize)
    return read_back(weight, _levels(table, blocksize), blocksize)


def render_outlier_map(blocksize: int = 64, strength: float = 100, format: str = "NF4") -> bytes:
    """Draw where in a matrix with one outlier the error sits, and how it is distributed."""
    weight = matrix_with_outlier(strength)
    error = read_back_as(weight, blocksize, format) - weight
    others = torch.ones_like(weight, dtype=torch.bool)
    others[OUTLIER] = False
    flat = OUTLIER[0] * SIDE + OUTLIER[1]
    hurt = torch.zeros(SIDE * SIDE, dtype=torch.bool)
    hurt[flat // blocksize * blocksize : (flat // blocksize + 1) * blocksize] = True
    hurt = hurt.view(SIDE, SIDE) & others

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), width_ratios=(5, 6))
    picture = left.imshow(error.abs(), vmin=0, vmax=2)
    left.plot(*reversed(OUTLIER), "o", mfc="none", mec=PALETTE["highlight"], mew=2, markersize=13)
    left.set(xticks=[], yticks=[], xlabel="64 × 64 weights; circle: the outlier")
    left.grid(False)
    figure.colorbar(picture, ax=left, label="absolute error (σ)", shrink=0.85, extend="max")

    bins = torch.linspace(-3, 3, 61)
    clipped = error.clamp(-2.99, 2.99)
    for where, color in ((others & ~hurt, PALETTE["quantized"]), (hurt, PALETTE["highlight"])):
        if where.any():
            right.hist(clipped[where], bins, color=color, alpha=0.75, log=True)
    right.set(xlim=(-3, 3), ylim=(0.7, 3000), ylabel="weights (logarithmic)")
    right.set_xlabel("error (σ); what is beyond ±3 is drawn at the ends")
    notes = {
        f"the outlier's block: {int(hurt.sum())} others": PALETTE["highlight"],
        f"all other blocks: {int((others & ~hurt).sum())}": PALETTE["quantized"],
    }
    for line, (note, color) in enumerate(notes.items()):
        right.text(0.02, 0.97 - 0.07 * line, note, color=color, transform=right.transAxes, va="top")
    bits = 4 + 32 / blocksize
    figure.suptitle(
        f"{format}, blocks of {blocksize} ({bits:.3f} bits), outlier {strength:g} σ: "
        f"mean error of the other weights {error[others].abs().mean():.3f} σ",
        x=0.01,
        ha="left",
    )
    return figure_png(figure)


def outlier_explorer() -> Explorer:
    """Make the explorer of chapter 2: block size, outlier and format move the error map."""
    return Explorer(
        render_outlier_map,
        blocksize=SelectionSlider(options=BLOCKSIZES, value=64, description="block size"),
        strength=SelectionSlider(options=STRENGTHS, value=100, description="outlier (σ)"),
        format=Dropdown(options=list(FORMATS), description="format"),
    )


def draw_blocks_and_bytes(weight: Tensor, levels: Tensor, blocksize: int) -> Figure:
    """A small matrix on its way to bytes: laid flat, cut into blocks, scaled, coded, packed.

    `weight` has at most sixteen numbers, an even number of them; `blocksize` may be any number.
    """
    rows, columns = weight.shape
    n = weight.numel()
    blocks = split_blocks(weight, blocksize)
    absmax = block_absmax(weight, blocksize)
    scaled = (blocks / absmax[:, None]).view(-1)[:n]
    codes = assign(scaled, levels)
    grey, blue, pink = PALETTE["base"], PALETTE["quantized"], PALETTE["highlight"]
    largest = int(weight.flatten().abs().argmax())

    figure, ax = plt.subplots(figsize=(10, 5.4))
    ax.set(xlim=(-1.9, n + 0.1), ylim=(-7.9, rows + 0.2))
    ax.axis("off")

    def cell(x: float, y: float, text: str, face: str, color: str, width: float = 1.0) -> None:
        ax.add_patch(Rectangle((x, y), width, 0.8, facecolor=face, edgecolor="white", lw=1.5))
        style = {"color": color, "fontsize": 9, "weight": "bold" if color == pink else "normal"}
        ax.text(x + width / 2, y + 0.39, text, ha="center", va="center", **style)

    def name(y: float, text: str, color: str) -> None:
        ax.text(-0.2, y + 0.39, text, ha="right", va="center", fontsize=10, color=color)

    # The matrix stands in the middle, so that the eye goes down from it.
    left = (n - columns) / 2
    for i in range(n):
        row, column = divmod(i, columns)
        ink = pink if i == largest else PALETTE["ink"]
        number = f"{weight.flatten()[i]:+.3f}"
        cell(left + column, rows - 0.9 - row, number, PALE_GREY, ink)
        cell(i, -1.6, number, PALE_GREY, ink)
        cell(i, -4.2, f"{scaled[i]:+.2f}", PALE_BLUE, ink)
        cell(i, -5.5, str(int(codes[i])), blue, "white")
    name(rows - 0.9 - (rows - 1) / 2, "W", grey)
    name(-1.6, "laid flat", grey)
    for block, largest_here in enumerate(absmax.tolist()):
        start, end = block * blocksize, min((block + 1) * blocksize, n)
        ax.add_patch(
            Rectangle((start, -2.62), end - start - 0.08, 0.62, facecolor="none", edgecolor=blue)
        )
        text = f"block {block}: c = {largest_here:.3f}"
        ax.text((start + end) / 2, -2.31, text, ha="center", va="center", fontsize=9.5, color=blue)
        if block:
            ax.plot([start - 0.04] * 2, [-5.6, -0.6], color=blue, linewidth=1.4, linestyle="--")
    name(-2.7, "absmax", blue)
    name(-4.2, "w / c", blue)
    name(-5.5, "codes", blue)
    for i, value in enumerate(pack_nibbles(codes).flatten().tolist()):
        cell(2 * i, -6.9, f"0x{value:02X}", blue, "white", width=2.0)
    name(-6.9, "bytes", blue)
    ax.text(
        0, -7.6, f"{n} weights: {n // 2} bytes of codes, {4 * len(absmax)} bytes of constants",
        color=blue, fontsize=10, va="center",
    )  # fmt: skip
    ax.set_title("From a matrix to bytes: blocks run on from row to row, two codes share a byte")
    return figure
