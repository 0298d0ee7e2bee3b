"""The command: do what is not yet stored, and store after every run."""

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from tqdm import tqdm

from benchmarks.stored import ROOT, stamp, store, write_json
from benchmarks.study.cost import cost
from benchmarks.study.parts import key, specs, tuning
from benchmarks.study.plan import PLAN, make_plan
from benchmarks.study.ways import ROWS_A_STEP, STEPS, run, untrained

RESULTS = ROOT / "data" / "results" / "study.json"


def main() -> None:
    """Go through the parts in order; stop after the pilots as long as there is no plan."""
    parser = argparse.ArgumentParser(description="The study of chapter 8; resumable.")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--fresh", action="store_true", help="forget what is stored")
    arguments = parser.parse_args()
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() and not arguments.fresh else {}
    report = {
        **stamp(["transformers"]),
        "workers": arguments.workers,
        "steps": STEPS,
        "rows_a_step": ROWS_A_STEP,
        "minutes": old.get("minutes", 0.0),
        "base": old.get("base") or untrained(),
        "runs": old.get("runs", []),
        "cost": old.get("cost"),
    }
    runs: list[dict] = report["runs"]
    pool = ProcessPoolExecutor(
        arguments.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    with pool, tqdm(unit="run", ncols=80) as bar:

        def finish(part: str, wanted: Sequence[dict]) -> None:
            """Make the runs of a part that are not stored."""
            done = {key(run) for run in runs}
            missing = [spec for spec in wanted if key(spec) not in done]
            bar.total = (bar.total or 0) + len(missing)
            bar.set_description(part)
            before, started = report["minutes"], time.perf_counter()
            for finished in as_completed([pool.submit(run, spec) for spec in missing]):
                runs.append(finished.result())
                report["minutes"] = round(before + (time.perf_counter() - started) / 60, 1)
                store(report, "study", quiet=True)
                bar.update()

        while wanted := tuning(runs):
            finish("tuning", wanted)
        finish("pilot", specs("pilot", runs))
        if not PLAN.exists():
            write_json({**stamp([]), **make_plan(runs)}, PLAN)
            print(f"\n{PLAN.name} is written. Read it and commit it; run this again to follow it.")
            return
        seeds = json.loads(PLAN.read_text())["seeds"]
        for part in ("verdict", "bits", "rows", "unseen"):
            finish(part, specs(part, runs, seeds))
    report["cost"] = report["cost"] or cost()
    runs.sort(key=key)
    store(report, "study")


if __name__ == "__main__":
    main()
