"""Hold the memory planner's predictions against what real steps need, and store both.

`python benchmarks/memory.py` (4 minutes on two cores, 4 GB) writes data/results/memory.json:

- `rows`: small models of several architectures, trained for two steps on the CPU. `measured` is
  the most that PyTorch's allocator had handed out during the second one, the model's own tensors
  and the optimizer's included. Those marked `held_out` were drawn at random (seed 0), and nothing
  in the planner was changed after they were first seen.
- `big`: the real shapes from 7B to 70B, forward and backward without memory, every block of them
  traced; the planner has three blocks to go by. PyTorch's own `MemTracker`, which takes no frozen
  parameters, traces the full fine-tunes as well.
"""

import gc
import random
import sys
import time
from itertools import accumulate
from typing import Any

import torch
from stored import stamp, store
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig
from transformers.utils import logging

from qlora_edu.memory import plan_memory
from qlora_edu.planner.fake_step import build_model, training_loss, without_memory
from qlora_edu.planner.trace import Allocations, kept_tensors, trace_memory, weigh

LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 768,
}
DEEP = {**LLAMA, "num_hidden_layers": 12, "hidden_size": 384, "intermediate_size": 1024}
WIDE = {**LLAMA, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3}
MANY_WORDS = {**LLAMA, "vocab_size": 32000}
GPT2 = {"n_embd": 256, "n_layer": 6, "n_head": 8, "vocab_size": 5000}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
OPT = {"hidden_size": 256, "num_hidden_layers": 6, "ffn_dim": 1024, "num_attention_heads": 8}
OPT |= {"vocab_size": 2000, "word_embed_proj_dim": 256}
NEOX = {"hidden_size": 256, "num_hidden_layers": 5, "intermediate_size": 1024, "vocab_size": 2000}
NEOX |= {"num_attention_heads": 8, "bos_token_id": 0, "eos_token_id": 0}
PHI3 = {**LLAMA, "vocab_size": 4000, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
HEADS = {**LLAMA, "head_dim": 32, "vocab_size": 4000}

FLOAT32 = {"dtype": "float32", "r": 16}
KEPT = {**FLOAT32, "gradient_checkpointing": False}
CASES: list[tuple[str, dict, str, int, int, dict]] = [
    *(("llama", LLAMA, m, 8, 128, KEPT) for m in ("full", "lora", "qlora", "houlsby")),
    *(("llama", LLAMA, m, 8, 128, FLOAT32) for m in ("full", "lora", "qlora", "houlsby")),
    ("llama", LLAMA, "qlora", 8, 128, {**KEPT, "backend": "bitsandbytes"}),
    ("llama", LLAMA, "qlora", 4, 300, {**FLOAT32, "backend": "bitsandbytes", "r": 64}),
    ("llama", LLAMA, "qlora", 8, 128, {**KEPT, "padding": True}),
    ("llama", LLAMA, "qlora", 8, 128, {**KEPT, "lora_dropout": 0.1}),
    ("llama", LLAMA, "qlora", 4, 300, {"r": 16, "autocast": True}),
    ("llama", LLAMA, "full", 1, 16, KEPT),
    ("llama", LLAMA, "qlora", 1, 1500, KEPT),
    ("llama", MANY_WORDS, "lora", 4, 100, FLOAT32),
    ("llama", DEEP, "qlora", 4, 128, KEPT),
    ("llama", DEEP, "full", 2, 64, {"dtype": "bfloat16"}),
    ("llama", WIDE, "qlora", 1, 32, KEPT),
    (
        "llama",
        WIDE,
        "qlora",
        1,
        256,
        {"dtype": "bfloat16", "double_quant": False, "blocksize": 128},
    ),
    ("llama", LLAMA, "lora", 8, 128, {**KEPT, "target_modules": ("q_proj", "v_proj"), "r": 4}),
    ("gpt2", GPT2, "full", 4, 200, KEPT),
    ("opt", OPT, "qlora", 2, 200, KEPT),
    ("gpt_neox", NEOX, "qlora", 2, 200, FLOAT32),
    ("qwen2", {**LLAMA, "vocab_size": 8000}, "qlora", 2, 256, {"dtype": "bfloat16"}),
    ("mistral", {**LLAMA, "sliding_window": 100}, "lora", 2, 200, KEPT),
    ("phi3", PHI3, "lora", 2, 200, KEPT),
    ("gemma2", HEADS, "qlora", 2, 200, KEPT),
    ("gemma3_text", {**HEADS, "num_hidden_layers": 8}, "lora", 2, 200, KEPT),
    (
        "mixtral",
        {**LLAMA, "num_local_experts": 4},
        "lora",
        2,
        200,
        {"gradient_checkpointing": False},
    ),
]


def draw(count: int, seed: int = 0) -> list[tuple[str, dict, str, int, int, dict]]:
    """Steps that nobody chose."""
    rng, cases = random.Random(seed), []
    for _ in range(count):
        heads = rng.choice([4, 8])
        shape = {
            "hidden_size": 32 * heads * rng.choice([1, 2, 3]),
            "intermediate_size": 64 * rng.randint(4, 24),
            "num_hidden_layers": rng.randint(1, 14),
            "num_attention_heads": heads,
            "num_key_value_heads": rng.choice([1, 2, 4]),
            "vocab_size": rng.choice([500, 3000, 20000]),
            "tie_word_embeddings": rng.random() < 0.5,
        }
        settings = {
            "r": rng.choice([1, 8, 32, 128]),
            "dtype": rng.choice(["float32", "bfloat16"]),
            "lora_dropout": rng.choice([0.0, 0.05]),
            "gradient_checkpointing": rng.random() < 0.5,
            "padding": rng.random() < 0.3,
            "backend": rng.choice(["qlora_edu", "bitsandbytes"]),
            "blocksize": rng.choice([64, 256]),
            "double_quant": rng.random() < 0.5,
        }
        kind = rng.choice(["llama", "qwen2", "qwen3", "mistral", "olmo2"])
        method = rng.choice(["full", "lora", "qlora", "qlora", "houlsby"])
        cases.append((kind, shape, method, rng.randint(1, 6), rng.randint(10, 700), settings))
    return cases


def measure(config: Any, settings: Any, batch: int, length: int) -> int:
    """Peak bytes of the second training step, and all that was there before it."""
    torch.manual_seed(0)
    state: dict[str, Any] = {}

    def step() -> None:
        training_loss(state["model"], state["ids"], settings).backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad()

    def make() -> None:
        state["model"] = model = build_model(config, settings)
        trained = [p for p in model.parameters() if p.requires_grad]
        state["optimizer"] = torch.optim.AdamW(trained, lr=1e-4)
        state["ids"] = torch.randint(0, config.vocab_size, (batch, length))
        step()
        gc.collect()

    before = int(trace_memory(make).live[-1])
    return before + trace_memory(step).peak


def small(case: tuple[str, dict, str, int, int, dict], held_out: bool) -> dict:
    """One row: what was predicted, what was measured."""
    kind, shape, method, batch, length, settings = case
    config = AutoConfig.for_model(kind, **shape)
    plan = plan_memory(
        config, method, batch_size=batch, max_length=length, device="cpu", **settings
    )
    measured = measure(config, plan.settings, batch, length)
    error = plan.peak_bytes / measured - 1
    name = f"{kind} {shape.get('hidden_size', shape.get('n_embd'))}"
    print(f"{name:<16}{method:<9}{batch} x {length:<6}{measured / 2**20:8.1f} MiB {error:+8.2%}")
    return {
        "model": kind,
        "method": method,
        "batch": batch,
        "length": length,
        "held_out": held_out,
        "shape": shape,
        "settings": settings,
        "predicted_bytes": plan.peak_bytes,
        "measured_bytes": measured,
        "error": error,
        "peak_moment": plan.peak_moment,
    }


def big(name: str, method: str, batch: int, length: int, **settings: Any) -> dict:
    """One row: forward and backward of the whole model without memory, and every block traced."""
    plan = plan_memory(name, method, batch_size=batch, max_length=length, optim="sgd", **settings)
    started = time.perf_counter()
    with without_memory(plan.settings):
        model = build_model(plan.config, plan.settings, fake=True)
        ids = torch.zeros(batch, length, dtype=torch.long)
        allocations = Allocations()
        allocations.ignore([ids, *kept_tensors(model)])
        with allocations:
            training_loss(model, ids, plan.settings).backward()
        peak = sum(weigh(model).values()) + max(accumulate(allocations.changes))
        by_mem_tracker = None
        if method == "full":
            model.zero_grad()
            tracker = MemTracker()
            tracker.track_external(model)
            with tracker:
                training_loss(model, ids, plan.settings).backward()
            by_mem_tracker = sum(s["Total"] for s in tracker.get_tracker_snapshot("peak").values())
    error = plan.peak_bytes / peak - 1
    print(
        f"{name:<12}{method:<8}{plan.settings.backend:<14}{batch} x {length:<6}"
        f"{peak / 2**30:8.2f} GiB {error:+8.2%}{time.perf_counter() - started:8.0f} s",
        *([f"MemTracker {by_mem_tracker / 2**30:.2f} GiB"] if by_mem_tracker else []),
        flush=True,
    )
    return {
        "model": name,
        "method": method,
        "batch": batch,
        "length": length,
        "settings": settings,
        "predicted_bytes": plan.peak_bytes,
        "traced_bytes": peak,
        "error": error,
        "mem_tracker_bytes": by_mem_tracker,
    }


def main() -> None:
    """Measure and store everything."""
    logging.set_verbosity_error()
    report = stamp(["transformers", "bitsandbytes", "peft"])
    report["rows"] = [small(case, held_out=False) for case in CASES]
    report["rows"] += [small(case, held_out=True) for case in draw(16)]
    theirs = {"backend": "bitsandbytes", "adapter_dtype": "bfloat16"}
    report["big"] = [
        big("llama-7b", "full", 1, 512),
        big("llama-7b", "lora", 4, 512),
        big("llama-7b", "qlora", 1, 512),
        big("llama-7b", "qlora", 1, 512, gradient_checkpointing=False),
        big("llama-7b", "qlora", 4, 2048, **theirs),
        big("llama-3-8b", "qlora", 1, 2048, **theirs),
        big("llama-13b", "qlora", 1, 512, **theirs),
        big("llama-33b", "qlora", 1, 512, **theirs),
        big("llama-65b", "qlora", 1, 512, **theirs),
        big("llama-2-70b", "qlora", 1, 4096, **theirs),
        big("llama-65b", "full", 1, 512),
    ]
    worst = max(abs(row["error"]) for row in report["rows"])
    print(f"worst error: {worst:.2%} over {len(report['rows'])} measured steps")
    store(report, "memory")


if __name__ == "__main__":
    sys.exit(main())
