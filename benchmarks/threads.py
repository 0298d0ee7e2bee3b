"""One thread, two that spin, two that wait passively: a training step, idle and beside others.

``python benchmarks/threads.py`` (three minutes, on a machine that is otherwise idle) writes
data/results/threads.json: seconds per step of the embedded preset, each way in a process of its
own, in turns, beside 0, 1 and 2 processes that do nothing but compute.
"""

import json
import os
import subprocess
import sys
import time
from multiprocessing import Process
from statistics import median
from typing import Any

from stored import stamp, store

WAYS: dict[str, dict[str, str]] = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "spinning": {},
    "waiting passively": {"OMP_WAIT_POLICY": "PASSIVE"},
}
ROUNDS, STEPS = 3, 12


def busy() -> None:
    """Compute until ended."""
    while True:
        pass


def steps() -> None:
    """Print the seconds of some training steps of the embedded preset (in a process of its own)."""
    import torch
    from peft import get_peft_model

    from qlora_edu import FinetuneConfig
    from qlora_edu.finetuning import adapter_config
    from qlora_edu.production.loading import load_base, locate
    from qlora_edu.text.conversations import encode_conversations, read_conversations
    from qlora_edu.training import collate, completion_loss

    config = FinetuneConfig.from_preset("embedded")
    model, tokenizer = load_base(config)
    model = get_peft_model(model, adapter_config(config)).train()
    found = read_conversations(locate(config.train_data), "train")[: 8 * STEPS]
    rows = encode_conversations(tokenizer, found, config.max_length)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    seconds = []
    for first in range(0, len(rows), 8):
        started = time.perf_counter()
        completion_loss(model, collate(rows[first : first + 8])).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"threads": torch.get_num_threads(), "seconds": seconds[2:]}))


def timed(way: str) -> dict[str, Any]:
    """Run `steps` in a fresh process, with the variables of a way and no others of their kind."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, __file__, "steps"],
        env=clean | WAYS[way],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure all ways beside 0, 1 and 2 busy processes, and store what came out."""
    report = stamp(["bitsandbytes"])
    report |= {"load_before": os.getloadavg()[0], "rounds": ROUNDS, "steps": STEPS - 2, "rows": []}
    for others in (0, 1, 2):
        processes = [Process(target=busy, daemon=True) for _ in range(others)]
        for process in processes:
            process.start()
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(ROUNDS):
            for way in WAYS:
                found[way] += timed(way)["seconds"]
        for process in processes:
            process.kill()
            process.join()
        means = {way: sum(seconds) / len(seconds) for way, seconds in found.items()}
        best = min(means.values())
        for way, seconds in found.items():
            report["rows"].append(
                {
                    "busy_processes": others,
                    "way": way,
                    "mean_s": round(means[way], 4),
                    "median_s": round(median(seconds), 4),
                    "longest_s": round(max(seconds), 4),
                    "times_the_best": round(means[way] / best, 2),
                }
            )
            print(others, way, report["rows"][-1], flush=True)
    store(report, "threads")


if __name__ == "__main__":
    steps() if sys.argv[1:] == ["steps"] else main()
