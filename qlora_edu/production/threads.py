"""How many threads compute, and how they wait for each other.

OpenMP gives each core a thread, and a thread that is ready early *spins*: it keeps its core busy
until the others are ready. Beside one other busy process that costs a lot: the thread that is
waited for has no core to run on. Waiting passively, a thread gives its core away.
"""

import os
import time

POLICY, COUNT = "OMP_WAIT_POLICY", "OMP_NUM_THREADS"


def wait_passively() -> None:
    """Let waiting threads give their cores away; OpenMP reads this when torch is loaded."""
    os.environ.setdefault(POLICY, "PASSIVE")


def choose_threads(seconds: float = 0.4) -> str:
    """Take the faster of one thread and one per core, and say in a few words what was taken.

    Where `OMP_NUM_THREADS` or a passive `OMP_WAIT_POLICY` is set, that choice stands.
    """
    import torch

    threads, how = torch.get_num_threads(), ""
    if threads > 1 and os.environ.get(POLICY, "").upper() == "PASSIVE":
        how = ", waiting passively"
    elif threads > 1 and COUNT not in os.environ:
        times = dict.fromkeys((1, threads), 0.0)
        _seconds_per_step(0)  # the first one starts the threads
        for _ in range(4):
            for count in times:
                torch.set_num_threads(count)
                times[count] += _seconds_per_step(seconds / 8)
        threads = min(times, key=lambda count: times[count])
        torch.set_num_threads(threads)
        how = f", the faster of 1 and {max(times)} just now"
    return f"{threads} thread{'s' * (threads > 1)}{how}"


def _seconds_per_step(seconds: float) -> float:
    """Time steps of a layer's size for so long, at least one."""
    import torch

    weight, x = torch.ones(640, 256, requires_grad=True), torch.ones(256, 256)
    started, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - started < seconds:
        torch.autograd.grad((x @ weight.T).square().mean(), weight)
        steps += 1
    return (time.perf_counter() - started) / steps
