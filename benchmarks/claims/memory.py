"""What fits: the claims on memory, by the planner and by what a card measured. Chapters 6 and 9."""

from functools import cache
from typing import Any

from benchmarks.claims.ledger import (
    LORA,
    MARGIN,
    QLORA,
    Answer,
    claim,
    percent,
    stored,
)
from qlora_edu.memory import (
    GIB,
    LLAMA_SHAPES,
    MemoryPlan,
    adapter_parameters,
    llama_parameters,
    nf4_bits_per_weight,
    plan_memory,
)


@cache
def plan(model: str, method: str, **settings: Any) -> MemoryPlan:
    """Plan a step, once: tracing a step takes seconds. One row of 512 tokens, r = 64."""
    return plan_memory(model, method, **settings)


def guanaco(size: str) -> MemoryPlan:
    """Plan a step of the paper's recipe for a LLaMA of this size, its adapters in 16 bits.

    >>> guanaco("7B").peak_moment
    'optimizer step'
    """
    return plan(
        f"llama-{size.lower()}",
        "qlora",
        backend="bitsandbytes",
        adapter_dtype="bfloat16",
        optim="paged_adamw_32bit",
        lora_dropout=0.1 if size in ("7B", "13B") else 0.05,
    )


def headline(model: str) -> tuple[str, list[dict[str, Any]], bool]:
    """The card, the stored runs of a model held to a smaller card's memory, and whether all fit."""
    report = stored("gpu_headline")
    rows = [row for row in report["rows"] if row["model"] == model]
    within = [row["peak_bytes"] + row["outside_bytes"] <= row["card_bytes"] for row in rows]
    return report["machine"], rows, bool(rows) and all(row["fits"] for row in rows) and all(within)


@claim(
    "A 65B model can be fine-tuned on one 48 GB card.",
    f"{QLORA}, abstract",
    "`make gpu-report`, part d; notebook 9",
)
def _65b_on_48gb() -> Answer:
    card, rows, fits = headline("llama-65b")
    peak = max(row["peak_bytes"] for row in rows) / 1e9
    steps, length = len(rows[0]["losses"]), rows[0]["length"]
    return Answer.of(
        f"{peak:.1f} GB at the peak",
        reproduced=fits,
        because=(
            f"A LLaMA-65B with random weights trained {steps} steps of one row of {length} tokens "
            f"on an {card} held to 48 GB, its adapters in 16 bits, with a peak of {peak:.1f} GB; "
            "that is a statement on memory, and none on what such a model would say."
        ),
    )


@claim(
    "Full fine-tuning of a 65B model in 16 bits needs more than 780 GB.",
    f"{QLORA}, section 1",
    "the planner, without a card; notebook 6",
)
def _65b_full_over_780gb() -> Answer:
    peak = plan("llama-65b", "full", optim="adamw_32bit").peak_bytes
    each = peak / sum(llama_parameters("65B"))
    return Answer.of(
        f"{peak / 1e9:.1f} GB",
        reproduced=peak > 780e9,
        because=(
            f"Weights and gradients in 16 bits and Adam's two states in 32 are {each:.0f} bytes "
            "for each parameter, and the activations of a short row are gone when all of these "
            "are there."
        ),
    )


@claim(
    "A 33B model can be fine-tuned on one 24 GB card.",
    f"{QLORA}, section 4",
    "`make gpu-report`, part d; notebook 9",
)
def _33b_on_24gb() -> Answer:
    card, rows, fits = headline("llama-33b")
    peak = max(row["peak_bytes"] for row in rows) / 1e9
    return Answer.of(
        f"{peak:.1f} GB at the peak",
        reproduced=fits,
        because=(
            f"A LLaMA-33B with random weights trained {len(rows[0]['losses'])} steps of one row of "
            f"{rows[0]['length']} tokens on an {card} held to 24 GB, but with adapters and "
            "optimizer states in 16 bits; with the paper's 32-bit states the plan is "
            f"{guanaco('33B').peak_bytes / 1e9:.1f} GB, which was not run."
        ),
    )


@claim(
    "Guanaco 7B, 13B, 33B and 65B have a memory of 5, 10, 21 and 41 GB.",
    f"{QLORA}, table 6",
    "the planner, without a card; notebook 6",
)
def _guanaco_memory() -> Answer:
    plans = {size: guanaco(size) for size in LLAMA_SHAPES}
    weights = [sum(one.trace.weights.values()) / 1e9 for one in plans.values()]
    peaks = [one.peak_bytes / 1e9 for one in plans.values()]
    printed = (5, 10, 21, 41)
    between = all(w < p < peak for w, p, peak in zip(weights, printed, peaks, strict=True))
    return Answer.of(
        "weights " + ", ".join(f"{number:.1f}" for number in weights) + " GB; "
        "peak of a step " + ", ".join(f"{number:.1f}" for number in peaks) + " GB",
        in_part=between,
        because=(
            "The paper does not say what it counts; its four numbers are "
            f"{'all' if between else 'not all'} between the weights alone and the peak of a "
            "training step, which in whole GiB is "
            f"{', '.join(str(round(p * 1e9 / GIB)) for p in peaks)}."
        ),
    )


@claim(
    "The 4-bit base of a 7B model takes 5,048 MB.",
    f"{QLORA}, section 2",
    "the planner, without a card; notebook 6",
)
def _7b_base_5048mb() -> Answer:
    held = dict(plan("llama-7b", "qlora").trace.weights)
    base = sum(nbytes for row, nbytes in held.items() if row != "adapters")
    upcast = base + held["embeddings and head"] + held["norms and the rest"]
    near = abs(base / 5048e6 - 1) < 0.02
    return Answer.of(
        f"{base / 1e6:,.0f} MB",
        reproduced=near,
        because=(
            f"A LLaMA-7B at {nf4_bits_per_weight():.3f} bits for each linear weight, the rest in "
            f"16 bits, takes {base / 1e6:,.0f} MB, and {upcast / 1e6:,.0f} MB with that rest in 32 "
            "bits; what else was counted the paper does not say."
        ),
    )


@claim(
    "The LoRA parameters of a 7B model, 0.2 % of its weights, take 26 MB.",
    f"{QLORA}, section 2",
    "arithmetic on the shapes; notebook 4",
)
def _7b_lora_26mb() -> Answer:
    hidden, layers, _ = LLAMA_SHAPES["7B"]
    share = 0.002 * sum(llama_parameters("7B")) * 2 / 1e6
    query_value = [layers * 2 * r * 2 * hidden * 2 / 1e6 for r in (16, 32)]
    recipe = adapter_parameters("7B", 64) * 2 / 1e6
    return Answer.of(
        f"{share:.1f} MB",
        in_part=abs(share / 26 - 1) < 0.05,
        because=(
            f"0.2 % of a LLaMA-7B in 16 bits is {share:.1f} MB, which agrees, but no rank is "
            f"given: on query and value r = 16 takes {query_value[0]:.1f} and r = 32 "
            f"{query_value[1]:.1f} MB, and the Guanaco recipe, r = 64 on all linear layers, "
            f"{recipe:.0f} MB."
        ),
    )


@claim(
    "Checkpointing shrinks LoRA's input gradients from 567 MB to 18 MB a sequence.",
    f"{QLORA}, section 2",
    "arithmetic on the shapes; notebook 6",
)
def _gradients_567_to_18mb() -> Answer:
    hidden, layers, inner = LLAMA_SHAPES["7B"]
    a_token = layers * 2 * (6 * hidden + inner)
    ratio = 567 / 18
    return Answer.of(
        f"{layers} times; 567 MB are {567e6 / a_token:.0f} tokens",
        in_part=abs(ratio - layers) < 1,
        because=(
            f"The ratio of the two is {ratio:.1f}, and a 7B has {layers} blocks of which one at a "
            f"time is live; but the inputs of all linear layers are {a_token / 1e6:.2f} MB per "
            f"token, so that 567 MB belong to a row of {567e6 / a_token:.0f} tokens, and the paper "
            "gives no length."
        ),
    )


@claim(
    "LoRA needs 3 times less GPU memory than full fine-tuning: 350 GB instead of 1.2 TB for GPT-3.",
    f"{LORA}, abstract and section 4.2",
    "the planner and `make gpu-report`, part b, on a 7B; notebook 6",
)
def _lora_3_times_less_memory() -> Answer:
    before = {}
    for method in ("full", "lora"):
        one = plan("llama-7b", method)
        before[method] = sum(one.held.values()) + one.gradient_bytes
    planned = before["full"] / before["lora"]
    measured = step("full, bf16")["peak_allocated_bytes"] / step("lora")["peak_allocated_bytes"]
    return Answer.of(
        f"{planned:.1f} times before activations, {measured:.1f} at the peak (7B)",
        in_part=min(planned, measured) >= 3,
        because=(
            f"1.2 TB over 350 GB is {1200 / 350:.1f}, and 350 GB are just the 16-bit weights of "
            "175 billion parameters; a GPT-3 cannot be run here, and for a LLaMA-7B at r = 64 the "
            f"plan is {planned:.1f} times less before the first token, and {measured:.1f} were "
            "measured at the peak of a step."
        ),
    )


def step(task: str, length: int = 512) -> dict[str, Any]:
    """The stored training step of a 7B: "full, bf16", "lora", "qlora, ours" and so on."""
    rows = stored("gpu_steps")["rows"]
    return next(row for row in rows if (row["task"], row["length"]) == (task, length))


def savings() -> dict[str, float]:
    """Share of memory that QLoRA saves a 7B, by what is compared with what.

    >>> round(savings()["linear weights"], 3)
    0.742
    """
    linear, rest = llama_parameters("7B")
    bits = nf4_bits_per_weight()
    peaks = {
        task: step(task)["peak_allocated_bytes"] for task in ("full, bf16", "lora", "qlora, ours")
    }
    return {
        "linear weights": 1 - bits / 16,
        "all weights": 1 - (linear * bits + rest * 16) / ((linear + rest) * 16),
        "LoRA": 1 - peaks["qlora, ours"] / peaks["lora"],
        "full": 1 - peaks["qlora, ours"] / peaks["full, bf16"],
    }


@claim(
    "Four bits instead of 16 take 75 % less memory.",
    "Common in tutorials, as 4/16; no paper",
    "arithmetic, and `make gpu-report`, part b; notebook 6",
)
def _4_bit_75_percent_less() -> Answer:
    saved = savings()
    return Answer.of(
        f"linear weights {percent(saved['linear weights'], 1)}, all weights "
        f"{percent(saved['all weights'], 1)}, a step {percent(saved['LoRA'], 1)}",
        reproduced=saved["LoRA"] >= 0.75 - MARGIN,
        in_part=True,
        because=(
            "The constants of the blocks and the embeddings, which stay in 16 bits, cost a little "
            "of the 75 %, and a whole training step of a 7B, measured against LoRA's, holds much "
            f"else that is not in 4 bits: it takes {percent(saved['LoRA'])} less."
        ),
    )


@claim(
    "QLoRA takes 70 % less memory.",
    "Common in tutorials, mostly without saying than what; no paper",
    "arithmetic, and `make gpu-report`, part b; notebook 6",
)
def _70_percent_less() -> Answer:
    saved = savings()
    met = [saved[than] >= 0.7 for than in ("all weights", "LoRA", "full")]
    return Answer.of(
        f"all weights {percent(saved['all weights'], 1)}, a step {percent(saved['LoRA'], 1)} "
        f"(than LoRA), {percent(saved['full'], 1)} (than full)",
        reproduced=all(met),
        in_part=any(met),
        because=(
            "Three comparisons for a 7B at r = 64 and rows of 512 tokens: the weights of the "
            f"whole model against 16 bits ({percent(saved['all weights'])} less), the measured "
            f"peak of a step against 16-bit LoRA ({percent(saved['LoRA'])}), and against full "
            f"fine-tuning ({percent(saved['full'])})."
        ),
    )
