"""Chapter 1: sixteen levels out of the normal distribution.

A 4-bit code can name sixteen numbers. A *codebook* says which: a table of levels between -1 and 1.
Quantising a number means writing down the index of the level nearest to it. Trained weights look
like draws from a normal distribution, so NF4 takes its levels from the quantiles of that.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_edu.errors import QuantizationError

LEVELS = ("nf4", "fp4", "int4", "fp4-e2m1", "fp4-e3m0", "af4")

MAGNITUDES = {  # the positive numbers of symmetric codebooks
    # Two's complement also has -8, but -8/7 lies outside [-1, 1], where no scaled weight falls.
    "int4": (1, 2, 3, 4, 5, 6, 7),
    # Two bits of exponent and one of mantissa: FP4 of the OCP Microscaling Formats (MX) v1.0.
    "fp4-e2m1": (0.5, 1, 1.5, 2, 3, 4, 6),
    # Three bits of exponent and no mantissa.
    "fp4-e3m0": (0.25, 0.5, 1, 2, 4, 8, 16),
}


def nf4_levels(bits: int = 4, offset: float = 0.9677083) -> Tensor:
    """Derive the NormalFloat levels from the quantiles of N(0, 1).

    Equally spaced probabilities run from `offset` down to one half: `2**(bits-1)` of them give the
    positive levels and one fewer, mirrored, the negative ones, with an exact zero between. Only in
    float32 are all entries of the published table exact. Returns ascending float32 `[2**bits]`.

    Source: QLoRA (arXiv 2305.14314) section 3; equals bitsandbytes `get_4bit_type("nf4")`.

    >>> nf4_levels()[[0, 7, 8, 15]].tolist()
    [-1.0, 0.0, 0.07958029955625534, 1.0]
    """
    if not (2 <= bits <= 8 and 0.5 < offset < 1):
        raise QuantizationError(f"bits: 2 to 8, offset: between 0.5 and 1; not {bits}, {offset}")
    half = 2 ** (bits - 1)
    # Whatever the default dtype and device are now: the table must not depend on them.
    factory_kwargs = {"dtype": torch.float32, "device": "cpu"}
    positive = normal_quantile(torch.linspace(offset, 0.5, half + 1, **factory_kwargs)[:-1])
    negative = -normal_quantile(torch.linspace(offset, 0.5, half, **factory_kwargs)[:-1])
    levels = torch.cat([negative, torch.zeros(1, **factory_kwargs), positive]).sort().values
    return levels / levels.max()


def normal_quantile(probability: Tensor) -> Tensor:
    """Find the number below which this share of N(0, 1) lies, in float64, rounded to float32."""
    return torch.special.ndtri(probability.double()).float()


def mirrored_levels(magnitudes: Sequence[float]) -> Tensor:
    """List ascending magnitudes, a zero and the negatives, divided by the largest: ascending.

    >>> mirrored_levels([1.0, 2.0])
    tensor([-1.0000, -0.5000,  0.0000,  0.5000,  1.0000])
    """
    positive = torch.tensor(magnitudes, dtype=torch.float32, device="cpu") / max(magnitudes)
    return torch.cat([-positive.flip(0), positive.new_zeros(1), positive])


def fp4_levels() -> Tensor:
    """List the FP4 table of bitsandbytes in the order of its codes, which is not ascending.

    It is E2M1 but for 0.0625 beside 12, where E2M1 has 1. Source: bitsandbytes `get_4bit_type`.
    """
    positive = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=torch.float32, device="cpu")
    return torch.cat([positive, -positive]) / 12


def af4_levels(blocksize: int = 64) -> Tensor:
    """Derive AbnormalFloat-4: the levels of least mean absolute error for blocks of this size.

    For least absolute error a level is the *median* of its cell. That is solved for 8 levels on
    (0, 1] and 7 on [-1, 0), the outermost pinned; a zero joins them. Returns float32 `[16]`.

    Source: Yoshida (arXiv 2306.06965); equals the published tables to 1e-6.

    >>> af4_levels()[[1, 8]]
    tensor([-0.6944,  0.0427])
    """
    if blocksize < 2:
        raise QuantizationError(f"blocksize must be at least 2, got {blocksize}")
    # The largest m of a block of half-normals has this density, up to a factor. Given m, what is
    # quantised is a normal of width 1/m, cut off at 1. The sum over m is the trapezoidal rule.
    m = torch.linspace(0, 10, 641, dtype=torch.float64, device="cpu")
    density = torch.erf(m / math.sqrt(2)) ** (blocksize - 2) * torch.exp(-(m**2) / 2)
    grid = torch.linspace(0, 1, 4097, dtype=torch.float64, device="cpu")
    cumulative = torch.erf(grid[:, None] * m / math.sqrt(2)) @ density
    negative, positive = (_cell_medians(n, grid.numpy(), cumulative.numpy()) for n in (7, 8))
    return torch.from_numpy(np.concatenate([-negative[::-1], [0.0], positive])).float()


def _cell_medians(n: int, grid: np.ndarray, cumulative: np.ndarray) -> np.ndarray:
    levels = np.arange(1, n + 1) / n
    for _ in range(2000):
        edges = np.concatenate([[0.0], (levels[:-1] + levels[1:]) / 2])
        mass = np.interp(edges, grid, cumulative)
        medians = np.interp((mass[:-1] + mass[1:]) / 2, cumulative, grid)
        step = np.abs(medians - levels[:-1]).max()
        levels[:-1] = medians
        if step < 1e-10:
            break
    return levels


def lloyd_max_levels(
    samples: Tensor, n_levels: int = 16, pinned: Sequence[float] = (-1.0, 0.0, 1.0)
) -> Tensor:
    """Fit levels of least mean *squared* error to samples: Lloyd's algorithm, in one dimension.

    Two steps alternate: cut the line at the midpoints between levels, then move each level, but for
    one on each pinned value, to the mean of its cell. Returns ascending float32 `[n_levels]`.

    Source: Lloyd (1982), "Least squares quantization in PCM"; Max (1960).

    >>> lloyd_max_levels(torch.tensor([-1.0, -0.8, 0.8, 1.0]), n_levels=2, pinned=())
    tensor([-0.9000,  0.9000])
    """
    ascending = samples.detach().flatten().double().sort().values
    if not (len(ascending) and ascending.isfinite().all() and n_levels >= max(2, len(pinned))):
        raise QuantizationError("samples must be finite, n_levels at least 2 and one for each pin")
    middles = (torch.arange(n_levels, device=ascending.device) * 2 + 1) * len(ascending)
    levels = ascending[middles // (2 * n_levels)]
    free = torch.ones_like(levels, dtype=torch.bool)
    for pin in pinned:
        nearest = (levels - pin).abs().masked_fill(~free, math.inf).argmin()
        levels[nearest], free[nearest] = pin, False
    levels, order = levels.sort()
    free = free[order]

    # With running sums over the sorted samples, the mean of a cell is a difference of two entries.
    sums = F.pad(ascending.cumsum(0), (1, 0))
    for _ in range(500):
        cuts = torch.searchsorted(ascending, (levels[:-1] + levels[1:]) / 2, right=True)
        edges = F.pad(F.pad(cuts, (1, 0)), (0, 1), value=len(ascending))
        counts = edges.diff()
        means = torch.where(counts > 0, sums[edges].diff() / counts, levels)
        step = torch.where(free, means - levels, 0.0)
        levels = levels + step
        if step.abs().max() < 1e-7:
            break
    return levels.float()


def get_levels(levels: str | Tensor, blocksize: int = 64) -> Tensor:
    """Look a codebook up by its name in `LEVELS`, or check one given as a tensor.

    Only "af4" depends on the block size. Returns float32 levels in the order of their codes.

    >>> get_levels("int4").shape
    torch.Size([15])
    """
    if isinstance(levels, Tensor):
        table = levels.detach().float().clone()  # a later change by the caller must not reach us
        right_shape = table.dim() == 1 and 2 <= len(table) <= 16
        if not (right_shape and levels.is_floating_point() and (table.abs() <= 1).all()):
            raise QuantizationError(
                f"levels must be a 1-D floating tensor of 2 to 16 numbers in [-1, 1], got {levels}"
            )
        return table
    if levels not in LEVELS:
        raise QuantizationError(f"unknown levels {levels!r}: give one of {LEVELS}, or a tensor")
    if levels in MAGNITUDES:
        return mirrored_levels(MAGNITUDES[levels])
    if levels == "af4":
        return af4_levels(blocksize)
    return nf4_levels() if levels == "nf4" else fp4_levels()


def assign(x: Tensor, levels: Tensor) -> Tensor:
    """Give each number the code of its nearest level; a tie goes to the lower level.

    The code is the number of midpoints between levels that are below x: a binary search. Returns
    uint8, in the shape of `x`.

    >>> assign(torch.tensor([-1.0, 0.5, 0.6, 1.0]), torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0, 1, 2, 2], dtype=torch.uint8)
    """
    ascending, order = levels.to(x.device).sort(stable=True)
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    ranks = torch.bucketize(x.float(), midpoints, out_int32=True)
    return order.to(torch.uint8)[ranks]


def level_usage(codes: Tensor, n_levels: int = 16) -> Tensor:
    """Measure the share of the codes that falls on each level: float64, shape `[n_levels]`.

    >>> level_usage(torch.tensor([0, 1, 1, 3], dtype=torch.uint8), 4)
    tensor([0.2500, 0.5000, 0.0000, 0.2500], dtype=torch.float64)
    """
    return torch.bincount(codes.flatten().long(), minlength=n_levels).double() / codes.numel()


def entropy_bits(usage: Tensor) -> float:
    """Compute the entropy of the shares, in bits: the information that one code carries.

    >>> entropy_bits(torch.tensor([0.25, 0.25, 0.5]))
    1.5
    """
    return torch.special.entr(usage.double()).sum().item() / math.log(2)


def affine_int4(weights: Tensor, blocksize: int) -> Tensor:
    """Round each block to 16 even steps from its smallest to its largest weight, and read back.

    Its two constants, the smallest weight and the step, take 16 bits each, together as many as an
    absmax. A block of equal weights has a step of 0 and comes back as NaN.

    >>> affine_int4(torch.tensor([-1.0, 0.1, 0.72, 2.75]), 4)
    tensor([-1.0000,  0.0000,  0.7500,  2.7500])
    """
    blocks = weights.reshape(-1, blocksize)
    low, high = blocks.amin(dim=1, keepdim=True), blocks.amax(dim=1, keepdim=True)
    low, step = low.half().float(), ((high - low) / 15).half().float()
    return (((blocks - low) / step).round().clamp(0, 15) * step + low).reshape(weights.shape)
