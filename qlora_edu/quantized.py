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

    What is named as in `torch.Tensor` means the same. Save its `state_dict()` as safetensors.
    """

    packed: Tensor  # uint8 `[ceil(n / 2), 1]`: two codes per byte, the first in the high nibble
    constants: Tensor | QuantizedAbsmax  # The absmax of each block, float32 `[blocks]` or in 8 bits
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

    def numel(self) -> int:
        """Count the weights, not the bytes that hold them."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of the constants of the blocks."""
        same_for_all = {"levels", "absmax_levels", "absmax_offset"}
        return sum(t.nbytes for name, t in self.tensors().items() if name not in same_for_all)

    @property
    def bits_per_weight(self) -> float:
        """`8 * nbytes` over the number of weights; 0 for an empty tensor."""
        return 8 * self.nbytes / max(self.numel(), 1)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Rebuild the tensor: level times absmax, in its own shape and dtype (or another dtype).

        Double quantisation may round a float16 absmax near 65504 up to infinity; ask for float32.

        >>> quantize(torch.tensor([-3.0, 0.0, 3.0]), double_quant=False).dequantize()
        tensor([-3.,  0.,  3.])
        """
        return kernels.dequantize_blockwise(
            self.packed, self.absmax, self.levels, self.blocksize, self.shape, dtype or self.dtype
        )

    def row_chunks(self, dtype: torch.dtype | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Rebuild a matrix a few rows at a time, so that the whole of it never takes up memory.

        Yields which rows, and those rows of `dequantize(dtype)`; the next chunk overwrites them.

        >>> quantized = quantize(torch.ones(1000, 2048), double_quant=False)
        >>> [(rows.start, tuple(chunk.shape)) for rows, chunk in quantized.row_chunks()]
        [(0, (512, 2048)), (512, (488, 2048))]
        """
        return kernels.row_chunks(self, dtype or self.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """List the tensors by name; nothing is copied."""
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
        """Copy to a device; raises `QuantizationError` for a dtype."""
        if isinstance(device, torch.dtype):
            raise QuantizationError(
                f"a QuantizedTensor is never converted, so not to {device}: use dequantize(dtype)"
            )
        return self.with_tensors({k: t.to(device=device) for k, t in self.tensors().items()})

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """List every tensor under bitsandbytes' keys; bitsandbytes can load "nf4" and "fp4".

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
            metadata |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}
            metadata["nested_offset"] = offset.item()
        else:
            tensors[f"{prefix}.absmax"] = self.constants
        text = torch.tensor(list(json.dumps(metadata).encode()), dtype=torch.uint8, device="cpu")
        return tensors | {f"{prefix}.quant_state.bitsandbytes__{self.levels_name}": text}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], prefix: str = "weight") -> Self:
        """Rebuild from the keys that `state_dict`, or a bitsandbytes `Linear4bit`, has written.

        Raises `QuantizationError` if a key is missing or the tensors do not fit together.
        """
        start = f"{prefix}.quant_state.bitsandbytes__"
        keys = [key for key in state if key.startswith(start)]
        if len(keys) != 1:
            remedy = f"check the prefix, and that {prefix!r} was saved after quantisation"
            raise QuantizationError(f"found {len(keys)} keys {start}<levels>, not one: {remedy}")
        try:
            metadata = json.loads(bytes(state[keys[0]].tolist()))
            constants: Any = state[f"{prefix}.absmax"].detach()
            if f"{prefix}.nested_absmax" in state:
                constants = QuantizedAbsmax(
                    codes=constants,
                    nested_absmax=state[f"{prefix}.nested_absmax"].detach(),
                    offset=constants.new_tensor(metadata["nested_offset"], dtype=torch.float32),
                    levels=state[f"{prefix}.nested_quant_map"].detach(),
                )
            quantized = cls(
                # Sharded training stores the same bytes under a float dtype, in fewer elements.
                packed=state[prefix].detach().contiguous().view(torch.uint8).view(-1, 1),
                constants=constants,
                levels=state[f"{prefix}.quant_map"].detach(),
                levels_name=metadata["quant_type"],
                blocksize=metadata["blocksize"],
                shape=torch.Size(metadata["shape"]),
                dtype={str(dtype): dtype for dtype in DTYPES}[f"torch.{metadata['dtype']}"],
            )
            nested_blocksize = metadata.get("nested_blocksize", NESTED_BLOCKSIZE)
            if keys[0] != start + quantized.levels_name or nested_blocksize != NESTED_BLOCKSIZE:
                raise ValueError(f"{keys[0]} says {metadata}")
            quantized._check()
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise QuantizationError(f"{prefix} is damaged or not whole: {error!r}") from error
        return quantized

    def _check(self) -> None:
        check_blocksize(self.blocksize)
        n, n_levels = self.numel(), len(get_levels(self.levels))
        blocks = -(-n // self.blocksize)
        sizes = {"packed": -(-n // 2), "levels": n_levels, "absmax": blocks}
        sizes |= {"absmax_codes": blocks, "absmax_nested_absmax": -(-blocks // NESTED_BLOCKSIZE)}
        sizes |= {"absmax_offset": 1, "absmax_levels": 256}
        for name, tensor in self.tensors().items():
            dtype = torch.uint8 if name in ("packed", "absmax_codes") else torch.float32
            if tensor.dtype != dtype or tensor.numel() != sizes[name]:
                found = f"{tensor.numel()} x {tensor.dtype}"
                raise ValueError(f"{name} is {found}, and not {sizes[name]} x {dtype}")
        if n_levels < 16 and n and unpack_nibbles(self.packed, n).max() >= n_levels:
            raise ValueError(f"a code is beyond the {n_levels} levels")
        if min(self.shape, default=0) < 0 or not self.absmax.isfinite().all():
            raise ValueError("the shape is negative, or a block constant is not finite")

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor({self.levels_name}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"blocksize={self.blocksize}, {self.bits_per_weight:.3f} bits per weight)"
        )


def quantize(
    weight: Tensor,
    levels: str | Tensor = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    compiled: bool = False,
) -> QuantizedTensor:
    """Quantise a tensor to 4 bits per weight.

    Takes a finite weight in one of `DTYPES`, of any shape; levels as `get_levels` takes them; one
    of `BLOCKSIZES`. `double_quant` writes the absmax in 8 bits; `compiled` is many times faster,
    after some seconds. Raises `QuantizationError`; `NotReadyError` if there is no compiler.

    Source: QLoRA (arXiv 2305.14314) section 3; for "nf4" and "fp4" equals bitsandbytes
    `quantize_4bit(..., compress_statistics=double_quant)` on a CPU, to the byte.

    >>> quantize(torch.randn(256, 256))
    QuantizedTensor(nf4, shape=(256, 256), dtype=torch.float32, blocksize=64, 4.127 bits per weight)
    """
    if not isinstance(weight, Tensor) or weight.dtype not in DTYPES:
        kind = getattr(weight, "dtype", type(weight).__name__)
        raise QuantizationError(f"cannot quantise a {kind}: convert it to a tensor of {DTYPES}")
    check_blocksize(blocksize)
    table = get_levels(levels, blocksize)
    packed, absmax = kernels.quantize_blockwise(weight, table, blocksize, compiled)
    if not absmax.isfinite().all():  # an absmax is NaN or infinite if one of its weights is
        bad = (~weight.isfinite()).nonzero()
        first = tuple(bad[0].tolist())
        raise QuantizationError(
            f"weight holds {len(bad)} non-finite value(s), the first, {weight[first].item()}, at "
            f"index {first}: repair the checkpoint or replace them before quantising"
        )
    return QuantizedTensor(
        packed=packed,
        constants=quantize_absmax(absmax) if double_quant else absmax,
        levels=table.to(weight.device),
        levels_name=levels if isinstance(levels, str) else "custom",
        blocksize=blocksize,
        shape=weight.shape,
        dtype=weight.dtype,
    )


def check_blocksize(blocksize: int) -> None:
    """Refuse, by `QuantizationError`, a block size that is not one of `BLOCKSIZES`."""
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise QuantizationError(f"unsupported blocksize {blocksize!r}: use one of {BLOCKSIZES}")


# So that torch.load(..., weights_only=True) reads what torch.save has written: no code comes along.
torch.serialization.add_safe_globals([QuantizedTensor, QuantizedAbsmax])
