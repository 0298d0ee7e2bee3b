"""Measure on a CUDA card what this course can only plan on a CPU, and store it.

    make gpu-report                                  # all parts
    python benchmarks/gpu_report.py a paging         # some, by letter or by name
    python benchmarks/gpu_report.py --dry-run        # all of it, tiny, on a CPU; stores nothing

a  quantiser  packed bytes, constants and read-back values beside bitsandbytes' CUDA kernels; and
              bandwidth, as a share of what the card reaches when it copies
b  steps      a 7B: full, LoRA and QLoRA steps, peak memory beside the plan, tokens a second
c  paging     the optimizer step of a 7B's adapters, paged by nobody, by the driver and by us
d  headline   QLoRA steps of a 65B within 48 GB, of a 33B within 24 GB and of a 7B within 8 GB
e  study      ways of chapter 8 at ten seeds; takes its learning rates from `make experiments`

Estimates for an H100, not measurements: a 1 minute, b 4, c 3, d 7, e 6. Each part is stopped after
`--minutes` (8). Each of its tasks has a process of its own: what crashes takes nothing with it, and
the memory of one is not counted for the next. A part is stored as data/results/gpu_<part>.json, and
holds what was measured and, under "error", what failed; the exit code is then 1.

The models of parts b and d have RANDOM WEIGHTS: time and memory are real, what they say is noise.
"""

import argparse
import gc
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from stored import ROOT, stamp, store
from torch import Tensor, nn

from qlora_edu import QuantizedTensor, quantize
from qlora_edu.blockwise import unpack_nibbles
from qlora_edu.compat import quiet
from qlora_edu.kernels import PagingCounters, PrefetchingPagedAdamW, compiled_chunk_size
from qlora_edu.memory import NEVER_PAGED, RESERVE, MemoryPlan, plan_memory
from qlora_edu.planner.fake_step import training_loss

DRY_FOLDER = ROOT / "build" / "gpu_report"
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


# a: the quantiser


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
            if weight.numel() < compiled_chunk_size(weight.device):
                raise ValueError(f"{weight.numel():,} weights are less than a chunk: not compiled")
            return quantize(weight, double_quant=False, compiled=True).packed

        def of_bitsandbytes(weight: Tensor = weight) -> Tensor:
            kind = {"compress_statistics": False, "quant_type": "nf4", "blocksize": 64}
            return quantize_4bit(weight, **kind)[0]

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


# b: the steps of a 7B

METHODS: dict[str, dict[str, Any]] = {
    "full, bf16": {"method": "full"},
    "lora": {"method": "lora"},
    "qlora, ours": {"method": "qlora"},
    "qlora, bitsandbytes + PEFT": {"method": "qlora", "stack": "bitsandbytes"},
    "qlora, ours, bf16 adapters": {"method": "qlora", "adapter_dtype": "bfloat16"},
    "qlora, bitsandbytes + PEFT, bf16 adapters": {
        "method": "qlora",
        "stack": "bitsandbytes",
        "adapter_dtype": "bfloat16",
    },
}


def ids_for(plan: MemoryPlan, device: str) -> Tensor:
    """One batch of random tokens, the same at every call."""
    shape, words = (plan.batch_size, plan.max_length), plan.config.vocab_size
    return torch.randint(0, words, shape, generator=torch.Generator().manual_seed(0)).to(device)


def backward(model: nn.Module, ids: Tensor, plan: MemoryPlan) -> Tensor:
    """Forward, backward, clipping; returns the loss, detached."""
    loss = training_loss(model, ids, plan.settings)
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.3)
    return loss.detach()


def check_finite(losses: Sequence[float]) -> None:
    """Raise unless every loss is a number."""
    if not all(map(math.isfinite, losses)):
        raise ArithmeticError(f"a loss is not finite: {losses}")


def steps(name: str, small: bool, device: str) -> Rows:
    """One way of training at two lengths, batch 1, checkpointing on; torch's default AdamW."""
    from qlora_edu.production.random_weights import build_random

    model_name, lengths = (TINY, (32, 64)) if small else ("llama-7b", (512, 2048))
    settings = {"device": device, **METHODS[name]}
    plans = [plan_memory(model_name, max_length=length, **settings) for length in lengths]
    free, total = free_and_total(device)
    room = min(free, total - RESERVE)
    common = {"model": plans[0].name, "method": name, "weights": LABEL, "optimizer": "adamw"}
    rows = []
    for plan in plans:
        row = {**common, "batch": plan.batch_size, "length": plan.max_length, "settings": settings}
        row |= {"plan_bytes": plan.peak_bytes, "plan_moment": plan.peak_moment}
        if device == "cuda" and plan.peak_bytes > room:
            yield {**row, "fits": False, "room_bytes": room, "says": "does not fit"}
        else:
            rows.append((plan, row))
    if not rows:
        return
    torch.manual_seed(0)
    started = time.perf_counter()
    with quiet():
        model = build_random(model_name, plans[0].settings, device)
    built = round(time.perf_counter() - started, 1)
    # What the planner calls "adamw": on CUDA the default, for all tensors at once, not fused.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    for plan, row in rows:
        ids, losses, times = ids_for(plan, device), [], []
        start_counting(device)
        for _ in range(7):
            started = time.perf_counter()
            loss = backward(model, ids, plan)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())  # waits for the card...
            if device == "cuda":
                torch.cuda.synchronize()  # ...and for what came after the loss
            times.append(time.perf_counter() - started)
        check_finite(losses)
        allocated, reserved = peaks(device)
        step_s = median(times[2:])
        yield {
            **row,
            "fits": True,
            "peak_allocated_bytes": allocated or None,
            "peak_reserved_bytes": reserved or None,
            "outside_bytes": outside(device) or None,
            "relative_error": relative_error(plan, allocated),
            "seconds_a_step": step_s,
            "tokens_per_second": round(plan.batch_size * plan.max_length / step_s, 1),
            "losses": [round(loss, 4) for loss in losses],
            "build_seconds": built,
        }


# c: paging

TORCH, FUSED, THEIRS = "torch AdamW", "torch AdamW, fused", "bitsandbytes AdamW32bit"
THEIRS_PAGED = "bitsandbytes PagedAdamW32bit"
OURS = {  # share of the states at hand, bytes a page, prefetching
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


# d: the headline

HEADLINES = [  # model, bytes of the card, whose layers
    (model, card, stack)
    for model, card in (("llama-65b", 48), ("llama-33b", 24), ("llama-7b", 8))
    for stack in ("qlora_edu", "bitsandbytes")
]
RATE = 1e-4  # the paper's for 33B and 65B


def choose_plan(model: Any, card_bytes: int, **settings: Any) -> MemoryPlan | None:
    """The plan with paged 32-bit states if it fits on the card, or else with bfloat16 states."""
    for optimizer in ("paged_adamw_32bit", "adamw"):
        plan = plan_memory(model, "qlora", max_length=512, optim=optimizer, **settings)
        if plan.peak_bytes + RESERVE <= card_bytes:
            return plan
    return None


def headline(model_name: str, card: int, stack: str, small: bool, device: str) -> Rows:
    """Ten steps on one batch, in a process that may take no more than a card of `card` GB.

    A gigabyte is 10^9 bytes here: real cards have more (a 48 GB card some 51.5·10^9), so the limit
    is the stricter one. Of it the allocator gets what the context and a reserve leave.
    """
    from qlora_edu.production.random_weights import build_random

    card_bytes = card * 10**9
    row = {"model": model_name, "card_bytes": card_bytes, "stack": stack, "weights": LABEL}
    settings = {"stack": stack, "r": 64, "adapter_dtype": "bfloat16", "device": device}
    plan = choose_plan(TINY if small else model_name, card_bytes, **settings)
    if plan is None:
        yield {**row, "fits": False, "says": "does not fit, by the plan"}
        return
    plan = plan.at(max_length=16) if small else plan
    row |= {"batch": plan.batch_size, "length": plan.max_length, "settings": settings}
    row |= {"optimizer": plan.optim, "plan_bytes": plan.peak_bytes}
    row |= {"plan_moment": plan.peak_moment, "learning_rate": RATE}
    free, total = free_and_total(device)
    others = outside(device)
    if device == "cuda":
        if total < card_bytes or free < plan.peak_bytes + RESERVE:
            says = f"this card is too small for it: {total:,} bytes, {free:,} of them free"
            yield {**row, "fits": False, "says": says}
            return
        cap = card_bytes - max(others, RESERVE)
        torch.cuda.set_per_process_memory_fraction(cap / total)
        row["allocator_cap_bytes"] = cap
    started = time.perf_counter()
    torch.manual_seed(0)
    with quiet():
        model = build_random(TINY if small else model_name, plan.settings, device)
    built = round(time.perf_counter() - started, 1)
    print(f"{model_name}, {stack}: built in {built} s", file=sys.stderr, flush=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    managed = plan.host_bytes
    optimizer = headline_optimizer(plan.optim, trained)
    ids, losses, times, tops = ids_for(plan, device), [], [], {"backward": [], "optimizer": []}
    start_counting(device)
    for number in range(3 if small else 12):
        started = time.perf_counter()
        losses.append(backward(model, ids, plan).item())
        tops["backward"].append(peaks(device))
        if number == 0 and device == "cuda":
            context = outside(device)  # kernels are loaded now, and managed memory is not yet taken
            in_use = torch.cuda.memory_allocated() + max(context, RESERVE)
            check_managed(managed, min(card_bytes - in_use, free_and_total(device)[0]))
        start_counting(device, forget_cache=False)
        optimizer.step()
        optimizer.zero_grad()
        tops["optimizer"].append(peaks(device))
        start_counting(device, forget_cache=False)
        times.append(time.perf_counter() - started)
    check_finite(losses)
    row |= {
        "seconds_a_step": median(times[2:]),
        "tokens_per_second": round(plan.batch_size * plan.max_length / median(times[2:]), 1),
        "losses": [round(loss, 4) for loss in losses],
        "falls": losses[-1] < losses[0],
        "build_seconds": built,
        "managed_bytes": managed,
        "fits": None,
    }
    if device == "cuda":
        allocated = max(top for of_part in tops.values() for top, _ in of_part)
        reserved = max(top for of_part in tops.values() for _, top in of_part)
        # Managed memory is not the allocator's; counted as if all of it were on the card then.
        in_step = max(top for top, _ in tops["optimizer"]) + managed
        needed = max(allocated, in_step)
        row |= {
            "peak_allocated_bytes": allocated,
            "peak_reserved_bytes": reserved,
            "optimizer_step_bytes": in_step,
            "peak_bytes": needed,
            "outside_bytes": context,
            "relative_error": relative_error(plan, needed),
            "fits": max(needed, reserved) + context <= card_bytes,
        }
    yield row
    if not row["falls"]:
        raise ArithmeticError(f"the losses do not fall: {losses}")


def headline_optimizer(name: str, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """bitsandbytes' paged optimizer, or torch's with states in the dtype of the adapters."""
    if name == "adamw":
        return torch.optim.AdamW(trained, lr=RATE)
    from bitsandbytes.optim import PagedAdamW32bit

    return PagedAdamW32bit(trained, lr=RATE)


# e: the study

STUDY_WAYS, STUDY_SEEDS, WORKERS = ("full", "lora", "qlora", "qlora + embeddings"), 10, 8


def study(small: bool, device: str) -> Rows:
    """Ways of chapter 8 at more seeds, some runs at a time."""
    import three_ways

    path = ROOT / "data" / "results" / "three_ways.json"
    best = json.loads(path.read_text()).get("best") if path.exists() else None
    if small:
        best = {way: rates[0] for way, rates in three_ways.RATES.items()}
    if not best:
        raise FileNotFoundError("no tuned learning rates are stored: run `make experiments` first")
    specs = [
        {
            "part": "seeds",
            "rows": 3000,
            "way": way,
            "rate": three_ways.rate_of(way, best),
            "seed": seed,
        }
        for seed in range(1 if small else STUDY_SEEDS)
        for way in STUDY_WAYS
    ]
    if small:
        with tempfile.TemporaryDirectory() as folder:
            shorten(three_ways, Path(folder))
            for spec in specs:
                yield {**three_ways.run(spec, device), "device": device}
        return
    spawn = multiprocessing.get_context("spawn")
    failed: list[Exception] = []
    with ProcessPoolExecutor(WORKERS, mp_context=spawn) as pool:
        runs = [pool.submit(three_ways.run, spec, device) for spec in specs]
        for finished in as_completed(runs):
            try:
                yield {**finished.result(), "device": device}
            except Exception as error:  # what the other runs found is kept
                failed.append(error)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(specs)} runs failed") from failed[0]


def shorten(three_ways: Any, folder: Path) -> None:
    """Cut the study to two steps, a few rows and texts; for a dry run alone, in its process."""
    for path in (*three_ways.TASKS.glob("*.jsonl"), ROOT / "data" / "text" / "held-out.jsonl"):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:6]))
    three_ways.TASKS, three_ways.ROOT = folder / "data" / "tasks", folder
    three_ways.STEPS, train = 2, three_ways.train
    three_ways.train = lambda *args, **kwargs: 25 * train(*args, **kwargs)  # a mean is over 50
    real = three_ways.generate_answers
    three_ways.generate_answers = lambda *args, **_: real(*args, max_new_tokens=2)


# The parts, their tasks, and how they are run

PARTS: dict[str, dict[str, Callable[[bool, str], Rows]]] = {
    "quantiser": {"equality": equality, "bandwidth": bandwidth},
    "steps": {name: partial(steps, name) for name in METHODS},
    "paging": {name: partial(paging, name) for name in (TORCH, FUSED, THEIRS, THEIRS_PAGED, *OURS)},
    "headline": {
        f"{model} within {card} GB, {stack}": partial(headline, model, card, stack)
        for model, card, stack in HEADLINES
    },
    "study": {"study": study},
}
LETTERS = dict(zip("abcde", PARTS, strict=True))


def card(device: str) -> Rows:
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


def follow(parent: int) -> None:
    """End this process and its children when the parent has been killed: they hold the card."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def work(part: str, name: str, small: bool, device: str, path: Path) -> None:
    """In the child: run one task, and write its rows down one by one, as they are found."""
    os.setsid()  # its own children go with it
    threading.Thread(target=follow, args=(os.getppid(),), daemon=True).start()
    task = partial(card, device) if part == "card" else partial(PARTS[part][name], small, device)
    with path.open("a", encoding="utf-8") as file:
        try:
            for row in task():
                row = {"task": name, **row} if part != "card" else row
                print(json.dumps(row, allow_nan=False), file=file, flush=True)
                if part != "card":
                    print(json.dumps(row), flush=True)
        except Exception as error:
            traceback.print_exc()
            message = without_paths(f"{type(error).__name__}: {error}")
            print(json.dumps({"task": name, "error": message}), file=file, flush=True)
            sys.exit(1)


def run_task(part: str, name: str, small: bool, device: str, minutes: float) -> list[dict]:
    """Run one task in a process of its own; its rows, the last of which may be an error."""
    # A forked process would inherit a CUDA that it cannot use; without CUDA forking is faster.
    context = multiprocessing.get_context("spawn" if device == "cuda" else "fork")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        process = context.Process(target=work, args=(part, name, small, device, path))
        process.start()
        try:
            process.join(60 * minutes)
            late = process.is_alive()
        finally:
            if process.is_alive():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
            process.join()
        rows = read_rows(path)
    if late:
        rows.append({"task": name, "error": f"stopped after {minutes:.1f} minutes"})
    elif process.exitcode and not any("error" in row for row in rows):
        code = process.exitcode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        rows.append({"task": name, "error": f"the process ended with {how}"})
    return rows


def read_rows(path: Path) -> list[dict]:
    """The rows in a file whose writer may have died within the last line."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def run_part(part: str, facts: dict, small: bool, device: str, minutes: float) -> dict:
    """Run the tasks of a part one after another; what they found, and what failed."""
    print(f"part {part}", flush=True)
    started, rows = time.perf_counter(), []
    for name in PARTS[part]:
        left = minutes - (time.perf_counter() - started) / 60
        if left <= 0:
            rows.append({"task": name, "says": f"not begun: {minutes:g} minutes were over"})
            continue
        rows += run_task(part, name, small, device, left)
    report = {**facts, "dry_run": small, "part": part}
    report["minutes"] = round((time.perf_counter() - started) / 60, 2)
    errors = [f"{row['task']}: {row['error']}" for row in rows if "error" in row]
    if errors:
        report["error"] = "; ".join(errors)
    return {**report, "rows": rows}


def keep(report: dict, part: str, small: bool) -> None:
    """Store the result of a card; of a dry run only a file under build/."""
    if not small:
        store(report, f"gpu_{part}")
        return
    DRY_FOLDER.mkdir(parents=True, exist_ok=True)
    path = DRY_FOLDER / f"gpu_{part}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{path.name} written under build, of a dry run: it measures nothing")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that were asked for; 1 if anything failed."""
    parser = argparse.ArgumentParser(description="Measure the course on a CUDA card.")
    choices = [*LETTERS, *PARTS]
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(choices))
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU; stores nothing")
    parser.add_argument("--minutes", type=float, default=8.0, help="that each part may take")
    arguments = parser.parse_args(argv)
    for part in arguments.parts:
        if part not in choices:
            parser.error(f"no part {part!r}; there are {', '.join(choices)}")
    if not arguments.dry_run and not torch.cuda.is_available():
        print(
            "error: PyTorch finds no CUDA device, and this report measures one. "
            "Try --dry-run, which runs every part on a CPU and stores nothing",
            file=sys.stderr,
        )
        return 1
    wanted = {LETTERS.get(part, part) for part in arguments.parts or PARTS}
    device = "cpu" if arguments.dry_run else "cuda"
    os.environ["PYTORCH_ALLOC_CONF"] = ALLOCATOR  # read by each task's process when it begins
    if arguments.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        for name in ("bitsandbytes", "peft", "transformers.models.llama.modeling_llama"):
            import_module(name)  # what is imported here the forked tasks need not import
        # Nothing is computed here: a process with a team of threads cannot be forked. And the
        # number of threads is not set: each thread of a forked task would then set it again,
        # several at once while a model loads, and PyTorch sometimes loses its pool over that.
    facts = run_task("card", "card", arguments.dry_run, device, arguments.minutes)
    if len(facts) != 1 or "error" in facts[0]:
        print(f"error: this machine cannot be described: {facts}", file=sys.stderr)
        return 1
    failed = False
    for part in (part for part in PARTS if part in wanted):
        report = run_part(part, facts[0], arguments.dry_run, device, arguments.minutes)
        keep(report, part, arguments.dry_run)
        if "error" in report:
            failed = True
            print(f"part {part}, failed: {report['error']}", file=sys.stderr)
    if wanted & {"steps", "headline"}:
        print(LABEL)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
