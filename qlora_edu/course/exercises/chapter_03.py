"""The exercises of notebook 3: count, predict, read, repair, choose and shrink block constants."""

from functools import cache

import torch
from torch import Tensor

from qlora_edu.blockwise import BLOCKSIZES, split_blocks
from qlora_edu.codebooks import assign, lloyd_max_levels, nf4_levels
from qlora_edu.course.exercises.core import Exercise, Inputs, Seen, faults_left
from qlora_edu.double_quant import NESTED_BLOCKSIZE, dynamic_map


def constant_bits(blocksize: int, nested_blocksize: int) -> float:
    """Count the bits that constants add to each weight after double quantisation."""
    return 8 / blocksize + 32 / (blocksize * nested_blocksize)


ex_3_1 = Exercise(
    "3.1 bits of constants",
    constant_bits,
    [(64, 256), (32, 256), (128, 64), (4096, 16)],
    # Far below 32 / (4096 * 4096) bits, far above float64 rounding.
    atol=1e-9,
    because={
        "that is in bytes; an 8-bit code has 8 bits, a float32 has 32": (
            lambda size, nested: constant_bits(size, nested) / 8
        ),
        "a nested constant serves nested_blocksize *blocks*, each of blocksize weights: divide by "
        "both": lambda size, nested: 8 / size + 32 / nested,
        "the 8-bit codes have constants too, one float32 for each nested block": (
            lambda size, nested: 8 / size
        ),
        "the float32 absmax are not kept: their 8-bit codes replace them": (
            lambda size, nested: 32 / size + constant_bits(size, nested)
        ),
    },
)


def spoiled(n: int, places: list[int], blocksize: int, double_quant: bool) -> int:
    """Count the weights that come back as NaN from bitsandbytes."""
    if double_quant:
        return n if places else 0
    return blocksize * len({place // blocksize for place in places})


def _places_of_nan(random: torch.Generator) -> Inputs:
    """One NaN, none, two in a block, two in different blocks; both ways; over 256 blocks."""
    place = int(torch.randint(2**16, (1,), generator=random)) // 128 * 128
    return [
        (n, places, blocksize, double_quant)
        for places in ([place + 1], [], [place + 1, place + 3], [place, place + 50_000])
        for n, blocksize in ((2**17, 64), (2**18, 128))
        for double_quant in (False, True)
    ]


ex_3_2 = Exercise(
    "3.2 how far does a NaN reach?",
    spoiled,
    _places_of_nan,
    because={
        "the absmax of its block is NaN, and every weight of the block is multiplied by it": (
            lambda n, places, size, double: len(places)
        ),
        "with double quantisation the offset is a mean over *all* absmax: what is the mean of "
        "numbers of which one is NaN?": (
            lambda n, places, size, double: spoiled(n, places, size, False)
        ),
        "the nested block would be spoiled by its nested absmax, but the offset, a mean over the "
        "whole tensor, reaches further": lambda n, places, size, double: spoiled(
            n, places, size * NESTED_BLOCKSIZE if double else size, False
        ),
        "without double quantisation blocks know nothing of each other": (
            lambda n, places, size, double: spoiled(n, places, size, True)
        ),
        "two NaN in one block spoil one block": lambda n, places, size, double: (
            spoiled(n, places, size, True) if double else size * len(places)
        ),
    },
)


def read_constants(
    codes: Tensor, nested_absmax: Tensor, offset: float | Tensor, table: Tensor
) -> Tensor:
    """Read the absmax of every block back from 8 bits: float32 `[blocks]`."""
    return table[codes.int()] * _spread(nested_absmax, codes) + offset


def _spread(nested_absmax, codes):
    return nested_absmax.repeat_interleave(256)[: len(codes)]


def _stored_constants(random: torch.Generator) -> Inputs:
    """Three nested blocks, the last one short; one block alone, by another table; full blocks."""
    for n, table in ((600, dynamic_map()), (5, torch.linspace(-1, 1, 256)), (1024, dynamic_map())):
        codes = torch.randint(0, 256, (n,), generator=random).to(torch.uint8)
        nested_absmax = 0.5 + torch.rand(-(-n // 256), generator=random)
        yield codes, nested_absmax, 2 + torch.rand((), generator=random).item(), table


ex_3_3 = Exercise(
    "3.3 read the constants",
    read_constants,
    _stored_constants,
    # The order of two float32 operations may differ; a step of the table is 1000 times larger.
    atol=1e-5,
    because={
        "the mean was subtracted before writing: add the offset": (
            lambda codes, absmax, offset, table: read_constants(codes, absmax, 0.0, table)
        ),
        "the offset is in the units of absmax: add it after the multiplication, not before": (
            lambda codes, absmax, offset, table: (
                (table[codes.int()] + offset) * _spread(absmax, codes)
            )
        ),
        "every 256 codes have a nested constant of their own": (
            lambda codes, absmax, offset, table: table[codes.int()] * absmax[0] + offset
        ),
        "256 codes *in a row* share a nested constant: c₀ c₀ … c₁ c₁ …, not c₀ c₁ c₂ c₀ c₁ …": (
            lambda codes, absmax, offset, table: (
                table[codes.int()] * absmax.repeat(256)[: len(codes)] + offset
            )
        ),
        "a code is an index into the table, not a number to multiply with": (
            lambda codes, absmax, offset, table: codes * _spread(absmax, codes) + offset
        ),
    },
)


def repaired_constants(absmax: Tensor, table: Tensor) -> Tensor:
    """Write absmax in 8 bits and read them back: float32 `[blocks]`."""
    return _through(split_blocks(absmax - absmax.mean(), 256), table, absmax) + absmax.mean()


def _through(blocks, table, absmax, magnitude=torch.abs):
    """Take blocks through the table and back, and cut off what fills the last one."""
    largest = magnitude(blocks).amax(dim=1, keepdim=True)
    codes = assign((blocks / largest).clamp(-1, 1), table)
    return (table[codes.int()] * largest).flatten()[: len(absmax)]


def _constants(absmax, table, padded_mean=False, signed=False, lost=False):
    """The notebook's broken version, with those of its faults that are named."""
    offset = split_blocks(absmax, 256).mean() if padded_mean else absmax.mean()
    blocks = split_blocks(absmax if padded_mean else absmax - offset, 256)
    blocks = blocks - offset if padded_mean else blocks
    back = _through(blocks, table, absmax, (lambda x: x) if signed else torch.abs)
    return back if lost else back + offset


def _skewed_constants(random: torch.Generator) -> Inputs:
    """Constants with a few small ones, so that the largest difference is negative."""
    for n, table in ((512, dynamic_map()), (300, dynamic_map()), (700, torch.linspace(-1, 1, 256))):
        absmax = 2.5 + 0.4 * torch.rand(n, generator=random)
        absmax[torch.randperm(n, generator=random)[: n // 20]] *= 0.3
        yield absmax, table


ex_3_4 = Exercise(
    "3.4 repair the round trip",
    repaired_constants,
    _skewed_constants,
    # Dividing or multiplying by a reciprocal may differ in the last bit; a step is 0.01.
    atol=1e-4,
    because={
        **faults_left(
            _constants,
            lost="the constants come back around zero: what was subtracted must be added again",
            signed="the smallest constants come back too large: after centring, the largest "
            "*magnitude* may be that of a negative number",
            padded_mean="where the number of constants is no multiple of 256, the zeros that fill "
            "the last block were averaged and centred as if they were constants",
        ),
        "the mean is right, but the zeros that fill the last block were centred too: subtract it "
        "before cutting into blocks": lambda absmax, table: (
            _through(split_blocks(absmax, 256) - absmax.mean(), table, absmax) + absmax.mean()
        ),
    },
)


def _bits(blocksize, double_quant):
    return 4 + (constant_bits(blocksize, NESTED_BLOCKSIZE) if double_quant else 32 / blocksize)


def best_within(budget: float) -> tuple[int, bool]:
    """Choose block size and double quantisation: the least error within so many bits per weight.

    Half the block size saves 2.5 % of the error or more, and float32 constants save 0.02 %: so the
    smallest blocks that fit, and float32 constants if they fit with those.
    """
    return _first_fitting(budget, (False, True))


def _first_fitting(budget, double_quants, bits=_bits):
    choices = ((blocksize, double) for blocksize in BLOCKSIZES for double in double_quants)
    return next((choice for choice in choices if bits(*choice) <= budget), (BLOCKSIZES[-1], True))


ex_3_5 = Exercise(
    "3.5 spend a budget",
    best_within,
    [(budget,) for budget in (4.5, 4.126953125, 5.0, 4.1255, 4.25, 4.04, 4.02)],
    because={
        "64 and 256 are the paper's choice; another budget has another best": (
            lambda budget: (64, True)
        ),
        "that is the best without double quantisation; with it, smaller blocks fit the budget": (
            lambda budget: _first_fitting(budget, (False,))
        ),
        "where float32 constants fit at the smallest block size they are (slightly) better": (
            lambda budget: _first_fitting(budget, (True,))
        ),
        "over budget: the nested constants cost 32 / (blocksize · 256) bits as well": (
            lambda budget: _first_fitting(
                budget, (False, True), lambda size, double: 4 + (8 if double else 32) / size
            )
        ),
    },
)


def five_bit_levels() -> Tensor:
    """Fit 32 levels to the scaled, centred constants of normal weights."""
    weights = torch.randn(2**14, 64, generator=torch.Generator().manual_seed(5))
    absmax = weights.abs().amax(dim=1)
    blocks = (absmax - absmax.mean()).reshape(-1, 256)
    return lloyd_max_levels(blocks / blocks.abs().amax(dim=1, keepdim=True), 32, pinned=())


@cache
def _blocks() -> tuple[Tensor, ...]:
    """Two million normal weights, and the levels that stand for them, in blocks of 64."""
    weights = torch.randn(2**15, 64, generator=torch.Generator().manual_seed(256))
    absmax = weights.abs().amax(dim=1)
    return weights, nf4_levels()[assign(weights / absmax[:, None], nf4_levels()).int()], absmax


def rise(table: Tensor) -> float:
    """Relative growth of the weights' root mean square error when constants go through a table."""
    weights, levels, absmax = _blocks()
    through, kept = (
        (levels * constants[:, None] - weights).double().square().mean().sqrt()
        for constants in (repaired_constants(absmax, table.float()), absmax)
    )
    return (through / kept - 1).item()


ex_3_6 = Exercise(
    "3.6 constants in five bits",
    five_bit_levels,
    open=True,
    score=lambda levels: f"{len(levels)} levels: the weights' error grows by {rise(levels):.2%}",
    because={
        "five bits name 32 levels: return a 1-D tensor of at most 32": Seen(
            dynamic_map, lambda levels: levels.dim() != 1 or not 2 <= len(levels) <= 32
        ),
        "the levels must ascend and lie in [-1, 1]": Seen(
            lambda: torch.linspace(1, -1, 32),
            lambda levels: not (levels.diff() > 0).all() or not (levels.abs() <= 1).all(),
        ),
        "the levels are evenly spaced: most constants lie near the mean, so should the levels": (
            Seen(
                lambda: torch.linspace(-1, 1, 32),
                lambda levels: levels.diff().std() < 1e-3 and rise(levels) > 0.005,
            )
        ),
        "the weights' root mean square error grows by 0.5 % or more over float32 constants": Seen(
            nf4_levels, lambda levels: not rise(levels) < 0.005
        ),
    },
)

EXERCISES = (ex_3_1, ex_3_2, ex_3_3, ex_3_4, ex_3_5, ex_3_6)
