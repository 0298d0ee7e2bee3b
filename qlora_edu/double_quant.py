"""Chapter 3: quantising the constants.

Double quantisation subtracts the mean of all absmax and writes the differences in 8 bits, in blocks
of 256 with a float32 constant each: 4 + 32/64 = 4.5 bits per weight become
4 + 8/64 + 32/(64*256) = 4.127.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_edu.blockwise import split_blocks

NESTED_BLOCKSIZE = 256
GRID_STEPS = 65535


class QuantizedAbsmax(NamedTuple):
    """Block constants in 8 bits: absmax = levels[codes] * nested_absmax + offset."""

    codes: Tensor  # uint8, one per block
    nested_absmax: Tensor  # float32, one per 256 blocks
    offset: Tensor  # float32 scalar: the mean of all absmax
    levels: Tensor  # float32 `[256]`: the level of each code


def dynamic_map() -> Tensor:
    """Build the signed 8-bit *dynamic* codebook.

    Seven decades run from 1e-7 to 1, and each is cut into twice as many equal steps as the one
    below: 1, 2, 4, ..., 64. The centres of the steps, with both signs, make 254 levels; 0 and 1
    complete them. There is no -1. Returns ascending levels, float32, shape `[256]`.

    Source: Dettmers (arXiv 1511.04561); equals bitsandbytes `create_dynamic_map()`.

    >>> dynamic_map()[[0, 127, 255]]
    tensor([-0.9930,  0.0000,  1.0000])
    """
    levels = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        centres = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += [centres, -centres]
    return torch.cat(levels).sort().values


def quantize_absmax(absmax: Tensor) -> QuantizedAbsmax:
    """Write block constants in 8 bits.

    They are positive, so the signed map would waste half its levels: the mean goes first. The rest
    is quantised like weights, in blocks of 256. Takes float32, shape `[blocks]`, finite.

    Source: QLoRA (arXiv 2305.14314) section 3, "Double Quantization", which says FP8; the code that
    came with it uses `dynamic_map`. Equals bitsandbytes `quantize_blockwise` on a CPU, to the byte.

    >>> quantize_absmax(torch.tensor([1.0, 3.0])).offset
    tensor(2.)
    """
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    if not offset.isfinite():
        # The float32 sum has overflowed (constants near 3e38); the mean itself never does.
        offset = absmax.double().mean().float()
    centred = absmax - offset
    blocks = split_blocks(centred, NESTED_BLOCKSIZE)
    nested_absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / nested_absmax).unsqueeze(1)
    codes = assign_8bit(scaled).view(-1)[: centred.numel()]
    return QuantizedAbsmax(codes, nested_absmax, offset, dynamic_map().to(absmax.device))


def assign_8bit(scaled: Tensor) -> Tensor:
    """Find the nearest level of `dynamic_map` as bitsandbytes does on a CPU: through a table.

    It rounds to a grid of 65,536 points on [-1, 1] and looks the code of that point up, so near a
    midpoint the code, uint8, may be a neighbour's. NaN, from a block of zeros, gets code 0.

    >>> assign_8bit(torch.tensor([-1.0, 1.0, torch.nan])).tolist()
    [0, 255, 0]
    """
    points = (scaled.clamp(-1, 1).nan_to_num(nan=-1.0) + 1) * 0.5 * GRID_STEPS + 0.5
    return codes_of_grid().to(scaled.device)[points.int()]


@cache
def codes_of_grid() -> Tensor:
    """Find the code of every point of the grid: uint8, shape `[65536]`, on the CPU."""
    levels = dynamic_map()
    grid = torch.arange(GRID_STEPS + 1, dtype=torch.float32, device="cpu") / GRID_STEPS * 2 - 1
    midpoints = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(grid, midpoints, out_int32=True).to(torch.uint8)


def dequantize_absmax(quantized: QuantizedAbsmax) -> Tensor:
    """Read block constants back: the level of each code, times its constant, plus the offset.

    >>> dequantize_absmax(quantize_absmax(torch.tensor([1.0, 3.0])))
    tensor([1.0070, 3.0000])
    """
    codes, nested_absmax, offset, levels = quantized
    n = codes.numel()
    scaled = split_blocks(levels[codes.int()], NESTED_BLOCKSIZE) * nested_absmax.unsqueeze(1)
    return scaled.view(-1)[:n] + offset
