"""The explorer of chapter 4: how much of a change a low rank keeps, and what α does to it."""

from functools import cache

import matplotlib.pyplot as plt
import torch
from ipywidgets import FloatSlider, IntSlider, SelectionSlider
from matplotlib.axes import Axes
from torch import Tensor

from qlora_edu.course.explorers.core import Explorer
from qlora_edu.course.plots import PALETTE, figure_png
from qlora_edu.lora import energy_kept, low_rank_factors

SIZE = 64
SIGNAL = (10.0, 8.0, 6.5, 5.5, 4.5, 3.5)  # singular values of what there is to learn
ALPHAS = (1, 2, 4, 8, 16, 32, 64)
_TOP = 1.5  # end of the axis of errors


@cache
def synthetic_update(noise: float) -> tuple[Tensor, Tensor]:
    """Make a change `[64, 64]`, six directions and noise, and the six directions alone: float64.

    >>> wanted, signal = synthetic_update(0.0)
    >>> torch.equal(wanted, signal), int(torch.linalg.matrix_rank(signal))
    (True, 6)
    """
    generator = torch.Generator().manual_seed(64)
    left, right, entries = torch.randn(3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    U, V = (torch.linalg.qr(square)[0][:, : len(SIGNAL)] for square in (left, right))
    signal = (U * torch.tensor(SIGNAL, dtype=torch.float64)) @ V.T
    return signal + noise * entries, signal


def low_rank_errors(noise: float, r: int, scaling: float = 1.0) -> tuple[float, float]:
    """Relative error of `scaling · B · A` against the change, and against its signal.

    >>> [round(error, 6) for error in low_rank_errors(0.0, r=6)]
    [0.0, 0.0]
    """
    wanted, signal = synthetic_update(noise)
    B, A = low_rank_factors(wanted, r)
    applied = scaling * B @ A
    return tuple(((applied - aim).norm() / aim.norm()).item() for aim in (wanted, signal))


def _draw_directions(ax: Axes, noise: float, r: int, scaling: float) -> None:
    sizes = torch.linalg.svdvals(synthetic_update(noise)[0]).tolist()
    colors = [PALETTE["adapter" if i < r else "base"] for i in range(SIZE)]
    ax.bar(range(1, SIZE + 1), sizes, color=colors, width=0.8)
    applied = [scaling * size for size in sizes[:r]]
    top = 1.25 * sizes[0]
    shown = [(i, size) for i, size in enumerate(applied, start=1) if size <= top]
    if scaling != 1 and shown:
        ax.plot(*zip(*shown, strict=True), "_", color=PALETTE["highlight"], mew=2, markersize=8)
    words = f"pink: as applied, times α/r = {scaling:.3g}" if scaling != 1 else "α/r = 1"
    if len(shown) < r:
        words += f"\n({r - len(shown)} above the axis)"
    ax.text(SIZE, 0.97 * top, words, ha="right", va="top", color=PALETTE["highlight"])
    ax.text(SIZE, 0.80 * top, "kept", ha="right", color=PALETTE["adapter"])
    ax.text(SIZE, 0.73 * top, "dropped", ha="right", color=PALETTE["base"])
    ax.set(xlabel="direction", ylabel="singular value of ΔW", ylim=(0, top), xlim=(0, SIZE + 1))
    kept = energy_kept(torch.tensor(sizes))[r - 1].item()
    ax.set_title(f"{r} of {SIZE} directions hold {kept:.1%} of the energy", fontsize=11)


def _draw_errors(ax: Axes, noise: float, r: int, scaling: float) -> None:
    ranks = range(1, 33)
    of_change, of_signal = zip(*(low_rank_errors(noise, r) for r in ranks), strict=True)
    ax.plot(ranks, of_change, color=PALETTE["ink"])
    ax.plot(ranks, of_signal, color=PALETTE["ink"], linestyle="--")
    ax.text(32, 1.28, "dashed: against the signal alone", ha="right", color=PALETTE["ink"])
    ax.text(32, 1.38, "solid: against ΔW, at α = r", ha="right", color=PALETTE["ink"])
    for error in low_rank_errors(noise, r, scaling):
        inside = error <= _TOP - 0.06
        mark = {"marker": "o", "mfc": "none"} if inside else {"marker": "^"}
        ax.plot(
            r, min(error, _TOP - 0.06), color=PALETTE["highlight"], mew=2.5, markersize=13, **mark
        )
    numbers = r * (SIZE + SIZE)
    ax.set_title(f"r(in + out) = {numbers:,} numbers for {SIZE * SIZE:,}", fontsize=11)
    ax.set(xlabel="rank r", ylabel="relative error", xlim=(0, 33), ylim=(0, _TOP))


def render_low_rank(r: int = 8, lora_alpha: float = 8, noise: float = 0.15) -> bytes:
    """Draw a change of weights by its directions, and what `α/r · B · A` of a given rank misses.

    `B` and `A` are the best of their rank for `α = r`. Another `α` applies them too strongly or too
    weakly, as when an adapter is loaded with an `α` it was not trained with.
    """
    noise = round(noise, 3)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(3, 2))
    _draw_directions(left, noise, r, lora_alpha / r)
    _draw_errors(right, noise, r, lora_alpha / r)
    error, _ = low_rank_errors(noise, r, lora_alpha / r)
    figure.suptitle(f"r = {r}, α = {lora_alpha:g}: relative error {error:.3g}", x=0.01, ha="left")
    return figure_png(figure)


def lora_explorer() -> Explorer:
    """Make the explorer of chapter 4: rank, α, and the noise in the change that is wanted."""
    return Explorer(
        render_low_rank,
        r=IntSlider(8, min=1, max=32, description="rank r"),
        lora_alpha=SelectionSlider(options=ALPHAS, value=8, description="α"),
        noise=FloatSlider(0.15, min=0, max=0.3, step=0.05, description="noise"),
    )
