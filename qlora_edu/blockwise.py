"""Chapter 2: blocks, absmax and nibbles.

The levels of chapter 1 lie between -1 and 1; weights do not. So the tensor is laid out flat and
cut into blocks of, say, 64. The largest magnitude of a block, its *absmax*, is kept in float32, and
the block divided by it fits the levels. One outlier then spoils one block and not the whole tensor.
Each weight becomes a 4-bit code, a nibble, and two nibbles share a byte.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_edu.errors import QuantizationError

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
    """Refuse what cannot be quantised: no tensor, or another dtype than `DTYPES`.

    Raises:
        DtypeError: `weight` is no tensor or has an unsupported dtype.
    """
    if not isinstance(weight, Tensor):
        raise DtypeError(f"weight must be a torch.Tensor, got {type(weight).__name__}")
    if weight.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise DtypeError(
            f"cannot quantise a tensor of dtype {weight.dtype}: convert it to one of {names}"
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
