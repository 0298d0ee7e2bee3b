"""What rank, placement, α/r and learning rate do to LoRA on the embedded tasks; and what ΔW is.

    python benchmarks/lora_experiments.py        # about 13 minutes on two cores

One thing is changed at a time, from: LoRA on all linear layers, r = 16, α = 32, learning rate 3e-3,
400 steps of 8 rows, one seed. Every run is measured on the same 150 rows of the validation split.
Then the base is fully fine-tuned on the same rows, and of the change ΔW of each linear layer the
singular values are kept. All is stored as data/results/lora_experiments.json.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from stored import ROOT, stamp, store

from qlora_edu.finetuning import FinetuneConfig, Run, finetune

START = {"method": "lora", "learning_rate": 3e-3, "r": 16, "lora_alpha": 32.0}
CHANGES = [
    ("as it is", {}),
    *(("rank", {"r": r, "lora_alpha": 2.0 * r}) for r in (1, 2, 4, 64)),
    *(
        ("placement", {"target_modules": "q_proj,v_proj", "r": r, "lora_alpha": 2.0 * r})
        for r in (16, 64)
    ),
    *(("lora_alpha", {"lora_alpha": lora_alpha}) for lora_alpha in (2.0, 256.0)),
    *(("learning rate", {"learning_rate": rate}) for rate in (3e-4, 1e-2)),
]


def run(**settings) -> Run:
    """One fine-tune, measured on the validation split."""
    with tempfile.TemporaryDirectory() as folder:
        config = FinetuneConfig.from_preset(
            "embedded",
            held_out_data="data/tasks/valid.jsonl",
            held_out_rows=150,
            answer_rows=150,
            max_steps=400,
            output_dir=str(Path(folder) / "run"),
            **settings,
        )
        return finetune(config)


def row(experiment: str, changes: dict) -> dict:
    """What was changed, and what came of it."""
    result = run(**{**START, **changes})
    config, summary = result.config, result.summary()
    kept = ("exact_match_after", "held_out_loss_after", "trainable_parameters", "training_seconds")
    names = ("target_modules", "r", "lora_alpha", "learning_rate")
    settings = {name: getattr(config, name) for name in names}
    return {"experiment": experiment, **settings, **{name: summary[name] for name in kept}}


def weight_updates() -> dict:
    """Singular values of ΔW, layer by layer, of a full fine-tune; in descending order."""
    result = run(method="full", learning_rate=1e-3)
    before = load_file(ROOT / "data" / "base-model" / "model.safetensors")
    spectra = {}
    for name, after in result.model.state_dict().items():
        if "proj" in name:
            delta = after.float() - before[name].float()
            values = torch.linalg.svdvals(delta)
            spectra[name] = [float(f"{value:.4g}") for value in values.tolist()]
    return {"exact_match_after": result.after.exact_match, "singular_values": spectra}


def main() -> None:
    """Run everything and store it whole."""
    argparse.ArgumentParser(description="Experiments with LoRA on the base.").parse_args()
    started = time.perf_counter()
    rows = [row(experiment, changes) for experiment, changes in CHANGES]
    report = {**stamp(["peft", "trl"]), "rows": rows, "full": weight_updates()}
    report["minutes"] = round((time.perf_counter() - started) / 60, 1)
    store(report, "lora_experiments")


if __name__ == "__main__":
    main()
