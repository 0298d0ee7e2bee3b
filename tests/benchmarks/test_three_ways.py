"""The study of chapter 8: every run described, nothing done twice, nothing lost on the way."""

import json
import sys
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import three_ways

    return three_ways


def test_runs_of_one_seed_see_the_same_rows(study, monkeypatch):
    """So that their differences can be paired."""
    seen = {}

    def train(model, batches, rate, **_):
        seen.setdefault(rate, []).append([batch["input_ids"].tolist() for batch in batches])
        return [1.0] * 60

    monkeypatch.setattr(study, "STEPS", 3)
    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study, "measure", lambda *args, **kwargs: {})
    for way in ("full", "houlsby", "qlora + embeddings"):
        for seed in (0, 1):
            spec = {"part": "seeds", "rows": 3000, "way": way, "rate": seed, "seed": seed}
            study.run(spec)
    assert all(rows == seen[seed][0] for seed in (0, 1) for rows in seen[seed])
    assert seen[0][0] != seen[1][0]


@pytest.mark.parametrize(
    ("way", "trainable"),
    [
        ("full", 3_016_960),
        ("lora", 286_720),
        ("qlora", 286_720),
        ("nf2", 286_720),
        ("houlsby", 264_704),
        ("qlora + embeddings", 286_720 + 1024 * 256),
    ],
)
def test_each_way_trains_what_it_says(study, way, trainable):
    model, _ = study.load_base()
    study.make_trainable(model, way)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


@pytest.mark.parametrize("way", ["full", "lora", "qlora", "houlsby", "qlora + embeddings"])
def test_a_seed_means_the_same_on_every_machine(study, monkeypatch, way):
    """All that is drawn is there, in the processor's memory, before anything moves to a card."""
    moved, real = [], torch.nn.Module.to

    def to(model, device):
        if device == "the card":
            moved.append({name: p.clone() for name, p in model.named_parameters()})
            return model
        return real(model, device)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    torch.manual_seed(0)
    there, _ = study.prepare(way, "the card")
    torch.manual_seed(0)
    here = dict(study.prepare(way)[0].named_parameters())
    assert (
        len(moved) == 1 and moved[0].keys() == here.keys() == dict(there.named_parameters()).keys()
    )
    assert all(torch.equal(moved[0][name], here[name]) for name in here)


def test_a_short_run_is_measured_in_every_way(study, monkeypatch):
    monkeypatch.setattr(study, "STEPS", 12)
    monkeypatch.setattr(study, "measure", lambda *a, answers=300, real=study.measure: real(*a, 30))
    spec = {"part": "seeds", "rows": 100, "way": "qlora", "rate": 3e-3, "seed": 0}
    found = study.run(spec)
    assert found.items() >= spec.items() and found["trainable"] == 286_720
    assert set(found["by_family"]) == {"question", "absent", "record"}
    assert found["training_loss"] > 0 and 1 < found["text_perplexity"] < 3
    other = found["on_another_base"]["lora"]
    assert other["held_out_loss"] == pytest.approx(found["held_out_loss"], rel=0.1)


class InThisProcess:
    """Stands for the pool: runs at once, and fails after `lives` runs."""

    lives = 10**9

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def submit(self, function, spec):
        future = Future()
        if InThisProcess.lives == 0:
            future.set_exception(KeyboardInterrupt())
        else:
            InThisProcess.lives -= 1
            future.set_result(function(spec))
        return future


def test_an_interrupted_study_goes_on_and_ends_the_same(study, monkeypatch, tmp_path):
    done = Counter()

    def run(spec):
        done[json.dumps(spec, sort_keys=True)] += 1
        return {**spec, "held_out_loss": abs(spec["rate"] - 2e-3), "exact_match": 0.5}

    (tmp_path / "data" / "results").mkdir(parents=True)
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules["stored"], "ROOT", tmp_path)
    stamp = {"command": "three_ways.py", "date": "", "machine": "", "versions": {}}
    monkeypatch.setattr(study, "stamp", lambda packages: stamp)
    monkeypatch.setattr(study, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(study, "as_completed", lambda futures: iter(futures))
    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "untrained", lambda: [{"base": "float32"}])
    monkeypatch.setattr(study, "cost", lambda: [{"way": "full"}])
    monkeypatch.setattr(sys, "argv", ["three_ways.py", "--seeds", "2"])
    for lives in (7, 30, 11):
        InThisProcess.lives = lives
        with pytest.raises(KeyboardInterrupt):
            study.main()
    InThisProcess.lives = 10**9
    study.main()
    report = json.loads((tmp_path / "data" / "results" / "three_ways.json").read_text())
    assert set(done.values()) == {1}
    assert len(report["runs"]) == len(done) == 2 * 20 + 2 * 8 + 2 * 2 + 2 * 9
    assert set(report["best"].values()) == {2e-3}
    assert report["cost"] and report["base"]
    # More tuning may overtake a rate: what was run at the old one leaves, and is run again.
    monkeypatch.setitem(study.RATES, "full", (2.1e-3,))
    study.main()
    report = json.loads((tmp_path / "data" / "results" / "three_ways.json").read_text())
    rates = {(r["part"], r["way"]): r["rate"] for r in report["runs"] if r["part"] != "tuning"}
    assert rates["seeds", "full"] == 2.1e-3 and rates["seeds", "lora"] == 2e-3


def test_the_stored_study_is_whole(study):
    """What notebook 8 reads: every run of every part, at the rate that the tuning chose."""
    path = ROOT / "data" / "results" / "three_ways.json"
    report = json.loads(path.read_text())
    assert report["best"] == study.best_rates(report["runs"])
    for part in ("tuning", "seeds", "bits", "rows"):
        names = ("part", "rows", "way", "rate", "seed")
        stored = [{n: r[n] for n in names} for r in report["runs"] if r["part"] == part]
        wanted = study.specs_of(part, report["best"])
        assert sorted(stored, key=str) == sorted(wanted, key=str)
    assert {row["way"] for row in report["cost"]} == set(study.WAYS)
    assert report["steps"] == study.STEPS and report["rows_a_step"] == study.ROWS_A_STEP
