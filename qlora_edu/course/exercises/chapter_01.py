"""The exercises of notebook 1: codes, ties, the offset, a broken table, and better ones."""

from functools import cache

import torch
from torch import Tensor

from qlora_edu.codebooks import (
    assign,
    get_levels,
    lloyd_max_levels,
    nf4_levels,
    normal_quantile,
)
from qlora_edu.course.exercises.core import Exercise, Inputs, Seen, same


def usage_for_blocks_of_one() -> list[float]:
    """Shares of NF4's sixteen levels when every weight is its own block."""
    return [0.5] + [0.0] * 14 + [0.5]


ex_1_1 = Exercise(
    "1.1 blocks of one",
    usage_for_blocks_of_one,
    # Shares read off a simulation are as good as exact ones.
    atol=0.02,
    because={
        "equal shares need weights spread over [-1, 1]; what is w / |w| for a single weight?": (
            lambda: [1 / 16] * 16
        ),
        "absmax is a magnitude: a negative weight divided by it gives -1, not +1": (
            lambda: [0.0] * 15 + [1.0]
        ),
        "these are percent; shares sum to 1": lambda: [50] + [0] * 14 + [50],
        "that is a bell, as blocks of many weights give; here each block holds one weight": Seen(
            lambda: [n / 64 for n in (1, 2, 3, 4, 5, 5, 6, 6, 6, 6, 5, 5, 4, 3, 2, 1)],
            lambda shares: max(shares[1:-1]) > max(shares[0], shares[-1]) > 0,
        ),
    },
)


def _numbers_and_ties(random: torch.Generator) -> Inputs:
    """Levels in 64ths, so that midpoints are exact, and numbers that include every midpoint."""
    for n_levels in (4, 16):
        levels = (torch.randperm(129, generator=random)[:n_levels].sort().values - 64) / 64
        yield torch.rand(5, generator=random) * 2 - 1, levels
        yield _midpoints(levels), levels
        yield torch.rand(3, 4, generator=random) * 2 - 1, levels


def _midpoints(levels):
    return (levels[:-1] + levels[1:]) / 2


def _below(x, levels):
    return torch.bucketize(x, levels, right=True) - 1


ex_1_2 = Exercise(
    "1.2 the nearest level",
    assign,
    _numbers_and_ties,
    because={
        "a number exactly on a midpoint goes to the lower level: count the midpoints strictly "
        "below it": lambda x, levels: torch.bucketize(x, _midpoints(levels), right=True),
        "that is the nearest level below, not the nearest: the frontiers are the midpoints": Seen(
            _below,
            lambda yours, expected, x, levels: same(
                yours.clamp(min=0), _below(x, levels).clamp(min=0)
            ),
        ),
        "codes start at 0: sixteen of them must fit in 4 bits": (
            lambda x, levels: torch.bucketize(x, _midpoints(levels)) + 1
        ),
        "these are the levels; the answer is their indices, the codes": (
            lambda x, levels: levels[torch.bucketize(x, _midpoints(levels))]
        ),
    },
)


def offset_for(bits: int) -> float:
    """Place the outermost probability between those of `2**bits` and `2**bits - 1` equal cells."""
    n = 2**bits
    return 1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2


ex_1_3 = Exercise(
    "1.3 an offset for any width",
    offset_for,
    [(bits,) for bits in (4, 3, 2, 5, 8)],
    # Float32 is good enough; the other widths tell a rule from the literal.
    atol=1e-7,
    because={
        "that is the middle of the last of 2**bits cells; average it with that of one cell fewer": (
            lambda bits: 1 - 1 / (2 * 2**bits)
        ),
        "that is the middle of the last of 2**bits - 1 cells; average it with that of one cell "
        "more": lambda bits: 1 - 1 / (2 * (2**bits - 1)),
        "that is where the last cell begins; its middle is half a cell further out": (
            lambda bits: 1 - (1 / 2**bits + 1 / (2**bits - 1)) / 2
        ),
        "one number is not a rule: 0.9677083 is 929/960 cut to seven digits, for 4 bits; with "
        "another number of bits there are other cells": lambda bits: 0.9677083,
    },
)


def repaired_levels(offset: float = 0.9677083) -> Tensor:
    """Build NF4 from the ascending probabilities that the broken version uses."""
    return _sixteen(_half(offset, 9), -_half(offset, 8), torch.zeros(1))


def _half(offset, n, first=1):
    return normal_quantile(torch.linspace(0.5, offset, n)[first:])


def _sixteen(*parts):
    levels = torch.cat(parts).sort().values
    return levels / levels.max()


def _zeros(levels):
    return int((levels == 0).sum()) if levels.shape == (16,) else 1


def _mirrored(levels):
    """Whether all seven negative levels are positive ones with a minus."""
    negative, positive = levels[levels < 0], levels[levels > 0]
    gaps = (negative[:, None] + positive).abs().amin(dim=1)
    return len(negative) == 7 and len(positive) == 8 and bool((gaps < 1e-4).all())


ex_1_4 = Exercise(
    "1.4 repair the table",
    repaired_levels,
    [(0.9677083,), (0.95,), (0.99,)],
    # The last bits depend on the order of the steps, as the notebook shows; that is not the point.
    atol=1e-6,
    because={
        "two of the sixteen codes stand for zero; each half must stop short of 0.5, and one zero "
        "is added": Seen(
            lambda offset: _sixteen(_half(offset, 8, first=0), -_half(offset, 8, first=0)),
            lambda levels: _zeros(levels) > 1,
        ),
        "no level is exactly zero: a zero weight would come back as something else": Seen(
            lambda offset: _sixteen(_half(offset, 9), -_half(offset, 9)),
            lambda levels: _zeros(levels) == 0,
        ),
        "the outermost level is not 1: the absmax of a block could not be kept; divide by the "
        "largest level": Seen(
            lambda offset: nf4_levels(4, offset) * normal_quantile(torch.tensor(offset)),
            lambda levels: levels.shape == (16,) and abs(levels.max() - 1) > 1e-3,
        ),
        "that has 8 negative and 7 positive levels; NF4 has 7 negative and 8 positive": Seen(
            lambda offset: -nf4_levels(4, offset).flip(0),
            lambda levels: (levels < 0).sum() == 8 and (levels > 0).sum() == 7,
        ),
        "the seven negative levels have probabilities of their own, from linspace(0.5, offset, 8); "
        "they are not eight positive ones without one": Seen(
            lambda offset: _sixteen(_half(offset, 9), -_half(offset, 9)[1:], torch.zeros(1)),
            _mirrored,
        ),
    },
)


def round_trip(weights: Tensor, levels: Tensor, blocksize: int) -> Tensor:
    """Quantise in blocks and come back; the same shape, a multiple of `blocksize` numbers."""
    blocks = weights.reshape(-1, blocksize)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    return (levels[assign(blocks / absmax, levels).int()] * absmax).reshape(weights.shape)


def best_table(weights: Tensor, blocksize: int, tables: dict[str, Tensor]) -> str:
    """Name the table of least mean absolute error on these weights."""
    return _least(weights, blocksize, tables, lambda x, back: (back - x).abs().mean())


def _least(weights, blocksize, tables, measure):
    """Name the table of the least measure of blocks `[n, blocksize]` and what came back of them."""
    blocks = weights.reshape(-1, blocksize)
    measured = {n: measure(blocks, round_trip(blocks, t, blocksize)) for n, t in tables.items()}
    return min(measured, key=measured.get)


def _scaled_error(blocks, back):
    return ((back - blocks) / blocks.abs().amax(dim=1, keepdim=True)).abs().mean()


@cache
def _tables(blocksize):
    return {name: get_levels(name, blocksize) for name in ("nf4", "int4", "af4", "fp4-e3m0")}


def _jobs(random: torch.Generator) -> Inputs:
    """Weights for which each of the four tables wins, by 2.5 % or more.

    Of the heavy weights another table wins at another block size. In the last job half of the
    blocks are quiet and normal, half loud and uniform: errors in scaled blocks tell another winner.
    """
    n = 2**15
    normal, heavy, quiet = torch.randn(3, n, generator=random)
    heavy = heavy / torch.randn(3, n, generator=random).square().mean(dim=0).sqrt()
    uniform = torch.rand(n, generator=random) * 2 - 1
    mixed = torch.cat([0.05 * quiet[: n // 2], uniform[: n // 2]])
    nameless = {"first": get_levels("nf4"), "second": get_levels("int4")}
    jobs = ((normal, 64), (uniform, 64), (normal, 4096), (heavy, 4096), (heavy, 64))
    return [*((x, size, _tables(size)) for x, size in jobs), (mixed, 64, nameless)]


ex_1_5 = Exercise(
    "1.5 which table for which job?",
    best_table,
    _jobs,
    because={
        "NF4 is not always best: it depends on the distribution and on the block size; measure": (
            lambda weights, blocksize, tables: "nf4"
        ),
        "that is the least mean *squared* error; the least mean absolute error is another table's "
        "in one of the jobs": lambda weights, blocksize, tables: _least(
            weights, blocksize, tables, lambda x, back: (back - x).square().mean()
        ),
        "compare with the weights in their own units: level × absmax": (
            lambda weights, blocksize, tables: _least(weights, blocksize, tables, _scaled_error)
        ),
        "that is one absmax for all weights; each block of `blocksize` weights has its own": (
            lambda weights, blocksize, tables: best_table(weights, len(weights), tables)
        ),
    },
)


@cache
def _fresh_blocks():
    """Half a million normal weights, in blocks of 64, which no reader has seen."""
    return torch.randn(8192, 64, generator=torch.Generator().manual_seed(1772))


def _against_nf4(levels):
    """Root mean square error on fresh weights, as a change against NF4's."""

    def error(table):
        return (round_trip(_fresh_blocks(), table, 64) - _fresh_blocks()).square().mean().sqrt()

    return (error(levels.float()) / error(nf4_levels()) - 1).item()


def better_levels() -> Tensor:
    """Fit levels to scaled blocks by Lloyd's algorithm, with -1, 0 and 1 kept."""
    return _fitted(pinned=(-1.0, 0.0, 1.0))


def _fitted(pinned):
    weights = torch.randn(8192, 64, generator=torch.Generator().manual_seed(4))
    return lloyd_max_levels(weights / weights.abs().amax(dim=1, keepdim=True), pinned=pinned)


ex_1_6 = Exercise(
    "1.6 beat NF4",
    better_levels,
    open=True,
    score=lambda levels: f"{_against_nf4(levels):+.2%} root mean square error against NF4",
    because={
        "4 bits name sixteen levels: return a 1-D tensor of 16 different numbers in [-1, 1], "
        "ascending": Seen(
            lambda: torch.linspace(-1, 1, 17),
            lambda x: x.shape != (16,) or (x.diff() <= 0).any() or (x.abs() > 1).any(),
        ),
        "0 is not among the levels: a zero weight must come back as zero": Seen(
            lambda: _fitted(pinned=()), lambda levels: not (levels == 0).any()
        ),
        "-1 and 1 are not both among the levels: the absmax of a block would not survive": Seen(
            lambda: _fitted(pinned=(0.0,)), lambda levels: levels[0] != -1 or levels[-1] != 1
        ),
        "on fresh normal weights in blocks of 64 its root mean square error is not at least 1 % "
        "below NF4's": Seen(nf4_levels, lambda levels: _against_nf4(levels) > -0.01),
    },
)

EXERCISES = (ex_1_1, ex_1_2, ex_1_3, ex_1_4, ex_1_5, ex_1_6)
