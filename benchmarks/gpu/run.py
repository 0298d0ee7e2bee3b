"""The tasks of the report, each in a process of its own: what crashes takes nothing else along."""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from benchmarks.gpu.card import Rows, describe, without_paths
from benchmarks.gpu.headline import HEADLINES, headline
from benchmarks.gpu.paging import FUSED, OURS, THEIRS, THEIRS_PAGED, TORCH, paging
from benchmarks.gpu.quantiser import bandwidth, equality
from benchmarks.gpu.steps import METHODS, steps
from benchmarks.gpu.study import study
from benchmarks.stored import ROOT, store, write_json

DRY_FOLDER = ROOT / "build" / "gpu_report"
PARTS: dict[str, dict[str, Callable[[bool, str], Rows]]] = {
    "quantiser": {"equality": equality, "bandwidth": bandwidth},
    "steps": {name: partial(steps, name) for name in METHODS},
    "paging": {name: partial(paging, name) for name in (TORCH, FUSED, THEIRS, THEIRS_PAGED, *OURS)},
    "headline": {
        f"{model} within {card} GB, {stack}": partial(headline, model, card, stack)
        for model, card, stack in HEADLINES
    },
    "study": {"study": study},
}
LETTERS = dict(zip("abcde", PARTS, strict=True))


def follow(parent: int) -> None:
    """End this process and its children when the parent has been killed: they hold the card."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def work(part: str, name: str, small: bool, device: str, path: Path) -> None:
    """In the child: run one task, and write its rows down one by one, as they are found."""
    os.setsid()  # its own children go with it
    threading.Thread(target=follow, args=(os.getppid(),), daemon=True).start()
    task = (
        partial(describe, device) if part == "card" else partial(PARTS[part][name], small, device)
    )
    with path.open("a", encoding="utf-8") as file:
        try:
            for row in task():
                row = {"task": name, **row} if part != "card" else row
                print(json.dumps(row, allow_nan=False), file=file, flush=True)
                if part != "card":
                    print(json.dumps(row), flush=True)
        except Exception as error:
            traceback.print_exc()
            message = without_paths(f"{type(error).__name__}: {error}")
            print(json.dumps({"task": name, "error": message}), file=file, flush=True)
            sys.exit(1)


def run_task(part: str, name: str, small: bool, device: str, minutes: float) -> list[dict]:
    """Run one task in a process of its own; its rows, the last of which may be an error."""
    # A forked process would inherit a CUDA that it cannot use; without CUDA forking is faster.
    context = multiprocessing.get_context("spawn" if device == "cuda" else "fork")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        process = context.Process(target=work, args=(part, name, small, device, path))
        process.start()
        try:
            process.join(60 * minutes)
            late = process.is_alive()
        finally:
            if process.is_alive():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
            process.join()
        rows = read_rows(path)
    if late:
        rows.append({"task": name, "error": f"stopped after {minutes:.1f} minutes"})
    elif process.exitcode and not any("error" in row for row in rows):
        code = process.exitcode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        rows.append({"task": name, "error": f"the process ended with {how}"})
    return rows


def read_rows(path: Path) -> list[dict]:
    """The rows in a file whose writer may have died within the last line."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def run_part(part: str, facts: dict, small: bool, device: str, minutes: float) -> dict:
    """Run the tasks of a part one after another; what they found, and what failed."""
    print(f"part {part}", flush=True)
    started, rows = time.perf_counter(), []
    for name in PARTS[part]:
        left = minutes - (time.perf_counter() - started) / 60
        if left <= 0:
            rows.append({"task": name, "says": f"not begun: {minutes:g} minutes were over"})
            continue
        rows += run_task(part, name, small, device, left)
    report = {**facts, "dry_run": small, "part": part}
    report["minutes"] = round((time.perf_counter() - started) / 60, 2)
    errors = [f"{row['task']}: {row['error']}" for row in rows if "error" in row]
    if errors:
        report["error"] = "; ".join(errors)
    return {**report, "rows": rows}


def keep(report: dict, part: str, small: bool) -> None:
    """Store the result of a card; of a dry run only a file under build/."""
    if not small:
        store(report, f"gpu_{part}")
        return
    path = DRY_FOLDER / f"gpu_{part}.json"
    write_json(report, path)
    print(f"{path.name} written under build, of a dry run: it measures nothing")
