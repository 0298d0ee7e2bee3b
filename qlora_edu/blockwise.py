"""Chapter 2: blocks, absmax and nibbles.

The levels of chapter 1 lie between -1 and 1. So the tensor is read row by row and cut into blocks
of, say, 64, and each is divided by its largest magnitude, its *absmax*, which is kept in float32.
One outlier then spoils one block and not the whole tensor. Each weight becomes a 4-bit code, a
nibble, and two nibbles share a byte. `kernels` does the same to every byte, in less time.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_edu.codebooks import assign

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALLEST_ABSMAX = 1e-38  # bitsandbytes never divides by less; a subnormal in float32


def split_blocks(x: Tensor, blocksize: int) -> Tensor:
    """Read x row by row and cut it into blocks: float32 `[ceil(n / blocksize), blocksize]`.

    A short last block is filled with zeros.

    >>> split_blocks(torch.tensor([[1.0, 2.0, 3.0]]), 2)
    tensor([[1., 2.],
            [3., 0.]])
    """
    flat = x.detach().reshape(-1).float()
    missing = -flat.numel() % blocksize
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, blocksize)


def block_absmax(x: Tensor, blocksize: int) -> Tensor:
    """Find the largest magnitude of each block: float32, shape `[ceil(n / blocksize)]`.

    >>> block_absmax(torch.tensor([1.0, -3.0, 0.5, 0.25, 2.0]), 2)
    tensor([3.0000, 0.5000, 2.0000])
    """
    return split_blocks(x, blocksize).abs().amax(dim=1)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Put two 4-bit codes into each byte, the first in the high nibble.

    Takes n codes, uint8 below 16; an odd n is filled up with code 0. Returns `[ceil(n / 2), 1]`.

    >>> pack_nibbles(torch.tensor([0, 15, 7], dtype=torch.uint8)).flatten().tolist()
    [15, 112]
    """
    codes = codes.reshape(-1)
    pairs = F.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
    return (pairs[:, :1] << 4) | pairs[:, 1:]


def unpack_nibbles(packed: Tensor, n: int) -> Tensor:
    """Read n 4-bit codes back, uint8 `[n]`; the inverse of `pack_nibbles`.

    >>> unpack_nibbles(torch.tensor([[15], [112]], dtype=torch.uint8), 3).tolist()
    [0, 15, 7]
    """
    packed = packed.reshape(-1, 1)
    return torch.cat([packed >> 4, packed & 0x0F], dim=1).view(-1)[:n]


def quantize_blockwise(weight: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantise a tensor to 4 bits, block by block.

    Takes n finite numbers in one of `DTYPES`, and a codebook of chapter 1. Returns the packed
    codes, uint8 `[ceil(n / 2), 1]`, and absmax, float32 `[ceil(n / blocksize)]`.

    Source: QLoRA (arXiv 2305.14314) equation 1; equals bitsandbytes `quantize_4bit` on a CPU.

    >>> quantize_blockwise(torch.tensor([-2.0, 2.0]), torch.tensor([-1.0, 1.0]), blocksize=64)
    (tensor([[1]], dtype=torch.uint8), tensor([2.]))
    """
    n, blocks = weight.numel(), split_blocks(weight, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1 / absmax.clamp(min=SMALLEST_ABSMAX))[:, None]
    if n % blocksize:  # bitsandbytes divides a short last block, where it multiplies whole ones
        absmax[-1] = absmax[-1].clamp(min=SMALLEST_ABSMAX)
        scaled[-1] = blocks[-1] / absmax[-1]
    codes = assign(scaled, levels).view(-1)
    return pack_nibbles(codes[: n + n % 2]), absmax  # if n is odd, one code more: that of a zero


def dequantize_blockwise(
    packed: Tensor,
    absmax: Tensor,
    levels: Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Rebuild the weights: the level of each code times the absmax of its block.

    The product is computed in float32, and then rounded to the `dtype` of the result.

    >>> packed, levels = torch.tensor([[1]], dtype=torch.uint8), torch.tensor([-1.0, 1.0])
    >>> dequantize_blockwise(packed, torch.tensor([2.0]), levels, 64, (2,), torch.float32)
    tensor([-2.,  2.])
    """
    n = math.prod(shape)
    values = levels[unpack_nibbles(packed, n).int()]
    return (values * absmax.repeat_interleave(blocksize)[:n]).to(dtype).view(tuple(shape))


def read_back(weight: Tensor, levels: Tensor, blocksize: int) -> Tensor:
    """Quantise a tensor and read it back: what a model computes with after quantisation.

    >>> read_back(torch.tensor([-3.0, 0.1, 4.0]), torch.tensor([-1.0, 0.0, 1.0]), 64)
    tensor([-4.,  0.,  4.])
    """
    packed, absmax = quantize_blockwise(weight, levels, blocksize)
    return dequantize_blockwise(packed, absmax, levels, blocksize, weight.shape, weight.dtype)
