"""What becomes of a QLoRA adapter when it is merged: in the weights, and in the answers.

    python benchmarks/merge_lab.py        # about ten minutes on two cores

QLoRA adapters are trained on the embedded tasks at several learning rates, which leaves them with
updates of several sizes. Each is merged in three ways: into 4 bits (NF4 with double quantisation
again), into the dequantised base and into the original base, both rounded to bfloat16. For each
way: how much of the update survives in the weights, and the exact match on 150 rows of the
validation split. The largest adapter is also taken at fractions of its size. Stored as
data/results/merge_lab.json.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from stored import stamp, store
from torch import nn

from qlora_edu.adapters import adapter_tensors, lora_layers, replace_module
from qlora_edu.finetuning import finetune
from qlora_edu.production.config import FinetuneConfig
from qlora_edu.production.loading import load_base, locate
from qlora_edu.qlora import (
    MERGE_TARGETS,
    FusedQLoRALinear,
    merge_weight,
    replace_linear_layers,
    surviving_share,
)
from qlora_edu.text.conversations import read_conversations
from qlora_edu.training import exact_match, generate_answers

ROWS = 150
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
CONFIG = FinetuneConfig.from_preset("embedded", held_out_data="data/tasks/valid.jsonl")


def trained(rate: float) -> dict[str, torch.Tensor]:
    """The adapter of one fine-tune, under PEFT's names."""
    from peft import get_peft_model_state_dict

    with tempfile.TemporaryDirectory() as folder:
        config = CONFIG.replace(
            learning_rate=rate, held_out_rows=1, answer_rows=0, output_dir=str(Path(folder) / "run")
        )
        return get_peft_model_state_dict(finetune(config).model)


def exact(model: nn.Module, tokenizer, rows: list) -> float:
    """Exact match on the validation rows."""
    prompts, wanted = [row[:-1] for row in rows], [row[-1]["content"] for row in rows]
    answers = generate_answers(model, tokenizer, prompts, CONFIG.max_new_tokens, batch_size=ROWS)
    return exact_match(answers, wanted)


@torch.no_grad()
def measure(name: str, tensors: dict, fraction: float, base, tokenizer, rows: list) -> dict:
    """One adapter at a fraction of its size: unmerged, and merged in the three ways."""
    model = copy.deepcopy(base)
    replace_linear_layers(model, CONFIG.r, CONFIG.lora_alpha, layer_class=FusedQLoRALinear)
    own = adapter_tensors(model)
    for key, tensor in own.items():
        tensor.copy_(tensors[key] * (fraction if "lora_B" in key else 1.0))
    match = {"unmerged": exact(model, tokenizer, rows)}
    size, shares = [], {into: [] for into in MERGE_TARGETS}
    for into in MERGE_TARGETS:
        merged = copy.deepcopy(base)
        for layer_name, layer in lora_layers(model).items():
            original, delta = base.get_submodule(layer_name).weight, layer.delta_weight()
            weight = merge_weight(layer.weight, delta, into, original)
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
            linear.weight.data = weight.float()
            replace_module(merged, layer_name, linear)
            start = original if into == "original" else layer.weight.dequantize()
            shares[into].append(surviving_share(start, weight, delta))
            if into == "4-bit":
                size.append((delta.square().mean() / original.square().mean()).sqrt().item())
        match[into] = exact(merged, tokenizer, rows)
    row = {
        "adapter": name,
        "fraction": fraction,
        "update_over_weight": sum(size) / len(size),  # RMS of ΔW over RMS of W, mean over layers
        "surviving_share": {into: sum(of) / len(of) for into, of in shares.items()},
        "exact_match": match,
    }
    print(row, flush=True)
    return row


def main() -> None:
    """Train, merge, measure, store."""
    argparse.ArgumentParser(description="Merge QLoRA adapters in three ways.").parse_args()
    base, tokenizer = load_base(CONFIG.replace(method="lora"))
    rows = [list(row) for row in read_conversations(locate(CONFIG.held_out_data))[:ROWS]]
    results = []
    for rate in RATES:
        tensors = trained(rate)
        fractions = (*FRACTIONS, 1.0) if rate == max(RATES) else (1.0,)
        name = f"learning rate {rate:g}"
        results += [measure(name, tensors, part, base, tokenizer, rows) for part in fractions]
    report = {**stamp(["bitsandbytes", "peft", "trl"]), "rows_measured": ROWS, "rows": results}
    store(report, "merge_lab")


if __name__ == "__main__":
    main()
