"""What paging an optimizer's states costs on a CPU, and what prefetching hides of it.

`python benchmarks/paging.py` (a minute) writes data/results/paging.json. 32 float32 parameters of
2^17 elements (4.2 million, 32 MiB of states) are stepped by `torch.optim.AdamW` and by
`PrefetchingPagedAdamW` in turns, in one thread, so that the copying thread has a core of its own.
`ratio` is the median time of a paged step over that of a plain one, in the same run; the counters
are those of one step, after one to warm up.
"""

import time
from dataclasses import asdict
from statistics import median

import torch
from stored import stamp, store

from qlora_edu.kernels import PagingCounters, PrefetchingPagedAdamW

TENSORS, ELEMENTS, ROUNDS = 32, 2**17, 15
STATES = TENSORS * ELEMENTS * 2 * 4
PAGES = (2**14, 2**16, 2**18, 2**20)
SHARES = (1.0, 0.9, 0.5, 0.1, 0.0)  # of the states' bytes; 0.0 stands for two pages


def parameters() -> list[torch.nn.Parameter]:
    """The same numbers, with the same gradients, at every call."""
    torch.manual_seed(0)
    found = [torch.nn.Parameter(torch.randn(ELEMENTS)) for _ in range(TENSORS)]
    for parameter in found:
        parameter.grad = torch.randn(ELEMENTS)
    return found


def seconds(optimizer: torch.optim.Optimizer) -> float:
    """Time of one step."""
    started = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - started


def row(page_bytes: int, share: float, prefetch: bool) -> dict:
    """Step both kinds in turns; one row of the result."""
    budget = max(int(share * STATES), 2 * page_bytes)
    plain_parameters, paged_parameters = parameters(), parameters()
    plain = torch.optim.AdamW(plain_parameters)
    paged = PrefetchingPagedAdamW(
        paged_parameters, budget_bytes=budget, page_bytes=page_bytes, prefetch=prefetch
    )
    seconds(plain), seconds(paged)
    paged.counters = PagingCounters()
    times = [(seconds(plain), seconds(paged))]
    counted = asdict(paged.counters)
    times += [(seconds(plain), seconds(paged)) for _ in range(ROUNDS - 1)]
    for mine, theirs in zip(paged_parameters, plain_parameters, strict=True):
        assert torch.equal(mine, theirs)
    plain_s, paged_s = (median(of_one) for of_one in zip(*times, strict=True))
    print(
        f"page {page_bytes >> 10:5} KiB, budget {share:4.0%}, prefetch {prefetch!s:<5}: "
        f"{1000 * plain_s:5.1f} ms plain, {paged_s / plain_s:6.2f}x, {counted}",
        flush=True,
    )
    return {
        "budget_share": share,
        "budget_bytes": budget,
        "page_bytes": page_bytes,
        "prefetch": prefetch,
        "plain_s": plain_s,
        "paged_s": paged_s,
        "ratio": paged_s / plain_s,
        **counted,
    }


def main() -> None:
    """Measure and store."""
    torch.set_num_threads(1)
    report = stamp(["numpy"])
    report["state_bytes"] = STATES
    report["rows"] = [
        row(page, share, prefetch)
        for page in PAGES
        for share in SHARES
        for prefetch in (True, False)
    ]
    store(report, "paging")


if __name__ == "__main__":
    main()
