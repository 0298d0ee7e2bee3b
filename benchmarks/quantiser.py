"""Time `quantize` and `dequantize` beside bitsandbytes and torchao.

Ours and the peer's take turns in one process, so that whatever slows the machine slows both; what
is kept is the median of each, and the ratio peer / ours, which says how many times faster ours is.
Before anything is timed, what both compute is compared: with bitsandbytes every byte, with torchao,
whose constants are made in another way, that nearly all codes agree. `compiled` is our kernel
through torch.compile.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from qlora_edu import quantize
from qlora_edu.compat import quiet
from qlora_edu.errors import NotReadyError

BIG, SECONDS = (4096, 4096), 1.5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def seconds(function: Callable, calls: int) -> float:
    """Seconds for one call, on average over some calls in a row."""
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - started) / calls


def in_turns(ours: Callable, theirs: Callable) -> tuple[float, float]:
    """Time both in turns, of some 50 ms each, at least five times over; the medians in seconds."""
    calls = [max(1, round(0.05 / seconds(function, 3))) for function in (ours, theirs)]
    times, started = ([], []), time.perf_counter()
    while len(times[0]) < 5 or time.perf_counter() - started < SECONDS:
        for function, n, of_function in zip((ours, theirs), calls, times, strict=True):
            of_function.append(seconds(function, n))
    return median(times[0]), median(times[1])


def row(name: str, ours: Callable, peer: str, theirs: Callable) -> dict:
    """Time the two; a row of the result, printed as it is made."""
    ours_s, peer_s = in_turns(ours, theirs)
    ratio = peer_s / ours_s
    print(f"{name:<44}{1000 * ours_s:8.2f} ms   {peer:<13}{1000 * peer_s:8.2f} ms {ratio:7.2f}×")
    return {"name": name, "ours_s": ours_s, "peer": peer, "peer_s": peer_s, "ratio": ratio}


def beside_bitsandbytes(shape: tuple, dtype: str, levels: str, blocksize: int, dq: bool) -> list:
    """Quantise, eager and compiled, and dequantise; compared to the byte first."""
    weight = torch.randn(shape).to(DTYPES[dtype])
    settings = {"levels": levels, "blocksize": blocksize, "double_quant": dq}
    mine = quantize(weight, **settings)

    def theirs():
        return quantize_4bit(weight, blocksize=blocksize, quant_type=levels, compress_statistics=dq)

    packed, state = theirs()
    assert torch.equal(mine.packed, packed)
    kind = levels + (f" blocks of {blocksize}" if blocksize != 64 else "") + (" dq" if dq else "")
    name = f"{kind} {shape[0]}x{shape[1]} {dtype}"
    rows = [row(f"quantize {name}", lambda: quantize(weight, **settings), "bitsandbytes", theirs)]
    try:
        fast = quantize(weight, **settings, compiled=True)
    except NotReadyError as error:
        print(f"{name}: {error}")
    else:
        assert torch.equal(fast.packed, packed)
        rows.append(
            row(
                f"quantize {name} compiled",
                lambda: quantize(weight, **settings, compiled=True),
                "bitsandbytes",
                theirs,
            )
        )
    assert torch.equal(mine.dequantize(), dequantize_4bit(packed, state))
    rows.append(
        row(
            f"dequantize {name}",
            mine.dequantize,
            "bitsandbytes",
            lambda: dequantize_4bit(packed, state),
        )
    )
    return rows


def beside_torchao() -> list[dict]:
    """The same with torchao, which always quantises doubly."""
    with quiet():  # it prints on import
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    weight = torch.randn(BIG)
    mine, theirs = quantize(weight), to_nf4(weight, 64, 256)
    apart = (mine.dequantize() - theirs.get_original_weight()).abs() > 0.05
    assert apart.float().mean() < 0.01
    name = "nf4 dq 4096x4096 float32"
    return [
        row(f"quantize {name}", lambda: quantize(weight), "torchao", lambda: to_nf4(weight)),
        row(f"dequantize {name}", mine.dequantize, "torchao", theirs.get_original_weight),
    ]


def measure() -> list[dict]:
    """All rows."""
    torch.manual_seed(0)
    rows = []
    for shape in ((1024, 1024), BIG, (11008, 4096)):
        rows += beside_bitsandbytes(shape, "float32", "nf4", 64, dq=False)
    for dtype in ("bfloat16", "float16"):
        rows += beside_bitsandbytes(BIG, dtype, "nf4", 64, dq=False)
    for blocksize in (32, 256, 1024):
        rows += beside_bitsandbytes(BIG, "float32", "nf4", blocksize, dq=False)
    rows += beside_bitsandbytes(BIG, "float32", "fp4", 64, dq=False)
    rows += beside_bitsandbytes(BIG, "float32", "nf4", 64, dq=True)
    return rows + beside_torchao()
