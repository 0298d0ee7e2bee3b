"""The exercises of notebook 3: count, predict, read, repair, choose and shrink block constants."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from qlora_edu.blockwise import BLOCKSIZES, split_blocks
from qlora_edu.codebooks import assign, lloyd_max_levels, nf4_levels
from qlora_edu.course.exercises.core import Case, Check, Mistake, OpenCheck
from qlora_edu.course.explorers.chapter_03 import (
    FLOAT32,
    block_sums,
    constants_round_trip,
    nf4_rms_error,
)
from qlora_edu.double_quant import NESTED_BLOCKSIZE, dynamic_map


def constant_bits(blocksize: int, nested_blocksize: int) -> float:
    """Count the bits that constants add to each weight after double quantisation.

    >>> constant_bits(64, 256)
    0.126953125
    """
    return 8 / blocksize + 32 / (blocksize * nested_blocksize)


ex_3_1 = Check(
    "3.1 bits of constants",
    reference=constant_bits,
    cases=lambda random: [
        {"blocksize": blocksize, "nested_blocksize": nested}
        for blocksize, nested in ((64, 256), (32, 256), (128, 64), (4096, 16))
    ],
    # Far below 32 / (4096 * 4096) bits, far above float64 rounding.
    atol=1e-9,
    mistakes=(
        Mistake(
            "bytes",
            lambda blocksize, nested_blocksize: constant_bits(blocksize, nested_blocksize) / 8,
            "that is in bytes; an 8-bit code has 8 bits, a float32 has 32",
        ),
        Mistake(
            "nested for each weight",
            lambda blocksize, nested_blocksize: 8 / blocksize + 32 / nested_blocksize,
            "a nested constant serves nested_blocksize *blocks*, each of blocksize weights: divide "
            "by both",
        ),
        Mistake(
            "nested forgotten",
            lambda blocksize, nested_blocksize: 8 / blocksize,
            "the 8-bit codes have constants too, one float32 for each nested block",
        ),
        Mistake(
            "float32 kept",
            lambda blocksize, nested_blocksize: (
                32 / blocksize + constant_bits(blocksize, nested_blocksize)
            ),
            "the float32 absmax are not kept: their 8-bit codes replace them",
        ),
        Mistake(
            "weight included",
            lambda blocksize, nested_blocksize: 4 + constant_bits(blocksize, nested_blocksize),
            "the 4 bits of the weight's own code are not constants",
        ),
        Mistake(
            "the paper's number",
            lambda blocksize, nested_blocksize: constant_bits(64, 256),
            "0.127 is for blocks of 64 and 256 only",
        ),
    ),
)


def spoiled(n: int, places: list[int], blocksize: int, double_quant: bool) -> int:
    """Count the weights that come back as NaN from bitsandbytes.

    >>> spoiled(4096, [5], 64, double_quant=False), spoiled(4096, [5], 64, double_quant=True)
    (64, 4096)
    """
    if double_quant:
        return n if places else 0
    return blocksize * len({place // blocksize for place in places})


def _nan_cases(random: torch.Generator) -> list[Case]:
    """One NaN, none, two in a block, two in different blocks; both ways; over 256 blocks."""
    n = 2**17
    place = int(torch.randint(n // 2, (1,), generator=random)) // 128 * 128
    return [
        {"n": n, "places": places, "blocksize": blocksize, "double_quant": double_quant}
        for places in ([place + 1], [], [place + 1, place + 3], [place, place + 50_000])
        for blocksize in (64, 128)
        for double_quant in (False, True)
    ]


ex_3_2 = Check(
    "3.2 how far does a NaN reach?",
    reference=spoiled,
    cases=_nan_cases,
    mistakes=(
        Mistake(
            "the NaN alone",
            lambda n, places, blocksize, double_quant: len(places),
            "the absmax of its block is NaN, and every weight of the block is multiplied by it",
        ),
        Mistake(
            "its block, always",
            lambda n, places, blocksize, double_quant: spoiled(n, places, blocksize, False),
            "with double quantisation the offset is a mean over *all* absmax: what is the mean of "
            "numbers of which one is NaN?",
        ),
        Mistake(
            "its nested block",
            lambda n, places, blocksize, double_quant: (
                spoiled(n, places, blocksize * NESTED_BLOCKSIZE, False)
                if double_quant
                else spoiled(n, places, blocksize, False)
            ),
            "the nested block would be spoiled by its nested absmax, but the offset, a mean over "
            "the whole tensor, reaches further",
        ),
        Mistake(
            "always the tensor",
            lambda n, places, blocksize, double_quant: n if places else 0,
            "without double quantisation blocks know nothing of each other",
        ),
        Mistake(
            "blocks counted twice",
            lambda n, places, blocksize, double_quant: (
                (n if places else 0) if double_quant else blocksize * len(places)
            ),
            "two NaN in one block spoil one block",
        ),
        Mistake(
            "the tensor, NaN or not",
            lambda n, places, blocksize, double_quant: (
                n if double_quant else spoiled(n, places, blocksize, False)
            ),
            "where there is no NaN nothing is spoiled",
        ),
    ),
)


def read_constants(
    codes: Tensor, nested_absmax: Tensor, offset: float | Tensor, table: Tensor
) -> Tensor:
    """Read the absmax of every block back from 8 bits: float32 `[blocks]`.

    >>> table = torch.tensor([-1.0, 0.0, 1.0])
    >>> codes = torch.tensor([0, 1, 2], dtype=torch.uint8)
    >>> read_constants(codes, torch.tensor([0.5]), 2.0, table)
    tensor([1.5000, 2.0000, 2.5000])
    """
    return table[codes.int()] * nested_absmax.repeat_interleave(256)[: len(codes)] + offset


def _stored_constants(random: torch.Generator) -> list[Case]:
    """Three nested blocks, the last one short; one block alone; full blocks."""
    return [
        {
            "codes": torch.randint(0, 256, (n,), generator=random).to(torch.uint8),
            "nested_absmax": 0.5 + torch.rand(-(-n // 256), generator=random),
            "offset": 2 + torch.rand((), generator=random).item(),
            "table": dynamic_map(),
        }
        for n in (600, 5, 1024)
    ]


def _spread(nested_absmax: Tensor, n: int) -> Tensor:
    return nested_absmax.repeat_interleave(256)[:n]


ex_3_3 = Check(
    "3.3 read the constants",
    reference=read_constants,
    cases=_stored_constants,
    # The order of two float32 operations may differ; a step of the table is 1000 times larger.
    atol=1e-5,
    mistakes=(
        Mistake(
            "no offset",
            lambda codes, nested_absmax, offset, table: read_constants(
                codes, nested_absmax, 0.0, table
            ),
            "the mean was subtracted before writing: add the offset",
        ),
        Mistake(
            "offset first",
            lambda codes, nested_absmax, offset, table: (
                (table[codes.int()] + offset) * _spread(nested_absmax, len(codes))
            ),
            "the offset is in the units of absmax: add it after the multiplication, not before",
        ),
        Mistake(
            "the first for all",
            lambda codes, nested_absmax, offset, table: (
                table[codes.int()] * nested_absmax[0] + offset
            ),
            "every 256 codes have a nested constant of their own",
        ),
        Mistake(
            "tiled",
            lambda codes, nested_absmax, offset, table: (
                table[codes.int()] * nested_absmax.repeat(256)[: len(codes)] + offset
            ),
            "256 codes *in a row* share a nested constant: c₀ c₀ … c₁ c₁ …, not c₀ c₁ c₂ c₀ c₁ …",
        ),
        Mistake(
            "codes for levels",
            lambda codes, nested_absmax, offset, table: (
                codes.float() * _spread(nested_absmax, len(codes)) + offset
            ),
            "a code is an index into the table, not a number to multiply with",
        ),
        Mistake(
            "an integer code",
            lambda codes, nested_absmax, offset, table: (
                (codes.float() - 128) / 128 * _spread(nested_absmax, len(codes)) + offset
            ),
            "that reads an even ruler, as torchao writes; here the table says what a code means",
        ),
    ),
)


def repaired_constants(absmax: Tensor, table: Tensor) -> Tensor:
    """Write absmax in 8 bits and read them back: float32 `[blocks]`."""
    offset = absmax.mean()
    blocks = split_blocks(absmax - offset, 256)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    codes = assign(blocks / largest, table)
    return (table[codes.int()] * largest).flatten()[: len(absmax)] + offset


def _broken_constants(
    absmax: Tensor,
    table: Tensor,
    padded_mean: bool = False,
    largest_only: bool = False,
    offset_lost: bool = False,
) -> Tensor:
    """The version of the notebook, each fault by itself."""
    if padded_mean:
        blocks = split_blocks(absmax, 256)
        offset = blocks.mean()
        blocks = blocks - offset
    else:
        offset = absmax.mean()
        blocks = split_blocks(absmax - offset, 256)
    magnitudes = blocks if largest_only else blocks.abs()
    largest = magnitudes.amax(dim=1, keepdim=True)
    codes = assign((blocks / largest).clamp(-1, 1), table)
    read_back = (table[codes.int()] * largest).flatten()[: len(absmax)]
    return read_back if offset_lost else read_back + offset


def _skewed_constants(random: torch.Generator) -> list[Case]:
    """Constants with a few small ones, so that the largest difference is negative."""
    cases = []
    for n in (512, 300, 700):
        absmax = 2.5 + 0.4 * torch.rand(n, generator=random)
        absmax[torch.randperm(n, generator=random)[: n // 20]] *= 0.3
        cases.append({"absmax": absmax, "table": dynamic_map()})
    return cases


ex_3_4 = Check(
    "3.4 repair the round trip",
    reference=repaired_constants,
    cases=_skewed_constants,
    # Dividing or multiplying by a reciprocal may differ in the last bit; a step is 0.01.
    atol=1e-4,
    mistakes=(
        Mistake(
            "offset lost",
            lambda absmax, table: _broken_constants(absmax, table, offset_lost=True),
            "the constants come back around zero: what was subtracted must be added again",
            lambda case, yours, expected: yours.mean().abs() < 0.5 * expected.mean(),
        ),
        Mistake(
            "the largest, not the largest magnitude",
            lambda absmax, table: _broken_constants(absmax, table, largest_only=True),
            "the smallest constants come back too large: after centring, the largest *magnitude* "
            "may be that of a negative number",
            lambda case, yours, expected: yours.min() > expected.min() + 0.1,
        ),
        Mistake(
            "padding in the mean",
            lambda absmax, table: _broken_constants(absmax, table, padded_mean=True),
            "wrong where the number of constants is no multiple of 256: the zeros that fill the "
            "last block were averaged and centred as if they were constants",
        ),
        Mistake(
            "a mean for each block",
            lambda absmax, table: torch.cat(
                [repaired_constants(part, table) for part in absmax.split(256)]
            ),
            "close, but the file has room for one offset: the mean over the whole tensor",
        ),
        Mistake(
            "not quantised",
            lambda absmax, table: absmax.clone(),
            "these are the constants as they were; they must pass through the table",
        ),
    ),
)


def _bits(blocksize: int, double_quant: bool) -> float:
    if double_quant:
        return 4 + constant_bits(blocksize, NESTED_BLOCKSIZE)
    return 4 + 32 / blocksize


def best_within(budget: float) -> tuple[int, bool]:
    """Choose block size and double quantisation: the least error within a budget of bits a weight.

    >>> best_within(4.5)
    (32, True)
    """
    choices = [
        (blocksize, double_quant)
        for blocksize in BLOCKSIZES
        for double_quant in (False, True)
        if _bits(blocksize, double_quant) <= budget
    ]
    return min(choices, key=lambda choice: nf4_rms_error(choice[0], 256 if choice[1] else FLOAT32))


def _first_fitting(
    budget: float,
    double_quants: tuple[bool, ...],
    bits: Callable[[int, bool], float] = _bits,
) -> tuple[int, bool]:
    for blocksize in BLOCKSIZES:
        for double_quant in double_quants:
            if bits(blocksize, double_quant) <= budget:
                return blocksize, double_quant
    return BLOCKSIZES[-1], True


ex_3_5 = Check(
    "3.5 spend a budget",
    reference=best_within,
    cases=lambda random: [
        {"budget": budget} for budget in (4.5, 4.126953125, 5.0, 4.1255, 4.25, 4.04, 4.02)
    ],
    mistakes=(
        Mistake(
            "always 64",
            lambda budget: (64, True),
            "64 and 256 are the paper's choice; another budget has another best",
        ),
        Mistake(
            "fewest bits",
            lambda budget: (4096, True),
            "that has the fewest bits; the question is the least error that the budget allows",
        ),
        Mistake(
            "float32 only",
            lambda budget: _first_fitting(budget, (False,)),
            "that is the best without double quantisation; with it, smaller blocks fit the budget",
        ),
        Mistake(
            "double always",
            lambda budget: _first_fitting(budget, (True,)),
            "where float32 constants fit at the smallest block size they are (slightly) better",
        ),
        Mistake(
            "nested constants forgotten",
            lambda budget: _first_fitting(
                budget, (False, True), lambda b, d: 4 + (8 if d else 32) / b
            ),
            "over budget: the nested constants cost 32 / (blocksize · 256) bits as well",
        ),
        Mistake(
            "budget not used up",
            lambda budget: _first_fitting(budget, (False, True), lambda b, d: _bits(b, d) + 1e-9),
            "a choice that costs exactly the budget is within it",
        ),
    ),
)


def five_bit_levels() -> Tensor:
    """Fit 32 levels to the scaled, centred constants of normal weights."""
    weights = torch.randn(2**14, 64, generator=torch.Generator().manual_seed(5))
    absmax = weights.abs().amax(dim=1)
    blocks = (absmax - absmax.mean()).reshape(-1, 256)
    return lloyd_max_levels(blocks / blocks.abs().amax(dim=1, keepdim=True), 32, pinned=())


@cache
def _rms_with_constants(table: tuple[float, ...] | None) -> float:
    """Root mean square error on two million normal weights; None is float32 constants."""
    absmax, levels_squared, levels_times_weights, weights_squared = block_sums(64)
    if table is not None:
        absmax = constants_round_trip(absmax, torch.tensor(table))
    squares = absmax.square() * levels_squared - 2 * absmax * levels_times_weights
    return (squares.double().sum().item() + weights_squared) ** 0.5


def rise(table: Tensor) -> float:
    """Relative growth of the weights' root mean square error when constants go through a table.

    >>> round(100 * rise(dynamic_map()), 2)
    0.03
    """
    return _rms_with_constants(tuple(table.float().tolist())) / _rms_with_constants(None) - 1


ex_3_6 = OpenCheck(
    "3.6 constants in five bits",
    reference=five_bit_levels,
    mistakes=(
        Mistake(
            "too many levels",
            dynamic_map,
            "five bits name 32 levels: return a 1-D tensor of at most 32",
            lambda case, levels, _: levels.dim() != 1 or not 2 <= len(levels) <= 32,
        ),
        Mistake(
            "not a table",
            lambda: torch.linspace(1, -1, 32),
            "the levels must ascend and lie in [-1, 1]",
            lambda case, levels, _: not (levels.diff() > 0).all() or not (levels.abs() <= 1).all(),
        ),
        Mistake(
            "an even ruler",
            lambda: torch.linspace(-1, 1, 32),
            "evenly spaced, 32 levels cost 0.8 %: most constants lie near the mean, so should the "
            "levels",
            lambda case, levels, _: (
                len(levels) > 2 and levels.diff().std() < 1e-3 and rise(levels) > 0.005
            ),
        ),
        Mistake(
            "levels for weights",
            nf4_levels,
            "the weights' root mean square error grows by 0.5 % or more over float32 constants",
            lambda case, levels, _: not rise(levels) < 0.005,
        ),
    ),
)
