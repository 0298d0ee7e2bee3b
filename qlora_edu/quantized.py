"""Chapter 3: a tensor held in 4 bits per value, with its constants; to a file and back."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from qlora_edu.blockwise import BLOCKSIZES, DTYPES, check_blocksize, unpack_nibbles
from qlora_edu.codebooks import get_levels
from qlora_edu.double_quant import (
    NESTED_BLOCKSIZE,
    QuantizedAbsmax,
    dequantize_absmax,
    quantize_absmax,
)
from qlora_edu.errors import QuantizationError
from qlora_edu.kernels import (
    UNPACKING,
    chunk_size,
    decode,
    dequantize_blockwise,
    quantize_blockwise,
)


class StateDictError(QuantizationError):
    """A state dict does not describe a quantised tensor."""


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """A tensor held in 4 bits a value; `quantize` makes one."""

    packed: Tensor
    """uint8 `[ceil(n / 2), 1]`: two codes a byte, the first in the high nibble."""
    constants: Tensor | QuantizedAbsmax
    """The absmax of each block: float32 `[blocks]`, or in 8 bits after double quantisation."""
    levels: Tensor
    """The codebook, float32, in the order of its codes."""
    levels_name: str
    """Its name in `LEVELS`, or "custom"."""
    blocksize: int
    shape: torch.Size
    """Of the tensor before quantisation, and so of `dequantize()`."""
    dtype: torch.dtype
    """Of the tensor before quantisation, and so of `dequantize()`."""

    @property
    def double_quant(self) -> bool:
        """Whether the block constants are quantised too."""
        return isinstance(self.constants, QuantizedAbsmax)

    @property
    def absmax(self) -> Tensor:
        """The block constants in float32, shape `[blocks]`, decoded if need be."""
        return dequantize_absmax(self.constants) if self.double_quant else self.constants

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes that grow with the tensor: the codes and the constants of the blocks.

        The lookup tables (16 and 256 levels) and the one offset are the same few bytes for a tensor
        of any size, and do not count.
        """
        if self.double_quant:
            codes, nested_absmax, *_ = self.constants
            return self.packed.nbytes + codes.nbytes + nested_absmax.nbytes
        return self.packed.nbytes + self.constants.nbytes

    @property
    def bits_per_weight(self) -> float:
        """`8 * nbytes` over the number of weights; 0 for an empty tensor."""
        return 8 * self.nbytes / max(self.shape.numel(), 1)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Rebuild the tensor: level times absmax, in its own shape and dtype (or another dtype).

        A float16 tensor near its limit of 65504 may come back with an infinity, because double
        quantisation rounds the absmax up as often as down; ask for float32 there.

        >>> quantize(torch.tensor([-3.0, 0.0, 3.0]), double_quant=False).dequantize()
        tensor([-3.,  0.,  3.])
        """
        return dequantize_blockwise(
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
        n_rows, width = self.shape
        whole_blocks = self.blocksize // math.gcd(width, self.blocksize)
        step = chunk_size(self.device, chunks=4) // max(width, 1) // whole_blocks * whole_blocks
        step = max(step, whole_blocks)
        unpacking = UNPACKING.get() or nullcontext
        with unpacking():
            absmax, buffer = self.absmax, torch.empty(0, dtype=torch.int64, device=self.device)
        for start in range(0, n_rows, step):
            stop = min(start + step, n_rows)
            first, last = start * width, stop * width
            with unpacking():
                chunk = decode(
                    self.packed[first // 2 : (last + 1) // 2],
                    absmax[first // self.blocksize : -(-last // self.blocksize)],
                    self.levels,
                    self.blocksize,
                    buffer.resize_((last + 1) // 2 - first // 2),
                )
                chunk = chunk[: last - first].view(stop - start, width).to(dtype or self.dtype)
            yield slice(start, stop), chunk

    def to(self, device: torch.device | str) -> Self:
        """Copy to a device."""
        constants = self.constants
        if self.double_quant:
            constants = QuantizedAbsmax(*(tensor.to(device) for tensor in constants))
        else:
            constants = constants.to(device)
        return replace(
            self,
            packed=self.packed.to(device),
            constants=constants,
            levels=self.levels.to(device),
        )

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """List every tensor by the key bitsandbytes gives it, ready for a safetensors file.

        Of the codebooks, bitsandbytes itself reads "nf4" and "fp4" back, and refuses the others.

        Args:
            prefix: the name of the parameter, such as `model.layers.0.mlp.up_proj.weight`.

        >>> sorted(quantize(torch.ones(64), double_quant=False).state_dict())
        ['weight', 'weight.absmax', 'weight.quant_map', 'weight.quant_state.bitsandbytes__nf4']
        """
        facts = {
            "quant_type": self.levels_name,
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        tensors = {prefix: self.packed, f"{prefix}.quant_map": self.levels}
        if self.double_quant:
            codes, nested_absmax, offset, nested_map = self.constants
            tensors[f"{prefix}.absmax"] = codes
            tensors[f"{prefix}.nested_absmax"] = nested_absmax
            tensors[f"{prefix}.nested_quant_map"] = nested_map
            facts["nested_blocksize"] = NESTED_BLOCKSIZE
            facts["nested_dtype"] = "float32"
            facts["nested_offset"] = offset.item()
        else:
            tensors[f"{prefix}.absmax"] = self.constants
        text = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
        tensors[f"{prefix}.quant_state.bitsandbytes__{self.levels_name}"] = text
        return tensors

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], prefix: str = "weight") -> Self:
        """Rebuild from the keys that `state_dict`, or a bitsandbytes `Linear4bit`, has written.

        Args:
            state: may hold other keys too.
            prefix: the name of the parameter.

        Raises:
            StateDictError: a key is missing, or the tensors do not fit what they claim to be.

        >>> quantized = quantize(torch.ones(3), double_quant=False)
        >>> QuantizedTensor.from_state_dict(quantized.state_dict()).dequantize()
        tensor([1., 1., 1.])
        """
        facts = _read_facts(state, prefix)
        constants = _take(state, f"{prefix}.absmax")
        if f"{prefix}.nested_absmax" in state:
            constants = QuantizedAbsmax(
                codes=constants,
                nested_absmax=_take(state, f"{prefix}.nested_absmax"),
                offset=torch.tensor(
                    facts["nested_offset"], dtype=torch.float32, device=constants.device
                ),
                map=_take(state, f"{prefix}.nested_quant_map"),
            )
        quantized = cls(
            # Sharded training stores the same bytes under a float dtype, in fewer elements.
            packed=_take(state, prefix).contiguous().view(torch.uint8).view(-1, 1),
            constants=constants,
            levels=_take(state, f"{prefix}.quant_map"),
            levels_name=facts["quant_type"],
            blocksize=facts["blocksize"],
            shape=torch.Size(facts["shape"]),
            dtype=facts["dtype"],
        )
        _check_fit(quantized, prefix)
        return quantized

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor({self.levels_name}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"blocksize={self.blocksize}, {self.bits_per_weight:.3f} bits a weight)"
        )


def _take(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise StateDictError(f"the state dict has no key {key!r}: it is not whole")
    return state[key].detach()


def _read_facts(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Read the facts that are no tensors, which bitsandbytes keeps as JSON in a uint8 tensor."""
    start = f"{prefix}.quant_state.bitsandbytes__"
    keys = [key for key in state if key.startswith(start)]
    if len(keys) != 1:
        raise StateDictError(
            f"expected one key {start}<levels> in the state dict, found {keys or 'none'}: "
            f"check the prefix, and that {prefix!r} was saved after quantisation"
        )
    try:
        facts = json.loads(bytes(state[keys[0]].tolist()))
        facts["dtype"] = {str(dtype): dtype for dtype in DTYPES}[f"torch.{facts['dtype']}"]
        facts["shape"] = [int(size) for size in facts["shape"]]
        if f"{prefix}.nested_absmax" in state:
            facts["nested_offset"] = float(facts["nested_offset"])
        valid = (
            f"{start}{facts['quant_type']}" == keys[0]
            and facts["blocksize"] in BLOCKSIZES
            and facts.get("nested_blocksize", NESTED_BLOCKSIZE) == NESTED_BLOCKSIZE
            and min(facts["shape"], default=0) >= 0
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StateDictError(f"{keys[0]} is damaged: {error!r}") from error
    if not valid:
        raise StateDictError(f"{keys[0]} describes no tensor that this library can hold: {facts}")
    return facts


def _check_fit(quantized: QuantizedTensor, prefix: str) -> None:
    """Compare every tensor's dtype and size with what the shape and the block size ask for."""
    n = quantized.shape.numel()
    blocks = -(-n // quantized.blocksize)
    wanted = [("", quantized.packed, torch.uint8, -(-n // 2))]
    if quantized.double_quant:
        codes, nested_absmax, _, nested_map = quantized.constants
        nested_blocks = -(-blocks // NESTED_BLOCKSIZE)
        wanted += [
            (".absmax", codes, torch.uint8, blocks),
            (".nested_absmax", nested_absmax, torch.float32, nested_blocks),
            (".nested_quant_map", nested_map, torch.float32, 256),
        ]
    else:
        wanted += [(".absmax", quantized.constants, torch.float32, blocks)]
    for suffix, tensor, dtype, size in wanted:
        if tensor.dtype != dtype or tensor.numel() != size:
            raise StateDictError(
                f"{prefix}{suffix} holds {tensor.numel()} x {tensor.dtype}, but shape "
                f"{tuple(quantized.shape)} in blocks of {quantized.blocksize} asks for "
                f"{size} x {dtype}"
            )
    try:
        n_levels = len(get_levels(quantized.levels))
    except QuantizationError as error:
        raise StateDictError(f"{prefix}.quant_map: {error}") from error
    if n_levels < 16 and n and int(unpack_nibbles(quantized.packed, n).max()) >= n_levels:
        raise StateDictError(f"{prefix} holds a code beyond its {n_levels} levels")
    if not quantized.absmax.isfinite().all():
        raise StateDictError(
            f"{prefix}: a block constant is NaN or infinite, so the file is damaged"
        )


def quantize(
    weight: Tensor,
    levels: str | Tensor = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    compiled: bool = False,
) -> QuantizedTensor:
    """Quantise a tensor to 4 bits a weight.

    Args:
        weight: any shape; float32, float16 or bfloat16; finite.
        levels: a name in `LEVELS`, or a tensor of 2 to 16 levels in [-1, 1].
        blocksize: weights that share one absmax; one of `BLOCKSIZES`.
        double_quant: whether to write the absmax in 8 bits.
        compiled: as for `quantize_blockwise`: many times faster, after some seconds of compiling.

    Raises:
        QuantizationError: in one of its kinds, named after what is wrong.

    Source: QLoRA (arXiv 2305.14314) section 3; for "nf4" and "fp4" equals bitsandbytes
    `quantize_4bit(..., compress_statistics=double_quant)` on a CPU, to the byte.

    >>> quantize(torch.randn(256, 256))
    QuantizedTensor(nf4, shape=(256, 256), dtype=torch.float32, blocksize=64, 4.127 bits a weight)
    """
    check_blocksize(blocksize)
    table = get_levels(levels, blocksize)
    packed, absmax = quantize_blockwise(weight, table, blocksize, compiled)
    return QuantizedTensor(
        packed=packed,
        constants=quantize_absmax(absmax) if double_quant else absmax,
        levels=table.to(weight.device),
        levels_name=levels if isinstance(levels, str) else "custom",
        blocksize=blocksize,
        shape=weight.shape,
        dtype=weight.dtype,
    )
