"""Chapter 2: blocks, absmax and nibbles.

The levels of chapter 1 lie between -1 and 1; weights do not. So the tensor is laid out flat and
cut into blocks of, say, 64. The largest magnitude of a block, its *absmax*, is kept in float32, and
the block divided by it fits the levels. One outlier then spoils one block and not the whole tensor.
Each weight becomes a 4-bit code, a nibble, and two nibbles share a byte.
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_edu.codebooks import QuantizationError, assign

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

PIECE = 2**18
"""Weights that a CPU works on at a time: few enough for its cache, and whole blocks of any size."""

# bitsandbytes never divides by less than this; a subnormal in float32.
_SMALLEST_SCALE = 1e-38


class NonFiniteError(QuantizationError):
    """The tensor holds NaN or infinity, which would spoil every weight of its block."""


class BlocksizeError(QuantizationError):
    """The block size is not one of `BLOCKSIZES`."""


class CompilerError(QuantizationError):
    """The quantiser could not be compiled on this machine."""


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


def _refuse_non_finite(weight: Tensor) -> None:
    bad = (~torch.isfinite(weight)).nonzero()
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


def piece_size(device: torch.device, pieces: int = 1) -> int:
    """How many weights to work on at a time: some `PIECE`s on a CPU, 2^26 elsewhere.

    A GPU wants more than any cache holds: starting a call takes it as long as a million weights.
    """
    return pieces * PIECE if device.type == "cpu" else 2**26


def compiled_piece_size(device: torch.device) -> int:
    """How many weights to give to compiled code at a time: four `PIECE`s on a CPU, 2^24 elsewhere.

    Only whole pieces are compiled, so they are no larger than the layers of a 7B.
    """
    return 4 * PIECE if device.type == "cpu" else 2**24


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

    It goes through the tensor in pieces, so whatever its size, it needs a few megabytes beside the
    result (and a copy, if the tensor is not contiguous).

    Args:
        weight: any shape; float32, float16 or bfloat16.
        levels: a codebook of chapter 1, 1-D, of at most 16 levels.
        blocksize: one of `BLOCKSIZES`.
        compiled: run pieces of a million weights (16 million on a GPU) through `torch.compile`,
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
    # Compiled code keeps its temporaries in registers and likes longer pieces.
    piece = (compiled_piece_size if compiled else piece_size)(weight.device)
    for start in range(0, in_blocks, piece):
        stop = min(start + piece, in_blocks)
        # Only whole pieces are compiled: the remainder would be compiled anew for every size.
        whole = compiled and stop - start == piece
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
    piece = piece_size(packed.device)
    for start in range(0, n, piece):
        stop = min(start + piece, n)
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


class InspectionError(QuantizationError):
    """The weight asked for is not to be found in the tensor or the file."""


class InspectedWeight(NamedTuple):
    """One weight of a quantised tensor, followed from its place to its bits and back."""

    position: int
    """In the tensor laid out flat, row by row."""
    block: int
    """Which block; `position // blocksize`."""
    absmax: float
    """The constant of that block."""
    byte: int
    """Which byte of the packed codes; `position // 2`."""
    value: int
    """What the byte holds, 0 to 255."""
    half: str
    """Which half of it is this weight's: "high" at an even position, "low" at an odd one."""
    code: int
    """The nibble, 0 to 15."""
    level: float
    """The entry of the codebook at that code."""
    dequantized: float
    """level × absmax, in the dtype of the tensor."""
    offset: int | None = None
    """Where in the file the byte is, counted from its start; None if it is in memory."""

    def error(self, weight: float) -> float:
        """Subtract the weight before quantisation from what is read back."""
        return self.dequantized - float(weight)

    def __str__(self) -> str:
        """Write the way from the place to the value, a line for each step."""
        place = "" if self.offset is None else f", byte {self.offset} of the file"
        first, second = f"{self.value >> 4:04b}", f"{self.value & 15:04b}"
        bits = f"[{first}] {second}" if self.half == "high" else f"{first} [{second}]"
        return (
            f"position     {self.position}\n"
            f"byte         {self.byte}{place}\n"
            f"holds        0x{self.value:02X} = {bits}\n"
            f"code         {self.code}, the {self.half} nibble\n"
            f"level        {self.level:+.6f}\n"
            f"block        {self.block}\n"
            f"absmax       {self.absmax:.6g}\n"
            f"dequantised  {self.dequantized:+.6g}"
        )


def inspect_weight(
    packed: Tensor,
    absmax: Tensor,
    levels: Tensor,
    blocksize: int,
    shape: Sequence[int],
    index: int | Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> InspectedWeight:
    """Follow one weight of a quantised tensor to its byte, its nibble and its block.

    Args:
        packed, absmax, levels, blocksize, shape: as for `dequantize_blockwise`.
        index: of the weight in a tensor of that shape; negative numbers count from the end.
        dtype: of the weights before quantisation.

    Raises:
        InspectionError: there is no such weight.

    >>> packed, levels = torch.tensor([[0x0F]], dtype=torch.uint8), torch.linspace(-1, 1, 16)
    >>> found = inspect_weight(packed, torch.tensor([3.0]), levels, 64, (1, 2), (0, 1))
    >>> found.byte, found.half, found.code, found.dequantized
    (0, 'low', 15, 3.0)
    """
    position = _flat_position(index, shape)
    block, byte = position // blocksize, position // 2
    if packed.numel() <= byte or absmax.numel() <= block:
        raise InspectionError(
            f"{packed.numel()} byte(s) and {absmax.numel()} constant(s) do not hold weight "
            f"{position} of shape {tuple(shape)} in blocks of {blocksize}"
        )
    return _inspected(
        position, blocksize, int(packed.view(-1)[byte]), absmax.view(-1)[block], levels, dtype
    )


def inspect_file(path: str | Path, name: str, index: int | Sequence[int]) -> InspectedWeight:
    """Follow one weight into a safetensors file that bitsandbytes wrote; read only its bytes.

    The file starts with the length of its header, 8 bytes; then the header, JSON that says of each
    tensor its dtype, its shape and where its bytes begin; then the bytes. So one seek finds the
    byte that holds the weight, and another its block's constant.

    Args:
        path: a file with the keys of a `Linear4bit` without double quantisation.
        name: of the quantised weight, such as `weight`.
        index: of the weight in the tensor before quantisation.

    Raises:
        InspectionError: no such weight, no such name, or its constants are quantised too.

    Source: the layout is the one of the safetensors README, "Format".
    """
    with Path(path).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))

        def read(key: str, start: int = 0, length: int | None = None) -> bytes:
            if key not in header:
                raise InspectionError(f"{path} holds no tensor {key!r}")
            begin, end = header[key]["data_offsets"]
            if length is None:
                length = end - begin - start
            file.seek(8 + size + begin + start)
            return file.read(length)

        keys = [key for key in header if key.startswith(f"{name}.quant_state.bitsandbytes__")]
        if len(keys) != 1 or f"{name}.nested_absmax" in header:
            raise InspectionError(
                f"{name!r} of {path} is not a 4-bit weight with plain float32 constants"
                + (": it is double-quantised, see chapter 3" if keys else "")
            )
        facts = json.loads(read(keys[0]))
        position = _flat_position(index, facts["shape"])
        value = read(name, position // 2, 1)[0]
        constant = read(f"{name}.absmax", 4 * (position // facts["blocksize"]), 4)
        table = read(f"{name}.quant_map")
    found = _inspected(
        position,
        facts["blocksize"],
        value,
        torch.frombuffer(bytearray(constant), dtype=torch.float32)[0],
        torch.frombuffer(bytearray(table), dtype=torch.float32),
        getattr(torch, facts["dtype"]),
    )
    return found._replace(offset=8 + size + header[name]["data_offsets"][0] + found.byte)


def _flat_position(index: int | Sequence[int], shape: Sequence[int]) -> int:
    indices = (index,) if isinstance(index, int) else tuple(index)
    if len(indices) != len(shape) or any(
        not -n <= i < n for i, n in zip(indices, shape, strict=True)
    ):
        raise InspectionError(f"no weight at index {indices} of a tensor of shape {tuple(shape)}")
    position = 0
    for i, n in zip(indices, shape, strict=True):
        position = position * n + i % n
    return position


def _inspected(
    position: int,
    blocksize: int,
    value: int,
    constant: Tensor,
    levels: Tensor,
    dtype: torch.dtype,
) -> InspectedWeight:
    half = "low" if position % 2 else "high"
    code = value & 15 if position % 2 else value >> 4
    if code >= levels.numel():
        raise InspectionError(f"code {code} is beyond the {levels.numel()} levels of the table")
    return InspectedWeight(
        position=position,
        block=position // blocksize,
        absmax=constant.item(),
        byte=position // 2,
        value=value,
        half=half,
        code=code,
        level=levels[code].item(),
        dequantized=(levels[code] * constant).to(dtype).item(),
    )
