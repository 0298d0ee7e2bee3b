"""The card: what it is, what it holds, how its time and its peaks are taken."""

import gc
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from statistics import median
from typing import Any

import psutil
import torch

from benchmarks.stored import stamp
from qlora_edu.memory import MemoryPlan

ALLOCATOR = "expandable_segments:True"  # fewer gaps between blocks; as one would train a 65B
LABEL = "RANDOM WEIGHTS: time and memory are real, what the models say is noise"
TINY = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 512,
    "tie_word_embeddings": False,
}
Rows = Iterator[dict[str, Any]]


class ManagedMemoryError(MemoryError):
    """More managed memory would be asked for than the card has free."""


def check_managed(nbytes: int, free: int) -> None:
    """Refuse managed memory that the card has no room for: the driver would have to evict.

    Raises:
        ManagedMemoryError: with both numbers.
    """
    if nbytes > free:
        raise ManagedMemoryError(
            f"{nbytes:,} bytes of managed memory, and only {free:,} are free on the card: not asked"
        )


def seconds(function: Callable[[], Any], device: str, calls: int = 10, rounds: int = 20) -> float:
    """Median seconds of one call, over rounds of some calls; by CUDA's own clock on a card."""
    function()
    times = []
    for _ in range(rounds):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000 / calls)
        else:
            started = time.perf_counter()
            for _ in range(calls):
                function()
            times.append((time.perf_counter() - started) / calls)
    return median(times)


def free_and_total(device: str) -> tuple[int, int]:
    """Free and total bytes of the card; of the machine in a dry run."""
    if device == "cuda":
        return torch.cuda.mem_get_info()
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def outside(device: str) -> int:
    """Bytes of the card that are in use but not PyTorch's: contexts, kernels, other processes."""
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    free, total = free_and_total(device)
    return total - free - torch.cuda.memory_reserved()


def start_counting(device: str, forget_cache: bool = True) -> None:
    """Begin to watch the peak of the allocator anew."""
    if device == "cuda":
        torch.cuda.synchronize()
        if forget_cache:
            gc.collect()
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks(device: str) -> tuple[int, int]:
    """The most bytes allocated and reserved since `start_counting`; zeros in a dry run."""
    if device != "cuda":
        return 0, 0
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def relative_error(plan: MemoryPlan, measured: int) -> float | None:
    """How far off the plan was; None in a dry run, where no card counts."""
    return round(plan.peak_bytes / measured - 1, 5) if measured else None


def describe(device: str) -> Rows:
    """What every stored result says of the machine; found out in a process of its own, too."""
    facts = stamp(["bitsandbytes", "transformers", "peft", "accelerate"])
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["card"] = {
            "name": properties.name,
            "total_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": driver_version(),
            "allocator": ALLOCATOR,
        }
    memory = psutil.virtual_memory().total
    yield {**facts, "host": {"cores": os.cpu_count(), "total_bytes": memory}}


def driver_version() -> str | None:
    """The version of NVIDIA's driver, if its own tool is there to say so."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return found.stdout.splitlines()[0].strip() if found.stdout else None
    return None


def without_paths(text: str) -> str:
    """The text without addresses, and of each path only the last name: results are published.

    >>> without_paths("File /a/b.c/d.py, see https://x.org/y")
    'File d.py, see (an address)'
    """
    text = re.sub(r"\w+://\S+|\bhttps?:\S*", "(an address)", text)
    return re.sub(r"(?<![\w.])(?:/[\w.+@~-]+)+/([\w.+@~-]+)", r"\1", text)
