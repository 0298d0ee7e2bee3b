"""Follow one weight of a quantised tensor to its bits, in memory or in a file, and back."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_edu.errors import QuantizationError


class InspectedWeight(NamedTuple):
    """One weight of a quantised tensor, followed from its place to its bits and back."""

    position: int  # In the tensor laid out flat, row by row
    block: int  # Which block; `position // blocksize`
    absmax: float  # The constant of that block
    byte: int  # Which byte of the packed codes; `position // 2`
    value: int  # What the byte holds, 0 to 255
    half: str  # Which half of it is this weight's: "high" at an even position, "low" at an odd one
    code: int  # The nibble, 0 to 15
    level: float  # The entry of the codebook at that code
    dequantized: float  # level × absmax, in the dtype of the tensor
    file_position: int | None = None
    """Where in the file the byte is, counted from its start; None if it is in memory."""

    def error(self, weight: float) -> float:
        """Subtract the weight before quantisation from what is read back."""
        return self.dequantized - float(weight)

    def __str__(self) -> str:
        """Write the way from the place to the value, a line for each step."""
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
    index: int | Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> InspectedWeight:
    """Follow one weight of a quantised tensor to its byte, its nibble and its block.

    Args:
        packed, absmax, levels, blocksize, shape: as for `dequantize_blockwise`.
        index: of the weight in a tensor of that shape; negative numbers count from the end.
        dtype: of the weights before quantisation.

    Raises:
        QuantizationError: there is no such weight.

    >>> packed, levels = torch.tensor([[0x0F]], dtype=torch.uint8), torch.linspace(-1, 1, 16)
    >>> found = inspect_weight(packed, torch.tensor([3.0]), levels, 64, (1, 2), (0, 1))
    >>> found.byte, found.half, found.code, found.dequantized
    (0, 'low', 15, 3.0)
    """
    position = _flat_position(index, shape)
    block, byte = position // blocksize, position // 2
    if packed.numel() <= byte or absmax.numel() <= block:
        raise QuantizationError(
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

    The file has the keys of a `Linear4bit` without double quantisation; `name` is that of the
    quantised weight. Raises `QuantizationError` for another kind of file, name or index.

    Source: the layout is the one of the safetensors README, "Format".
    """
    with Path(path).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))

        def read(key: str, start: int = 0, length: int | None = None) -> bytes:
            if key not in header:
                raise QuantizationError(f"{path} holds no tensor {key!r}")
            begin, end = header[key]["data_offsets"]
            if length is None:
                length = end - begin - start
            file.seek(8 + size + begin + start)
            return file.read(length)

        keys = [key for key in header if key.startswith(f"{name}.quant_state.bitsandbytes__")]
        if len(keys) != 1 or f"{name}.nested_absmax" in header:
            raise QuantizationError(
                f"{name!r} of {path} is not a 4-bit weight with plain float32 constants"
                + (": it is double-quantised, see chapter 3" if keys else "")
            )
        metadata = json.loads(read(keys[0]))
        position = _flat_position(index, metadata["shape"])
        value = read(name, position // 2, 1)[0]
        constant = read(f"{name}.absmax", 4 * (position // metadata["blocksize"]), 4)
        table = read(f"{name}.quant_map")
    found = _inspected(
        position,
        metadata["blocksize"],
        value,
        torch.frombuffer(bytearray(constant), dtype=torch.float32)[0],
        torch.frombuffer(bytearray(table), dtype=torch.float32),
        getattr(torch, metadata["dtype"]),
    )
    return found._replace(file_position=8 + size + header[name]["data_offsets"][0] + found.byte)


def _flat_position(index: int | Sequence[int], shape: Sequence[int]) -> int:
    indices = (index,) if isinstance(index, int) else tuple(index)
    if len(indices) != len(shape) or any(
        not -n <= i < n for i, n in zip(indices, shape, strict=True)
    ):
        raise QuantizationError(f"no weight at index {indices} of a tensor of shape {tuple(shape)}")
    position = 0
    for i, n in zip(indices, shape, strict=True):
        position = position * n + i % n
    return position


def _inspected(
    position: int, blocksize: int, value: int, constant: Tensor, levels: Tensor, dtype: torch.dtype
) -> InspectedWeight:
    half = "low" if position % 2 else "high"
    code = value & 15 if position % 2 else value >> 4
    if code >= levels.numel():
        raise QuantizationError(f"code {code} is beyond the {levels.numel()} levels of the table")
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
