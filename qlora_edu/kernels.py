"""Fast twins of what the chapters derive: the same result, to the byte, in less time.

A chapter holds the definition, a few lines to be read aloud. What runs on real weights is here:
in chunks that stay in the processor's cache, compiled, or fused.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_edu.blockwise import SMALLEST_ABSMAX, pack_nibbles, unpack_nibbles
from qlora_edu.codebooks import assign
from qlora_edu.errors import NotReadyError, QuantizationError
from qlora_edu.files.host_tier import StreamCopier, ThreadCopier
from qlora_edu.paging import PagedAdamW

# Weights that a CPU works on at a time: few enough for its cache, and whole blocks of any size.
CHUNK = 2**18
# How many weights to work on at a time, a multiple of 4096; None: as many as suit the device.
CHUNK_SIZE: ContextVar[int | None] = ContextVar("CHUNK_SIZE", default=None)
# Makes a context manager that is entered around each chunk that is unpacked.
UNPACKING: ContextVar[Callable[[], Any]] = ContextVar("UNPACKING", default=nullcontext)


def chunk_size(device: torch.device, chunks: int = 1, elsewhere: int = 2**26) -> int:
    """Say how many weights to work on at a time: some `CHUNK`s on a CPU, or `elsewhere`."""
    # Starting a call takes a GPU as long as computing with a million weights.
    return CHUNK_SIZE.get() or (chunks * CHUNK if device.type == "cpu" else elsewhere)


@torch.no_grad()  # torch.compile makes one version for each grad mode, and one is enough
def quantize_blockwise(
    weight: Tensor, levels: Tensor, blocksize: int, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantise as `blockwise.quantize_blockwise` does, in a few megabytes beside the result.

    `compiled` needs a C++ compiler (`NotReadyError`) and some seconds at the first call.
    """
    if len(levels) > 16:
        raise QuantizationError(f"a code has 4 bits, too few for {len(levels)} levels")
    flat, n = weight.detach().reshape(-1), weight.numel()
    ascending, order = levels.to(device=weight.device, dtype=torch.float32).sort(stable=True)
    # Sixteen levels have fifteen midpoints; above infinity there is nothing to count.
    midpoints = F.pad((ascending[:-1] + ascending[1:]) / 2, (0, 16 - len(levels)), value=math.inf)
    # What is counted is a rank in ascending order; FP4's codes are in another one.
    in_order = torch.equal(order, torch.arange(len(levels), device=order.device))
    ranked = F.pad(order.to(torch.uint8), (0, 16 - len(levels)))
    byte_of_ranks = pack_nibbles(torch.cartesian_prod(ranked, ranked)).flatten()
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=weight.device)
    in_blocks = n - n % blocksize
    # Compiled code keeps its temporaries in registers; on a GPU a layer of a 7B is a whole chunk.
    device = weight.device
    chunk = chunk_size(device, chunks=4, elsewhere=2**24) if compiled else chunk_size(device)
    for start in range(0, in_blocks, chunk):
        stop = min(start + chunk, in_blocks)
        # Only whole chunks are compiled: the remainder would be compiled anew for every size.
        whole = compiled and stop - start == chunk
        kernel = _compiled_quantize_blocks if whole else _quantize_blocks
        ranks, largest = kernel(flat[start:stop].float().view(-1, blocksize), midpoints)
        packed[start // 2 : stop // 2] = ranks if in_order else byte_of_ranks[ranks.int()]
        absmax[start // blocksize : stop // blocksize] = largest
    if in_blocks < n:  # a short last block is divided; if n is odd, a zero completes its last byte
        last = F.pad(flat[in_blocks:].float(), (0, n % 2))
        absmax[-1] = last.abs().max().clamp(min=SMALLEST_ABSMAX)
        packed[in_blocks // 2 :] = pack_nibbles(assign(last / absmax[-1], levels))
    return packed, absmax


def _quantize_blocks(blocks: Tensor, midpoints: Tensor) -> tuple[Tensor, Tensor]:
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX)).unsqueeze(1)
    # Fifteen comparisons and a sum, which compile to vector instructions without branch or table.
    ranks = torch.zeros_like(scaled, dtype=torch.int32)
    for midpoint in midpoints.unbind():
        ranks += scaled > midpoint
    return pack_nibbles(ranks).to(torch.uint8), absmax


@cache
def _compile() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_quantize_blocks, dynamic=False)


def _compiled_quantize_blocks(blocks: Tensor, midpoints: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return _compile()(blocks, midpoints)
    except RuntimeError as error:
        raise NotReadyError(
            "compiled=True needs a C++ compiler and Python's headers (on Debian: apt-get install "
            "g++ python3-dev), on a GPU Triton too; without compiled=True the result is the "
            "same, to the byte"
        ) from error


def dequantize_blockwise(
    packed: Tensor,
    absmax: Tensor,
    levels: Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Rebuild the weights as `blockwise.dequantize_blockwise` does, chunk by chunk."""
    n = math.prod(shape)
    flat = torch.empty(n, dtype=dtype, device=packed.device)
    chunk = chunk_size(packed.device)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        codes = packed[start // 2 : (stop + 1) // 2]
        constants = absmax[start // blocksize : -(-stop // blocksize)]
        flat[start:stop] = decode(codes, constants, levels, blocksize)[: stop - start]
    return flat.view(tuple(shape))


def decode(
    packed: Tensor, absmax: Tensor, levels: Tensor, blocksize: int, out: Tensor | None = None
) -> Tensor:
    """Look the levels of packed codes up and multiply them by the absmax of their blocks.

    Both levels of a byte travel as one 8-byte number: half the look-ups. `out` is memory for them.
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
    return unpack_nibbles(torch.arange(256, dtype=torch.uint8, device=device), 512).int()


def row_chunks(quantized: Any, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rebuild a few rows of a `QuantizedTensor` at a time; see its method of this name."""
    n_rows, width = quantized.shape
    blocksize, device = quantized.blocksize, quantized.device
    whole_blocks = blocksize // math.gcd(width, blocksize)  # so many rows end where a block ends
    step = chunk_size(device, chunks=4) // max(width, 1) // whole_blocks * whole_blocks
    step = max(step, whole_blocks)
    unpacking = UNPACKING.get()
    with unpacking():
        absmax, buffer = quantized.absmax, torch.empty(0, dtype=torch.int64, device=device)
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        first, last = start * width, stop * width
        with unpacking():
            codes = quantized.packed[first // 2 : (last + 1) // 2]
            constants = absmax[first // blocksize : -(-last // blocksize)]
            buffer.resize_(len(codes))
            chunk = decode(codes, constants, quantized.levels, blocksize, buffer)
            chunk = chunk[: last - first].view(stop - start, width).to(dtype)
        yield slice(start, stop), chunk


class FusedProduct(torch.autograd.Function):
    """`y = x·Wᵀ + bias + s·(x·Aᵀ)·Bᵀ`, in place where the definitions make new tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        quantized: Any,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
    ) -> Tensor:
        """Compute y `[tokens, out]` from x `[tokens, in]`, in the one dtype of x, A and B."""
        y = x.new_empty(len(x), quantized.shape[0])
        for rows, W in quantized.row_chunks(x.dtype):
            if bias is None:
                torch.mm(x, W.T, out=y[:, rows])
            else:
                torch.addmm(bias[rows], x, W.T, out=y[:, rows])
        thin = (x @ lora_A.T).mul_(scaling)
        y.addmm_(thin, lora_B.T)
        ctx.save_for_backward(x, thin, lora_A, lora_B)
        ctx.quantized, ctx.scaling = quantized, scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x, bias, A and B from that of y."""
        x, thin, lora_A, lora_B = ctx.saved_tensors
        grad_thin = (grad_y @ lora_B).mul_(ctx.scaling)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_thin @ lora_A
            for rows, W in ctx.quantized.row_chunks(grad_y.dtype):
                grad_x.addmm_(grad_y[:, rows], W)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y.sum(0)
        return grad_x, None, grad_bias, grad_thin.T @ x, grad_y.T @ thin, None


@dataclass
class PagingCounters:
    """What paging has cost: each use of a page is a hit, prefetched or a fault."""

    hits: int = 0
    prefetched: int = 0
    faults: int = 0
    evictions: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


class PageEvent(NamedTuple):
    """An entry of `PrefetchingPagedAdamW.trace`."""

    page: int
    what: str  # "hit", "prefetched" or "fault", as counted; "prefetch": it is sent for early
    frame: int
    evicted: int | None


class PrefetchingPagedAdamW(PagedAdamW):
    """Chapter 7's `PagedAdamW`, which fetches the next page while the current one is computed.

    Copies run on a thread or a CUDA stream, and only changed pages are written back. The results
    are the same to the bit.
    """

    def __init__(self, params: Iterable[Any], *args: Any, prefetch: bool = True, **settings: Any):
        self.counters = PagingCounters()
        self.trace: list[PageEvent] | None = None  # set to [] to record what happens
        self._pending: dict[int, Any] = {}  # of each frame: the copies to wait for before using it
        self._dirty: set[int] = set()  # pages that have changed since they came
        super().__init__(params, *args, **settings)
        self.prefetch = prefetch and self.table.frames > 1

    def _admit(self, host_states: dict[Tensor, Tensor]) -> None:
        known = len(self.frames)
        super()._admit(host_states)
        for frame in self.frames[known:]:
            self._copier.adopt(frame)

    @cached_property
    def _copier(self) -> ThreadCopier | StreamCopier:
        device = self.frames[0].device
        return (StreamCopier if device.type == "cuda" else ThreadCopier)(device)

    def _visit(self, sweep: Sequence[int]) -> Iterator[Tensor]:
        early = False  # was this page sent for while the one before it was computed?
        for number, following in zip(sweep, [*sweep[1:], None], strict=True):
            frame = self._fetch(number, "prefetched" if early else None)
            early = self.prefetch and following is not None and following not in self.table.frame_of
            if early:
                self._fetch(following, "prefetch")
            self._copier.wait(self._pending[frame])
            self._dirty.add(number)
            yield self._view(number, frame)

    def _fetch(self, number: int, what: str | None) -> int:
        frame, fault, evicted = self.table.access(number)
        if fault:
            # One copier does both in this order, so the page is saved before it is overwritten.
            moves = self._write_back([] if evicted is None else [(evicted, frame)])
            host = self.pages[number].host
            self._pending[frame] = self._copier.start([*moves, (self._view(number, frame), host)])
            self.counters.evictions += evicted is not None
            self.counters.bytes_in += host.nbytes
        what = what or ("fault" if fault else "hit")
        self.counters.hits += what == "hit"
        self.counters.faults += what == "fault"
        self.counters.prefetched += what == "prefetched"
        if self.trace is not None:
            self.trace.append(PageEvent(number, what, frame, evicted))
        return frame

    def _write_back(self, places: Iterable[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        dirty = [(number, frame) for number, frame in places if number in self._dirty]
        moves = [(self.pages[number].host, self._view(number, frame)) for number, frame in dirty]
        self._dirty.difference_update(number for number, _ in dirty)
        self.counters.bytes_out += sum(host.nbytes for host, _ in moves)
        return moves

    def flush(self) -> None:
        """Write every changed page back, and wait for it; the frames keep what they hold."""
        if self.frames:
            self._copier.finish(self._copier.start(self._write_back(self.table.frame_of.items())))
