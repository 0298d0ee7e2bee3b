"""Part c: the optimizer step of a 7B's adapters, paged by nobody, by the driver and by us."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.gpu.card import Rows, check_managed, free_and_total, outside, peaks, start_counting
from qlora_edu.files.host_tier import NEVER_PAGED
from qlora_edu.kernels import PagingCounters, PrefetchingPagedAdamW
from qlora_edu.memory import RESERVE, plan_memory

TORCH, FUSED, THEIRS = "torch AdamW", "torch AdamW, fused", "bitsandbytes AdamW32bit"
THEIRS_PAGED = "bitsandbytes PagedAdamW32bit"
OURS = {  # share of the states at hand, bytes per page, prefetching
    "ours, a tenth, 1 MiB": (0.1, 2**20, True),
    "ours, a tenth, 4 MiB": (0.1, 2**22, True),
    "ours, a tenth, 4 MiB, no prefetching": (0.1, 2**22, False),
    "ours, a tenth, 16 MiB": (0.1, 2**24, True),
    "ours, all of it, 4 MiB": (1.0, 2**22, True),
}


def adapters_of_7b(small: bool, device: str) -> list[nn.Parameter]:
    """float32 tensors as large as the adapters of a 7B with r = 64, and their gradients."""
    sizes = [2**14, 2**15, 100_000]
    if not small:
        sizes = [n for n, _ in plan_memory("llama-7b", "qlora", r=64).trace.trained]
    generator = torch.Generator(device).manual_seed(0)
    found = []
    for n in sizes:
        found.append(nn.Parameter(torch.randn(n, device=device, generator=generator)))
        found[-1].grad = torch.randn(n, device=device, generator=generator)
    return found


def paged_bytes(parameters: Sequence[Tensor]) -> int:
    """What bitsandbytes puts in managed memory for them: two float32 states of the larger ones."""
    return sum(2 * 4 * p.numel() for p in parameters if p.numel() >= NEVER_PAGED)


def make_optimizer(
    name: str, parameters: list[nn.Parameter], small: bool, device: str
) -> torch.optim.Optimizer:
    """The optimizer of that name; managed memory only where the card has room for it."""
    import bitsandbytes

    if name in OURS:
        share, page, prefetch = OURS[name]
        page = 2**14 if small else page
        budget = max(2 * page, int(share * sum(2 * p.nbytes for p in parameters)))
        if share == 1.0:
            budget += page * len(parameters)  # the last page of a tensor is seldom full
        return PrefetchingPagedAdamW(
            parameters, budget_bytes=budget, page_bytes=page, prefetch=prefetch
        )
    if name == THEIRS_PAGED:
        check_managed(paged_bytes(parameters), free_and_total(device)[0] - RESERVE)
        return bitsandbytes.optim.PagedAdamW32bit(parameters, lr=1e-3, weight_decay=1e-2)
    if name == THEIRS:
        return bitsandbytes.optim.AdamW32bit(parameters, lr=1e-3, weight_decay=1e-2)
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2, fused=name == FUSED or None)


def paging(name: str, small: bool, device: str) -> Rows:
    """Steps of one optimizer: their time, and what they need on the card."""
    warm_ups, rounds = 2, 3 if small else 15
    parameters = adapters_of_7b(small, device)
    start_counting(device)
    before = outside(device)
    at_rest = torch.cuda.memory_allocated() if device == "cuda" else 0
    optimizer = make_optimizer(name, parameters, small, device)
    times = []
    for number in range(warm_ups + rounds):
        if number == warm_ups and isinstance(optimizer, PrefetchingPagedAdamW):
            optimizer.counters = PagingCounters()
        started = time.perf_counter()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    allocated, reserved = peaks(device)
    row = {
        "optimizer": name,
        "parameters": sum(p.numel() for p in parameters),
        "tensors": len(parameters),
        "state_bytes": sum(2 * p.nbytes for p in parameters),
        "seconds_a_step": median(times[warm_ups:]),
        "first_step_seconds": times[0],
        "rest_allocated_bytes": at_rest or None,  # parameters and gradients
        "peak_allocated_bytes": allocated or None,
        "peak_reserved_bytes": reserved or None,
        # Managed memory is not the allocator's: if resident, it shows here, among loaded kernels.
        "outside_before_bytes": before or None,
        "outside_after_bytes": outside(device) or None,
        "managed_bytes": paged_bytes(parameters) if name == THEIRS_PAGED else 0,
    }
    if isinstance(optimizer, PrefetchingPagedAdamW):
        row["counters"] = {key: n / rounds for key, n in asdict(optimizer.counters).items()}
        row["frames"], row["pages"] = len(optimizer.frames), len(optimizer.pages)
        row["page_bytes"], row["prefetch"] = optimizer.page_bytes, optimizer.prefetch
        row["device_bytes"], row["host_bytes"] = optimizer.device_bytes, optimizer.host_bytes
        # Chapter 7's promise: the parameters of torch's AdamW, to the bit.
        twins = adapters_of_7b(small, device)
        plain = torch.optim.AdamW(twins, lr=1e-3, weight_decay=1e-2, foreach=False)
        for _ in range(warm_ups + rounds):
            plain.step()
        pairs = zip(parameters, twins, strict=True)
        row["differing_parameters"] = sum(int((mine != twin).sum()) for mine, twin in pairs)
    yield row
