"""Train the systems of chapter 10's tournament, and store what each answers.

    python benchmarks/tournament.py        # about ten minutes on two cores

One seed of each way of chapter 8 at its tuned rate, QLoRA at three ranks, and two merges of one of
them; all answer the same 150 prompts of the test split, greedily. Stored as
data/results/tournament.json, answers and all, so that any judge can be tried on them later.
"""

import copy
import json
from typing import Any

import three_ways
import torch
from stored import ROOT, stamp, store
from torch import nn
from tqdm import tqdm

from qlora_edu.adapters import add_lora, lora_layers, replace_module
from qlora_edu.qlora import FusedQLoRALinear, merge_weight, replace_linear_layers
from qlora_edu.text.conversations import encode_conversations, read_conversations
from qlora_edu.training import (
    collate,
    exact_match,
    generate_answers,
    held_out_loss,
    row_order,
    train,
)

PROMPTS, SEED = 150, 0
SYSTEMS: dict[str, dict[str, Any]] = {
    "full": {"way": "full"},
    "LoRA r16": {"way": "lora", "r": 16},
    "QLoRA r2": {"way": "qlora", "r": 2},
    "QLoRA r16": {"way": "qlora", "r": 16},
    "QLoRA r64": {"way": "qlora", "r": 64},
    "QLoRA FP4 r16": {"way": "fp4", "r": 16},
}
MERGED = {"merged, 16 bits": "dequantized", "merged, 4 bits": "4-bit"}


def trained(system: dict[str, Any], best: dict[str, float]) -> tuple[nn.Module, Any]:
    """A base fine-tuned in this way, as in chapter 8's study; α is twice the rank."""
    torch.manual_seed(SEED)
    model, tokenizer = three_ways.load_base()
    way, r = system["way"], system.get("r")
    if way == "lora":
        add_lora(model, r, 2 * r)
    elif way != "full":
        replace_linear_layers(
            model, r, 2 * r, layer_class=FusedQLoRALinear, **three_ways.VARIANTS[way]
        )
    conversations = read_conversations(three_ways.TASKS / "train.jsonl")
    rows = encode_conversations(tokenizer, conversations, 256)
    steps, size = three_ways.STEPS, three_ways.ROWS_A_STEP
    order = row_order(len(rows), steps * size, SEED)
    batches = (
        collate([rows[i] for i in order[at : at + size]]) for at in range(0, len(order), size)
    )
    kind = {"schedule": "cosine", "warmup_steps": three_ways.WARMUP, "total_steps": steps}
    train(model, batches, three_ways.rate_of(way, best), max_grad_norm=1.0, **kind)
    model.config.use_cache = True
    return model.eval(), tokenizer


@torch.no_grad()
def merged(model: nn.Module, into: str) -> nn.Module:
    """A copy with plain linear layers, the adapters of QLoRA merged; 16 bits are bfloat16's."""
    model = copy.deepcopy(model)
    for name, layer in lora_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        delta = layer.scaling * layer.lora_B @ layer.lora_A
        linear.weight.copy_(merge_weight(layer.weight, delta, into).float())
        replace_module(model, name, linear)
    return model


def main() -> None:
    """Train, ask, store."""
    study = json.loads((ROOT / "data" / "results" / "three_ways.json").read_text())
    conversations = read_conversations(three_ways.TASKS / "test.jsonl")[:PROMPTS]
    lines = (three_ways.TASKS / "test.jsonl").read_text(encoding="utf-8").splitlines()[:PROMPTS]
    wanted = [messages[-1]["content"] for messages in conversations]
    rows = [
        {
            "prompt": messages[0]["content"],
            "wanted": messages[-1]["content"],
            "family": json.loads(line)["family"],
            "answers": {},
        }
        for messages, line in zip(conversations, lines, strict=True)
    ]
    systems: dict[str, dict[str, Any]] = {}

    def ask(name: str, model: nn.Module, tokenizer: Any, about: dict[str, Any]) -> None:
        prompts = [messages[:-1] for messages in conversations]
        answers = generate_answers(model, tokenizer, prompts, 72, batch_size=75)
        for row, answer in zip(rows, answers, strict=True):
            row["answers"][name] = answer
        loss = held_out_loss(model, encode_conversations(tokenizer, conversations, 256), 75)
        systems[name] = {
            **about,
            "exact_match": round(exact_match(answers, wanted), 4),
            "held_out_loss": round(loss, 5),
        }

    base, tokenizer = three_ways.load_base()
    base.config.use_cache = True
    ask("base", base, tokenizer, {"way": "none"})
    for name, system in tqdm(SYSTEMS.items(), desc="systems"):
        model, tokenizer = trained(system, study["best"])
        ask(name, model, tokenizer, system)
        if name == "QLoRA r16":
            for title, into in MERGED.items():
                ask(title, merged(model, into), tokenizer, {**system, "merged": into})
    facts = stamp(["transformers"]) | {"seed": SEED, "steps": three_ways.STEPS}
    store({**facts, "systems": systems, "rows": rows}, "tournament")


if __name__ == "__main__":
    main()
