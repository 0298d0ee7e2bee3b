"""Part e: ways of chapter 8 at ten seeds, with the learning rates of `make experiments`."""

import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.gpu.card import Rows
from benchmarks.stored import ROOT

STUDY_WAYS, STUDY_SEEDS, WORKERS = ("full", "lora", "qlora", "qlora + embeddings"), 10, 8


def study(small: bool, device: str) -> Rows:
    """Ways of chapter 8 at more seeds, some runs at a time."""
    sys.path.append(str(ROOT / "benchmarks"))  # a script, which imports what lies beside it
    import three_ways

    path = ROOT / "data" / "results" / "three_ways.json"
    best = json.loads(path.read_text()).get("best") if path.exists() else None
    if small:
        best = {way: rates[0] for way, rates in three_ways.RATES.items()}
    if not best:
        raise FileNotFoundError("no tuned learning rates are stored: run `make experiments` first")
    specs = [
        {
            "part": "seeds",
            "rows": 3000,
            "way": way,
            "rate": three_ways.rate_of(way, best),
            "seed": seed,
        }
        for seed in range(1 if small else STUDY_SEEDS)
        for way in STUDY_WAYS
    ]
    if small:
        with tempfile.TemporaryDirectory() as folder:
            shorten(three_ways, Path(folder))
            for spec in specs:
                yield {**three_ways.run(spec, device), "device": device}
        return
    spawn = multiprocessing.get_context("spawn")
    failed: list[Exception] = []
    with ProcessPoolExecutor(WORKERS, mp_context=spawn) as pool:
        runs = [pool.submit(three_ways.run, spec, device) for spec in specs]
        for finished in as_completed(runs):
            try:
                yield {**finished.result(), "device": device}
            except Exception as error:  # what the other runs found is kept
                failed.append(error)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(specs)} runs failed") from failed[0]


def shorten(three_ways: Any, folder: Path) -> None:
    """Cut the study to two steps, a few rows and texts; for a dry run alone, in its process."""
    for path in (*three_ways.TASKS.glob("*.jsonl"), ROOT / "data" / "text" / "held-out.jsonl"):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:6]))
    three_ways.TASKS, three_ways.ROOT = folder / "data" / "tasks", folder
    three_ways.STEPS, train = 2, three_ways.train
    three_ways.train = lambda *args, **kwargs: 25 * train(*args, **kwargs)  # a mean is over 50
    real = three_ways.generate_answers
    three_ways.generate_answers = lambda *args, **_: real(*args, max_new_tokens=2)
