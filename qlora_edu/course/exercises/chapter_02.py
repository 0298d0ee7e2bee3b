"""The exercises of notebook 2: costs, packing, places, outliers, a broken reader."""

import math
from collections.abc import Sequence
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_edu.blockwise import BLOCKSIZES, pack_nibbles, read_back, unpack_nibbles
from qlora_edu.codebooks import get_levels, nf4_levels
from qlora_edu.course.exercises.core import Exercise, Inputs, Seen, faults_left


def bits_a_weight(code_bits: int, blocksize: int, constant_bits: int) -> float:
    """Add a weight's share of its block's constants to its code."""
    return code_bits + constant_bits / blocksize


ex_2_1 = Exercise(
    "2.1 what a block costs",
    bits_a_weight,
    [(4, 64, 32), (4, 32, 32), (3, 128, 16), (2, 4096, 48)],
    # Binary fractions: nothing is lost, whatever the order of the steps.
    atol=1e-12,
    because={
        "the codes alone cannot be read back: each block's constants are stored too": (
            lambda code, size, constant: code
        ),
        "the constants are stored once a block and not once a weight: share them out": (
            lambda code, size, constant: code + constant
        ),
        "constant_bits are bits already; dividing by 8 makes bytes of them": (
            lambda code, size, constant: code + constant / 8 / size
        ),
        "a larger block makes a weight cheaper: the block size stands below the line": (
            lambda code, size, constant: code + size / constant
        ),
    },
)


def pack_quarters(codes: Tensor) -> Tensor:
    """Put four 2-bit codes in a byte, the first in the highest bits; fill the last up with 0."""
    return _weighed(_fours(codes), 64, 16, 4, 1).to(torch.uint8)


def _fours(codes):
    return F.pad(codes.long(), (0, -len(codes) % 4)).view(-1, 4)


def _weighed(fours, *places):
    return (fours * torch.tensor(places)).sum(dim=1)


def _code_rows(random: torch.Generator) -> Inputs:
    rows = [torch.tensor([0, 1, 2, 3]), torch.tensor([3, 3, 3, 3])]
    rows += [torch.randint(4, (n,), generator=random) for n in (8, 6, 64, 3)]
    return [(row.to(torch.uint8),) for row in rows]


ex_2_2 = Exercise(
    "2.2 four codes in a byte",
    pack_quarters,
    _code_rows,
    exact_dtype=True,  # packed into int64, a byte would take eight
    because={
        "the first of four codes belongs in the *highest* two bits: [0, 1, 2, 3] gives 0x1B, not "
        "0xE4": lambda codes: _weighed(_fours(codes), 1, 4, 16, 64),
        "added without shifting, the codes cannot be told apart again: each needs two bits of its "
        "own": lambda codes: _weighed(_fours(codes), 1, 1, 1, 1),
        "four bits for each are too many: a shift by 4 is for nibbles, these codes take 2 bits": (
            lambda codes: _weighed(_fours(codes), 4096, 256, 16, 1) % 256
        ),
        "codes left over at the end need one more byte, filled up with zeros": (
            lambda codes: pack_quarters(codes[: len(codes) // 4 * 4])
        ),
    },
)


def where_is(row: int, column: int, columns: int, blocksize: int) -> tuple[int, str, int]:
    """Find a weight of a matrix: its byte, its half of the byte, its block."""
    position = row * columns + column
    return position // 2, ("high", "low")[position % 2], position // blocksize


def _places(random: torch.Generator) -> Inputs:
    """Places in matrices; in the last two an odd row begins in the middle of a byte."""
    shapes = ((96, 64), (256, 64), (100, 32), (5, 32))
    drawn = torch.randint(4, 50, (4, 2), generator=random).tolist()
    places = [(r, c % n, n, size) for (r, c), (n, size) in zip(drawn, shapes, strict=True)]
    return [(1, 2, 6, 4), *places, (7, 2, 5, 32), (9, 3, 5, 32)]


def _misplaced(byte=None, half=None, block=None):
    """Make the right answer with one part of it changed, by a function of place and right part."""

    def wrong(row, column, columns, size):
        right = where_is(row, column, columns, size)
        changes = zip((byte, half, block), right, strict=True)
        return tuple(r if f is None else f(row, column, columns, size) for f, r in changes)

    return wrong


ex_2_3 = Exercise(
    "2.3 which byte?",
    where_is,
    _places,
    because={
        "a tensor is laid flat row by row: the position is row × columns + column": (
            lambda row, column, columns, size: where_is(column, row, columns, size)
        ),
        "blocks do not start anew with each row: they run on across rows, so a block is position "
        "// blocksize": _misplaced(block=lambda r, c, n, size: r * -(-n // size) + c // size),
        "two weights share a byte: the byte is position // 2": (
            _misplaced(byte=lambda r, c, n, size: r * n + c)
        ),
        "the first of two, at an even position, is in the high nibble": (
            _misplaced(half=lambda r, c, n, size: ("low", "high")[(r * n + c) % 2])
        ),
        "the position decides and not the column: a row may begin in the middle of a byte": (
            _misplaced(half=lambda r, c, n, size: ("high", "low")[c % 2])
        ),
    },
)


def deadly_ratio(levels: Tensor) -> float:
    """How many times the largest other weight an outlier must be to turn all others to zero."""
    above, below = levels[levels > 0].min(), -levels[levels < 0].max()
    return 2 / min(above, below).item()


ex_2_4 = Exercise(
    "2.4 a deadly outlier",
    deadly_ratio,
    # The last is NF4 turned round: there the negative neighbour of zero is the nearer one.
    [
        *((get_levels(name),) for name in ("nf4", "int4", "fp4-e3m0", "fp4-e2m1", "af4")),
        (-nf4_levels().flip(0),),
    ],  # fmt: skip
    # The ratios are 14 to 128, so float32 is good to a few 1e-6.
    atol=1e-3,
    because={
        "a weight is lost as soon as 0 is *nearer* than the next level: below half of that level": (
            lambda levels: deadly_ratio(levels) / 2
        ),
        "then weights of one sign still survive: the level nearer to zero decides": (
            lambda levels: 2 / max(levels[levels > 0].min(), -levels[levels < 0].max()).item()
        ),
        "that looks at one side of zero only; the signs of the others are unknown": (
            lambda levels: 2 / levels[levels > 0].min().item()
        ),
        "weights beside an outlier lie near zero: only the gaps next to zero matter": (
            lambda levels: 2 / levels.diff().max().item()
        ),
    },
)


def repaired_reader(
    packed: Tensor, absmax: Tensor, levels: Tensor, blocksize: int, shape: Sequence[int]
) -> Tensor:
    """Read packed weights back: high nibble first, blocks across rows, filling dropped."""
    n = math.prod(shape)
    values = levels[unpack_nibbles(packed, n).long()]
    return (values * absmax[torch.arange(n) // blocksize]).reshape(tuple(shape))


def _small_tensors(random: torch.Generator) -> Inputs:
    """Codes and constants by chance, in blocks that end within rows, at their ends, and short."""
    even = torch.linspace(-1, 1, 16)
    for shape, blocksize, levels in (
        *(((2, 6), 4, nf4_levels()), ((3, 5), 4, nf4_levels()), ((4, 8), 8, even)),
        *(((10,), 4, nf4_levels()), ((3, 2, 3), 4, even)),
    ):
        n = math.prod(shape)
        codes = torch.randint(16, (n,), generator=random).to(torch.uint8)
        absmax = torch.rand(-(-n // blocksize), generator=random) * 9 + 1
        yield pack_nibbles(codes), absmax, levels, blocksize, shape


def _reader(packed, absmax, levels, size, shape, **faults):
    """The notebook's broken reader, with those of its faults that are named, or with another."""
    n = math.prod(shape)
    halves = [packed & 15, packed >> 4] if "low_first" in faults else [packed >> 4, packed & 15]
    codes = torch.cat(halves, dim=1).flatten()
    place, columns = torch.arange(n), shape[-1]
    if "by_row" in faults:
        constants = absmax[: shape[0]].repeat_interleave(columns)
    elif "restart" in faults:
        block = place // columns * -(-columns // size) + place % columns // size
        constants = absmax[block.clamp(max=len(absmax) - 1)]
    else:
        constants = absmax[place // size]
    values = levels[(codes if "uncut" in faults else codes[:n]).long()]
    return (values if "bare" in faults else values * constants).reshape(shape)


ex_2_5 = Exercise(
    "2.5 repair the reader",
    repaired_reader,
    _small_tensors,
    # One product in float32; another order of the steps may round it otherwise.
    atol=1e-5,
    because={
        **faults_left(
            _reader,
            low_first="each pair of weights has changed places: the first code is in the high "
            "nibble",
            by_row="a row is not a block: weight number i belongs to constant i // blocksize",
            uncut="an odd number of weights leaves a nibble over: only the first n codes are "
            "weights",
        ),
        "the blocks were made from the flat tensor and run on across rows; do not begin a new one "
        "with each row": partial(_reader, restart=True),
        "these are the levels, between -1 and 1; each is to be multiplied by its block's absmax": (
            partial(_reader, bare=True)
        ),
    },
)


def largest_blocksize(weights: Tensor, levels: Tensor, limit: float) -> int:
    """The largest block size whose mean error is at most `limit` of the mean magnitude, or 0."""
    return _largest_within(weights, levels, limit, _mean_size(weights))


def _mean_size(x):
    return x.abs().double().mean()


def _root_mean_square(x):
    return x.double().square().mean().sqrt()


def _largest_within(weights, levels, limit, whole, size_of=_mean_size):
    errors = {size: read_back(weights, levels, size) - weights for size in BLOCKSIZES}
    return max((n for n, error in errors.items() if size_of(error) <= limit * whole), default=0)


def heavy_tails(n: int, generator: torch.Generator) -> Tensor:
    """Draw n weights from Student's t with four degrees of freedom; not scaled."""
    normal = torch.randn(n, generator=generator)
    return normal / torch.randn(4, n, generator=generator).square().mean(dim=0).sqrt()


def _budgets(random: torch.Generator) -> Inputs:
    """Limits that lie between the errors of two block sizes, far from both."""
    normal, heavy = torch.randn(2**16, generator=random), heavy_tails(2**16, random)
    nf4, int4 = get_levels("nf4"), get_levels("int4")
    scaled = 0.02 * normal
    return [(normal, nf4, 0.0985), (scaled, nf4, 0.106), (heavy, nf4, 0.15), (normal, int4, 0.12),
            (normal, nf4, 0.05)]  # fmt: skip


ex_2_6 = Exercise(
    "2.6 how large may the blocks be?",
    largest_blocksize,
    _budgets,
    because={
        "the limit is a share: divide the mean error by the mean magnitude of the weights": (
            lambda *given: _largest_within(*given, whole=1)
        ),
        "that compares root mean squares; the limit is about mean absolute values": (
            lambda *given: _largest_within(*given, _root_mean_square(given[0]), _root_mean_square)
        ),
        "no block size keeps to this limit: say so, with 0": Seen(
            lambda *given: largest_blocksize(*given) or None,
            lambda yours, expected, *given: expected == 0,
        ),
        "64 is only the default: it depends on the weights, the table and the limit; measure": (
            lambda *given: 64
        ),
    },
)


@cache
def _fresh_heavy():
    """Half a million heavy-tailed weights that no reader has seen."""
    return heavy_tails(2**19, torch.Generator().manual_seed(565))


def _against_nf4(levels, blocksize):
    """Mean absolute error on fresh weights, as a change against NF4's in blocks of 128."""
    entries = ((levels.float(), blocksize), (nf4_levels(), 128))
    ours, nf4 = ((read_back(_fresh_heavy(), *e) - _fresh_heavy()).abs().mean() for e in entries)
    return (ours / nf4 - 1).item()


def heavy_format() -> tuple[Tensor, int]:
    """NormalFloat with its outermost probability moved out, to 0.995, in blocks of 128."""
    return nf4_levels(4, 0.995), 128


def _is_no_format(answer):
    levels, blocksize = answer
    ascend = levels.dim() == 1 and 2 <= len(levels) <= 16 and bool((levels.diff() > 0).all())
    return not (ascend and bool((levels.abs() <= 1).all()) and blocksize in BLOCKSIZES)


ex_2_7 = Exercise(
    "2.7 a format for heavy tails",
    heavy_format,
    open=True,
    score=lambda found: f"{_against_nf4(*found):+.1%} mean absolute error against NF4",
    because={
        "return (levels, blocksize): 2 to 16 ascending numbers in [-1, 1], and one of the block "
        "sizes 32 … 4096": Seen(lambda: (torch.linspace(-1, 1, 17), 128), _is_no_format),
        "that costs more than 4.25 bits per weight: the code and 32 bits for each block": Seen(
            lambda: (nf4_levels(4, 0.995), 64),
            lambda found: bits_a_weight(math.ceil(math.log2(len(found[0]))), found[1], 32) > 4.25,
        ),
        "0 is not among the levels: beside an outlier most weights should come back as 0, and "
        "these all come back as something else": Seen(
            lambda: (torch.linspace(-1, 1, 16), 128), lambda found: not (found[0] == 0).any()
        ),
        "on fresh heavy-tailed weights its mean absolute error is not 8 % below that of NF4 in "
        "blocks of 128": Seen(
            lambda: (nf4_levels(), 128),
            lambda found: _against_nf4(*found) > -0.08,
        ),
    },
)

EXERCISES = (ex_2_1, ex_2_2, ex_2_3, ex_2_4, ex_2_5, ex_2_6, ex_2_7)
