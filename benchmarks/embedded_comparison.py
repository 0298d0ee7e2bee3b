"""Full fine-tuning, LoRA and QLoRA of the embedded base on the same rows, and the base untrained.

    python benchmarks/embedded_comparison.py        # about 12 minutes on two cores

Every method sees the same batches for the same number of steps; only the learning rate of full
fine-tuning differs, since a rate that suits adapters is too large for all weights. The untrained
base is measured twice: asked plainly, and with three solved rows before the question, since a
plain zero may only say that it has never seen the format. The results are stored as
data/results/embedded_comparison.json.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from qlora_edu.chat_data import read_conversations
from qlora_edu.finetune import FinetuneConfig, finetune
from qlora_edu.training import exact_match, generate_answers

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "data" / "results" / "embedded_comparison.json"
FULL_LEARNING_RATE = 1e-3


def few_shot_exact_match(shots: int, rows: int) -> float:
    """Exact match of the untrained base with `shots` solved training rows before each question."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = ROOT / "data" / "base-model"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    solved = read_conversations(ROOT / "data" / "tasks" / "train.jsonl")[:shots]
    held_out = read_conversations(ROOT / "data" / "tasks" / "test.jsonl")[:rows]
    examples = [turn for messages in solved for turn in messages]
    prompts = [[*examples, *messages[:-1]] for messages in held_out]
    answers = generate_answers(model, tokenizer, prompts)
    return exact_match(answers, [messages[-1]["content"] for messages in held_out])


def compare(overrides: dict) -> list[dict]:
    """Run the three methods with the embedded preset; one row of figures each."""
    rows = []
    for method in ("qlora", "lora", "full"):
        with tempfile.TemporaryDirectory() as folder:
            config = FinetuneConfig.from_preset(
                "embedded", method=method, output_dir=str(Path(folder) / "run"), **overrides
            )
            if method == "full":
                config = config.replace(learning_rate=FULL_LEARNING_RATE)
            result = finetune(config)
        rows.append({"method": method, "learning_rate": config.learning_rate, **result.summary()})
        print(json.dumps(rows[-1]))
    return rows


def main() -> None:
    """Measure, then write the results whole."""
    parser = argparse.ArgumentParser(description="Compare three ways to fine-tune the base.")
    parser.add_argument("--max-steps", type=int, default=None)
    arguments = parser.parse_args()
    overrides = {"max_steps": arguments.max_steps} if arguments.max_steps else {}
    started = time.perf_counter()
    report = {
        "command": " ".join(["python", "benchmarks/embedded_comparison.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU",
        "versions": {name: version(name) for name in ("torch", "bitsandbytes", "peft", "trl")},
        "base": {f"{shots}_shot": few_shot_exact_match(shots, 300) for shots in (0, 3)},
        "rows": compare(overrides),
    }
    report["minutes"] = round((time.perf_counter() - started) / 60, 1)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    part = RESULTS.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(part, RESULTS)
    print(f"{RESULTS.relative_to(ROOT)} written")


if __name__ == "__main__":
    main()
