"""The study of chapter 8: full fine-tuning, LoRA, QLoRA and Houlsby adapters, fairly compared.

    make experiments        # some two hours on two cores; interrupt it, run it again, it goes on

Every run sees 300 steps of 8 rows of the embedded tasks; runs of one seed see the same rows in the
same order. The learning rate warms up over 10 steps and falls along a cosine. Five parts:

tuning   five learning rates for each way, two seeds, chosen by the mean validation loss;
seeds    each way at its own rate, five seeds, measured on the test rows;
bits     QLoRA over a base in 3 and in 2 bits: does the adapter mend what rounding broke?
rows     100, 300 and 1,000 different rows in place of 3,000, at the same number of steps;
cost     seconds per step (ways take turns, so that all see the same machine) and peak memory.

Each run is also asked for its perplexity on held-out *pretraining* text (what was forgotten?), and
adapters of LoRA and QLoRA are attached to each other's base. The results, run by run, are stored as
data/results/three_ways.json after every run.
"""

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from stored import ROOT, stamp, store
from torch import nn
from tqdm import tqdm

from qlora_edu.adapters import adapter_tensors, add_houlsby, add_lora, load_adapters
from qlora_edu.codebooks import nf4_levels
from qlora_edu.qlora import FusedQLoRALinear, replace_linear_layers
from qlora_edu.text.conversations import encode_conversations, read_conversations
from qlora_edu.text.perplexity import encode_text, surprise
from qlora_edu.training import (
    collate,
    exact_match,
    generate_answers,
    held_out_loss,
    row_order,
    train,
)

BASE, TASKS = ROOT / "data" / "base-model", ROOT / "data" / "tasks"
STEPS, ROWS_A_STEP, WARMUP = 300, 8, 10
RANK, ALPHA, BOTTLENECK = 16, 32.0, 64  # 286,720 parameters of LoRA, 264,704 of Houlsby
RATES = {
    "full": (3e-4, 1e-3, 2e-3, 3e-3, 5e-3),
    "lora": (1e-3, 2e-3, 3e-3, 5e-3, 8e-3),
    "qlora": (1e-3, 2e-3, 3e-3, 5e-3, 8e-3),
    "houlsby": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
}
# What QLoRA can be varied in; each takes the learning rate that was tuned for QLoRA itself.
VARIANTS = {
    "qlora": {"levels": "nf4", "double_quant": True},
    "nf4 without DQ": {"levels": "nf4", "double_quant": False},
    "fp4": {"levels": "fp4", "double_quant": True},
    "int4": {"levels": "int4", "double_quant": True},
    "nf3": {"levels": "nf3", "double_quant": True},
    "nf2": {"levels": "nf2", "double_quant": True},
    "qlora + embeddings": {"levels": "nf4", "double_quant": True},
}
WAYS = (
    *("full", "lora", "qlora", "houlsby"),
    *("nf4 without DQ", "fp4", "int4", "qlora + embeddings"),
)
FEW = (100, 300, 1000)
TUNING_SEEDS, SEEDS, FEW_SEEDS = (100, 101), (0, 1, 2, 3, 4), (0, 1)
CROSSED = {"lora": ("qlora", "nf3", "nf2"), "qlora": ("lora",), "nf3": ("lora",), "nf2": ("lora",)}


def load_base() -> tuple[Any, Any]:
    """The base in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model.config.use_cache = False
    return model.eval(), AutoTokenizer.from_pretrained(BASE)


def make_trainable(model: nn.Module, way: str) -> None:
    """Prepare the base, in place, for one way of fine-tuning."""
    if way == "lora":
        add_lora(model, RANK, ALPHA)
    elif way == "houlsby":
        add_houlsby(model, BOTTLENECK)
    elif way != "full":
        settings = dict(VARIANTS[way])
        if settings["levels"] in ("nf3", "nf2"):
            settings["levels"] = nf4_levels(bits=int(settings["levels"][-1]))
        replace_linear_layers(model, RANK, ALPHA, layer_class=FusedQLoRALinear, **settings)
        if way == "qlora + embeddings":
            model.get_input_embeddings().weight.requires_grad_()


def prepare(way: str, device: str = "cpu") -> tuple[Any, Any]:
    """The base, ready for a way of fine-tuning, and its tokenizer.

    Adapters are drawn on the CPU and then moved: a card's generator has other numbers for a seed.
    """
    model, tokenizer = load_base()
    make_trainable(model, way)
    return model.to(device), tokenizer


def run(spec: dict, device: str = "cpu") -> dict:
    """One fine-tune, measured; `spec` says which."""
    torch.manual_seed(spec["seed"])
    model, tokenizer = prepare(spec["way"], device)
    rows = encode_conversations(tokenizer, read_conversations(TASKS / "train.jsonl"), 256)
    rows = rows[: spec["rows"]]
    order = row_order(len(rows), STEPS * ROWS_A_STEP, spec["seed"])
    batches = (
        collate([rows[i] for i in order[at : at + ROWS_A_STEP]])
        for at in range(0, len(order), ROWS_A_STEP)
    )
    losses = train(
        model,
        batches,
        spec["rate"],
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        total_steps=STEPS,
        max_grad_norm=1.0,
    )
    split = "valid" if spec["part"] == "tuning" else "test"
    result = {
        **spec,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "losses": [round(loss, 4) for loss in losses[::10]],
        "training_loss": round(sum(losses[-50:]) / 50, 5),
        **measure(model, tokenizer, split),
    }
    if spec["part"] in ("seeds", "bits") and spec["way"] in CROSSED:
        tensors = adapter_tensors(model)
        result["on_another_base"] = {}
        for other in CROSSED[spec["way"]]:
            model, _ = prepare(other, device)
            load_adapters(model, tensors)
            result["on_another_base"][other] = measure(model, tokenizer, split, answers=100)
    return result


def measure(model: nn.Module, tokenizer: Any, split: str, answers: int = 300) -> dict:
    """Loss and exact match on task rows, by family too, and perplexity on pretraining text."""
    held_out = read_conversations(TASKS / f"{split}.jsonl")
    families = [messages.row["family"] for messages in held_out][:answers]
    wanted = [messages[-1]["content"] for messages in held_out][:answers]
    prompts = [messages[:-1] for messages in held_out][:answers]
    model.config.use_cache = True
    given = generate_answers(model, tokenizer, prompts, max_new_tokens=72, batch_size=100)
    model.eval()
    text = encode_text(tokenizer, ROOT / "data" / "text" / "held-out.jsonl")[:300]
    by_family = {}
    for family in sorted(set(families)):
        chosen = [i for i, name in enumerate(families) if name == family]
        match = exact_match([given[i] for i in chosen], [wanted[i] for i in chosen])
        by_family[family] = round(match, 4)
    return {
        "exact_match": round(exact_match(given, wanted), 4),
        "by_family": by_family,
        "held_out_loss": round(
            held_out_loss(model, encode_conversations(tokenizer, held_out, 256), 100), 5
        ),
        "text_perplexity": round(surprise(model, text).perplexity, 5),
    }


def untrained() -> list[dict]:
    """The base as it is, before any training: in 32 and 16 bits, and in each format."""
    found = []
    for name in ("float32", "bfloat16", "qlora", "nf4 without DQ", "fp4", "int4", "nf3", "nf2"):
        model, tokenizer = load_base()
        if name == "bfloat16":
            model = model.bfloat16().float()  # the weights of 16 bits, the arithmetic of 32
        elif name != "float32":
            make_trainable(model, name)
        found.append({"base": name, **measure(model, tokenizer, "test")})
    return found


def cost(rounds: int = 8) -> list[dict]:
    """Seconds per step, the ways taking turns, and the peak of a step over what it starts from."""
    from qlora_edu.planner.trace import trace_memory

    _, tokenizer = load_base()
    conversations = read_conversations(TASKS / "train.jsonl")
    rows = encode_conversations(tokenizer, conversations, 256)
    batch = collate(rows[:ROWS_A_STEP])
    models, seconds = {}, {way: [] for way in WAYS}
    for way in WAYS:
        torch.manual_seed(0)
        models[way], _ = prepare(way)
        train(models[way], [batch] * 3, 1e-3)
    for _ in range(rounds):
        for way, model in models.items():
            started = time.perf_counter()
            train(model, [batch] * 5, 1e-3)
            seconds[way].append((time.perf_counter() - started) / 5)
    found = []
    for way, model in models.items():
        # `state_dict` holds packed weights and their constants at the bytes they really take.
        held = sum(tensor.nbytes for tensor in {t.data_ptr(): t for t in _tensors(model)}.values())
        found.append(
            {
                "way": way,
                "seconds_a_step": round(sorted(seconds[way])[rounds // 2], 4),
                "weights_bytes": held,
                "step_bytes": int(trace_memory(lambda m=model: train(m, [batch], 1e-3)).peak),
                "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "rows": ROWS_A_STEP,
                "tokens": batch["input_ids"].shape[1],
            }
        )
    return found


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [tensor for tensor in model.state_dict().values() if isinstance(tensor, torch.Tensor)]


def specs_of(part: str, best: dict[str, float], seeds: tuple[int, ...] = SEEDS) -> list[dict]:
    """The runs of one part, each fully described."""
    all_rows = 3000
    common = {"part": part, "rows": all_rows}

    if part == "tuning":
        return [
            {**common, "way": way, "rate": lr, "seed": seed}
            for seed in TUNING_SEEDS
            for way, rates in RATES.items()
            for lr in rates
        ]
    if part == "seeds":
        return [
            {**common, "way": way, "rate": rate_of(way, best), "seed": seed}
            for seed in seeds
            for way in WAYS
        ]
    if part == "bits":
        return [
            {**common, "way": way, "rate": rate_of(way, best), "seed": seed}
            for seed in FEW_SEEDS
            for way in ("nf3", "nf2")
        ]
    return [
        {**common, "way": way, "rate": rate_of(way, best), "seed": seed, "rows": rows}
        for seed in FEW_SEEDS
        for rows in FEW
        for way in ("full", "lora", "qlora")
    ]


def rate_of(way: str, best: dict[str, float]) -> float:
    """The tuned rate of a way; variants of QLoRA take QLoRA's."""
    return best[way if way in RATES else "qlora"]


def best_rates(runs: list[dict]) -> dict[str, float]:
    """For each way, the rate of the least loss on the validation rows, over the tuning seeds."""

    def loss(way: str, rate: float) -> float:
        found = [
            run["held_out_loss"]
            for run in runs
            if (run["part"], run["way"], run["rate"]) == ("tuning", way, rate)
        ]
        return sum(found) / len(found)

    return {way: min(rates, key=lambda rate: loss(way, rate)) for way, rates in RATES.items()}


def main() -> None:
    """Do what is not yet stored; store after every run."""
    parser = argparse.ArgumentParser(description="The study of chapter 8; resumable.")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="of the part `seeds`")
    parser.add_argument("--fresh", action="store_true", help="forget what is stored")
    arguments = parser.parse_args()
    path = ROOT / "data" / "results" / "three_ways.json"
    old = json.loads(path.read_text()) if path.exists() and not arguments.fresh else {}
    report = {
        **stamp(["transformers"]),
        "workers": arguments.workers,
        "steps": STEPS,
        "rows_a_step": ROWS_A_STEP,
        "rates": RATES,
        "minutes": old.get("minutes", 0.0),
        "base": old.get("base") or untrained(),
        "runs": old.get("runs", []),
        "best": {},
        "cost": old.get("cost"),
    }
    pool = ProcessPoolExecutor(
        arguments.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    seeds = tuple(range(arguments.seeds))
    with pool, tqdm(unit="run", ncols=80) as bar:
        for part in ("tuning", "seeds", "bits", "rows"):
            done = [
                {name: r[name] for name in ("part", "rows", "way", "rate", "seed")}
                for r in report["runs"]
            ]
            wanted = [spec for spec in specs_of(part, report["best"], seeds) if spec not in done]
            bar.total = (bar.total or 0) + len(wanted)
            bar.set_description(part)
            started = time.perf_counter()
            before = report["minutes"]
            for finished in as_completed([pool.submit(run, spec) for spec in wanted]):
                report["runs"].append(finished.result())
                report["minutes"] = round(before + (time.perf_counter() - started) / 60, 1)
                store(report, "three_ways", quiet=True)
                bar.update()
            best = report["best"] = best_rates(report["runs"])
            report["runs"] = [  # without runs at a rate that more tuning has overtaken
                r
                for r in report["runs"]
                if r["part"] == "tuning" or r["rate"] == rate_of(r["way"], best)
            ]
            store(report, "three_ways", quiet=True)
    report["cost"] = report["cost"] or cost()
    report["runs"].sort(key=lambda r: (r["part"], r["way"], r["rows"], r["rate"], r["seed"]))
    store(report, "three_ways")


if __name__ == "__main__":
    main()
