"""Part b: training steps of a 7B, three methods and two backends, beside their plans."""

import math
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.card import (
    LABEL,
    TINY,
    Rows,
    free_and_total,
    outside,
    peaks,
    relative_error,
    start_counting,
)
from qlora_edu.compat import quiet
from qlora_edu.memory import RESERVE, MemoryPlan, plan_memory
from qlora_edu.planner.fake_step import training_loss

METHODS: dict[str, dict[str, Any]] = {
    "full, bf16": {"method": "full"},
    "lora": {"method": "lora"},
    "qlora, ours": {"method": "qlora"},
    "qlora, bitsandbytes + PEFT": {"method": "qlora", "backend": "bitsandbytes"},
    "qlora, ours, bf16 adapters": {"method": "qlora", "adapter_dtype": "bfloat16"},
    "qlora, bitsandbytes + PEFT, bf16 adapters": {
        "method": "qlora",
        "backend": "bitsandbytes",
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
    from benchmarks.gpu.build import build_random

    model_name, lengths = (TINY, (32, 64)) if small else ("llama-7b", (512, 2048))
    settings = {"device": device, **METHODS[name]}
    plans = [plan_memory(model_name, max_length=length, **settings) for length in lengths]
    free, total = free_and_total(device)
    room = min(free, total - RESERVE)
    common = {"model": plans[0].name, "method": name, "weights": LABEL, "optimizer": "adamw_torch"}
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
    # What the planner calls "adamw_torch": on CUDA the default, for all tensors at once, not fused.
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
