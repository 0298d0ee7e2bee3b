"""The explorer of chapter 3: two block sizes and a model move bits, megabytes and error."""

from functools import cache
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from ipywidgets import Dropdown, SelectionSlider
from torch import Tensor

from qlora_edu.blockwise import BLOCKSIZES, block_absmax, split_blocks
from qlora_edu.codebooks import assign, nf4_levels
from qlora_edu.course.explorers.core import Explorer
from qlora_edu.course.plots import PALETTE, figure_png
from qlora_edu.double_quant import dynamic_map
from qlora_edu.memory import LLAMA_SHAPES, llama_parameters, nf4_bits_per_weight

FLOAT32 = 0  # in place of a nested block size: the constants stay in float32
NESTED_BLOCKSIZES = (FLOAT32, 16, 32, 64, 128, 256, 512)
_WEIGHTS = 2**21  # so that even blocks of 4096 fill a nested block of 512


class BlockSums(NamedTuple):
    """All that the squared error of NF4 blocks depends on, whatever becomes of their constants."""

    absmax: Tensor
    """float32, one per block, as the next two."""
    levels_squared: Tensor
    """Sum of q² over the block, q being the level that stands for a weight."""
    levels_times_weights: Tensor
    """Sum of q·w."""
    weights_squared: float
    """Sum of w² over all blocks."""


@cache
def block_sums(blocksize: int) -> BlockSums:
    """Quantise two million normal weights to NF4 and keep what the error depends on."""
    weights = torch.randn(_WEIGHTS, generator=torch.Generator().manual_seed(256))
    absmax = block_absmax(weights, blocksize)
    blocks, levels = split_blocks(weights, blocksize), nf4_levels()
    q = levels[assign(blocks / absmax[:, None], levels).int()]
    return BlockSums(
        absmax, q.square().sum(dim=1), (q * blocks).sum(dim=1), weights.square().sum().item()
    )


def constants_round_trip(
    absmax: Tensor, table: Tensor, nested_blocksize: int = 256, centre: bool = True
) -> Tensor:
    """Write block constants `[blocks]` as indices into an ascending table, and read them back.

    `nested_blocksize` constants share one of theirs. `centre` subtracts the mean first, as double
    quantisation does.

    >>> ruler = torch.arange(-127, 128) / 127
    >>> constants_round_trip(torch.tensor([2.0, 2.5, 3.0]), ruler)
    tensor([2.0000, 2.5000, 3.0000])
    """
    offset = absmax.mean() if centre else 0.0
    blocks = split_blocks(absmax - offset, nested_blocksize)
    nested_absmax = blocks.abs().amax(dim=1, keepdim=True)
    scaled = (blocks / nested_absmax).nan_to_num()
    read_back = table[assign(scaled, table).int()] * nested_absmax
    return read_back.flatten()[: absmax.numel()] + offset


@cache
def nf4_rms_error(blocksize: int, nested_blocksize: int = 256) -> float:
    """Root mean square error of NF4 on normal weights, in σ.

    With the constant ĉ read back, a block's squared error is ĉ²·Σq² − 2ĉ·Σqw + Σw².

    >>> round(nf4_rms_error(64, FLOAT32), 3), round(nf4_rms_error(64, 256), 3)
    (0.092, 0.092)
    """
    absmax, levels_squared, levels_times_weights, weights_squared = block_sums(blocksize)
    if nested_blocksize != FLOAT32:
        absmax = constants_round_trip(absmax, dynamic_map(), nested_blocksize)
    squares = absmax.square() * levels_squared - 2 * absmax * levels_times_weights
    return ((squares.double().sum().item() + weights_squared) / _WEIGHTS) ** 0.5


def bits_with_constants(blocksize: int, nested_blocksize: int = 256) -> float:
    """Bits per weight, code and constants together.

    >>> bits_with_constants(64, FLOAT32), bits_with_constants(64, 256)
    (4.5, 4.126953125)
    """
    return nf4_bits_per_weight(blocksize, nested_blocksize or None)


def render_constants(blocksize: int = 64, nested_blocksize: int = 256, size: str = "7B") -> bytes:
    """Draw what constants weigh in a model, and where the choice stands in bits and error."""
    blue, grey, pink = (PALETTE[use] for use in ("quantized", "base", "highlight"))
    double = nested_blocksize != FLOAT32
    parameters, _ = llama_parameters(size)
    bits = bits_with_constants(blocksize, nested_blocksize)
    error = nf4_rms_error(blocksize, nested_blocksize)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), width_ratios=(2, 3))
    bars = {"float32\nconstants": 32 / blocksize}
    if double:
        bars["double\nquantised"] = bits - 4
    sizes = [parameters * share / 8 / 2**20 for share in bars.values()]
    drawn = left.bar(list(bars), sizes, color=[grey, blue][: len(bars)], width=0.6)
    left.bar_label(drawn, [f"{mebibytes:,.0f} MiB" for mebibytes in sizes], padding=3)
    left.set(ylim=(0, 1.15 * max(sizes)), ylabel=f"constants of a {size} (MiB)")
    left.set_xlim(-0.6, 1.6)
    saved = f", {sizes[0] - sizes[-1]:,.0f} MiB saved" if double else ""
    left.set_title(f"4 + {bits - 4:.6f} bits per weight{saved}", fontsize=11)

    for nested, color in [(FLOAT32, grey), (nested_blocksize, blue)][: len(bars)]:
        x = [bits_with_constants(one, nested) for one in BLOCKSIZES]
        y = [nf4_rms_error(one, nested) for one in BLOCKSIZES]
        right.plot(x, y, "o-", color=color, markersize=5)
        if nested == FLOAT32:
            for one, a, b in list(zip(BLOCKSIZES, x, y, strict=True))[:5]:
                right.annotate(
                    f"{one}", (a, b), (5, 4), textcoords="offset points", color=color, fontsize=9
                )
    right.text(4.62, 0.0945, "float32 constants", color=grey, va="center")
    if double:
        right.text(
            4.28, 0.0855, f"8 bits, nested blocks of {nested_blocksize}", color=blue, va="center"
        )
    right.plot(bits, error, "o", mfc="none", mec=pink, mew=2.5, markersize=15)
    right.set(xlabel="bits per weight", ylabel="root mean square error (σ)")
    right.set(xlim=(3.98, 5.06), ylim=(0.08, 0.131))
    right.set_title(f"This choice: {bits:.4g} bits, error {error:.5f} σ", fontsize=11)
    return figure_png(figure)


def constants_explorer() -> Explorer:
    """Make the explorer of chapter 3: the block sizes of both levels, and a model."""
    nested = [("float32", FLOAT32), *((str(n), n) for n in NESTED_BLOCKSIZES[1:])]
    wide = {"description_width": "90px"}
    return Explorer(
        render_constants,
        blocksize=SelectionSlider(
            options=BLOCKSIZES, value=64, description="block size", style=wide
        ),
        nested_blocksize=SelectionSlider(
            options=nested, value=256, description="nested blocks", style=wide
        ),
        size=Dropdown(options=list(LLAMA_SHAPES), description="model"),
    )
