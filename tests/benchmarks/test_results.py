"""Stored results say how they were made, and they hold what the course promises."""

import json
import re
from pathlib import Path

import pytest

from qlora_edu.comparison import equivalence, mean_interval

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "data" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_names_command_date_machine_and_versions(path):
    report = json.loads(path.read_text())
    assert {"command", "date", "machine", "versions"} <= report.keys()
    assert report.get("rows") or report.get("runs"), "a result without rows says nothing"
    for word in ("/home", "/root", "/work", "http"):
        assert word not in path.read_text()


def test_the_study_says_what_the_course_says_of_it():
    report = json.loads((ROOT / "data" / "results" / "three_ways.json").read_text())
    measures = ("exact_match", "held_out_loss", "text_perplexity")
    found = {}
    for way in ("full", "lora", "qlora", "qlora + embeddings", "houlsby"):
        runs = [r for r in report["runs"] if (r["part"], r["way"]) == ("seeds", way)]
        runs.sort(key=lambda run: run["seed"])
        assert len(runs) >= 5
        found[way] = {name: [run[name] for run in runs] for name in measures}
    for measure, second in (("exact_match", "full"), ("held_out_loss", "lora")):
        test = equivalence(found["qlora"][measure], found[second][measure], margin=0.05)
        assert test.verdict == {"full": "different", "lora": "equivalent"}[second]
    forgotten = {
        way: mean_interval(values["text_perplexity"]).mean for way, values in found.items()
    }
    assert min(forgotten, key=forgotten.get) == "full"


def test_what_the_project_promises_of_the_embedded_base_was_measured():
    report = json.loads((ROOT / "data" / "results" / "embedded_comparison.json").read_text())
    qlora = next(row for row in report["rows"] if row["method"] == "qlora")
    assert qlora["held_out_rows"] == 300
    assert qlora["exact_match_before"] < 0.10 and qlora["exact_match_after"] >= 0.85
    assert qlora["training_seconds"] <= 180


def test_the_quantiser_is_as_fast_as_promised():
    report = json.loads((ROOT / "data" / "results" / "bench.json").read_text())
    rows = [row for row in report["rows"] if row["peer"] == "bitsandbytes"]
    assert not any("step" in row["name"] for row in rows)
    for row in rows:
        assert row["ratio"] == pytest.approx(row["peer_s"] / row["ours_s"])
    ratios = {
        kind: [row["ratio"] for row in rows if re.match(pattern, row["name"])]
        for kind, pattern in (
            ("eager", r"quantize .*\dx\d+ \w+$"),
            ("compiled", r"quantize .* compiled$"),
            ("back", r"dequantize "),
        )
    }
    assert len(ratios["eager"]) == len(ratios["compiled"]) == len(ratios["back"]) >= 8
    assert min(ratios["eager"]) >= 1.5 and min(ratios["compiled"]) >= 10


def test_a_qlora_step_costs_no_more_than_that_of_the_peers():
    report = json.loads((ROOT / "data" / "results" / "bench.json").read_text())
    rows = [row for row in report["rows"] if row["name"].startswith("qlora step ")]
    for unit, kind in (("s", "time"), ("bytes", "peak memory")):
        of_kind = [row for row in rows if row["name"].endswith(f" {kind}")]
        sizes = [re.search(r"width (\d+) batch (\d+)x", row["name"]).groups() for row in of_kind]
        assert all(len(set(numbers)) >= 3 for numbers in zip(*sizes, strict=True))
        for row in of_kind:
            assert row["ratio"] == pytest.approx(row[f"peer_{unit}"] / row[f"ours_{unit}"])
            assert row["ratio"] >= 1.0, row["name"]


def test_the_merge_lab_holds_every_merge():
    report = json.loads((ROOT / "data" / "results" / "merge_lab.json").read_text())
    for row in report["rows"]:
        assert row["surviving_share"].keys() == {"4-bit", "dequantized", "original"}
        assert row["exact_match"].keys() == {"unmerged", "4-bit", "dequantized", "original"}


def test_the_planner_was_held_against_many_steps_of_many_models():
    rows = json.loads((ROOT / "data" / "results" / "memory.json").read_text())["rows"]
    assert len({row["model"] for row in rows}) == 12 and sum(row["held_out"] for row in rows) >= 16
    assert max(abs(row["error"]) for row in rows) < 0.05


def test_every_paged_step_moved_what_the_theory_says():
    report = json.loads((ROOT / "data" / "results" / "paging.json").read_text())
    for row in report["rows"]:
        pages = report["state_bytes"] // row["page_bytes"]
        fits = row["budget_bytes"] >= report["state_bytes"]
        assert row["hits"] == (pages if fits else 0)
        assert row["faults"] + row["prefetched"] == (0 if fits else pages)
        assert row["bytes_in"] == row["bytes_out"] == (0 if fits else report["state_bytes"])
        assert row["ratio"] == pytest.approx(row["paged_s"] / row["plain_s"])


def test_the_card_took_what_the_course_says():
    headline = json.loads((ROOT / "data" / "results" / "gpu_headline.json").read_text())
    for theirs, ours in zip(headline["rows"][1::2], headline["rows"][::2], strict=True):
        assert (theirs["stack"], ours["stack"]) == ("bitsandbytes", "qlora_edu")
        assert theirs["fits"] and ours["fits"] and "RANDOM WEIGHTS" in ours["weights"]
    steps = json.loads((ROOT / "data" / "results" / "gpu_steps.json").read_text())["rows"]
    missing = [(row["peak_allocated_bytes"] - row["plan_bytes"]) / 2**20 for row in steps]
    assert len(steps) == 12 and {round(mib) for mib in missing} == {64}
    assert max(abs(row["relative_error"]) for row in steps) < 0.013
    rows = json.loads((ROOT / "data" / "results" / "gpu_quantiser.json").read_text())["rows"]
    nf4 = [r for r in rows if r["what"] == "equality" and r["levels"] == "nf4"]
    for row in nf4:
        assert row["packed"]["of"] > 8e6
        assert row["packed"]["differing"] <= (5 if row["dtype"] == "float32" else 0)
