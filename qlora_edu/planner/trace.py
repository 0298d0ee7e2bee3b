"""Live memory on the CPU, after each allocation and release, as PyTorch's profiler reports it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np


class Trace(NamedTuple):
    """Live bytes on the CPU above those at the start, after each allocation and release."""

    seconds: np.ndarray
    live: np.ndarray

    @property
    def peak(self) -> int:
        """The most that was live at once."""
        return int(self.live.max(initial=0))


def trace_memory(step: Callable[[], Any]) -> Trace:
    """Call ``step()`` and take down what PyTorch's allocator does meanwhile, to the byte.

    >>> trace_memory(lambda: torch.ones(1000).exp()).peak  # 4 bytes a number, twice
    8000
    """
    from torch.profiler import ProfilerActivity, profile

    with _mute(2), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = record.profiler.kineto_results.events()
    found = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    when, changes = np.array(found, dtype=np.int64).reshape(-1, 2).T
    return Trace((when - when[:1].sum()) / 1e9, np.cumsum(changes))


@contextmanager
def _mute(descriptor: int) -> Iterator[None]:
    """Hold back what compiled code writes there: the profiler announces itself at each start."""
    kept = os.dup(descriptor)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), descriptor)
        try:
            yield
        finally:
            os.dup2(kept, descriptor)
            os.close(kept)
