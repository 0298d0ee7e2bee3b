"""Chapter 1: sixteen levels out of the normal distribution.

A 4-bit code can name sixteen numbers. A *codebook* says which: it is a table of levels between -1
and 1, and quantising a number means writing down the index of the level nearest to it. Trained
weights look like draws from a normal distribution, so NF4 takes its levels from the quantiles of
that distribution: where weights are dense the levels are dense. This module derives NF4, builds its
rivals, and assigns numbers to levels.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_edu.errors import QuantizationError

LEVELS = ("nf4", "fp4", "int4", "fp4-e2m1", "fp4-e3m0", "af4")


def nf4_levels(bits: int = 4, offset: float = 0.9677083) -> Tensor:
    """Derive the NormalFloat levels from the quantiles of N(0, 1).

    Equally spaced probabilities run from `offset` down to one half: `2**(bits-1)` of them give the
    positive levels and one fewer, mirrored, the negative ones; with an exact zero between them that
    makes `2**bits`. The largest becomes 1. The steps are in float32 but for the normal quantile, in
    float64: only so does the published table come out exact in all sixteen entries.

    Args:
        bits: width of a code, 2 to 8.
        offset: the outermost probability, in (0.5, 1). The default belongs to NF4.

    Returns ascending levels, float32, shape `[2**bits]`.

    Source: QLoRA (arXiv 2305.14314) section 3; equals the table of bitsandbytes,
    `get_4bit_type("nf4")`.

    >>> nf4_levels()[[0, 7, 8, 15]].tolist()
    [-1.0, 0.0, 0.07958029955625534, 1.0]
    """
    if not 2 <= bits <= 8:
        raise QuantizationError(f"bits must be 2 to 8, got {bits}")
    if not 0.5 < offset < 1:
        raise QuantizationError(f"offset is a probability between 0.5 and 1, got {offset}")
    half = 2 ** (bits - 1)
    # Whatever the default dtype and device are now: the table must not depend on them.
    kind = {"dtype": torch.float32, "device": "cpu"}
    positive = normal_quantile(torch.linspace(offset, 0.5, half + 1, **kind)[:-1])
    negative = -normal_quantile(torch.linspace(offset, 0.5, half, **kind)[:-1])
    levels = torch.cat([negative, torch.zeros(1, **kind), positive]).sort().values
    return levels / levels.max()


def normal_quantile(probability: Tensor) -> Tensor:
    """Invert the normal distribution function in float64 and round to float32.

    Source: equals `scipy.stats.norm.ppf`, without needing scipy.

    >>> normal_quantile(torch.tensor([0.5, 0.975]))
    tensor([0.0000, 1.9600])
    """
    return torch.special.ndtri(probability.double()).float()


def equation_4_levels(bits: int = 4) -> Tensor:
    """Compute the paper's equation 4 exactly as it is printed; it is *not* the NF4 table.

    `q_i = (Q(i / (2**bits + 1)) + Q((i + 1) / (2**bits + 1))) / 2`, for every i that keeps both
    arguments in [0, 1], where Q is the normal quantile function. The ends are infinite, and the
    values are symmetric, so they cannot be NF4's.

    Returns ascending values, float32, shape `[2**bits + 1]`, not normalised.

    Source: QLoRA (arXiv 2305.14314) equation 4.

    >>> equation_4_levels()[[0, 8, 16]]
    tensor([-inf, 0., inf])
    """
    edges = normal_quantile(torch.arange(2**bits + 2, dtype=torch.float64) / (2**bits + 1))
    return (edges[:-1] + edges[1:]) / 2


def int4_levels() -> Tensor:
    """List the symmetric 4-bit integers -7 to 7, divided by 7.

    Two's complement has a sixteenth code, -8, but its level -8/7 lies outside [-1, 1], where no
    scaled weight falls: a symmetric quantiser leaves it unused. Shape `[15]`, float32, ascending.

    >>> int4_levels()[[0, 7, 14]]
    tensor([-1., 0., 1.])
    """
    return torch.arange(-7, 8, dtype=torch.float32) / 7


def fp4_e2m1_levels() -> Tensor:
    """List 4-bit floats with two exponent bits and one mantissa bit, divided by the largest, 6.

    One of the sixteen codes is a second zero (-0), so fifteen levels remain. Shape `[15]`, float32,
    ascending. Source: OCP Microscaling Formats (MX) v1.0, FP4.

    >>> (fp4_e2m1_levels() * 6)[7:].tolist()
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    return _mirror([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def fp4_e3m0_levels() -> Tensor:
    """List 4-bit floats with three exponent bits and no mantissa: the powers of two, over 16.

    Fifteen levels, as in `fp4_e2m1_levels`. Shape `[15]`, float32, ascending.

    >>> (fp4_e3m0_levels() * 16)[7:].tolist()
    [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    """
    return _mirror([0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0])


def _mirror(positive: list[float]) -> Tensor:
    magnitudes = torch.tensor(positive, dtype=torch.float32) / max(positive)
    return torch.cat([-magnitudes.flip(0), magnitudes.new_zeros(1), magnitudes])


def fp4_levels() -> Tensor:
    """List the FP4 table of bitsandbytes in the order of its codes, which is not ascending.

    It is E2M1 but for the subnormal, which is 0.0625 beside 12 and not 1: 0.0052 after scaling
    where `fp4_e2m1_levels` has 0.0833. Codes 0 and 8 are both zero. Shape `[16]`, float32.

    Source: equals bitsandbytes `get_4bit_type("fp4")`.

    >>> fp4_levels()[3]
    tensor(1.)
    """
    magnitudes = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
    levels = torch.tensor(magnitudes + [-magnitude for magnitude in magnitudes])
    return levels.float() / 12


def af4_levels(blocksize: int = 64) -> Tensor:
    """Derive AbnormalFloat-4: the levels of least mean absolute error, one half line at a time.

    What is quantised is not normal but a normal divided by the absmax of its block, so the best
    levels depend on the block size. For least absolute error a level is the *median* of its cell.
    AF4 solves that for 8 positive levels on (0, 1] and, apart, for 7 negative ones on [-1, 0), the
    outermost pinned at 1 and -1. The exact zero joins afterwards, and is in neither solution.

    Returns ascending levels, float32, shape `[16]`.

    Source: Yoshida (arXiv 2306.06965); equals the published tables to 1e-6.

    >>> af4_levels()[[1, 8]]
    tensor([-0.6944,  0.0427])
    """
    if blocksize < 2:
        raise QuantizationError(f"blocksize must be at least 2, got {blocksize}")
    grid = torch.linspace(0, 1, 4097, dtype=torch.float64)
    cumulative = _share_below(grid, blocksize)
    negative = -_cell_medians(7, grid, cumulative).flip(0)
    positive = _cell_medians(8, grid, cumulative)
    return torch.cat([negative, positive.new_zeros(1), positive]).float()


def _share_below(x: Tensor, blocksize: int) -> Tensor:
    """Compute P(0 < X < x) up to a factor, X being a normal over the absmax m of its block.

    Given m, X is a normal of width 1/m cut off at -1 and 1; m is the largest of `blocksize`
    half-normals. The sum over m is the trapezoidal rule, very exact for a smooth bell.
    """
    m = torch.linspace(0, 10, 641, dtype=torch.float64)
    inside = torch.erf(m / math.sqrt(2))
    density = inside ** (blocksize - 2) * torch.exp(-(m**2) / 2)
    return torch.erf(x[:, None] * m / math.sqrt(2)) @ density


def _cell_medians(n: int, grid: Tensor, cumulative: Tensor) -> Tensor:
    """Move n levels on (0, 1], the last pinned at 1, to the medians of their cells."""
    levels = torch.arange(1, n + 1, dtype=torch.float64) / n
    for _ in range(2000):
        edges = torch.cat([levels.new_zeros(1), (levels[:-1] + levels[1:]) / 2])
        mass = _interpolate(edges, grid, cumulative)
        medians = _interpolate((mass[:-1] + mass[1:]) / 2, cumulative, grid)
        step = (medians - levels[:-1]).abs().max()
        levels[:-1] = medians
        if step < 1e-10:
            break
    return levels


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Read a piecewise linear function; the knots ascend."""
    right = torch.searchsorted(knots, x).clamp(1, len(knots) - 1)
    share = (x - knots[right - 1]) / (knots[right] - knots[right - 1])
    return torch.lerp(values[right - 1], values[right], share)


def lloyd_max_levels(
    samples: Tensor,
    n_levels: int = 16,
    pinned: Sequence[float] = (-1.0, 0.0, 1.0),
    iterations: int = 500,
) -> Tensor:
    """Fit levels of least mean *squared* error to samples: Lloyd's algorithm, in one dimension.

    Two steps alternate: cut the line at the midpoints between levels, then move each level to the
    mean of its cell. Starting from quantiles, the level nearest to each pinned value stays on it.

    Args:
        samples: numbers to represent, any shape; scale weights by their block's absmax first.
        n_levels: how many levels, at least 2.
        pinned: levels to keep, such as an exact zero; may be empty.
        iterations: the most to make; fewer if the levels settle.

    Returns ascending levels, float32, shape `[n_levels]`.

    Raises:
        QuantizationError: no samples, non-finite samples, or more pins than levels.

    Source: Lloyd (1982), "Least squares quantization in PCM"; Max (1960).

    >>> lloyd_max_levels(torch.tensor([-1.0, -0.8, 0.8, 1.0]), n_levels=2, pinned=())
    tensor([-0.9000,  0.9000])
    """
    ascending = samples.detach().flatten().double().sort().values
    if not len(ascending) or not ascending.isfinite().all():
        raise QuantizationError("samples must be finite and at least one")
    if n_levels < max(2, len(pinned)):
        raise QuantizationError(f"{n_levels} level(s) cannot hold {len(pinned)} pinned ones")
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
    for _ in range(iterations):
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
    """Look a codebook up by name, or check one given as a tensor.

    Args:
        levels: one of `LEVELS`, or a 1-D floating tensor of 2 to 16 finite levels in [-1, 1].
        blocksize: of the blocks to be quantised; only "af4" depends on it.

    Returns the levels in the order of their codes, float32, 1-D. Raises `QuantizationError`.

    >>> get_levels("int4").shape
    torch.Size([15])
    """
    if isinstance(levels, Tensor):
        return _checked(levels)
    builders = {
        "nf4": nf4_levels,
        "fp4": fp4_levels,
        "int4": int4_levels,
        "fp4-e2m1": fp4_e2m1_levels,
        "fp4-e3m0": fp4_e3m0_levels,
        "af4": lambda: af4_levels(blocksize),
    }
    if not isinstance(levels, str) or levels not in builders:
        raise QuantizationError(
            f"unknown levels {levels!r}: name one of {', '.join(LEVELS)}, or pass a tensor"
        )
    return builders[levels]()


def _checked(levels: Tensor) -> Tensor:
    if levels.dim() != 1 or not 2 <= levels.numel() <= 16 or not levels.is_floating_point():
        raise QuantizationError(
            "levels must be a 1-D floating tensor of 2 to 16 entries, got "
            f"shape {tuple(levels.shape)}, {levels.dtype}"
        )
    levels = levels.detach().float().clone()  # a later change by the caller must not reach us
    if not (levels.abs() <= 1).all():
        raise QuantizationError(f"levels must be finite and lie in [-1, 1], got {levels.tolist()}")
    return levels


def assign(x: Tensor, levels: Tensor) -> Tensor:
    """Give each number the code of its nearest level; a tie goes to the lower level.

    The frontier between two neighbouring levels is their midpoint, so the code is the number of
    midpoints strictly below x. That needs a binary search, and no table of distances.

    Returns uint8, in the shape of `x`; the order of `levels` is the order of the codes.

    >>> assign(torch.tensor([-1.0, 0.5, 0.6, 1.0]), torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0, 1, 2, 2], dtype=torch.uint8)
    """
    ascending, order = levels.to(x.device).sort(stable=True)
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    ranks = torch.bucketize(x.float(), midpoints, out_int32=True)
    return order.to(torch.uint8)[ranks]


def level_usage(codes: Tensor, n_levels: int = 16) -> Tensor:
    """Measure the share of the codes that falls on each level.

    Returns shares that sum to 1, float64, shape `[n_levels]`.

    >>> level_usage(torch.tensor([0, 1, 1, 3], dtype=torch.uint8), 4)
    tensor([0.2500, 0.5000, 0.0000, 0.2500], dtype=torch.float64)
    """
    counts = torch.bincount(codes.flatten().long(), minlength=n_levels)
    return counts.double() / codes.numel()


def entropy_bits(usage: Tensor) -> float:
    """Compute the entropy of the shares, in bits: the information that one code carries.

    >>> entropy_bits(torch.tensor([0.25, 0.25, 0.5]))
    1.5
    """
    return torch.special.entr(usage.double()).sum().item() / math.log(2)


def affine_int4(weights: Tensor, blocksize: int) -> Tensor:
    """Round each block to 16 even steps from its smallest to its largest weight, and read back.

    The rival of one constant per block: two constants, the smallest weight and the step, kept in 16
    bits each, so that a block costs the same 32 bits. The range fits a block that is not symmetric.
    A block whose weights are all equal has a step of 0 and comes back as NaN.

    >>> affine_int4(torch.tensor([-1.0, 0.1, 0.72, 2.75]), 4)
    tensor([-1.0000,  0.0000,  0.7500,  2.7500])
    """
    blocks = weights.reshape(-1, blocksize)
    low, high = blocks.amin(dim=1, keepdim=True), blocks.amax(dim=1, keepdim=True)
    low, step = low.half().float(), ((high - low) / 15).half().float()
    return (((blocks - low) / step).round().clamp(0, 15) * step + low).reshape(weights.shape)
