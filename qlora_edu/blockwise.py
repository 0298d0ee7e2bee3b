"""Chapter 2: blocks, absmax and nibbles.

The levels of chapter 1 lie between -1 and 1; weights do not. So the tensor is laid out flat and
cut into blocks of, say, 64. The largest magnitude of a block, its *absmax*, is kept in float32, and
the block divided by it fits the levels. One outlier then spoils one block and not the whole tensor.
Each weight becomes a 4-bit code, a nibble, and two nibbles share a byte.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_edu.codebooks import QuantizationError, assign

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# bitsandbytes never divides by less than this; a subnormal in float32.
_SMALLEST_SCALE = 1e-38


class NonFiniteError(QuantizationError):
    """The tensor holds NaN or infinity, which would spoil every weight of its block."""


class BlocksizeError(QuantizationError):
    """The block size is not one of `BLOCKSIZES`."""


class DtypeError(QuantizationError, TypeError):
    """The tensor is of a type that cannot be quantised."""


def check_weight(weight: Tensor) -> None:
    """Refuse what cannot be quantised: no tensor, another dtype than `DTYPES`, NaN or infinity.

    Raises:
        DtypeError: `weight` is no tensor or has an unsupported dtype.
        NonFiniteError: `weight` holds NaN or infinity; says how many, and where the first one is.
    """
    if not isinstance(weight, Tensor):
        raise DtypeError(f"weight must be a torch.Tensor, got {type(weight).__name__}")
    if weight.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise DtypeError(
            f"cannot quantise a tensor of dtype {weight.dtype}: convert it to one of {names}"
        )
    finite = torch.isfinite(weight)
    if not finite.all():
        bad = (~finite).nonzero()
        first = tuple(bad[0].tolist())
        raise NonFiniteError(
            f"weight holds {len(bad)} non-finite value(s), the first, {weight[first].item()}, at "
            f"index {first}: repair the checkpoint or replace them before quantising"
        )


def check_blocksize(blocksize: int) -> None:
    """Refuse a block size that is not one of `BLOCKSIZES`.

    Raises:
        BlocksizeError: names the value and the supported sizes.
    """
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise BlocksizeError(
            f"unsupported blocksize {blocksize!r}: use one of {', '.join(map(str, BLOCKSIZES))}"
        )


def split_blocks(x: Tensor, blocksize: int) -> Tensor:
    """Lay x out flat, read row by row, and cut it into blocks.

    Returns:
        float32, shape `[ceil(n / blocksize), blocksize]`; a short last block is filled with zeros.

    >>> split_blocks(torch.tensor([[1.0, 2.0, 3.0]]), 2)
    tensor([[1., 2.],
            [3., 0.]])
    """
    flat = x.detach().reshape(-1).float()
    missing = -flat.numel() % blocksize
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, blocksize)


def block_absmax(x: Tensor, blocksize: int) -> Tensor:
    """Find the largest magnitude of each block.

    Args:
        x: any shape, floating; read row by row.
        blocksize: weights per block; the last block may be shorter.

    Returns:
        float32, shape `[ceil(n / blocksize)]`.

    >>> block_absmax(torch.tensor([1.0, -3.0, 0.5, 0.25, 2.0]), 2)
    tensor([3.0000, 0.5000, 2.0000])
    """
    return split_blocks(x, blocksize).abs().amax(dim=1)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Put two 4-bit codes into each byte, the first in the high nibble.

    Args:
        codes: uint8 below 16, n of them; an odd n is filled up with code 0.

    Returns:
        uint8, shape `[ceil(n / 2), 1]`.

    >>> pack_nibbles(torch.tensor([0, 15, 7], dtype=torch.uint8)).flatten().tolist()
    [15, 112]
    """
    codes = codes.reshape(-1)
    pairs = F.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
    return (pairs[:, :1] << 4) | pairs[:, 1:]


def unpack_nibbles(packed: Tensor, n: int) -> Tensor:
    """Read n 4-bit codes back; the inverse of `pack_nibbles`.

    Returns:
        uint8, shape `[n]`.

    >>> unpack_nibbles(torch.tensor([[15], [112]], dtype=torch.uint8), 3).tolist()
    [0, 15, 7]
    """
    packed = packed.reshape(-1, 1)
    return torch.cat([packed >> 4, packed & 0x0F], dim=1).view(-1)[:n]


def quantize_blockwise(weight: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantise a tensor to 4 bits, block by block.

    Args:
        weight: any shape; float32, float16 or bfloat16.
        levels: a codebook of chapter 1, 1-D.
        blocksize: one of `BLOCKSIZES`.

    Returns:
        The packed codes, uint8 `[ceil(n / 2), 1]`, and absmax, float32 `[ceil(n / blocksize)]`.

    Raises:
        DtypeError, NonFiniteError, BlocksizeError.

    Source: QLoRA (arXiv 2305.14314) equation 1; equals bitsandbytes `quantize_4bit` on a CPU, to
    the byte.

    >>> weight, levels = torch.tensor([-2.0, 2.0]), torch.tensor([-1.0, 1.0])
    >>> packed, absmax = quantize_blockwise(weight, levels, blocksize=64)
    >>> packed.item(), absmax.item()
    (1, 2.0)
    """
    check_weight(weight)
    check_blocksize(blocksize)
    n = weight.numel()
    blocks = split_blocks(weight, blocksize)
    absmax = block_absmax(weight, blocksize)
    scaled = blocks * (1.0 / absmax.clamp(min=_SMALLEST_SCALE)).unsqueeze(1)
    if n % blocksize:
        # bitsandbytes multiplies whole blocks by the reciprocal but divides a shorter last one,
        # and keeps the clamped absmax there. The two can round to different codes.
        absmax[-1].clamp_(min=_SMALLEST_SCALE)
        scaled[-1] = blocks[-1] / absmax[-1]
    # Codes beyond n are dropped, but for one that completes the last byte: it stands for zero.
    scaled = scaled.clamp(-1, 1).view(-1)[: n + n % 2]
    return pack_nibbles(assign(scaled, levels)), absmax


def dequantize_blockwise(
    packed: Tensor,
    absmax: Tensor,
    levels: Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Rebuild the weights: the level of each code times the absmax of its block.

    Args:
        packed: uint8 `[ceil(n / 2), 1]`.
        absmax: float32 `[ceil(n / blocksize)]`.
        levels: the codebook, 1-D.
        blocksize: weights per block.
        shape: of the result; n is its product.
        dtype: of the result. The product is computed in float32 and then rounded.

    >>> packed, levels = torch.tensor([[1]], dtype=torch.uint8), torch.tensor([-1.0, 1.0])
    >>> dequantize_blockwise(packed, torch.tensor([2.0]), levels, 64, (2,), torch.float32)
    tensor([-2.,  2.])
    """
    n = math.prod(shape)
    values = levels.to(packed.device)[unpack_nibbles(packed, n).int()]
    scaled = split_blocks(values, blocksize) * absmax.unsqueeze(1)
    return scaled.view(-1)[:n].reshape(tuple(shape)).to(dtype)
