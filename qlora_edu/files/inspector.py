"""Follow one weight of a quantised tensor to its bits, in memory or in a file, and back."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qlora_edu.errors import QuantizationError, reading


class InspectedWeight(NamedTuple):
    """One weight of a quantised tensor, followed from its place to its bits and back."""

    position: int  # In the flat tensor, row by row
    block: int  # `position // blocksize`
    absmax: float  # The constant of that block
    byte: int  # Which byte of the packed codes; `position // 2`
    value: int  # What the byte holds, 0 to 255
    half: str  # The half of it that is this weight's: "high" at an even position, else "low"
    code: int  # The nibble, 0 to 15
    level: float  # The entry of the codebook at that code
    dequantized: float  # level × absmax, in the dtype of the tensor
    file_position: int | None = None  # Of the byte, from the start of the file

    def __str__(self) -> str:
        place = "" if self.file_position is None else f", byte {self.file_position} of the file"
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
    index: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> InspectedWeight:
    """Follow one weight of what `quantize_blockwise` made of a tensor of this `shape` and `dtype`.

    >>> packed, levels = torch.tensor([[0x0F]], dtype=torch.uint8), torch.linspace(-1, 1, 16)
    >>> found = inspect_weight(packed, torch.tensor([3.0]), levels, 64, (1, 2), (0, 1))
    >>> found.byte, found.half, found.code, found.dequantized
    (0, 'low', 15, 3.0)
    """
    try:
        position = int(np.ravel_multi_index(tuple(index), tuple(shape)))
        byte, block = position // 2, position // blocksize
        value, constant = int(packed.view(-1)[byte]), absmax.view(-1)[block]
        half, code = ("low", value & 15) if position % 2 else ("high", value >> 4)
        level = levels[code]
    except (ValueError, IndexError) as error:
        raise QuantizationError(
            f"no weight at index {index} of a tensor of shape {tuple(shape)} in {packed.numel()} "
            f"byte(s), {absmax.numel()} constant(s) and {len(levels)} levels ({error})"
        ) from error
    dequantized = (level * constant).to(dtype).item()
    return InspectedWeight(
        position, block, constant.item(), byte, value, half, code, level.item(), dequantized
    )


def inspect_file(path: str | Path, name: str, index: Sequence[int]) -> InspectedWeight:
    """Follow one weight, stored as bitsandbytes' `Linear4bit` does, into a safetensors file.

    The file has 8 bytes with the length of its header; the header, JSON that says of each tensor
    where its bytes begin; then the bytes. Source: the README of safetensors, "Format".
    """
    with reading(path, QuantizationError, f"it must hold {name!r} in 4 bits, with float32 absmax"):
        file = np.memmap(path, np.uint8, mode="c")  # only what is looked at is read
        start = 8 + int.from_bytes(file[:8], "little")
        header = json.loads(bytes(file[8:start]))

        def read(key: str) -> Tensor:
            begin, end = header[key]["data_offsets"]
            return torch.from_numpy(file[start + begin : start + end])

        if f"{name}.nested_absmax" in header:
            raise QuantizationError(f"{name!r} of {path} is double-quantised, see chapter 3")
        [about] = [key for key in header if key.startswith(f"{name}.quant_state.bitsandbytes__")]
        state = json.loads(bytes(read(about).tolist()))
        absmax, levels = (
            read(f"{name}.{key}").view(torch.float32) for key in ("absmax", "quant_map")
        )
        dtype, shape = getattr(torch, state["dtype"]), state["shape"]
        found = inspect_weight(read(name), absmax, levels, state["blocksize"], shape, index, dtype)
    return found._replace(file_position=start + header[name]["data_offsets"][0] + found.byte)
