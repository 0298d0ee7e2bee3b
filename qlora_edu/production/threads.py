"""How many threads compute, and how they wait for each other.

PyTorch and bitsandbytes share a matrix product out among threads, one per core, with OpenMP. A
thread that is ready early *spins*: it keeps its core busy until the others are ready. On an idle
machine that saves a little. Beside one other busy process it costs a lot: the thread that is waited
for has no core to run on, because the one that waits holds it. Waiting passively, a thread gives
its core away. OpenMP reads how to wait when it is loaded, so it must be said before that.
"""

import os
import sys
import time

POLICY, COUNT = "OMP_WAIT_POLICY", "OMP_NUM_THREADS"


def wait_passively() -> None:
    """Make the threads of this process and of those it starts give their cores away while waiting.

    Does nothing for this process once torch is loaded, and nothing where the variable is set.
    """
    os.environ.setdefault(POLICY, "PASSIVE")


def choose_threads(seconds: float = 0.4) -> str:
    """Choose between one thread and one per core, and say in a few words what was chosen.

    Where `OMP_NUM_THREADS` or `OMP_WAIT_POLICY` were set before torch was loaded, their choice
    stands. Elsewhere, say in a notebook that `make lab` did not open, both are tried for
    `seconds` in all, in turns, on a small training step, and the faster one is taken.

    >>> choose_threads(0.01)  # doctest: +ELLIPSIS
    '... thread...'
    """
    import torch

    threads = torch.get_num_threads()
    how = ""
    if threads > 1 and os.environ.get(POLICY, "").upper() == "PASSIVE":
        how = ", waiting passively"
    elif threads > 1 and COUNT not in os.environ:
        times = dict.fromkeys((1, threads), 0.0)
        _step()  # the first one starts the threads
        for _ in range(4):
            for count in times:
                torch.set_num_threads(count)
                times[count] += _steps_in(seconds / 8)
        threads = min(times, key=lambda count: times[count])
        torch.set_num_threads(threads)
        how = f", the faster of 1 and {max(times)} just now"
    return f"{threads} thread{'s' * (threads > 1)}{how}"


def _steps_in(seconds: float) -> float:
    """Seconds per step, over as many steps as `seconds` have room for, at least one."""
    started, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - started < seconds:
        _step()
        steps += 1
    return (time.perf_counter() - started) / steps


def _step() -> None:
    """One forward and backward pass through two layers of the embedded model's size."""
    torch = sys.modules["torch"]
    up, down = (torch.ones(shape, requires_grad=True) for shape in ((640, 256), (256, 640)))
    hidden = torch.nn.functional.silu(torch.ones(256, 256) @ up.T) @ down.T
    torch.autograd.grad(hidden.square().mean(), (up, down))
