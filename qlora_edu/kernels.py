"""Fast twins of what the chapters derive: the same result, to the byte or to the bit, in less time.

A chapter holds the definition, a few lines to be read aloud. What runs on real weights is here:
worked off in chunks that stay in the processor's cache, or compiled. A test holds each twin equal
to its definition.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_edu.blockwise import (
    _SMALLEST_SCALE,
    NonFiniteError,
    check_blocksize,
    check_weight,
    pack_nibbles,
    unpack_nibbles,
)
from qlora_edu.codebooks import assign
from qlora_edu.errors import QuantizationError

CHUNK = 2**18
"""Weights that a CPU works on at a time: few enough for its cache, and whole blocks of any size."""

CHUNK_SIZE: ContextVar[int | None] = ContextVar("CHUNK_SIZE", default=None)
"""How many weights to work on at a time, a multiple of 4096; None: as many as suit the device."""

UNPACKING: ContextVar[Callable[[], AbstractContextManager[object]] | None] = ContextVar(
    "UNPACKING", default=None
)
"""Makes a context manager that is entered around each chunk that is unpacked; None: nothing is."""


class CompilerError(QuantizationError):
    """The quantiser could not be compiled on this machine."""


def _refuse_non_finite(weight: Tensor) -> None:
    bad = (~torch.isfinite(weight)).nonzero()
    first = tuple(bad[0].tolist())
    raise NonFiniteError(
        f"weight holds {len(bad)} non-finite value(s), the first, {weight[first].item()}, at "
        f"index {first}: repair the checkpoint or replace them before quantising"
    )


def _quantize_blocks(blocks: Tensor, midpoints: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise whole blocks, float32 `[blocks, blocksize]`: the heart of `quantize_blockwise`.

    A code is the number of midpoints below the scaled weight, so fifteen comparisons and a sum give
    it; a compiler turns them into a few vector instructions, without a branch or a table.
    """
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / absmax.clamp(min=_SMALLEST_SCALE)).unsqueeze(1)
    codes = torch.zeros_like(scaled, dtype=torch.int32)
    for midpoint in midpoints.unbind():
        codes += scaled > midpoint
    return pack_nibbles(codes).to(torch.uint8), absmax


def chunk_size(device: torch.device, chunks: int = 1) -> int:
    """Say how many weights to work on at a time: some `CHUNK`s on a CPU, 2^26 elsewhere.

    Starting a call takes a GPU as long as computing with a million weights, so it gets more than
    any cache holds. `CHUNK_SIZE` overrules both.
    """
    return CHUNK_SIZE.get() or (chunks * CHUNK if device.type == "cpu" else 2**26)


def compiled_chunk_size(device: torch.device) -> int:
    """How many weights to give to compiled code at a time: four `CHUNK`s on a CPU, 2^24 elsewhere.

    Only whole chunks are compiled, so they are no larger than the layers of a 7B.
    """
    return 4 * CHUNK if device.type == "cpu" else 2**24


def _two_in_a_byte(of_code: Tensor) -> Tensor:
    """List, for each of the 256 bytes, what its two codes stand for: `[16]` becomes `[256, 2]`."""
    return torch.stack([of_code.repeat_interleave(16), of_code.repeat(16)], dim=1)


@cache
def _compile() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_quantize_blocks, dynamic=False)


def _compiled_quantize_blocks(blocks: Tensor, midpoints: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return _compile()(blocks, midpoints)
    except RuntimeError as error:
        raise CompilerError(
            "compiled=True needs a C++ compiler and Python's headers (on Debian: apt-get install "
            "g++ python3-dev), on a GPU Triton too; without compiled=True the result is the "
            "same, to the byte"
        ) from error


@torch.no_grad()  # of grad mode, too, the compiler would make one version each
def quantize_blockwise(
    weight: Tensor, levels: Tensor, blocksize: int, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantise a tensor to 4 bits, block by block.

    It goes through the tensor in chunks, so whatever its size, it needs a few megabytes beside the
    result (and a copy, if the tensor is not contiguous).

    Args:
        weight: any shape; float32, float16 or bfloat16.
        levels: a codebook of chapter 1, 1-D, of at most 16 levels.
        blocksize: one of `BLOCKSIZES`.
        compiled: run chunks of a million weights (16 million on a GPU) through `torch.compile`,
            which needs a C++ compiler and some seconds at the first call. The result is the same to
            the byte.

    Returns:
        The packed codes, uint8 `[ceil(n / 2), 1]`, and absmax, float32 `[ceil(n / blocksize)]`.

    Raises:
        DtypeError, NonFiniteError, BlocksizeError.
        QuantizationError: more than 16 levels.
        CompilerError: `compiled`, and no compiler.

    Source: QLoRA (arXiv 2305.14314) equation 1; equals bitsandbytes `quantize_4bit` on a CPU, to
    the byte.

    >>> weight, levels = torch.tensor([-2.0, 2.0]), torch.tensor([-1.0, 1.0])
    >>> packed, absmax = quantize_blockwise(weight, levels, blocksize=64)
    >>> packed.item(), absmax.item()
    (1, 2.0)
    """
    check_weight(weight)
    check_blocksize(blocksize)
    if len(levels) > 16:
        raise QuantizationError(f"a code has 4 bits, too few for {len(levels)} levels")
    flat, n = weight.detach().reshape(-1), weight.numel()
    ascending, order = levels.to(device=weight.device, dtype=torch.float32).sort(stable=True)
    # Sixteen levels have fifteen midpoints; above infinity there is nothing to count.
    midpoints = F.pad((ascending[:-1] + ascending[1:]) / 2, (0, 16 - len(levels)), value=math.inf)
    # What is counted is a rank in ascending order; FP4's codes are in another one.
    in_order = torch.equal(order, torch.arange(len(levels), device=order.device))
    ranked = F.pad(order.to(torch.uint8), (0, 16 - len(levels)))
    byte_of_ranks = pack_nibbles(_two_in_a_byte(ranked)).flatten()
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-n // blocksize), device=weight.device)
    in_blocks = n - n % blocksize
    # Compiled code keeps its temporaries in registers and likes longer chunks.
    chunk = (compiled_chunk_size if compiled else chunk_size)(weight.device)
    for start in range(0, in_blocks, chunk):
        stop = min(start + chunk, in_blocks)
        # Only whole chunks are compiled: the remainder would be compiled anew for every size.
        whole = compiled and stop - start == chunk
        kernel = _compiled_quantize_blocks if whole else _quantize_blocks
        ranks, largest = kernel(flat[start:stop].float().view(-1, blocksize), midpoints)
        packed[start // 2 : stop // 2] = ranks if in_order else byte_of_ranks[ranks.int()]
        absmax[start // blocksize : stop // blocksize] = largest
    if in_blocks < n:
        # bitsandbytes multiplies whole blocks by the reciprocal but divides a shorter last one,
        # and keeps the clamped absmax there. The two can round to different codes. If n is odd,
        # the code that completes the last byte stands for zero.
        last = F.pad(flat[in_blocks:].float(), (0, n % 2))
        absmax[-1] = last.abs().max().clamp(min=_SMALLEST_SCALE)
        packed[in_blocks // 2 :] = pack_nibbles(assign(last / absmax[-1], levels))
    if not absmax.isfinite().all():  # an absmax is NaN or infinite if one of its weights is
        _refuse_non_finite(weight)
    return packed, absmax


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
    flat = torch.empty(n, dtype=dtype, device=packed.device)
    chunk = chunk_size(packed.device)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        values = decode(
            packed[start // 2 : (stop + 1) // 2],
            absmax[start // blocksize : -(-stop // blocksize)],
            levels,
            blocksize,
        )
        flat[start:stop] = values[: stop - start]
    return flat.view(tuple(shape))


def decode(
    packed: Tensor, absmax: Tensor, levels: Tensor, blocksize: int, out: Tensor | None = None
) -> Tensor:
    """Look the levels of packed codes up and multiply them by the absmax of their blocks.

    The heart of `dequantize_blockwise`. Both levels of a byte travel as one 8-byte number: half the
    look-ups, and PyTorch's fast kind. `out` is int64 and holds a number for each byte.

    Returns:
        float32, two for each byte of `packed`; over the memory of `out`, if that is given.

    >>> levels = torch.tensor([-1.0, 1.0])
    >>> decode(torch.tensor([[1]], dtype=torch.uint8), torch.tensor([2.0]), levels, 64)
    tensor([-2.,  2.])
    """
    if len(levels) < 16:
        levels = F.pad(levels, (0, 16 - len(levels)))
    pairs = levels.index_select(0, _codes_in_bytes(packed.device)).view(torch.int64)
    values = torch.index_select(pairs, 0, packed.view(-1).int(), out=out).view(torch.float32)
    in_blocks = len(values) // blocksize * blocksize
    values[:in_blocks].view(-1, blocksize).mul_(absmax[: in_blocks // blocksize, None])
    if in_blocks < len(values):
        values[in_blocks:] *= absmax[-1]
    return values


@cache
def _codes_in_bytes(device: torch.device) -> Tensor:
    """List the two codes of each of the 256 bytes, one after the other."""
    return unpack_nibbles(torch.arange(256, dtype=torch.uint8), 512).int().to(device)


def read_back(weight: Tensor, levels: Tensor, blocksize: int) -> Tensor:
    """Quantise a tensor and read it back: what a model computes with after quantisation.

    Args:
        weight: any shape; float32, float16 or bfloat16.
        levels: a codebook of chapter 1, 1-D.
        blocksize: one of `BLOCKSIZES`.

    Returns:
        The shape and dtype of `weight`.

    >>> read_back(torch.tensor([-3.0, 0.1, 4.0]), torch.tensor([-1.0, 0.0, 1.0]), 64)
    tensor([-4.,  0.,  4.])
    """
    packed, absmax = quantize_blockwise(weight, levels, blocksize)
    return dequantize_blockwise(packed, absmax, levels, blocksize, weight.shape, weight.dtype)
