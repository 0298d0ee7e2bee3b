"""The exercises of notebook 1: codes, ties, the offset, a broken table, and better ones."""

from functools import cache

import torch
from torch import Tensor

from qlora_edu.codebooks import (
    assign,
    entropy_bits,
    get_levels,
    level_usage,
    lloyd_max_levels,
    nf4_levels,
    normal_quantile,
)
from qlora_edu.course.exercises.core import Case, Check, Mistake, OpenCheck


def usage_for_blocks_of_one() -> list[float]:
    """Shares of NF4's sixteen levels when every weight is its own block."""
    return [0.5] + [0.0] * 14 + [0.5]


ex_1_1 = Check(
    "1.1 blocks of one",
    reference=usage_for_blocks_of_one,
    # Shares read off a simulation are as good as exact ones.
    atol=0.02,
    mistakes=(
        Mistake(
            "equal shares",
            lambda: [1 / 16] * 16,
            "equal shares need weights spread over [-1, 1]; what is w / |w| for a single weight?",
        ),
        Mistake(
            "sign forgotten",
            lambda: [0.0] * 15 + [1.0],
            "absmax is a magnitude: a negative weight divided by it gives -1, not +1",
        ),
        Mistake(
            "all at zero",
            lambda: [0.0] * 7 + [1.0] + [0.0] * 8,
            "level 7 is the exact zero; a weight divided by its own magnitude is never 0",
        ),
        Mistake(
            "a bell",
            lambda: [n / 64 for n in (1, 2, 3, 4, 5, 5, 6, 6, 6, 6, 5, 5, 4, 3, 2, 1)],
            "that is a bell, as blocks of many weights give; here each block holds one weight",
            lambda case, yours, expected: max(yours[1:-1]) > max(yours[0], yours[-1]) > 0,
        ),
    ),
)


def _numbers_and_ties(random: torch.Generator) -> list[Case]:
    """Levels in 64ths, so that midpoints are exact, and numbers that include every midpoint."""
    cases = []
    for n_levels in (4, 16):
        levels = (torch.randperm(129, generator=random)[:n_levels].sort().values - 64) / 64
        ties = (levels[:-1] + levels[1:]) / 2
        cases.append({"x": torch.rand(5, generator=random) * 2 - 1, "levels": levels})
        cases.append({"x": ties, "levels": levels})
        cases.append({"x": torch.rand(3, 4, generator=random) * 2 - 1, "levels": levels})
    return cases


def _midpoints(levels: Tensor) -> Tensor:
    return (levels[:-1] + levels[1:]) / 2


def _even_grid(x: Tensor, levels: Tensor) -> Tensor:
    return ((x + 1) / 2 * (len(levels) - 1)).round()


ex_1_2 = Check(
    "1.2 the nearest level",
    reference=assign,
    cases=_numbers_and_ties,
    mistakes=(
        Mistake(
            "ties up",
            lambda x, levels: torch.bucketize(x, _midpoints(levels), right=True),
            "a number exactly on a midpoint goes to the lower level: count the midpoints "
            "strictly below it",
        ),
        Mistake(
            "the level below",
            lambda x, levels: (torch.bucketize(x, levels, right=True) - 1).clamp(min=0),
            "that is the nearest level below, not the nearest: the frontiers are the midpoints",
        ),
        Mistake(
            "codes from one",
            lambda x, levels: torch.bucketize(x, _midpoints(levels)) + 1,
            "codes start at 0: sixteen of them must fit in 4 bits",
        ),
        Mistake(
            "levels for codes",
            lambda x, levels: levels[torch.bucketize(x, _midpoints(levels))],
            "these are the levels; the answer is their indices, the codes",
        ),
        Mistake(
            "an even grid",
            _even_grid,
            "that is right for evenly spaced levels only; these are not",
        ),
    ),
)


def offset_for(bits: int) -> float:
    """Place the outermost probability between those of `2**bits` and `2**bits - 1` equal cells.

    >>> round(offset_for(4), 12) == round(929 / 960, 12)
    True
    """
    n = 2**bits
    return 1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2


ex_1_3 = Check(
    "1.3 an offset for any width",
    reference=offset_for,
    cases=lambda random: [{"bits": bits} for bits in (4, 3, 2, 5, 8)],
    # Far below the last digit of 0.9677083, far above float64 rounding.
    atol=1e-9,
    mistakes=(
        Mistake(
            "even count only",
            lambda bits: 1 - 1 / (2 * 2**bits),
            "that is the middle of the last of 2**bits cells; average it with that of one cell "
            "fewer",
        ),
        Mistake(
            "odd count only",
            lambda bits: 1 - 1 / (2 * (2**bits - 1)),
            "that is the middle of the last of 2**bits - 1 cells; average it with that of one "
            "cell more",
        ),
        Mistake(
            "whole cells",
            lambda bits: 1 - (1 / 2**bits + 1 / (2**bits - 1)) / 2,
            "that is where the last cell begins; its middle is half a cell further out",
        ),
        Mistake(
            "the literal",
            lambda bits: 0.9677083,
            "a float32 accident is not a rule: with another number of bits there are other cells, "
            "and even at 4 bits 0.9677083 is 929/960 cut to seven digits",
        ),
        Mistake(
            "the tail",
            lambda bits: 1 - offset_for(bits),
            "that is the probability beyond the outermost level; the offset is the one below it",
        ),
        Mistake(
            "the equation's fraction",
            lambda bits: 2**bits / (2**bits + 1),
            "16/17 is the outermost finite edge of equation 4; NF4 does not use it",
        ),
    ),
)


def repaired_levels(offset: float = 0.9677083) -> Tensor:
    """Build NF4 from the ascending probabilities that the broken version uses."""
    positive = normal_quantile(torch.linspace(0.5, offset, 9)[1:])
    negative = -normal_quantile(torch.linspace(0.5, offset, 8)[1:])
    levels = torch.cat([negative, torch.zeros(1), positive]).sort().values
    return levels / levels.max()


def _broken_levels(offset: float = 0.9677083) -> Tensor:
    positive = normal_quantile(torch.linspace(0.5, offset, 8))
    return torch.cat([-positive, positive]).sort().values


def _two_zeros(offset: float = 0.9677083) -> Tensor:
    return _broken_levels(offset) / _broken_levels(offset).max()


def _not_scaled(offset: float = 0.9677083) -> Tensor:
    return nf4_levels(4, offset) * normal_quantile(torch.tensor(offset))


def _no_zero(offset: float = 0.9677083) -> Tensor:
    positive = normal_quantile(torch.linspace(0.5, offset, 9)[1:])
    return torch.cat([-positive, positive]).sort().values / positive.max()


ex_1_4 = Check(
    "1.4 repair the table",
    reference=repaired_levels,
    cases=lambda random: [{"offset": offset} for offset in (0.9677083, 0.95, 0.99)],
    # The last bits depend on the order of the steps, as the notebook shows; that is not the point.
    atol=1e-6,
    mistakes=(
        Mistake(
            "two zeros",
            _two_zeros,
            "two of the sixteen codes stand for zero; each half must stop short of 0.5, and one "
            "zero is added",
            lambda case, yours, expected: int((torch.as_tensor(yours) == 0).sum()) > 1,
        ),
        Mistake(
            "no zero",
            _no_zero,
            "no level is exactly zero: a zero weight would come back as something else",
            lambda case, yours, expected: not (torch.as_tensor(yours) == 0).any(),
        ),
        Mistake(
            "not scaled",
            _not_scaled,
            "the outermost level is not 1: the absmax of a block could not be kept; divide by the "
            "largest level",
            lambda case, yours, expected: abs(max(yours) - 1) > 1e-3,
        ),
        Mistake(
            "mirrored",
            lambda offset=0.9677083: -nf4_levels(4, offset).flip(0),
            "that has 8 negative and 7 positive levels; NF4 has 7 negative and 8 positive",
        ),
    ),
)


def round_trip(weights: Tensor, levels: Tensor, blocksize: int) -> Tensor:
    """Quantise in blocks and come back; the same shape, a multiple of `blocksize` numbers."""
    blocks = weights.reshape(-1, blocksize)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    return (levels[assign(blocks / absmax, levels).int()] * absmax).reshape(weights.shape)


def best_table(weights: Tensor, blocksize: int, tables: dict[str, Tensor]) -> str:
    """Name the table of least mean absolute error on these weights."""
    errors = {
        name: (round_trip(weights, levels, blocksize) - weights).abs().mean()
        for name, levels in tables.items()
    }
    return min(errors, key=errors.get)


def _worst_table(weights: Tensor, blocksize: int, tables: dict[str, Tensor]) -> str:
    errors = {
        name: (round_trip(weights, levels, blocksize) - weights).abs().mean()
        for name, levels in tables.items()
    }
    return max(errors, key=errors.get)


def _least_squares(weights: Tensor, blocksize: int, tables: dict[str, Tensor]) -> str:
    errors = {
        name: (round_trip(weights, levels, blocksize) - weights).square().mean()
        for name, levels in tables.items()
    }
    return min(errors, key=errors.get)


def _not_scaled_back(weights: Tensor, blocksize: int, tables: dict[str, Tensor]) -> str:
    absmax = weights.reshape(-1, blocksize).abs().amax(dim=1, keepdim=True)
    errors = {
        name: (round_trip(weights, levels, blocksize).reshape(-1, blocksize) / absmax)
        .sub(weights.reshape(-1, blocksize))
        .abs()
        .mean()
        for name, levels in tables.items()
    }
    return min(errors, key=errors.get)


def _most_even(weights: Tensor, blocksize: int, tables: dict[str, Tensor]) -> str:
    blocks = weights.reshape(-1, blocksize)
    scaled = blocks / blocks.abs().amax(dim=1, keepdim=True)
    entropies = {
        name: entropy_bits(level_usage(assign(scaled, levels))) for name, levels in tables.items()
    }
    return max(entropies, key=entropies.get)


@cache
def _tables(blocksize: int) -> dict[str, Tensor]:
    return {name: get_levels(name, blocksize) for name in ("nf4", "int4", "af4", "fp4-e3m0")}


def _four_jobs(random: torch.Generator) -> list[Case]:
    """Weights for which each of the four tables wins once, by 3 % or more."""
    n = 2**15
    normal = torch.randn(n, generator=random)
    uniform = torch.rand(n, generator=random) * 2 - 1
    heavy = torch.randn(n, generator=random)
    heavy = heavy / torch.randn(3, n, generator=random).square().mean(dim=0).sqrt()
    jobs = ((normal, 64), (uniform, 64), (normal, 4096), (heavy, 4096))
    return [
        {"weights": weights, "blocksize": blocksize, "tables": _tables(blocksize)}
        for weights, blocksize in jobs
    ]


ex_1_5 = Check(
    "1.5 which table for which job?",
    reference=best_table,
    cases=_four_jobs,
    mistakes=(
        Mistake(
            "always nf4",
            lambda weights, blocksize, tables: "nf4",
            "NF4 is not always best: it depends on the distribution and on the block size; measure",
        ),
        Mistake(
            "largest error",
            _worst_table,
            "that is the table of the *largest* error",
        ),
        Mistake(
            "squares",
            _least_squares,
            "that is the least mean *squared* error; the least mean absolute error is another "
            "table's in one of the jobs",
        ),
        Mistake(
            "not scaled back",
            _not_scaled_back,
            "compare with the weights in their own units: level × absmax",
        ),
        Mistake(
            "most even use",
            _most_even,
            "that is the table of the largest entropy; levels used evenly are not levels of the "
            "smallest error",
        ),
    ),
)


@cache
def _fresh_blocks() -> Tensor:
    """Half a million normal weights, in blocks of 64, which no reader has seen."""
    return torch.randn(8192, 64, generator=torch.Generator().manual_seed(1772))


def _rms_error(levels: Tensor, weights: Tensor) -> float:
    return (round_trip(weights, levels, 64) - weights).square().mean().sqrt().item()


def better_levels() -> Tensor:
    """Fit levels to scaled blocks by Lloyd's algorithm, with -1, 0 and 1 kept."""
    weights = torch.randn(8192, 64, generator=torch.Generator().manual_seed(4))
    return lloyd_max_levels(weights / weights.abs().amax(dim=1, keepdim=True))


def _unpinned() -> Tensor:
    weights = torch.randn(2048, 64, generator=torch.Generator().manual_seed(4))
    return lloyd_max_levels(weights / weights.abs().amax(dim=1, keepdim=True), pinned=())


def _no_ends() -> Tensor:
    weights = torch.randn(2048, 64, generator=torch.Generator().manual_seed(4))
    return lloyd_max_levels(weights / weights.abs().amax(dim=1, keepdim=True), pinned=(0.0,))


ex_1_6 = OpenCheck(
    "1.6 beat NF4",
    reference=better_levels,
    mistakes=(
        Mistake(
            "too many levels",
            lambda: torch.linspace(-1, 1, 17),
            "4 bits name sixteen levels: return a 1-D tensor of 16 different numbers in [-1, 1], "
            "ascending",
            lambda case, levels, _: (
                levels.shape != (16,) or (levels.diff() <= 0).any() or (levels.abs() > 1).any()
            ),
        ),
        Mistake(
            "no exact zero",
            _unpinned,
            "0 is not among the levels: a zero weight must come back as zero",
            lambda case, levels, _: not (levels == 0).any(),
        ),
        Mistake(
            "no ends",
            _no_ends,
            "-1 and 1 are not both among the levels: the absmax of a block would not survive",
            lambda case, levels, _: levels[0] != -1 or levels[-1] != 1,
        ),
        Mistake(
            "not better",
            nf4_levels,
            "on fresh normal weights in blocks of 64 its root mean square error is not at least "
            "1 % below NF4's",
            lambda case, levels, _: (
                _rms_error(levels.float(), _fresh_blocks())
                > 0.99 * _rms_error(nf4_levels(), _fresh_blocks())
            ),
        ),
    ),
)
