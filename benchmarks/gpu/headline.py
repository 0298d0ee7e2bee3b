"""Part d: QLoRA steps of a 65B within 48 GB, of a 33B within 24 GB and of a 7B within 8 GB."""

import sys
import time
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.card import (
    LABEL,
    TINY,
    Rows,
    check_managed,
    free_and_total,
    outside,
    peaks,
    relative_error,
    start_counting,
)
from benchmarks.gpu.steps import backward, check_finite, ids_for
from qlora_edu.compat import quiet
from qlora_edu.memory import RESERVE, MemoryPlan, plan_memory

HEADLINES = [  # model, bytes of the card, whose layers
    (model, card, stack)
    for model, card in (("llama-65b", 48), ("llama-33b", 24), ("llama-7b", 8))
    for stack in ("qlora_edu", "bitsandbytes")
]
RATE = 1e-4  # the paper's for 33B and 65B


def choose_plan(model: Any, card_bytes: int, **settings: Any) -> MemoryPlan | None:
    """The plan with paged 32-bit states if it fits on the card, or else with bfloat16 states."""
    for optimizer in ("paged_adamw_32bit", "adamw_torch"):
        plan = plan_memory(model, "qlora", max_length=512, optim=optimizer, **settings)
        if plan.peak_bytes + RESERVE <= card_bytes:
            return plan
    return None


def headline(model_name: str, card: int, stack: str, small: bool, device: str) -> Rows:
    """Ten steps on one batch, in a process that may take no more than a card of `card` GB.

    A gigabyte is 10^9 bytes here: real cards have more (a 48 GB card some 51.5·10^9), so the limit
    is the stricter one. Of it the allocator gets what the context and a reserve leave.
    """
    from benchmarks.gpu.build import build_random

    card_bytes = card * 10**9
    row = {"model": model_name, "card_bytes": card_bytes, "stack": stack, "weights": LABEL}
    settings = {"backend": stack, "r": 64, "adapter_dtype": "bfloat16", "device": device}
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
    if name == "adamw_torch":
        return torch.optim.AdamW(trained, lr=RATE)
    from bitsandbytes.optim import PagedAdamW32bit

    return PagedAdamW32bit(trained, lr=RATE)
