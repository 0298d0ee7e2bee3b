"""Part a: the quantiser beside bitsandbytes' CUDA kernels, in bytes and in bandwidth."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.card import Rows, seconds, without_paths
from qlora_edu import QuantizedTensor, quantize
from qlora_edu.blockwise import unpack_nibbles
from qlora_edu.kernels import chunk_size


def differing(mine: Tensor, theirs: Tensor) -> dict[str, float]:
    """How many entries differ, of how many, and by how much at most."""
    mine, theirs = mine.flatten(), theirs.flatten()
    apart = (mine.double() - theirs.double()).abs()
    # Two infinities are equal, and their difference is no number.
    count = int((mine != theirs).sum())
    return {"differing": count, "of": mine.numel(), "largest": apart.nan_to_num().max().item()}


def nibbles(packed: Tensor) -> Tensor:
    """The two codes of each byte."""
    return torch.cat([packed >> 4, packed & 15], dim=1)


def equality(small: bool, device: str) -> Rows:
    """Every dtype, block size and codebook, with and without double quantisation."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    shape = (16, 4096) if small else (4096, 4096)
    generator = torch.Generator(device).manual_seed(0)
    normal = torch.randn(shape, device=device, generator=generator)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = normal.to(dtype)
        for levels in ("nf4", "fp4"):
            for blocksize in (64, 128, 256, 512, 1024, 2048, 4096):
                for dq in (False, True):
                    mine = quantize(weight, levels, blocksize, dq)
                    packed, state = quantize_4bit(
                        weight, blocksize=blocksize, compress_statistics=dq, quant_type=levels
                    )
                    row = {
                        "what": "equality",
                        "dtype": str(dtype).removeprefix("torch."),
                        "levels": levels,
                        "blocksize": blocksize,
                        "double_quant": dq,
                        "packed": differing(mine.packed, packed),
                        "codes": differing(nibbles(mine.packed), nibbles(packed)),
                    }
                    if dq:
                        codes, nested, offset, table = mine.constants
                        row["absmax"] = differing(codes, state.absmax)
                        row["nested_absmax"] = differing(nested, state.state2.absmax)
                        row["offset"] = differing(offset, state.offset.to(device))
                        row["map"] = differing(table, state.state2.code.to(device))
                    else:
                        row["absmax"] = differing(mine.constants, state.absmax)
                    row["values"] = differing(mine.dequantize(), dequantize_4bit(packed, state))
                    yield row


def compiled_read(quantized: QuantizedTensor, small: bool) -> Callable[[], Tensor]:
    """Our definition, level × absmax, for the whole tensor at once, as one compiled function."""
    n, blocksize, dtype = quantized.shape.numel(), quantized.blocksize, quantized.dtype

    def read(packed: Tensor, absmax: Tensor, levels: Tensor) -> Tensor:
        values = levels[unpack_nibbles(packed, n).int()]
        return (values.view(-1, blocksize) * absmax[:, None]).to(dtype)

    # In a dry run the compiler itself would take longer than all the rest.
    fast = torch.compile(read, dynamic=False, backend="eager" if small else "inductor")
    arguments = (quantized.packed, quantized.absmax, quantized.levels)
    return lambda: fast(*arguments).view(quantized.shape)


def two_of(nbytes: int, device: str) -> tuple[Tensor, Tensor]:
    """Two tensors of so many bytes."""
    return tuple(torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))


def bandwidth(small: bool, device: str) -> Rows:
    """Bytes a second of each, beside those of a plain copy on the same card."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    repeat = {"device": device, "calls": 2 if small else 10, "rounds": 2 if small else 20}
    copied = 2**20 if small else 2**30
    copying = seconds(partial(torch.Tensor.copy_, *two_of(copied, device)), **repeat)
    speed = 2 * copied / copying  # each byte is read and written
    yield {"what": "copy", "bytes": copied, "seconds": copying, "bytes_per_second": speed}
    side = 256 if small else 8192  # 2^26 weights: what is taken at a time on a card
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(side, side, device=device).to(dtype)
        mine = quantize(weight, double_quant=False)
        theirs = quantize_4bit(weight, compress_statistics=False, quant_type="nf4", blocksize=64)
        moved = weight.nbytes + mine.nbytes

        def compiled_quantize(weight: Tensor = weight) -> Tensor:
            if weight.numel() < chunk_size(weight.device, chunks=4, elsewhere=2**24):
                raise ValueError(f"{weight.numel():,} weights are less than a chunk: not compiled")
            return quantize(weight, double_quant=False, compiled=True).packed

        def of_bitsandbytes(weight: Tensor = weight) -> Tensor:
            settings = {"compress_statistics": False, "quant_type": "nf4", "blocksize": 64}
            return quantize_4bit(weight, **settings)[0]

        contenders = [
            ("quantize", "ours", lambda w=weight: quantize(w, double_quant=False).packed),
            ("quantize", "ours, compiled", compiled_quantize),
            ("quantize", "bitsandbytes", of_bitsandbytes),
            ("dequantize", "ours", mine.dequantize),
            ("dequantize", "ours, compiled", compiled_read(mine, small)),
            ("dequantize", "bitsandbytes", lambda t=theirs: dequantize_4bit(*t)),
        ]
        expected = {"quantize": mine.packed, "dequantize": mine.dequantize()}
        for what, whose, function in contenders:
            row = {"what": what, "whose": whose, "dtype": str(dtype).removeprefix("torch.")}
            row |= {"shape": [side, side], "bytes": moved}
            try:
                row["beside_ours"] = differing(expected[what], function())
                row["seconds"] = seconds(function, **repeat)
            except Exception as error:  # no compiler on this machine, for one of many reasons
                if whose != "ours, compiled":
                    raise
                lines = str(error).splitlines()
                reason = without_paths(f"{type(error).__name__}: {lines[0] if lines else ''}")
                yield {**row, "reason": reason}
                continue
            row["bytes_per_second"] = moved / row["seconds"]
            row["share_of_copy"] = round(row["bytes_per_second"] / speed, 4)
            yield row
