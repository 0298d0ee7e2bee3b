"""What the literature claims, and what became of each claim here: the ledger of the course.

    python -m qlora_edu.course.claims      # writes data/claims.json, and the table in the README

A claim is a sentence with a number in it, and it is never believed for its author's sake. Each one
below stands above the function that tests it. The function computes from the library or reads a
stored result, and answers with our value, a verdict, and one sentence that says why. Of our own
values none is typed in: what stands as a literal number is the claim's, or a shape. So when a
result is measured anew its row changes, and a test notices that the file has not.

There are four verdicts. *Reproduced*: our value agrees. *In part*: some of it agrees, or all of it
under a condition that the claim leaves out, or only on a model far smaller than the claim's.
*Contradicted*: our value disagrees, which a small model is enough for. *Not here*: this course has
not what it would take, or has not measured it yet; the sentence says which.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qlora_edu.blockwise import unpack_nibbles
from qlora_edu.codebooks import entropy_bits, equation_4_levels, level_usage, nf4_levels
from qlora_edu.comparison import equivalence
from qlora_edu.evaluation import Judge, bradley_terry, exact_judge, play, word_judge
from qlora_edu.files import ROOT
from qlora_edu.memory import (
    GIB,
    LLAMA_SHAPES,
    MemoryPlan,
    adapter_parameters,
    llama_parameters,
    nf4_bits_per_weight,
    plan_memory,
)
from qlora_edu.quantized import quantize

FILE = ROOT / "data" / "claims.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- claims: begin -->", "<!-- claims: end -->"

VERDICTS = ("reproduced", "in part", "contradicted", "not here")
MARGIN = 0.05
"""The margin of every test of equivalence, chapter 8's."""

QLORA, LORA = "QLoRA (arXiv 2305.14314)", "LoRA (arXiv 2106.09685)"
LITGPT = "Lightning-AI/litgpt"


class ClaimError(ValueError):
    """The ledger cannot be filled or written; the message names the claim or the file."""


class NotMeasuredError(LookupError):
    """A stored result is not there; the message says which command makes it."""


class Claim(NamedTuple):
    """A sentence of the literature, in our words, with its number."""

    id: str
    claim: str
    source: str
    how: str
    """How it is checked, in one clause that names the notebook or the command."""


class Answer(NamedTuple):
    """What came of a claim: our value, one of ``VERDICTS``, and a sentence that says why."""

    value: str
    verdict: str
    because: str


LEDGER: dict[str, tuple[Claim, Callable[[], Answer]]] = {}
"""Every claim with the function that tests it, in the order of the table."""


def claim(id: str, sentence: str, source: str, how: str) -> Callable:
    """Enter a claim into the ledger, above the function that tests it.

    Raises:
        ClaimError: if the id is taken.
    """

    def enter(test: Callable[[], Answer]) -> Callable[[], Answer]:
        if id in LEDGER:
            raise ClaimError(f"two claims have the id {id!r}")
        LEDGER[id] = Claim(id, sentence, source, how), test
        return test

    return enter


def stored(name: str) -> dict[str, Any]:
    """Read a stored result, ``data/results/<name>.json``.

    Raises:
        NotMeasuredError: if there is none; it names the command that makes it.

    >>> stored("gpu_moon")
    Traceback (most recent call last):
    qlora_edu.course.claims.NotMeasuredError: not measured yet: run make gpu-report
    """
    path = ROOT / "data" / "results" / f"{name}.json"
    if not path.is_file():
        command = "make gpu-report" if name.startswith("gpu_") else f"python benchmarks/{name}.py"
        command = "make experiments" if name == "three_ways" else command
        raise NotMeasuredError(f"not measured yet: run {command}")
    return json.loads(path.read_text(encoding="utf-8"))


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


def not_here(because: str) -> Answer:
    """The answer to what cannot be checked in this course.

    >>> not_here("it needs a moon").because
    'not checked here, because it needs a moon'
    """
    return Answer("–", "not here", f"not checked here, because {because}")


def percent(share: float, digits: int = 0, sign: str = "") -> str:
    """A share as it is written in the course.

    >>> percent(0.742, 1), percent(0.0006, 2, "+")
    ('74.2 %', '+0.06 %')
    """
    return f"{100 * share:{sign}.{digits}f} %"


# Does it fit? Chapters 6 and 9


def headline(model: str) -> tuple[str, list[dict[str, Any]], bool]:
    """The card, the stored runs of a model held to a smaller card's memory, and whether all fit."""
    report = stored("gpu_headline")
    rows = [row for row in report["rows"] if row["model"] == model]
    within = [row["peak_bytes"] + row["outside_bytes"] <= row["card_bytes"] for row in rows]
    return report["machine"], rows, bool(rows) and all(row["fits"] for row in rows) and all(within)


@claim(
    "65b-on-48gb",
    "A 65B model can be fine-tuned on one 48 GB card.",
    f"{QLORA}, abstract",
    "`make gpu-report`, part d; notebook 9",
)
def _65b_on_48gb() -> Answer:
    card, rows, fits = headline("llama-65b")
    peak = max(row["peak_bytes"] for row in rows) / 1e9
    steps, length = len(rows[0]["losses"]), rows[0]["length"]
    return Answer(
        f"{peak:.1f} GB at the peak",
        "reproduced" if fits else "contradicted",
        f"A LLaMA-65B with random weights trained {steps} steps of one row of {length} tokens on "
        f"an {card} held to 48 GB, its adapters in 16 bits, with a peak of {peak:.1f} GB; that is "
        "a statement on memory, and none on what such a model would say.",
    )


@claim(
    "65b-full-over-780gb",
    "Full fine-tuning of a 65B model in 16 bits needs more than 780 GB.",
    f"{QLORA}, section 1",
    "the planner, without a card; notebook 6",
)
def _65b_full_over_780gb() -> Answer:
    peak = plan("llama-65b", "full", optim="adamw_32bit").peak_bytes
    each = peak / sum(llama_parameters("65B"))
    return Answer(
        f"{peak / 1e9:.1f} GB",
        "reproduced" if peak > 780e9 else "contradicted",
        f"Weights and gradients in 16 bits and Adam's two states in 32 are {each:.0f} bytes for "
        "each parameter, and the activations of a short row are gone when all of these are there.",
    )


@claim(
    "33b-on-24gb",
    "A 33B model can be fine-tuned on one 24 GB card.",
    f"{QLORA}, section 4",
    "`make gpu-report`, part d; notebook 9",
)
def _33b_on_24gb() -> Answer:
    card, rows, fits = headline("llama-33b")
    peak = max(row["peak_bytes"] for row in rows) / 1e9
    return Answer(
        f"{peak:.1f} GB at the peak",
        "reproduced" if fits else "contradicted",
        f"A LLaMA-33B with random weights trained {len(rows[0]['losses'])} steps of one row of "
        f"{rows[0]['length']} tokens on an {card} held to 24 GB, but with adapters and optimizer "
        f"states in 16 bits; with the paper's 32-bit states the plan is "
        f"{guanaco('33B').peak_bytes / 1e9:.1f} GB, which was not run.",
    )


@claim(
    "guanaco-memory",
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
    return Answer(
        "weights " + ", ".join(f"{number:.1f}" for number in weights) + " GB; "
        "peak of a step " + ", ".join(f"{number:.1f}" for number in peaks) + " GB",
        "in part" if between else "contradicted",
        "The paper does not say what it counts; its four numbers are "
        f"{'all' if between else 'not all'} between the weights alone and the peak of a training "
        f"step, which in whole GiB is {', '.join(str(round(p * 1e9 / GIB)) for p in peaks)}.",
    )


@claim(
    "7b-base-5048mb",
    "The 4-bit base of a 7B model takes 5,048 MB.",
    f"{QLORA}, section 2",
    "the planner, without a card; notebook 6",
)
def _7b_base_5048mb() -> Answer:
    held = dict(plan("llama-7b", "qlora").trace.weights)
    base = sum(nbytes for row, nbytes in held.items() if row != "adapters")
    upcast = base + held["embeddings and head"] + held["norms and the rest"]
    near = abs(base / 5048e6 - 1) < 0.02
    return Answer(
        f"{base / 1e6:,.0f} MB",
        "reproduced" if near else "contradicted",
        f"A LLaMA-7B at {nf4_bits_per_weight():.3f} bits for each linear weight, the rest in 16 "
        f"bits, takes {base / 1e6:,.0f} MB, and {upcast / 1e6:,.0f} MB with that rest in 32 bits; "
        "what else was counted the paper does not say.",
    )


@claim(
    "7b-lora-26mb",
    "The LoRA parameters of a 7B model, 0.2 % of its weights, take 26 MB.",
    f"{QLORA}, section 2",
    "arithmetic on the shapes; notebook 4",
)
def _7b_lora_26mb() -> Answer:
    hidden, layers, _ = LLAMA_SHAPES["7B"]
    share = 0.002 * sum(llama_parameters("7B")) * 2 / 1e6
    query_value = [layers * 2 * r * 2 * hidden * 2 / 1e6 for r in (16, 32)]
    recipe = adapter_parameters("7B", 64) * 2 / 1e6
    return Answer(
        f"{share:.1f} MB",
        "in part" if abs(share / 26 - 1) < 0.05 else "contradicted",
        f"0.2 % of a LLaMA-7B in 16 bits is {share:.1f} MB, which agrees, but no rank is given: "
        f"on query and value r = 16 takes {query_value[0]:.1f} and r = 32 {query_value[1]:.1f} "
        f"MB, and the Guanaco recipe, r = 64 on all linear layers, {recipe:.0f} MB.",
    )


@claim(
    "gradients-567-to-18mb",
    "Checkpointing shrinks LoRA's input gradients from 567 MB to 18 MB a sequence.",
    f"{QLORA}, section 2",
    "arithmetic on the shapes; notebook 6",
)
def _gradients_567_to_18mb() -> Answer:
    hidden, layers, inner = LLAMA_SHAPES["7B"]
    a_token = layers * 2 * (6 * hidden + inner)
    ratio = 567 / 18
    return Answer(
        f"{layers} times; 567 MB are {567e6 / a_token:.0f} tokens",
        "in part" if abs(ratio - layers) < 1 else "contradicted",
        f"The ratio of the two is {ratio:.1f}, and a 7B has {layers} blocks of which one at a "
        f"time is live; but the inputs of all linear layers are {a_token / 1e6:.2f} MB a token, "
        f"so that 567 MB belong to a row of {567e6 / a_token:.0f} tokens, and the paper gives no "
        "length.",
    )


@claim(
    "lora-3-times-less-memory",
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
    return Answer(
        f"{planned:.1f} times before activations, {measured:.1f} at the peak (7B)",
        "in part" if min(planned, measured) >= 3 else "contradicted",
        f"1.2 TB over 350 GB is {1200 / 350:.1f}, and 350 GB are just the 16-bit weights of 175 "
        f"billion parameters; a GPT-3 cannot be run here, and for a LLaMA-7B at r = 64 the plan is "
        f"{planned:.1f} times less before the first token, and {measured:.1f} were measured at the "
        "peak of a step.",
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
    "4-bit-75-percent-less",
    "Four bits instead of 16 take 75 % less memory.",
    "Common in tutorials, as 4/16; no paper",
    "arithmetic, and `make gpu-report`, part b; notebook 6",
)
def _4_bit_75_percent_less() -> Answer:
    saved = savings()
    return Answer(
        f"linear weights {percent(saved['linear weights'], 1)}, all weights "
        f"{percent(saved['all weights'], 1)}, a step {percent(saved['LoRA'], 1)}",
        "in part" if saved["LoRA"] < 0.75 - MARGIN else "reproduced",
        "The constants of the blocks and the embeddings, which stay in 16 bits, cost a little of "
        "the 75 %, and a whole training step of a 7B, measured against LoRA's, holds much else "
        f"that is not in 4 bits: it takes {percent(saved['LoRA'])} less.",
    )


@claim(
    "70-percent-less",
    "QLoRA takes 70 % less memory.",
    "Common in tutorials, mostly without saying than what; no paper",
    "arithmetic, and `make gpu-report`, part b; notebook 6",
)
def _70_percent_less() -> Answer:
    saved = savings()
    met = [saved[than] >= 0.7 for than in ("all weights", "LoRA", "full")]
    return Answer(
        f"all weights {percent(saved['all weights'], 1)}, a step {percent(saved['LoRA'], 1)} "
        f"(than LoRA), {percent(saved['full'], 1)} (than full)",
        "reproduced" if all(met) else "in part" if any(met) else "contradicted",
        "Three comparisons for a 7B at r = 64 and rows of 512 tokens: the weights of the whole "
        f"model against 16 bits ({percent(saved['all weights'])} less), the measured peak of a "
        f"step against 16-bit LoRA ({percent(saved['LoRA'])}), and against full fine-tuning "
        f"({percent(saved['full'])}).",
    )


# The format. Chapters 1 to 3


def bits(double_quant: bool) -> float:
    """Bits a weight of a real quantised tensor of 2^20 weights.

    >>> bits(double_quant=False)
    4.5
    """
    return quantize(torch.ones(2**20), double_quant=double_quant).bits_per_weight


@claim(
    "nf4-dq-4.127-bits",
    "NF4 in blocks of 64 with double quantisation takes 4.127 bits a weight.",
    f"{QLORA}, section 3 (0.5 bits of constants become 0.127)",
    "bytes of a quantised tensor; notebook 3",
)
def _nf4_dq_4_127_bits() -> Answer:
    value = bits(double_quant=True)
    return Answer(
        f"{value:.3f} bits",
        "reproduced" if round(value, 3) == 4.127 else "contradicted",
        "Four bits of code, 8 bits of constant for 64 weights and 32 bits for 64 times 256 "
        "weights, counted in the bytes of a real tensor.",
    )


@claim(
    "dq-saves-0.373-bits",
    "Double quantisation saves 0.373 bits a weight.",
    f"{QLORA}, section 3",
    "bytes of a tensor quantised both ways; notebook 3",
)
def _dq_saves_0_373_bits() -> Answer:
    plain, double = bits(double_quant=False), bits(double_quant=True)
    return Answer(
        f"{plain - double:.3f} bits",
        "reproduced" if round(plain - double, 3) == 0.373 else "contradicted",
        f"A tensor takes {plain:.3f} bits a weight with 32-bit constants and {double:.3f} with "
        "constants that are quantised themselves.",
    )


def dq_saves(size: str) -> float:
    """Bytes that double quantisation saves on the linear layers of a LLaMA."""
    return (bits(double_quant=False) - bits(double_quant=True)) / 8 * llama_parameters(size)[0]


@claim(
    "dq-saves-3gb",
    "Double quantisation saves about 3 GB on a 65B model.",
    f"{QLORA}, section 1",
    "arithmetic on the shapes; notebook 3",
)
def _dq_saves_3gb() -> Answer:
    saved = dq_saves("65B") / 1e9
    return Answer(
        f"{saved:.2f} GB",
        "reproduced" if round(saved) == 3 else "contradicted",
        f"The linear layers of a LLaMA-65B have {llama_parameters('65B')[0] / 1e9:.1f} billion "
        f"weights, and the bits saved on them are {saved:.2f} GB.",
    )


@claim(
    "litgpt-dq-saves-0.3gb",
    "Double quantisation takes a Llama-2-7B fine-tune from 14.14 to 13.84 GB.",
    f"{LITGPT}, tutorials/resource-tables.md",
    "arithmetic on the shapes; notebook 3",
)
def _litgpt_dq_saves_0_3gb() -> Answer:
    saved, printed = dq_saves("7B") / 1e9, 14.14 - 13.84
    return Answer(
        f"{saved:.2f} GB less",
        "reproduced" if round(saved, 2) == round(printed, 2) else "contradicted",
        f"Their two measurements are {printed:.2f} GB apart, and our arithmetic, on a model of the "
        f"same shapes, says {saved:.3f} GB; the totals depend on their settings and were not run.",
    )


PRINTED_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""The table that the paper prints in its appendix."""


@claim(
    "nf4-16-levels",
    "NF4's sixteen levels are the table −1, −0.6962, …, 0, 0.0796, …, 1.",
    f"{QLORA}, appendix (the exact values of NF4)",
    "derived from the normal distribution; notebook 1",
)
def _nf4_16_levels() -> Answer:
    equal = int((nf4_levels() == torch.tensor(PRINTED_NF4)).sum())
    return Answer(
        f"{equal} of {len(PRINTED_NF4)} levels equal, to the bit",
        "reproduced" if equal == len(PRINTED_NF4) else "contradicted",
        f"Quantiles of the normal distribution, taken from the outermost probability 0.9677083 on, "
        f"give {equal} of the {len(PRINTED_NF4)} printed levels exactly.",
    )


@claim(
    "nf4-equation-4",
    "NF4's levels are means of neighbouring quantiles at i/17 and (i + 1)/17.",
    f"{QLORA}, equation 4",
    "the equation computed as printed; notebook 1",
)
def _nf4_equation_4() -> Answer:
    levels = equation_4_levels()
    infinite = int(levels.isinf().sum())
    finite = levels[levels.isfinite()]
    symmetric = torch.allclose(finite, -finite.flip(0), atol=1e-6)
    return Answer(
        f"{len(levels)} values, {infinite} of them infinite",
        "contradicted" if infinite or symmetric else "reproduced",
        f"As printed the equation gives {len(levels)} values, {infinite} of them infinite and the "
        f"others {'' if symmetric else 'not '}symmetric, while the table that is used has sixteen "
        "finite levels and is not symmetric.",
    )


@claim(
    "nf4-equal-use",
    "NF4 uses its sixteen levels equally often: 6.25 % each.",
    f"{QLORA}, section 3",
    "sixteen million normal weights quantised in blocks of 64; notebook 1",
)
def _nf4_equal_use() -> Answer:
    weights = torch.randn(2**24, generator=torch.Generator().manual_seed(0))
    usage = level_usage(unpack_nibbles(quantize(weights).packed, len(weights)))
    low, high = usage.min().item(), usage.max().item()
    return Answer(
        f"{percent(low)} to {percent(high)}; {entropy_bits(usage):.2f} of 4 bits",
        "reproduced" if high - low < 0.01 else "contradicted",
        "Each block is divided by its own largest weight, which crowds the others towards the "
        f"middle, so that the rarest level gets {percent(low)} and the commonest {percent(high)}.",
    )


def before_training(base: str) -> float:
    """The course's base model on held-out text before any fine-tuning, its weights in a format."""
    found = {row["base"]: row["text_perplexity"] for row in stored("three_ways")["base"]}
    return found[base]


@claim(
    "nf4-keeps-quality",
    "Four bits of NF4 keep the quality of 16 bits.",
    f"{QLORA}, section 4",
    "`make experiments`; notebook 8",
)
def _nf4_keeps_quality() -> Answer:
    sixteen, four = before_training("bfloat16"), before_training("qlora")
    more = four / sixteen - 1
    return Answer(
        f"perplexity {sixteen:.4f} to {four:.4f} ({percent(more, 2, '+')})",
        "in part" if more < 0.005 else "contradicted",
        "Measured before any fine-tuning on the course's own base of three million weights, whose "
        f"perplexity on held-out text moves by {percent(more, 2, '+')}; on no larger model.",
    )


@claim(
    "nf4-beats-fp4-and-int4",
    "NF4 (27.41) beats FP4 (29.48 and 31.07) and INT4 (34.34) in mean perplexity.",
    f"{QLORA}, table 2",
    "`make experiments`; notebook 8",
)
def _nf4_beats_fp4_and_int4() -> Answer:
    base = before_training("float32")
    more = {
        name: before_training(key) / base - 1
        for name, key in {"NF4": "qlora", "INT4": "int4", "FP4": "fp4"}.items()
    }
    first = min(more, key=more.get) == "NF4"
    differ = max(more.values()) - min(more.values()) > 0.005
    after = sorted({compare("qlora", other, "held_out_loss")[0] for other in ("fp4", "int4")})
    return Answer(
        ", ".join(f"{name} {percent(number, 2, '+')}" for name, number in more.items())
        + " perplexity",
        "contradicted" if not first else "reproduced" if differ else "in part",
        f"On the course's small base NF4 {'comes' if first else 'does not come'} first, but at 4 "
        f"bits all formats are within {percent(max(more.values()), 2)} of the unquantised model, "
        "and that NF4 has the held-out loss of the others after fine-tuning is "
        f"{' and '.join(SAID[word] for word in after)}; the paper's models are far larger.",
    )


# Parameters. Chapter 4


def share(rank: int) -> float:
    """Trained share of a LLaMA-7B with adapters on all linear layers.

    >>> round(share(64), 4)
    0.0237
    """
    return adapter_parameters("7B", rank) / sum(llama_parameters("7B"))


@claim(
    "less-than-1-percent-trained",
    "With adapters less than 1 % of the parameters are trained.",
    "Common in tutorials of LoRA; no paper",
    "arithmetic on the shapes; notebook 4",
)
def _less_than_1_percent_trained() -> Answer:
    largest = max(r for r in range(1, 257) if share(r) < 0.01)
    return Answer(
        f"{percent(share(64), 1)} at r = 64; below 1 % up to r = {largest}",
        "reproduced" if largest >= 64 else "in part",
        "With adapters on all linear layers of a 7B the trained share grows with the rank: it is "
        f"below 1 % up to r = {largest}, and {percent(share(64), 1)} at the r = 64 of the Guanaco "
        "recipe.",
    )


@claim(
    "0.5-to-5-percent-trained",
    "With adapters 0.5 to 5 % of the parameters are trained.",
    "Common in tutorials of PEFT methods; no paper",
    "arithmetic on the shapes; notebook 4",
)
def _0_5_to_5_percent_trained() -> Answer:
    low, high = share(8), share(64)
    inside = low >= 0.005 and high <= 0.05
    return Answer(
        f"{percent(low, 2)} to {percent(high, 2)} for r = 8 to 64",
        "reproduced" if inside else "in part" if high >= 0.005 else "contradicted",
        f"With adapters on all linear layers of a 7B the share is {percent(low, 2)} at r = 8, "
        f"{percent(share(16), 2)} at r = 16 and {percent(high, 2)} at r = 64.",
    )


@claim(
    "lora-10000-times-fewer",
    "LoRA trains 10,000 times fewer parameters than full fine-tuning of GPT-3 175B.",
    f"{LORA}, abstract and section 4.2 (r = 4 on query and value)",
    "arithmetic on the shapes; notebook 4",
)
def _lora_10000_times_fewer() -> Answer:
    width, blocks, rank = 12_288, 96, 4
    trained = blocks * 2 * rank * (width + width)
    ratio = 175e9 / trained
    return Answer(
        f"{ratio:,.0f} times",
        "reproduced" if abs(ratio / 10_000 - 1) < 0.1 else "contradicted",
        f"At r = {rank} on the query and value matrices of {blocks} blocks of width {width:,} "
        f"there are {trained:,} trained numbers; the paper says roughly, and it is within a tenth.",
    )


@claim(
    "345m-24m-12m",
    "Of a 345M model full fine-tuning trains 345M parameters, adapters 24M and LoRA 12M.",
    "Goes round in teaching, without its settings; no paper",
    "arithmetic on the shapes of GPT-2 Medium; notebook 4",
)
def _345m_24m_12m() -> Answer:
    width, blocks, words, places, bottleneck, rank = 1024, 24, 50_257, 1024, 256, 32
    full = (words + places + 2) * width + blocks * (12 * width**2 + 13 * width)
    houlsby = blocks * 2 * (2 * bottleneck * width + bottleneck + width)
    # q, k and v in one matrix, the output of attention, up, down: r · (in + out) of each
    lora = blocks * rank * (4 + 2 + 5 + 5) * width
    near = round(houlsby / 2**20) == 24 and round(lora / 2**20) == 12
    return Answer(
        f"{full / 1e6:.1f}M; {houlsby / 2**20:.2f} and {lora / 2**20:.2f} · 2²⁰",
        "in part" if near else "contradicted",
        f"Two adapters a block with a bottleneck of {bottleneck}, and LoRA of r = {rank} on all "
        "linear layers, give 24 and 12 in binary millions, which is our reconstruction; the "
        f"model has {full / 1e6:.1f} million, and other settings give any other number.",
    )


# Quality. Chapters 4, 5, 8 and 10


def compare(first: str, second: str, measure: str) -> tuple[str, str]:
    """Two ways of fine-tuning, paired by seed: a verdict, and the difference with its interval.

    The verdict is that of chapter 8's `Equivalence`.
    """
    values = {}
    for way in (first, second):
        runs = [
            run
            for run in stored("three_ways")["runs"]
            if (run["part"], run["way"]) == ("seeds", way)
        ]
        values[way] = [run[measure] for run in sorted(runs, key=lambda run: run["seed"])]
    test = equivalence(values[first], values[second], MARGIN)
    mean, low, high = test.difference
    return test.verdict, f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def equal_in_both(first: str, second: str, names: str) -> Answer:
    """The answer to a claim that two ways are as good as each other."""
    loss, by_loss = compare(first, second, "held_out_loss")
    match, by_match = compare(first, second, "exact_match")
    found = {loss, match}
    verdict = {frozenset({"equivalent"}): "reproduced", frozenset({"different"}): "contradicted"}
    return Answer(
        f"loss {by_loss}, exact match {by_match}",
        verdict.get(frozenset(found), "in part"),
        f"On the course's own model of three million weights, five seeds, {names} at a margin of "
        f"{MARGIN}: in held-out loss equivalence is {SAID[loss]}, in exact match it is "
        f"{SAID[match]} (differences, with 90 % intervals); the paper's models are far larger.",
    )


SAID = {"equivalent": "shown", "different": "refuted", "not shown": "not shown"}


@claim(
    "qlora-equals-lora",
    "QLoRA is as good as LoRA in 16 bits.",
    f"{QLORA}, section 4",
    "`make experiments`; notebook 8",
)
def _qlora_equals_lora() -> Answer:
    return equal_in_both("qlora", "lora", "QLoRA against LoRA")


@claim(
    "qlora-equals-full",
    "QLoRA is as good as full fine-tuning.",
    f"{QLORA}, section 4",
    "`make experiments`; notebook 8",
)
def _qlora_equals_full() -> Answer:
    return equal_in_both("qlora", "full", "QLoRA against full fine-tuning, each at its best rate,")


def experiment(target_modules: str, rank: int) -> float:
    """Exact match of one run of chapter 4's experiments, at its common learning rate."""
    for row in stored("lora_experiments")["rows"]:
        setting = (
            row["target_modules"],
            row["r"],
            row["lora_alpha"] / row["r"],
            row["learning_rate"],
        )
        if setting == (target_modules, rank, 2, 0.003):
            return row["exact_match_after"]
    raise ClaimError(f"lora_experiments.json has no run of {target_modules} at r = {rank}")


@claim(
    "all-layers-matter",
    "Adapters have to be on all linear layers to come near full fine-tuning.",
    f"{QLORA}, section 4",
    "`python benchmarks/lora_experiments.py`; notebook 4",
)
def _all_layers_matter() -> Answer:
    everywhere, query_value = experiment("all-linear", 16), experiment("q_proj,v_proj", 64)
    full = stored("lora_experiments")["full"]["exact_match_after"]
    return Answer(
        f"exact match {everywhere:.2f} (all) against {query_value:.2f} (query and value)",
        "in part" if everywhere - query_value > MARGIN else "contradicted",
        "With about as many trained numbers, adapters on all linear layers reach "
        f"{everywhere:.2f} and those on query and value {query_value:.2f}, where full fine-tuning "
        f"has {full:.2f}; but that is one seed of one small model.",
    )


@claim(
    "rank-hardly-matters",
    "With adapters on all linear layers the rank hardly matters.",
    f"{QLORA}, section 4 and appendix",
    "`python benchmarks/lora_experiments.py`; notebook 4",
)
def _rank_hardly_matters() -> Answer:
    found = {r: experiment("all-linear", r) for r in (1, 4, 16, 64)}
    high_alike = abs(found[16] - found[64]) < MARGIN
    all_alike = max(found.values()) - min(found.values()) < MARGIN
    return Answer(
        "exact match " + ", ".join(f"{number:.2f} (r = {r})" for r, number in found.items()),
        "reproduced" if all_alike else "in part" if high_alike else "contradicted",
        f"Between r = 16 and 64 nothing is gained ({found[16]:.2f} and {found[64]:.2f}), but at r "
        f"= 1 exact match is {found[1]:.2f}: on one seed of a small model, trained for few steps, "
        "a rank can be too low.",
    )


@claim(
    "merging-into-4-bits",
    "Merging an adapter into its 4-bit base can change the answers, through rounding.",
    "huggingface/peft, the warning of its 4-bit `merge`",
    "`python benchmarks/merge_lab.py`; notebook 5",
)
def _merging_into_4_bits() -> Answer:
    rows = stored("merge_lab")["rows"]
    kept = [row["surviving_share"]["4-bit"] for row in rows]
    lost = max(row["exact_match"]["unmerged"] - row["exact_match"]["4-bit"] for row in rows)
    return Answer(
        f"{percent(min(kept))} to {percent(max(kept))} of the update survive",
        "reproduced" if lost > MARGIN else "contradicted",
        "Of nine adapters merged into 4 bits, small updates vanish in the rounding "
        f"({percent(min(kept))} survive) and large ones stay ({percent(max(kept))}), and exact "
        f"match falls by up to {lost:.2f}.",
    )


def places(judge: Judge) -> dict[str, int]:
    """The place of each system of the course's tournament, by one judge; equals share a place."""
    ratings = bradley_terry(play(stored("tournament")["rows"], judge))
    whole = {system: round(rating) for system, rating in ratings.items()}
    return {system: 1 + sum(o > mine for o in whole.values()) for system, mine in whole.items()}


@claim(
    "judges-disagree",
    "A place depends on the judge: people put Guanaco 7B third, GPT-4 puts it eighth.",
    f"{QLORA}, section 5",
    "`python benchmarks/tournament.py`, with two other judges",
)
def _judges_disagree() -> Answer:
    exact, words = places(exact_judge), places(word_judge)
    moved = max(exact, key=lambda system: abs(exact[system] - words[system]))
    two = f"place {exact[moved]} and {words[moved]}"
    if abs(exact[moved] - words[moved]) < 2:
        return not_here("the course's own judges agree, and people and GPT-4 were not asked.")
    return Answer(
        f"{two} of {len(exact)} (“{moved}”)",
        "in part",
        "Two programs as judges, one that wants the exact answer and one that counts shared words, "
        f"give the system “{moved}” of the course's own tournament {two} of {len(exact)}, among "
        "others that are nearly as good; people and GPT-4 were not asked.",
    )


# Speed and paging. Chapters 7, 9 and 10


@claim(
    "qlora-slower-than-lora",
    "QLoRA is slower than LoRA: 3.68 minutes instead of 2.36 for a Llama-2-7B.",
    f"{LITGPT}, tutorials/resource-tables.md",
    "`make gpu-report`, part b; notebook 9",
)
def _qlora_slower_than_lora() -> Answer:
    ratios = [
        step(task, length)["seconds_a_step"] / step("lora", length)["seconds_a_step"]
        for task in ("qlora, bitsandbytes + PEFT", "qlora, ours")
        for length in (512, 2048)
    ]
    return Answer(
        f"{min(ratios):.1f} to {max(ratios):.1f} times as long",
        "reproduced" if min(ratios) > 1 else "contradicted",
        f"Their ratio is {3.68 / 2.36:.1f}; a step of a 7B on an {stored('gpu_steps')['machine']} "
        f"took {min(ratios):.1f} to {max(ratios):.1f} times as long as LoRA's, by the stack and "
        "the length of the row, since every weight is unpacked anew.",
    )


def optimizer(name: str) -> dict[str, Any]:
    """The stored optimizer step on the adapters of a 7B at r = 64."""
    return next(row for row in stored("gpu_paging")["rows"] if row["task"] == name)


@claim(
    "paging-no-slower",
    "At a batch of 16 a paged optimizer is as fast as an ordinary one (65B).",
    f"{QLORA}, section 4",
    "`make gpu-report`, parts b and c; notebook 7",
)
def _paging_no_slower() -> Answer:
    plain = optimizer("bitsandbytes AdamW32bit")["seconds_a_step"]
    paged = optimizer("bitsandbytes PagedAdamW32bit")["seconds_a_step"]
    row = step("qlora, bitsandbytes + PEFT")["seconds_a_step"]
    more = (paged - plain) / (16 * row)
    return Answer(
        f"{percent(more, 2, '+')} of a step of 16 rows (7B)",
        "in part" if more < 0.01 else "contradicted",
        f"With memory to spare the paged update of a 7B's adapters took {1000 * paged:.0f} ms "
        f"instead of {1000 * plain:.0f}, which beside sixteen rows of {row:.2f} s is nothing; a "
        "65B, and a card short of memory, were not timed.",
    )


@claim(
    "paging-same-peak",
    "The peak of memory is the same with and without a paged optimizer.",
    f"{LITGPT}, pull request 275",
    "`make gpu-report`, part c; notebook 7",
)
def _paging_same_peak() -> Answer:
    plain, paged = optimizer("bitsandbytes AdamW32bit"), optimizer("bitsandbytes PagedAdamW32bit")
    seen = [row["peak_allocated_bytes"] / 1e9 for row in (plain, paged)]
    whole = seen[1] + paged["managed_bytes"] / 1e9
    return Answer(
        f"{seen[0]:.2f} and {seen[1]:.2f} GB by PyTorch's counter; {whole:.2f} with what it misses",
        "in part" if abs(whole / seen[0] - 1) < 0.01 else "contradicted",
        "PyTorch's counter does not see the memory that the driver pages, so that paged states "
        f"look free; counted with it the peak of the optimizer step is {whole:.2f} GB, against "
        f"{seen[0]:.2f} without paging.",
    )


@claim(
    "paging-critical",
    "Paged optimizers are critical for 33B on 24 GB and 65B on 48 GB.",
    f"{QLORA}, section 4",
    "the planner and `make gpu-report`, part d; notebooks 6 and 7",
)
def _paging_critical() -> Answer:
    _, rows, fits = headline("llama-33b")
    unpaged = fits and not any(row["managed_bytes"] for row in rows)
    late = guanaco("65B").peak_moment == "optimizer step"
    return Answer(
        f"33B on 24 GB {'without' if unpaged else 'only with'} paging",
        "in part" if unpaged else "reproduced",
        f"With rows of {rows[0]['length']} tokens and 16-bit states a 33B trained within 24 GB "
        f"{'without' if unpaged else 'only with'} paging; the planned peak of a 65B "
        f"{'is' if late else 'is not'} in the optimizer step, when paged states are back on the "
        "card, so that paging makes room for rare long rows, which the paper did not measure.",
    )


def serving(way: str) -> tuple[float, float]:
    """The least and the most time that a way of serving adds to a token, as shares of the base's.

    A share for each of the stored models and batches: the median over rounds in turns.

    Raises:
        ClaimError: if the stored result has another layout than is read here.
    """
    try:
        rows = [row for row in stored("serving")["rows"] if row["way"] == way]
        added = [row["token_ratio"][0] - 1 for row in rows]
        return min(added), max(added)
    except (KeyError, ValueError) as error:
        raise ClaimError(
            f"data/results/serving.json holds no {way!r} as `serving` in claims.py reads it (rows "
            f"with way and token_ratio): bring the two together ({error})"
        ) from error


@claim(
    "houlsby-latency",
    "Adapters of Houlsby's kind add 10 to 20 % of latency.",
    f"{LORA}, section 3 and table 1 (the range is a common summary)",
    "`python benchmarks/serving.py`; notebook 4 times it on your machine",
)
def _houlsby_latency() -> Answer:
    low, high = serving("Houlsby")
    inside = low >= 0.1 and high <= 0.2
    added = f"{percent(low, 0, '+')} to {percent(high, 0, '+')}"
    return Answer(
        f"{added} a token",
        "reproduced" if inside else "in part" if high > MARGIN else "contradicted",
        "Two adapters a block, on two small models and for one prompt and sixteen at a time, "
        f"change the time for a token by {added} on a CPU: it depends on the model and the batch.",
    )


@claim(
    "merged-no-latency",
    "A merged LoRA adapter adds no latency.",
    f"{LORA}, abstract and section 4.1",
    "`python benchmarks/serving.py`; notebook 4 times it on your machine",
)
def _merged_no_latency() -> Answer:
    low, high = serving("LoRA, merged")
    alike = high < MARGIN, low < MARGIN
    added = f"{percent(low, 0, '+')} to {percent(high, 0, '+')}"
    return Answer(
        f"{added} a token",
        "reproduced" if all(alike) else "in part" if any(alike) else "contradicted",
        "A merged model does the same operations as the base; on two small models, for one prompt "
        f"and sixteen at a time, the time for a token changes by {added}, and less than "
        f"{percent(MARGIN)} is taken for noise.",
    )


# What would take another house


@claim(
    "guanaco-65b-24-hours",
    "Guanaco 65B is trained in 24 hours on one GPU.",
    f"{QLORA}, abstract",
    "an estimate only, from `make gpu-report`, part d",
)
def _guanaco_65b_24_hours() -> Answer:
    _, rows, _ = headline("llama-65b")
    row = next(row for row in rows if row["stack"] == "bitsandbytes")
    passes = 1875 * 16  # the recipe's steps, and rows of each
    hours = passes * row["seconds_a_step"] / 3600
    return not_here(
        f"no 65B was trained to the end; as an estimate, {passes:,} rows of {row['length']} "
        f"tokens at the measured {row['seconds_a_step']:.2f} s would take {hours:.1f} hours, on a "
        "card that is faster than those of 48 GB."
    )


@claim(
    "guanaco-99.3-percent",
    "Guanaco 65B reaches 99.3 % (± 4.4) of ChatGPT's score.",
    f"{QLORA}, table 6",
    "not checked",
)
def _guanaco_99_3_percent() -> Answer:
    return not_here("it needs ChatGPT's answers, and GPT-4 as their judge.")


@claim(
    "mmlu-nf4-dq",
    "Fine-tuned in NF4 with double quantisation LLaMA has 53.1 on MMLU, in BF16 53.0, in FP4 52.2.",
    f"{QLORA}, section 4",
    "not checked",
)
def _mmlu_nf4_dq() -> Answer:
    return not_here(
        "it needs the weights of LLaMA 7B to 65B and dozens of fine-tunes on large cards; the "
        "course's own model is too small to answer such questions."
    )


# Filling and writing


def check(id: str) -> dict[str, str]:
    """Test one claim.

    Raises:
        ClaimError: if there is no such claim, or its function gives no verdict of ``VERDICTS``.

    >>> check("lora-10000-times-fewer")["value"]
    '9,272 times'
    """
    if id not in LEDGER:
        raise ClaimError(f"no claim {id!r}; there are {', '.join(LEDGER)}")
    entry, test = LEDGER[id]
    try:
        answer = test()
    except NotMeasuredError as missing:
        answer = Answer("–", "not here", f"{missing}")
    if answer.verdict not in VERDICTS:
        raise ClaimError(f"claim {id!r}: the verdict {answer.verdict!r} is none of {VERDICTS}")
    return {**entry._asdict(), **answer._asdict()}


def fill() -> list[dict[str, str]]:
    """Test every claim; it takes some twenty seconds, nearly all of them the planner's."""
    return [check(id) for id in LEDGER]


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """The ledger as a Markdown table.

    >>> entry = {"claim": "Snow is white.", "source": "Tarski", "how": "looking", "value": "white"}
    >>> print(table([{**entry, "verdict": "reproduced"}]))
    | claim | source | how checked | our value | verdict |
    | --- | --- | --- | --- | --- |
    | Snow is white. | Tarski | looking | white | **reproduced** |
    """
    lines = ["| claim | source | how checked | our value | verdict |", "| --- " * 5 + "|"]
    for entry in rows:
        cells = [entry[name].replace("|", "\\|") for name in ("claim", "source", "how", "value")]
        lines.append("| " + " | ".join([*cells, f"**{entry['verdict']}**"]) + " |")
    return "\n".join(lines)


def write(rows: Sequence[Mapping[str, str]] | None = None, path: Path = FILE) -> Path:
    """Write the ledger to data/claims.json, whole or not at all; without rows it is filled anew."""
    text = json.dumps(fill() if rows is None else list(rows), indent=1, ensure_ascii=False)
    return _replace(path, text + "\n")


def write_readme(rows: Sequence[Mapping[str, str]], path: Path = README) -> Path:
    """Replace the table between the README's two comment lines, whole or not at all.

    Raises:
        ClaimError: if the comment lines are not there once each, in their order.
    """
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not begin or not end or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ClaimError(f"{path.name} must hold the lines {BEGIN} and {END} once each, in order")
    return _replace(path, f"{before}{begin}{table(rows)}\n{end}{after}")


def _replace(path: Path, text: str) -> Path:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path


def main() -> None:
    """Test every claim, and write the file and the README's table."""
    rows = fill()
    write(rows)
    write_readme(rows)
    counts = Counter(entry["verdict"] for entry in rows)
    print(
        f"{len(rows)} claims: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    )


if __name__ == "__main__":
    main()
