"""Chapter 3: a tensor held in 4 bits per value, with its constants; to a file and back."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from qlora_edu import kernels
from qlora_edu.blockwise import BLOCKSIZES, DTYPES, unpack_nibbles
from qlora_edu.codebooks import get_levels
from qlora_edu.double_quant import (
    NESTED_BLOCKSIZE,
    QuantizedAbsmax,
    dequantize_absmax,
    quantize_absmax,
)
from qlora_edu.errors import QuantizationError


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """A tensor held in 4 bits per value; `quantize` makes one.

    It is no `torch.Tensor`, but `shape`, `size()`, `numel()`, `dtype`, `device` and `to(device)`
    mean what they mean there. A file to be kept is best a safetensors file of `state_dict()`.
    """

    packed: Tensor  # uint8 `[ceil(n / 2), 1]`: two codes per byte, the first in the high nibble
    constants: Tensor | QuantizedAbsmax
    """The absmax of each block: float32 `[blocks]`, or in 8 bits after double quantisation."""
    levels: Tensor  # The codebook, float32, in the order of its codes
    levels_name: str  # Its name in `LEVELS`, or "custom"
    blocksize: int
    shape: torch.Size  # Of the tensor before quantisation, and so of `dequantize()`
    dtype: torch.dtype  # Of the tensor before quantisation, and so of `dequantize()`

    @property
    def double_quant(self) -> bool:
        """Whether the block constants are quantised too."""
        return isinstance(self.constants, QuantizedAbsmax)

    @property
    def absmax(self) -> Tensor:
        """The block constants in float32, shape `[blocks]`, decoded if need be."""
        if isinstance(self.constants, QuantizedAbsmax):
            return dequantize_absmax(self.constants)
        return self.constants

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.packed.device

    @property
    def requires_grad(self) -> bool:
        """Never: a weight in 4 bits is frozen."""
        return False

    def numel(self) -> int:
        """Count the weights, not the bytes that hold them.

        >>> quantize(torch.ones(3, 5)).numel()
        15
        """
        return self.shape.numel()

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Return the shape, or its entry at `dim`."""
        return self.shape if dim is None else self.shape[dim]

    @property
    def nbytes(self) -> int:
        """Bytes that grow with the tensor: the codes and the constants of the blocks.

        The lookup tables (16 and 256 levels) and the one offset are the same few bytes for a tensor
        of any size, and do not count.
        """
        if isinstance(self.constants, QuantizedAbsmax):
            codes, nested_absmax, *_ = self.constants
            return self.packed.nbytes + codes.nbytes + nested_absmax.nbytes
        return self.packed.nbytes + self.constants.nbytes

    @property
    def bits_per_weight(self) -> float:
        """`8 * nbytes` over the number of weights; 0 for an empty tensor."""
        return 8 * self.nbytes / max(self.numel(), 1)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Rebuild the tensor: level times absmax, in its own shape and dtype (or another dtype).

        A float16 tensor near its limit of 65504 may come back with an infinity, because double
        quantisation rounds the absmax up as often as down; ask for float32 there.

        >>> quantize(torch.tensor([-3.0, 0.0, 3.0]), double_quant=False).dequantize()
        tensor([-3.,  0.,  3.])
        """
        return kernels.dequantize_blockwise(
            self.packed, self.absmax, self.levels, self.blocksize, self.shape, dtype or self.dtype
        )

    def row_chunks(self, dtype: torch.dtype | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Rebuild a matrix a few rows at a time, so that the whole of it never takes up memory.

        Yields:
            Which rows, and those rows of `dequantize(dtype)`; the next chunk overwrites them. A
            chunk is whole blocks, of some 2^20 weights on a CPU and 2^26 on a GPU.

        >>> quantized = quantize(torch.ones(1000, 2048), double_quant=False)
        >>> [(rows.start, tuple(chunk.shape)) for rows, chunk in quantized.row_chunks()]
        [(0, (512, 2048)), (512, (488, 2048))]
        """
        return kernels.row_chunks(self, dtype or self.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """List the tensors by name; nothing is copied.

        >>> list(quantize(torch.ones(64), double_quant=False).tensors())
        ['packed', 'levels', 'absmax']
        """
        found = {"packed": self.packed, "levels": self.levels}
        if isinstance(self.constants, QuantizedAbsmax):
            return found | {f"absmax_{k}": tensor for k, tensor in self.constants._asdict().items()}
        return found | {"absmax": self.constants}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Make the same out of other tensors, named as in `tensors()`."""
        packed, levels, *rest = (tensors[name] for name in self.tensors())
        constants = QuantizedAbsmax(*rest) if self.double_quant else rest[0]
        return replace(self, packed=packed, levels=levels, constants=constants)

    def to(self, device: torch.device | str | int) -> Self:
        """Copy to a device. The dtype of the values is chosen by `dequantize(dtype)`.

        Raises:
            QuantizationError: for a dtype; the packed bytes are never converted.

        >>> quantize(torch.ones(64)).to("cpu").device
        device(type='cpu')
        """
        if not isinstance(device, torch.device | str | int):
            raise QuantizationError(
                f"a QuantizedTensor moves to a device and is never converted, so not to {device}: "
                "dequantize(dtype) gives its values in another dtype"
            )
        return self.with_tensors({k: tensor.to(device) for k, tensor in self.tensors().items()})

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """List every tensor by the key bitsandbytes gives it, ready for a safetensors file.

        Of the codebooks, bitsandbytes itself reads "nf4" and "fp4" back, and refuses the others.

        >>> sorted(quantize(torch.ones(64), double_quant=False).state_dict())
        ['weight', 'weight.absmax', 'weight.quant_map', 'weight.quant_state.bitsandbytes__nf4']
        """
        metadata = {
            "quant_type": self.levels_name,
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        tensors = {prefix: self.packed, f"{prefix}.quant_map": self.levels}
        if isinstance(self.constants, QuantizedAbsmax):
            codes, nested_absmax, offset, nested_levels = self.constants
            tensors[f"{prefix}.absmax"] = codes
            tensors[f"{prefix}.nested_absmax"] = nested_absmax
            tensors[f"{prefix}.nested_quant_map"] = nested_levels
            metadata["nested_blocksize"] = NESTED_BLOCKSIZE
            metadata["nested_dtype"] = "float32"
            metadata["nested_offset"] = offset.item()
        else:
            tensors[f"{prefix}.absmax"] = self.constants
        text = torch.tensor(list(json.dumps(metadata).encode()), dtype=torch.uint8)
        tensors[f"{prefix}.quant_state.bitsandbytes__{self.levels_name}"] = text
        return tensors

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], prefix: str = "weight") -> Self:
        """Rebuild from the keys that `state_dict`, or a bitsandbytes `Linear4bit`, has written.

        Raises:
            QuantizationError: a key is missing, or the tensors do not fit what they claim to be.

        >>> quantized = quantize(torch.ones(3), double_quant=False)
        >>> QuantizedTensor.from_state_dict(quantized.state_dict()).dequantize()
        tensor([1., 1., 1.])
        """
        metadata = _read_metadata(state, prefix)
        constants: Any = _take(state, f"{prefix}.absmax")
        if f"{prefix}.nested_absmax" in state:
            offset = torch.tensor(metadata["nested_offset"], dtype=torch.float32)
            constants = QuantizedAbsmax(
                codes=constants,
                nested_absmax=_take(state, f"{prefix}.nested_absmax"),
                offset=offset.to(constants.device),
                levels=_take(state, f"{prefix}.nested_quant_map"),
            )
        quantized = cls(
            # Sharded training stores the same bytes under a float dtype, in fewer elements.
            packed=_take(state, prefix).contiguous().view(torch.uint8).view(-1, 1),
            constants=constants,
            levels=_take(state, f"{prefix}.quant_map"),
            levels_name=metadata["quant_type"],
            blocksize=metadata["blocksize"],
            shape=torch.Size(metadata["shape"]),
            dtype=metadata["dtype"],
        )
        _check_fit(quantized, prefix)
        return quantized

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor({self.levels_name}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"blocksize={self.blocksize}, {self.bits_per_weight:.3f} bits per weight)"
        )


def _take(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise QuantizationError(f"the state dict has no key {key!r}: it is not whole")
    return state[key].detach()


def _read_metadata(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Read what is no tensor, and what bitsandbytes keeps as JSON in a uint8 tensor."""
    start = f"{prefix}.quant_state.bitsandbytes__"
    keys = [key for key in state if key.startswith(start)]
    if len(keys) != 1:
        raise QuantizationError(
            f"expected one key {start}<levels> in the state dict, found {keys or 'none'}: "
            f"check the prefix, and that {prefix!r} was saved after quantisation"
        )
    try:
        metadata = json.loads(bytes(state[keys[0]].tolist()))
        metadata["dtype"] = {str(dtype): dtype for dtype in DTYPES}[f"torch.{metadata['dtype']}"]
        metadata["shape"] = [int(size) for size in metadata["shape"]]
        if f"{prefix}.nested_absmax" in state:
            metadata["nested_offset"] = float(metadata["nested_offset"])
        valid = (
            f"{start}{metadata['quant_type']}" == keys[0]
            and metadata["blocksize"] in BLOCKSIZES
            and metadata.get("nested_blocksize", NESTED_BLOCKSIZE) == NESTED_BLOCKSIZE
            and min(metadata["shape"], default=0) >= 0
        )
    except (KeyError, TypeError, ValueError) as error:
        raise QuantizationError(f"{keys[0]} is damaged: {error!r}") from error
    if not valid:
        raise QuantizationError(f"{keys[0]} describes no tensor that fits here: {metadata}")
    return metadata


def _check_fit(quantized: QuantizedTensor, prefix: str) -> None:
    """Compare every tensor's dtype and size with what the shape and the block size ask for."""
    n = quantized.shape.numel()
    blocks = -(-n // quantized.blocksize)
    wanted = [("", quantized.packed, torch.uint8, -(-n // 2))]
    if isinstance(quantized.constants, QuantizedAbsmax):
        codes, nested_absmax, _, nested_levels = quantized.constants
        nested_blocks = -(-blocks // NESTED_BLOCKSIZE)
        wanted += [
            (".absmax", codes, torch.uint8, blocks),
            (".nested_absmax", nested_absmax, torch.float32, nested_blocks),
            (".nested_quant_map", nested_levels, torch.float32, 256),
        ]
    else:
        wanted += [(".absmax", quantized.constants, torch.float32, blocks)]
    for suffix, tensor, dtype, size in wanted:
        if tensor.dtype != dtype or tensor.numel() != size:
            raise QuantizationError(
                f"{prefix}{suffix} holds {tensor.numel()} x {tensor.dtype}, but shape "
                f"{tuple(quantized.shape)} in blocks of {quantized.blocksize} asks for "
                f"{size} x {dtype}"
            )
    try:
        n_levels = len(get_levels(quantized.levels))
    except QuantizationError as error:
        raise QuantizationError(f"{prefix}.quant_map: {error}") from error
    if n_levels < 16 and n and int(unpack_nibbles(quantized.packed, n).max()) >= n_levels:
        raise QuantizationError(f"{prefix} holds a code beyond its {n_levels} levels")
    if not quantized.absmax.isfinite().all():
        raise QuantizationError(
            f"{prefix}: a block constant is NaN or infinite, so the file is damaged"
        )


def quantize(
    weight: Tensor,
    levels: str | Tensor = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    compiled: bool = False,
) -> QuantizedTensor:
    """Quantise a tensor to 4 bits per weight.

    Args:
        weight: any shape; float32, float16 or bfloat16; finite.
        levels: a name in `LEVELS`, or a tensor of 2 to 16 levels in [-1, 1].
        blocksize: weights that share one absmax; one of `BLOCKSIZES`.
        double_quant: whether to write the absmax in 8 bits.
        compiled: many times faster, after some seconds of compiling.

    Raises:
        QuantizationError: an argument cannot be used, or `weight` holds NaN or infinity.
        NotReadyError: `compiled`, and no compiler.

    Source: QLoRA (arXiv 2305.14314) section 3; for "nf4" and "fp4" equals bitsandbytes
    `quantize_4bit(..., compress_statistics=double_quant)` on a CPU, to the byte.

    >>> quantize(torch.randn(256, 256))
    QuantizedTensor(nf4, shape=(256, 256), dtype=torch.float32, blocksize=64, 4.127 bits per weight)
    """
    check_weight(weight)
    check_blocksize(blocksize)
    table = get_levels(levels, blocksize)
    packed, absmax = kernels.quantize_blockwise(weight, table, blocksize, compiled)
    if not absmax.isfinite().all():  # an absmax is NaN or infinite if one of its weights is
        _refuse_non_finite(weight)
    return QuantizedTensor(
        packed=packed,
        constants=quantize_absmax(absmax) if double_quant else absmax,
        levels=table.to(weight.device),
        levels_name=levels if isinstance(levels, str) else "custom",
        blocksize=blocksize,
        shape=weight.shape,
        dtype=weight.dtype,
    )


def check_weight(weight: Tensor) -> None:
    """Refuse, by `QuantizationError`, what is no tensor or of another dtype than `DTYPES`."""
    if not isinstance(weight, Tensor):
        raise QuantizationError(f"weight must be a torch.Tensor, got {type(weight).__name__}")
    if weight.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise QuantizationError(
            f"cannot quantise a tensor of dtype {weight.dtype}: convert it to one of {names}"
        )


def check_blocksize(blocksize: int) -> None:
    """Refuse, by `QuantizationError`, a block size that is not one of `BLOCKSIZES`."""
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise QuantizationError(
            f"unsupported blocksize {blocksize!r}: use one of {', '.join(map(str, BLOCKSIZES))}"
        )


def _refuse_non_finite(weight: Tensor) -> None:
    bad = (~torch.isfinite(weight)).nonzero()
    first = tuple(bad[0].tolist())
    raise QuantizationError(
        f"weight holds {len(bad)} non-finite value(s), the first, {weight[first].item()}, at "
        f"index {first}: repair the checkpoint or replace them before quantising"
    )


# So that torch.load(..., weights_only=True) reads what torch.save has written: no code comes along.
torch.serialization.add_safe_globals([QuantizedTensor, QuantizedAbsmax])
