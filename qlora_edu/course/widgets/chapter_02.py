"""The explorer of chapter 2: block size, outlier strength and format against the error map."""

from functools import cache

import matplotlib.pyplot as plt
import torch
from ipywidgets import Dropdown, SelectionSlider
from torch import Tensor

from qlora_edu.blockwise import BLOCKSIZES, read_back
from qlora_edu.codebooks import affine_int4, get_levels
from qlora_edu.course.plots import PALETTE, figure_png
from qlora_edu.course.widgets.core import Explorer

SIDE = 64  # the largest block, 4096, is then the whole matrix
OUTLIER = (27, 21)  # row and column
STRENGTHS = (1, 3, 10, 30, 100, 300, 1000)
FORMATS = {
    "NF4": "nf4",
    "FP4 E2M1": "fp4-e2m1",
    "FP4 E3M0": "fp4-e3m0",
    "AF4": "af4",
    "INT4": "int4",
    "affine INT4": None,  # two constants a block, and no table
}


@cache
def _normal_matrix() -> Tensor:
    return torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(64))


def matrix_with_outlier(strength: float) -> Tensor:
    """Draw 64 × 64 normal weights, one of which is `strength` standard deviations large.

    >>> matrix_with_outlier(300.0)[OUTLIER].item()
    300.0
    """
    weight = _normal_matrix().clone()
    weight[OUTLIER] = float(strength)
    return weight


@cache
def _levels(name: str, blocksize: int) -> Tensor:
    return get_levels(name, blocksize)


def read_back_as(weight: Tensor, blocksize: int, format: str) -> Tensor:
    """Quantise a matrix in one of `FORMATS` and read it back.

    Raises:
        KeyError: for a format that is not in `FORMATS`.

    >>> read_back_as(torch.eye(8), 64, "INT4").equal(torch.eye(8))
    True
    """
    table = FORMATS[format]
    if table is None:
        return affine_int4(weight, blocksize)
    return read_back(weight, _levels(table, blocksize), blocksize)


def render_outlier_map(blocksize: int = 64, strength: float = 100, format: str = "NF4") -> bytes:
    """Draw where in a matrix with one outlier the error sits, and how it is distributed.

    Args:
        blocksize: weights a block, one of `BLOCKSIZES`.
        strength: size of the one outlier, in standard deviations of the other weights.
        format: one of `FORMATS`.

    >>> render_outlier_map(blocksize=4096, strength=1000)[:4]
    b'\\x89PNG'
    """
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
    """Make the explorer of chapter 2: block size, outlier and format move the error map.

    >>> sorted(outlier_explorer().controls)
    ['blocksize', 'format', 'strength']
    """
    return Explorer(
        render_outlier_map,
        blocksize=SelectionSlider(options=BLOCKSIZES, value=64, description="block size"),
        strength=SelectionSlider(options=STRENGTHS, value=100, description="outlier (σ)"),
        format=Dropdown(options=list(FORMATS), description="format"),
    )
