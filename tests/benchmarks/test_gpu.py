"""The GPU report, as far as a machine without a GPU can tell: every part runs, none is lost."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from benchmarks.gpu import card, headline, paging, run, steps, study
from benchmarks.gpu.__main__ import main
from qlora_edu.files import ROOT
from qlora_edu.memory import RESERVE

RESULTS = ROOT / "data" / "results"
PARTS = ("quantiser", "steps", "paging", "headline", "study")


@pytest.fixture
def dry_folder(monkeypatch, tmp_path):
    """Where a dry run writes; the variables that the command sets are undone after the test."""
    monkeypatch.setattr(run, "DRY_FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "gpu" / "__main__.py")])
    for name in ("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
    return tmp_path


@pytest.fixture(scope="module")
def dry_run():
    """Run every part once, in a fresh process; what was said and what was written."""
    stored = {path: path.read_bytes() for path in RESULTS.glob("gpu_*.json")}
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--minutes", "60"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    now = {path: path.read_bytes() for path in RESULTS.glob("gpu_*.json")}
    assert now == stored, "a dry run has written results"
    folder = ROOT / "build" / "gpu_report"
    written = {part: json.loads((folder / f"gpu_{part}.json").read_text()) for part in PARTS}
    return done, written


def test_a_dry_run_says_what_it_is_and_prints_what_it_found(dry_run):
    done, written = dry_run
    for part, found in written.items():
        assert found["dry_run"] is True and found["part"] == part and "error" not in found
        assert {"command", "date", "machine", "versions", "host"} <= found.keys()
        assert found["command"] == "python -m benchmarks.gpu --dry-run --minutes 60"
        for row in found["rows"]:
            assert json.dumps(row) in done.stdout
        for word in ("/home", "/root", "/work", "http"):
            assert word not in json.dumps(found)
    assert "RANDOM WEIGHTS" in done.stdout


def test_on_a_cpu_every_byte_is_that_of_bitsandbytes(dry_run):
    rows = [row for row in dry_run[1]["quantiser"]["rows"] if row["what"] == "equality"]
    assert len(rows) == 3 * 2 * 7 * 2
    for row in rows:
        kinds = {"packed", "codes", "absmax", "values"}
        if row["double_quant"]:
            kinds |= {"nested_absmax", "offset", "map"}
        assert {name for name, value in row.items() if isinstance(value, dict)} == kinds
        for kind in kinds:
            assert row[kind]["differing"] == row[kind]["largest"] == 0 < row[kind]["of"], row


def test_bandwidth_is_a_share_of_that_of_a_copy(dry_run):
    copy, *rows = (row for row in dry_run[1]["quantiser"]["rows"] if row["what"] != "equality")
    assert copy["bytes_per_second"] == pytest.approx(2 * copy["bytes"] / copy["seconds"])
    whose = ("ours", "ours, compiled", "bitsandbytes")
    wanted = [(what, who) for what in ("quantize", "dequantize") for who in whose]
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        assert [(row["what"], row["whose"]) for row in of_dtype] == wanted
        for row in of_dtype:
            if "reason" in row:
                assert row["whose"] == "ours, compiled" and "not compiled" in row["reason"]
                continue
            n = row["shape"][0] * row["shape"][1]
            assert row["bytes"] == n * size + n // 2 + n // 64 * 4
            assert row["beside_ours"]["differing"] == 0
            share = row["bytes"] / row["seconds"] / copy["bytes_per_second"]
            assert row["share_of_copy"] == pytest.approx(share, abs=1e-4)


def test_every_way_steps_at_two_lengths_beside_its_plan(dry_run):
    rows = dry_run[1]["steps"]["rows"]
    assert [(row["method"], row["length"]) for row in rows] == [
        (name, length) for name in steps.METHODS for length in (32, 64)
    ]
    for row in rows:
        assert row["plan_bytes"] > 0 and row["fits"] and "RANDOM WEIGHTS" in row["weights"]
        assert len(row["losses"]) == 7 and row["optimizer"] == "adamw_torch"
        speed = row["batch"] * row["length"] / row["seconds_a_step"]
        assert row["tokens_per_second"] == pytest.approx(speed, rel=1e-3)
        assert row["peak_allocated_bytes"] is None, "no card was measured"


def test_paged_states_move_and_change_nothing(dry_run):
    rows = {row["optimizer"]: row for row in dry_run[1]["paging"]["rows"]}
    assert rows.keys() == run.PARTS["paging"].keys()
    for name, (share, _, prefetch) in paging.OURS.items():
        row = rows[name]
        assert row["differing_parameters"] == 0 and row["prefetch"] == prefetch
        counters = row["counters"]
        used = counters["hits"] + counters["faults"] + counters["prefetched"]
        assert used == row["pages"], "each page is used once a step"
        assert bool(counters["bytes_in"]) == (share < 1)
        assert bool(counters["prefetched"]) == (share < 1 and prefetch)
    assert rows[paging.THEIRS_PAGED]["managed_bytes"] == 2 * 4 * 100_000


def test_the_headline_falls_and_is_planned_first(dry_run):
    rows = dry_run[1]["headline"]["rows"]
    assert [(row["model"], row["card_bytes"] // 10**9, row["stack"]) for row in rows] == [
        *headline.HEADLINES
    ]
    for row in rows:
        assert row["falls"] and row["losses"][-1] < row["losses"][0]
        assert row["settings"]["adapter_dtype"] == "bfloat16" and row["settings"]["r"] == 64
        assert row["fits"] is None, "no card was measured"


def test_the_study_runs_each_way_on_the_device(dry_run):
    rows = dry_run[1]["study"]["rows"]
    assert [row["way"] for row in rows] == [*study.STUDY_WAYS]
    for row in rows:
        assert row["device"] == "cpu" and 0 <= row["exact_match"] <= 1


@pytest.mark.parametrize(
    ("model", "card", "optimizer"),
    [
        ("llama-65b", 48, "paged_adamw_32bit"),
        ("llama-33b", 24, "adamw_torch"),
        ("llama-7b", 8, "paged_adamw_32bit"),
    ],
)
def test_the_headline_takes_what_the_plan_says_fits(model, card, optimizer):
    settings = {"backend": "bitsandbytes", "r": 64, "adapter_dtype": "bfloat16"}
    plan = headline.choose_plan(model, card * 10**9, **settings)
    assert plan.optim == optimizer
    assert plan.peak_bytes + RESERVE <= card * 10**9


def test_more_managed_memory_than_is_free_is_never_asked_for(monkeypatch):
    card.check_managed(100, 100)
    with pytest.raises(card.ManagedMemoryError, match="101 bytes.*only 100 are free"):
        card.check_managed(101, 100)
    weight = torch.nn.Parameter(torch.zeros(100_000))
    small = torch.nn.Parameter(torch.zeros(99_999))
    assert paging.paged_bytes([weight, small]) == 800_000
    monkeypatch.setattr(paging, "free_and_total", lambda device: (RESERVE + 799_999, 2**40))
    with pytest.raises(card.ManagedMemoryError):
        paging.make_optimizer(paging.THEIRS_PAGED, [weight], False, "cpu")
    monkeypatch.setattr(paging, "free_and_total", lambda device: (RESERVE + 800_000, 2**40))
    paging.make_optimizer(paging.THEIRS_PAGED, [weight], False, "cpu")


def test_what_does_not_fit_is_not_tried(monkeypatch):
    """As on a card of 20 GB, were there one; nothing may be built for it."""
    for module in (steps, headline):
        monkeypatch.setattr(module, "free_and_total", lambda device: (20 * 10**9, 20 * 10**9))
        monkeypatch.setattr(module, "outside", lambda device: 0)
    rows = list(steps.steps("full, bf16", False, "cuda"))
    assert [row["length"] for row in rows] == [512, 2048]
    for row in rows:
        assert row["fits"] is False and row["says"] == "does not fit"
        assert row["plan_bytes"] > row["room_bytes"] == 20 * 10**9 - RESERVE
    (row,) = headline.headline("llama-33b", 24, "bitsandbytes", False, "cuda")
    assert row["fits"] is False and "too small" in row["says"] and row["plan_bytes"] < 24 * 10**9
    (row,) = headline.headline("llama-65b", 24, "bitsandbytes", False, "cuda")
    assert row["fits"] is False and "by the plan" in row["says"]


def crash(small, device):
    yield {"found": 1}
    os.kill(os.getpid(), signal.SIGKILL)


def fail(small, device):
    yield {"found": 2}
    raise MemoryError("CUDA out of memory; see https://x.org/a/b and /work/x/y.py")


def be_well(small, device):
    yield {"found": 4}


def test_what_crashes_fails_or_hangs_takes_nothing_with_it(dry_folder, monkeypatch, capfd):
    """Only the part that hangs has little time, and that runs from when it hangs."""
    context = multiprocessing.get_context("fork")
    hanging, join, run_part = context.Event(), context.Process.join, run.run_part

    def hang(small, device):
        yield {"found": 3}
        hanging.set()
        signal.pause()

    def join_late(process, timeout=None):
        if timeout is not None and timeout < 60:
            hanging.wait()
        join(process, timeout)

    def run_part_of(part, facts, small, device, minutes):
        return run_part(part, facts, small, device, 0.02 if part == "paging" else minutes)

    parts = {"quantiser": {"crash": crash, "fail": fail, "well": be_well}}
    parts |= {"paging": {"hang": hang, "late": be_well}, "study": {"well": be_well}}
    monkeypatch.setattr(run, "PARTS", parts)
    monkeypatch.setattr(run, "run_part", run_part_of)
    monkeypatch.setattr(context.Process, "join", join_late)
    assert main(["--dry-run"]) == 1
    first, second, third = (
        json.loads((dry_folder / f"gpu_{part}.json").read_text()) for part in parts
    )
    assert first["rows"] == [
        {"task": "crash", "found": 1},
        {"task": "crash", "error": "the process ended with signal 9"},
        {"task": "fail", "found": 2},
        {
            "task": "fail",
            "error": "MemoryError: CUDA out of memory; see (an address) and y.py",
        },
        {"task": "well", "found": 4},
    ]
    assert "crash: the process ended" in first["error"] and "fail: MemoryError" in first["error"]
    assert second["rows"][:2] == [
        {"task": "hang", "found": 3},
        {"task": "hang", "error": "stopped after 0.0 minutes"},
    ]
    assert "not begun" in second["rows"][2]["says"]
    assert third["rows"] == [{"task": "well", "found": 4}] and "error" not in third
    assert "part quantiser, failed" in capfd.readouterr().err


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_task_ends_with_the_report_that_began_it():
    """Or it would go on holding the card."""
    code = (
        "import os, signal\nfrom benchmarks.gpu import run\n"
        "def hang(small, device):\n    print(os.getpid(), flush=True)\n    signal.pause()\n"
        "run.PARTS = {'study': {'hang': hang}}\n"
        "run.run_task('study', 'hang', True, 'cpu', 60)\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        child = int(process.stdout.readline())
        process.kill()
    while is_running(child):  # for ever, if it does not end: then the test's own limit speaks
        time.sleep(0.1)


def test_a_task_has_a_process_of_its_own(dry_folder, monkeypatch):
    tasks = {name: lambda small, device: iter([{"pid": os.getpid()}]) for name in "ab"}
    monkeypatch.setattr(run, "PARTS", {"quantiser": tasks})
    assert main(["a", "--dry-run"]) == 0
    rows = json.loads((dry_folder / "gpu_quantiser.json").read_text())["rows"]
    assert len({os.getpid(), *(row["pid"] for row in rows)}) == 3


def test_a_card_that_was_measured_is_stored(monkeypatch):
    kept = {}
    monkeypatch.setattr(run, "store", lambda found, name: kept.update({name: found}))
    run.keep({"rows": []}, "paging", small=False)
    assert kept == {"gpu_paging": {"rows": []}}


def test_without_a_card_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run, "run_task", lambda *_: pytest.fail("something was begun"))
    assert main([]) == 1
    said = capsys.readouterr()
    assert "no CUDA device" in said.err and "--dry-run" in said.err and not said.out


def test_parts_are_chosen_by_letter_or_name(dry_folder, monkeypatch):
    parts = {part: {"well": be_well} for part in PARTS}
    monkeypatch.setattr(run, "PARTS", parts)
    assert main(["c", "quantiser", "--dry-run"]) == 0
    assert {path.name for path in dry_folder.glob("*.json")} == {
        "gpu_paging.json",
        "gpu_quantiser.json",
    }
    with pytest.raises(SystemExit):
        main(["f", "--dry-run"])
