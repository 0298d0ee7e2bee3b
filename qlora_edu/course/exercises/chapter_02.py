"""The exercises of notebook 2: costs, packing, places, outliers, a broken reader."""

import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_edu.blockwise import BLOCKSIZES, pack_nibbles, read_back, unpack_nibbles
from qlora_edu.codebooks import get_levels, nf4_levels
from qlora_edu.course.exercises.core import Case, Check, Mistake, OpenCheck


def bits_a_weight(code_bits: int, blocksize: int, constant_bits: int) -> float:
    """Add a weight's share of its block's constants to its code.

    >>> bits_a_weight(4, 64, 32)
    4.5
    """
    return code_bits + constant_bits / blocksize


ex_2_1 = Check(
    "2.1 what a block costs",
    reference=bits_a_weight,
    cases=lambda random: [
        {"code_bits": code, "blocksize": size, "constant_bits": constant}
        for code, size, constant in ((4, 64, 32), (4, 32, 32), (3, 128, 16), (2, 4096, 48))
    ],
    # Binary fractions: nothing is lost, whatever the order of the steps.
    atol=1e-12,
    mistakes=(
        Mistake(
            "constants forgotten",
            lambda code_bits, blocksize, constant_bits: float(code_bits),
            "the codes alone cannot be read back: each block's constants are stored too",
        ),
        Mistake(
            "a constant for each weight",
            lambda code_bits, blocksize, constant_bits: float(code_bits + constant_bits),
            "the constants are stored once a block and not once a weight: share them out",
        ),
        Mistake(
            "bytes for bits",
            lambda code_bits, blocksize, constant_bits: code_bits + constant_bits / 8 / blocksize,
            "constant_bits are bits already; dividing by 8 makes bytes of them",
        ),
        Mistake(
            "upside down",
            lambda code_bits, blocksize, constant_bits: code_bits + blocksize / constant_bits,
            "a larger block makes a weight cheaper: the block size stands below the line",
        ),
        Mistake(
            "the whole block",
            lambda code_bits, blocksize, constant_bits: code_bits * blocksize + constant_bits,
            "those are the bits of a whole block; divide by its number of weights",
        ),
    ),
)


def pack_quarters(codes: Tensor) -> Tensor:
    """Put four 2-bit codes in a byte, the first in the highest bits; fill the last up with 0.

    >>> pack_quarters(torch.tensor([0, 1, 2, 3, 3], dtype=torch.uint8)).tolist()
    [27, 192]
    """
    return (_fours(codes) * torch.tensor([64, 16, 4, 1])).sum(dim=1).to(torch.uint8)


def _fours(codes: Tensor) -> Tensor:
    return F.pad(codes.long(), (0, -len(codes) % 4)).view(-1, 4)


def _weighed(codes: Tensor, *places: int) -> Tensor:
    return (_fours(codes) * torch.tensor(places)).sum(dim=1)


def _quarters_of_the_tensor(codes: Tensor) -> Tensor:
    return (_fours(codes).view(4, -1) * torch.tensor([[64], [16], [4], [1]])).sum(dim=0)


def _code_rows(random: torch.Generator) -> list[Case]:
    rows = [torch.tensor([0, 1, 2, 3]), torch.tensor([3, 3, 3, 3])]
    rows += [torch.randint(4, (n,), generator=random) for n in (8, 6, 64, 3)]
    return [{"codes": row.to(torch.uint8)} for row in rows]


ex_2_2 = Check(
    "2.2 four codes in a byte",
    reference=pack_quarters,
    cases=_code_rows,
    mistakes=(
        Mistake(
            "lowest bits first",
            lambda codes: _weighed(codes, 1, 4, 16, 64),
            "the first of four codes belongs in the *highest* two bits: [0, 1, 2, 3] gives 0x1B, "
            "not 0xE4",
        ),
        Mistake(
            "not shifted",
            lambda codes: _weighed(codes, 1, 1, 1, 1),
            "added without shifting, the codes cannot be told apart again: each needs two bits of "
            "its own",
        ),
        Mistake(
            "shifted as nibbles",
            lambda codes: _weighed(codes, 4096, 256, 16, 1) % 256,
            "four bits for each are too many: a shift by 4 is for nibbles, these codes take 2 bits",
        ),
        Mistake(
            "tens",
            lambda codes: _weighed(codes, 1000, 100, 10, 1) % 256,
            "a 2-bit place counts to 4, so each place is worth four times the next and not ten",
        ),
        Mistake(
            "quarters of the tensor",
            _quarters_of_the_tensor,
            "neighbours share a byte: codes 0 to 3, then 4 to 7, not one from each quarter of the "
            "tensor",
        ),
        Mistake(
            "the last ones dropped",
            lambda codes: pack_quarters(codes[: len(codes) // 4 * 4]),
            "codes left over at the end need one more byte, filled up with zeros",
        ),
    ),
)


def where_is(row: int, column: int, columns: int, blocksize: int) -> tuple[int, str, int]:
    """Find a weight of a matrix: its byte, its half of the byte, its block.

    >>> where_is(1, 3, columns=6, blocksize=4)
    (4, 'low', 2)
    """
    position = row * columns + column
    return position // 2, ("high", "low")[position % 2], position // blocksize


def _places(random: torch.Generator) -> list[Case]:
    cases = [{"row": 1, "column": 2, "columns": 6, "blocksize": 4}]
    for columns, blocksize in ((96, 64), (256, 64), (100, 32), (5, 32)):
        row, column = (int(torch.randint(4, 50, (), generator=random)) for _ in range(2))
        cases.append(
            {"row": row, "column": column % columns, "columns": columns, "blocksize": blocksize}
        )
    return cases


def _by_column(row: int, column: int, columns: int, blocksize: int) -> tuple[int, str, int]:
    return where_is(column, row, columns, blocksize)


def _blocks_restart(row: int, column: int, columns: int, blocksize: int) -> tuple[int, str, int]:
    byte, half, _ = where_is(row, column, columns, blocksize)
    return byte, half, row * -(-columns // blocksize) + column // blocksize


def _not_halved(row: int, column: int, columns: int, blocksize: int) -> tuple[int, str, int]:
    _, half, block = where_is(row, column, columns, blocksize)
    return row * columns + column, half, block


def _swapped(row: int, column: int, columns: int, blocksize: int) -> tuple[int, str, int]:
    byte, half, block = where_is(row, column, columns, blocksize)
    return byte, {"high": "low", "low": "high"}[half], block


def _blocks_of_bytes(row: int, column: int, columns: int, blocksize: int) -> tuple[int, str, int]:
    byte, half, _ = where_is(row, column, columns, blocksize)
    return byte, half, byte // blocksize


ex_2_3 = Check(
    "2.3 which byte?",
    reference=where_is,
    cases=_places,
    mistakes=(
        Mistake(
            "down the columns",
            _by_column,
            "a tensor is laid flat row by row: the position is row × columns + column",
        ),
        Mistake(
            "blocks restart",
            _blocks_restart,
            "blocks do not start anew with each row: they run on across rows, so a block is "
            "position // blocksize",
        ),
        Mistake(
            "one byte each",
            _not_halved,
            "two weights share a byte: the byte is position // 2",
        ),
        Mistake(
            "halves swapped",
            _swapped,
            "the first of two, at an even position, is in the high nibble",
        ),
        Mistake(
            "blocks of bytes",
            _blocks_of_bytes,
            "the block size counts weights and not bytes",
        ),
    ),
)


def deadly_ratio(levels: Tensor) -> float:
    """How many times the largest other weight an outlier must be to turn all others to zero.

    >>> round(deadly_ratio(get_levels("int4")), 4)
    14.0
    """
    above, below = levels[levels > 0].min(), -levels[levels < 0].max()
    return 2 / min(above, below).item()


def _tables_with_zero(random: torch.Generator) -> list[Case]:
    names = ("nf4", "int4", "fp4-e3m0", "fp4-e2m1", "af4")
    return [{"levels": get_levels(name)} for name in names]


ex_2_4 = Check(
    "2.4 a deadly outlier",
    reference=deadly_ratio,
    cases=_tables_with_zero,
    # The ratios are 14 to 128, so float32 is good to a few 1e-6.
    atol=1e-3,
    mistakes=(
        Mistake(
            "no midpoint",
            lambda levels: deadly_ratio(levels) / 2,
            "a weight is lost as soon as 0 is *nearer* than the next level: below half of that "
            "level",
        ),
        Mistake(
            "the wider side",
            lambda levels: 2 / max(levels[levels > 0].min(), -levels[levels < 0].max()).item(),
            "then weights of one sign still survive: the level nearer to zero decides",
        ),
        Mistake(
            "the widest gap",
            lambda levels: 2 / levels.diff().max().item(),
            "weights beside an outlier lie near zero: only the gaps next to zero matter",
        ),
        Mistake(
            "upside down",
            lambda levels: 1 / deadly_ratio(levels),
            "that is the size of the other weights against the outlier; the question is how many "
            "times larger the outlier is",
        ),
        Mistake(
            "the first level",
            lambda levels: 2 / levels.abs().max().item(),
            "the outlier itself is at ±1 in every table; look at the levels next to zero",
        ),
    ),
)


def repaired_reader(
    packed: Tensor, absmax: Tensor, levels: Tensor, blocksize: int, shape: Sequence[int]
) -> Tensor:
    """Read packed weights back: high nibble first, blocks across rows, filling dropped."""
    n = math.prod(shape)
    values = levels[unpack_nibbles(packed, n).long()]
    return (values * absmax[torch.arange(n) // blocksize]).reshape(tuple(shape))


def _small_tensors(random: torch.Generator) -> list[Case]:
    """Codes and constants by chance, in blocks that end within rows, at their ends, and short."""
    cases = []
    for shape, blocksize in (((2, 6), 4), ((3, 5), 4), ((4, 8), 8), ((10,), 4), ((3, 2, 3), 4)):
        n = math.prod(shape)
        codes = torch.randint(16, (n,), generator=random).to(torch.uint8)
        absmax = torch.rand(-(-n // blocksize), generator=random) * 9 + 1
        cases.append(
            {
                "packed": pack_nibbles(codes),
                "absmax": absmax,
                "levels": get_levels("nf4"),
                "blocksize": blocksize,
                "shape": shape,
            }
        )
    return cases


def _low_first(
    packed: Tensor, absmax: Tensor, levels: Tensor, blocksize: int, shape: Sequence[int]
) -> Tensor:
    return repaired_reader((packed << 4) | (packed >> 4), absmax, levels, blocksize, shape)


def _with_blocks(
    packed: Tensor, absmax: Tensor, levels: Tensor, shape: Sequence[int], blocks: Tensor
) -> Tensor:
    """Read with a block of one's own choice for each weight, kept inside what there is."""
    values = levels[unpack_nibbles(packed, math.prod(shape)).long()]
    return (values * absmax[blocks.clamp(max=len(absmax) - 1)]).reshape(tuple(shape))


def _restarting(
    packed: Tensor, absmax: Tensor, levels: Tensor, blocksize: int, shape: Sequence[int]
) -> Tensor:
    position, columns = torch.arange(math.prod(shape)), shape[-1]
    rows = position // columns
    blocks = rows * -(-columns // blocksize) + position % columns // blocksize
    return _with_blocks(packed, absmax, levels, shape, blocks)


def _one_a_row(
    packed: Tensor, absmax: Tensor, levels: Tensor, blocksize: int, shape: Sequence[int]
) -> Tensor:
    return _with_blocks(packed, absmax, levels, shape, torch.arange(math.prod(shape)) // shape[-1])


def _constants_by_byte(
    packed: Tensor, absmax: Tensor, levels: Tensor, blocksize: int, shape: Sequence[int]
) -> Tensor:
    blocks = torch.arange(math.prod(shape)) // 2 // blocksize
    return _with_blocks(packed, absmax, levels, shape, blocks)


def _filling_kept(
    packed: Tensor, absmax: Tensor, levels: Tensor, blocksize: int, shape: Sequence[int]
) -> Tensor:
    if math.prod(shape) % 2 == 0:
        return repaired_reader(packed, absmax, levels, blocksize, shape)
    absmax = torch.cat([absmax, absmax[-1:]])
    return repaired_reader(packed, absmax, levels, blocksize, (math.prod(shape) + 1,))


ex_2_5 = Check(
    "2.5 repair the reader",
    reference=repaired_reader,
    cases=_small_tensors,
    # One product in float32; another order of the steps may round it otherwise.
    atol=1e-5,
    mistakes=(
        Mistake(
            "low nibble first",
            _low_first,
            "each pair of weights has changed places: the first code is in the high nibble",
        ),
        Mistake(
            "one constant a row",
            _one_a_row,
            "a row is not a block: weight number i belongs to constant i // blocksize",
        ),
        Mistake(
            "blocks restart",
            _restarting,
            "the blocks were made from the flat tensor and run on across rows; do not begin a new "
            "one with each row",
        ),
        Mistake(
            "constants by byte",
            _constants_by_byte,
            "the block size counts weights, and a byte holds two of them",
        ),
        Mistake(
            "levels only",
            lambda packed, absmax, levels, blocksize, shape: levels[
                unpack_nibbles(packed, math.prod(shape)).long()
            ].reshape(tuple(shape)),
            "these are the levels, between -1 and 1; each is to be multiplied by its block's "
            "absmax",
        ),
        Mistake(
            "filling kept",
            _filling_kept,
            "an odd number of weights leaves a nibble over: only the first n codes are weights",
        ),
    ),
)


def _relative_errors(weights: Tensor, levels: Tensor) -> dict[int, float]:
    return {
        size: ((read_back(weights, levels, size) - weights).abs().mean() / weights.abs().mean())
        .double()
        .item()
        for size in BLOCKSIZES
    }


def largest_blocksize(weights: Tensor, levels: Tensor, limit: float) -> int:
    """The largest block size whose mean error is at most `limit` of the mean magnitude, or 0."""
    errors = _relative_errors(weights, levels)
    return max((size for size in BLOCKSIZES if errors[size] <= limit), default=0)


def _absolute(weights: Tensor, levels: Tensor, limit: float) -> int:
    errors = {s: (read_back(weights, levels, s) - weights).abs().mean() for s in BLOCKSIZES}
    return max((size for size in BLOCKSIZES if errors[size] <= limit), default=0)


def _squared(weights: Tensor, levels: Tensor, limit: float) -> int:
    errors = {
        s: (read_back(weights, levels, s) - weights).square().mean().sqrt()
        / weights.square().mean().sqrt()
        for s in BLOCKSIZES
    }
    return max((size for size in BLOCKSIZES if errors[size] <= limit), default=0)


def _worst(weights: Tensor, levels: Tensor, limit: float) -> int:
    errors = {
        s: (read_back(weights, levels, s) - weights).abs().max() / weights.abs().max()
        for s in BLOCKSIZES
    }
    return max((size for size in BLOCKSIZES if errors[size] <= limit), default=0)


def heavy_tails(n: int, generator: torch.Generator) -> Tensor:
    """Draw n weights from Student's t with four degrees of freedom; not scaled.

    >>> heavy_tails(3, torch.Generator().manual_seed(0)).shape
    torch.Size([3])
    """
    normal = torch.randn(n, generator=generator)
    return normal / torch.randn(4, n, generator=generator).square().mean(dim=0).sqrt()


def _budgets(random: torch.Generator) -> list[Case]:
    """Limits that lie between the errors of two block sizes, far from both."""
    n = 2**16
    normal, heavy = torch.randn(n, generator=random), heavy_tails(n, random)
    nf4 = get_levels("nf4")
    return [
        {"weights": normal, "levels": nf4, "limit": 0.0985},
        {"weights": 0.02 * normal, "levels": nf4, "limit": 0.106},
        {"weights": heavy, "levels": nf4, "limit": 0.15},
        {"weights": normal, "levels": get_levels("int4"), "limit": 0.12},
        {"weights": normal, "levels": nf4, "limit": 0.05},
    ]


ex_2_6 = Check(
    "2.6 how large may the blocks be?",
    reference=largest_blocksize,
    cases=_budgets,
    mistakes=(
        Mistake(
            "absolute",
            _absolute,
            "the limit is a share: divide the mean error by the mean magnitude of the weights",
        ),
        Mistake(
            "squares",
            _squared,
            "that compares root mean squares; the limit is about mean absolute values",
        ),
        Mistake(
            "the smallest",
            lambda weights, levels, limit: min(
                (s for s, e in _relative_errors(weights, levels).items() if e <= limit),
                default=0,
            ),
            "that is the smallest block that keeps to the limit, the dearest one; find the largest",
        ),
        Mistake(
            "always an answer",
            lambda weights, levels, limit: largest_blocksize(weights, levels, limit) or 32,
            "no block size keeps to this limit: say so, with 0",
        ),
        Mistake(
            "always sixty-four",
            lambda weights, levels, limit: 64,
            "64 is only the default: it depends on the weights, the table and the limit; measure",
        ),
        Mistake(
            "the worst weight",
            _worst,
            "that looks at the largest error of one weight; the limit is about the mean",
        ),
    ),
)


@cache
def _fresh_heavy() -> Tensor:
    """Half a million heavy-tailed weights that no reader has seen."""
    return heavy_tails(2**19, torch.Generator().manual_seed(565))


def _mean_error(levels: Tensor, blocksize: int) -> float:
    weights = _fresh_heavy()
    return (read_back(weights, levels.float(), blocksize) - weights).abs().mean().item()


def heavy_format() -> tuple[Tensor, int]:
    """NormalFloat with its outermost probability moved out, to 0.995, in blocks of 128."""
    return nf4_levels(4, 0.995), 128


def _no_table(levels: Tensor, blocksize: int) -> bool:
    return (
        levels.dim() != 1
        or not 2 <= len(levels) <= 16
        or bool((levels.diff() <= 0).any())
        or bool((levels.abs() > 1).any())
        or blocksize not in BLOCKSIZES
    )


ex_2_7 = OpenCheck(
    "2.7 a format for heavy tails",
    reference=heavy_format,
    mistakes=(
        Mistake(
            "seventeen levels",
            lambda: (torch.linspace(-1, 1, 17), 128),
            "return (levels, blocksize): 2 to 16 ascending numbers in [-1, 1], and one of the "
            "block sizes 32 … 4096",
            lambda case, answer, _: _no_table(*answer),
        ),
        Mistake(
            "over the budget",
            lambda: (nf4_levels(4, 0.995), 64),
            "that costs more than 4.25 bits a weight: the code and 32 bits for each block",
            lambda case, answer, _: (
                bits_a_weight(math.ceil(math.log2(len(answer[0]))), answer[1], 32) > 4.25
            ),
        ),
        Mistake(
            "no exact zero",
            lambda: (torch.linspace(-1, 1, 16), 128),
            "0 is not among the levels: beside an outlier most weights should come back as 0, and "
            "these all come back as something else",
            lambda case, answer, _: not (answer[0] == 0).any(),
        ),
        Mistake(
            "not better",
            lambda: (nf4_levels(), 128),
            "on fresh heavy-tailed weights its mean absolute error is not 8 % below that of NF4 in "
            "blocks of 128",
            lambda case, answer, _: _mean_error(*answer) > 0.92 * _mean_error(nf4_levels(), 128),
        ),
    ),
)
