"""Full fine-tuning, LoRA and QLoRA of the embedded base on the same rows, and the base untrained.

    python benchmarks/embedded_comparison.py        # about 5 minutes on two cores

Every method sees the same batches for the same number of steps; only the learning rate of full
fine-tuning differs, since a rate that suits adapters is too large for all weights. The untrained
base is measured in three ways, since a plain zero may only say that it has never seen the format:
asked plainly, with three solved rows before the question, and in the manner of the talk that it was
pretrained on (this for the family `question` alone). The results are stored as
data/results/embedded_comparison.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from stored import ROOT, stamp, store

from qlora_edu.finetuning import FinetuneConfig, finetune
from qlora_edu.text.conversations import read_conversations
from qlora_edu.training import exact_match, generate_answers

TEST = ROOT / "data" / "tasks" / "test.jsonl"
FULL_LEARNING_RATE = 1e-3


def load_untrained() -> tuple[Any, Any]:
    """The base in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = ROOT / "data" / "base-model"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(base)


def few_shot_exact_match(shots: int) -> float:
    """Exact match of the untrained base with `shots` solved training rows before each question."""
    model, tokenizer = load_untrained()
    solved = read_conversations(ROOT / "data" / "tasks" / "train.jsonl")[:shots]
    held_out = read_conversations(TEST)
    examples = [turn for messages in solved for turn in messages]
    prompts = [[*examples, *messages[:-1]] for messages in held_out]
    answers = generate_answers(model, tokenizer, prompts)
    return exact_match(answers, [messages[-1]["content"] for messages in held_out])


@torch.no_grad()
def talk_exact_match() -> float:
    """Exact match on the family `question`, asked as two neighbours of Saltmere would talk.

    The first line of what the base says is compared, without its full stop, and with the capital
    with which a line of talk begins.
    """
    model, tokenizer = load_untrained()
    answers, wanted = [], []
    for messages in read_conversations(TEST):
        if messages.row["family"] != "question":
            continue
        asked, answer = (turn["content"] for turn in messages)
        passage, question = asked.rsplit("\n", 1)
        text = f"{tokenizer.bos_token}{passage}\n- {question}\n- "
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        said = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        answers.append(said.split("\n")[0].removesuffix("."))
        wanted.append(answer[0].upper() + answer[1:])
    return exact_match(answers, wanted)


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
    parser.add_argument("--max-steps", type=int, default=None, help="instead of the preset's")
    arguments = parser.parse_args()
    overrides = {"max_steps": arguments.max_steps} if arguments.max_steps else {}
    started = time.perf_counter()
    report = {
        **stamp(["bitsandbytes", "peft", "trl"]),
        "base": {
            "0_shot": few_shot_exact_match(0),
            "3_shot": few_shot_exact_match(3),
            "question_as_talk": talk_exact_match(),
        },
        "rows": compare(overrides),
    }
    report["minutes"] = round((time.perf_counter() - started) / 60, 1)
    store(report, "embedded_comparison")


if __name__ == "__main__":
    main()
