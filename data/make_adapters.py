"""Train the adapters of `data/adapters/`: one for each task family, and one for all of them.

    python data/make_adapters.py        # some six minutes on two cores

Each is a QLoRA adapter over NF4 with double quantisation, written by PEFT. Chapter 4 swaps the
three small ones on one base; chapter 5 merges the large one.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from qlora_edu.finetuning import FinetuneConfig, finetune

DATA = Path(__file__).resolve().parent
FAMILIES = ("question", "absent", "record")


def rows_of(split: str, family: str | None, folder: Path) -> str:
    """Write the rows of a family of tasks as a file of their own; its path."""
    lines = (DATA / "tasks" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(True)
    chosen = [line for line in lines if family in (None, json.loads(line)["family"])]
    path = folder / f"{split}.jsonl"
    path.write_text("".join(chosen), encoding="utf-8")
    return str(path)


def make(name: str, family: str | None, **settings) -> None:
    """Train one adapter; keep its two files and what it was measured to do."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = 300 if family is None else 100
        config = FinetuneConfig.from_preset(
            "embedded",
            train_data=rows_of("train", family, work),
            held_out_data=rows_of("valid", family, work),
            held_out_rows=rows,
            answer_rows=rows,
            output_dir=str(work / "run"),
            **settings,
        )
        result = finetune(config)
        kept = DATA / "adapters" / name
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(work / "run" / file, kept / file)
        summary = {"command": "python data/make_adapters.py", **result.summary()}
        (kept / "measured.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(name, result.closing_line(), flush=True)


def main() -> None:
    """Train all four."""
    argparse.ArgumentParser(description="Train the stored adapters.").parse_args()
    for family in FAMILIES:
        make(family, family, r=8, lora_alpha=16.0, max_steps=600 if family == "record" else 250)
    make("all", None)


if __name__ == "__main__":
    main()
