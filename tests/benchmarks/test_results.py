"""Stored results say how they were made, and what the README repeats of them is what they hold."""

import json
import math
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


def test_the_readme_repeats_what_the_untrained_base_can_do():
    report = json.loads((ROOT / "data" / "results" / "embedded_comparison.json").read_text())
    readme = " ".join((ROOT / "README.md").read_text().split())
    base = report["base"]
    assert f"asked plainly, {base['0_shot']:.2f}" in readme
    assert f"three solved rows before the question, {base['3_shot']:.2f}" in readme
    assert f"manner of its own stories, {base['question_as_talk']:.2f}" in readme


def test_the_readme_repeats_the_stored_study():
    report = json.loads((ROOT / "data" / "results" / "three_ways.json").read_text())
    readme = " ".join((ROOT / "README.md").read_text().split())
    measures = ("exact_match", "held_out_loss", "text_perplexity")
    found = {}
    for way in ("full", "lora", "qlora", "qlora + embeddings", "houlsby"):
        runs = [r for r in report["runs"] if (r["part"], r["way"]) == ("seeds", way)]
        runs.sort(key=lambda run: run["seed"])
        assert len(runs) >= 5
        found[way] = {name: [run[name] for run in runs] for name in measures}
        match, loss = (mean_interval(found[way][name]) for name in measures[:2])
        nats = [math.log(perplexity) for perplexity in found[way]["text_perplexity"]]
        cells = (
            f"{match.mean:.2f} [{match.low:.2f}, {match.high:.2f}]",
            f"{loss.mean:.3f}",
            f"{math.exp(mean_interval(nats).mean):.1f}",
            f"{runs[0]['trainable']:,}",
        )
        assert " | ".join(cells) in readme, f"{way}: {cells}"
    for measure, second, digits in (("exact_match", "full", 3), ("held_out_loss", "lora", 4)):
        test = equivalence(found["qlora"][measure], found[second][measure], margin=0.05)
        assert test.verdict == {"full": "different", "lora": "equivalent"}[second]
        mean, low, high = (f"{number:+.{digits}f}" for number in test.difference)
        assert mean in readme and f"{low} to {high}" in readme
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


def test_the_quantiser_is_as_fast_as_promised_and_the_readme_says_how_fast():
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
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"at least {floor(min(ratios['eager']))} times as fast" in readme
    assert f"compiled at least {floor(min(ratios['compiled']))} times" in readme
    slowest, fastest = min(ratios["back"]), max(ratios["back"])
    assert f"`dequantize` has {slowest:.1f} to {fastest:.1f} of its speed" in readme


def floor(ratio: float) -> float:
    """A ratio to one decimal, never rounded up."""
    return math.floor(10 * ratio) / 10


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
    step, small = (
        [r["ratio"] for r in report["rows"] if re.match(f"qlora {kind} .* time$", r["name"])]
        for kind in ("step", "small step")
    )
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"({floor(min(step))} to {floor(max(step))} times as fast" in readme
    assert f"it has {min(small):.2f} to {max(small):.2f} of their speed" in readme


def test_the_merge_lab_holds_every_merge():
    report = json.loads((ROOT / "data" / "results" / "merge_lab.json").read_text())
    for row in report["rows"]:
        assert row["surviving_share"].keys() == {"4-bit", "dequantized", "original"}
        assert row["exact_match"].keys() == {"unmerged", "4-bit", "dequantized", "original"}


def test_the_readme_says_how_right_the_planner_is_and_what_paging_costs():
    memory = json.loads((ROOT / "data" / "results" / "memory.json").read_text())
    measured = memory["rows"]
    worst = max(abs(row["error"]) for row in measured)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"Held against {len(measured)} real steps" in readme
    assert len({row["model"] for row in measured}) == 12 and "twelve architectures" in readme
    assert f"{sum(row['held_out'] for row in measured)} of the steps drawn at random" in readme
    assert f"at most {math.ceil(1000 * worst) / 10} %" in readme
    paging = json.loads((ROOT / "data" / "results" / "paging.json").read_text())
    at_a_tenth = {
        row["page_bytes"]: row["ratio"]
        for row in paging["rows"]
        if row["budget_share"] == 0.1 and row["prefetch"]
    }
    assert f"it takes {at_a_tenth[2**20]:.1f} times as long" in readme
    assert f"in pages of 16 KiB {at_a_tenth[2**14]:.0f} times" in readme


def test_every_paged_step_moved_what_the_theory_says():
    report = json.loads((ROOT / "data" / "results" / "paging.json").read_text())
    for row in report["rows"]:
        pages = report["state_bytes"] // row["page_bytes"]
        fits = row["budget_bytes"] >= report["state_bytes"]
        assert row["hits"] == (pages if fits else 0)
        assert row["faults"] + row["prefetched"] == (0 if fits else pages)
        assert row["bytes_in"] == row["bytes_out"] == (0 if fits else report["state_bytes"])
        assert row["ratio"] == pytest.approx(row["paged_s"] / row["plain_s"])


def test_the_readme_repeats_what_the_card_took():
    readme = " ".join((ROOT / "README.md").read_text().split())
    headline = json.loads((ROOT / "data" / "results" / "gpu_headline.json").read_text())
    for theirs, ours in zip(headline["rows"][1::2], headline["rows"][::2], strict=True):
        assert (theirs["stack"], ours["stack"]) == ("bitsandbytes", "qlora_edu")
        assert theirs["fits"] and ours["fits"] and "RANDOM WEIGHTS" in ours["weights"]
        numbers = (
            f"{theirs['card_bytes'] / 1e9:.0f} GB",
            f"{theirs['peak_bytes'] / 1e9:.1f} GB",
            f"{theirs['plan_bytes'] / 1e9:.1f} GB",
            f"{theirs['seconds_a_step']:.2f} s",
            f"{ours['seconds_a_step']:.2f} s",
        )
        assert " | ".join(numbers) in readme
    steps = json.loads((ROOT / "data" / "results" / "gpu_steps.json").read_text())["rows"]
    missing = [(row["peak_allocated_bytes"] - row["plan_bytes"]) / 2**20 for row in steps]
    assert len(steps) == 12 and {round(mib) for mib in missing} == {64}
    assert max(abs(row["relative_error"]) for row in steps) < 0.013
    rows = json.loads((ROOT / "data" / "results" / "gpu_quantiser.json").read_text())["rows"]
    nf4 = [r for r in rows if r["what"] == "equality" and r["levels"] == "nf4"]
    for row in nf4:
        assert row["packed"]["of"] > 8e6
        assert row["packed"]["differing"] <= (5 if row["dtype"] == "float32" else 0)
    paging = json.loads((ROOT / "data" / "results" / "gpu_paging.json").read_text())["rows"]
    took = {row["task"]: 1000 * row["seconds_a_step"] for row in paging if "error" not in row}
    ours = min(ms for name, ms in took.items() if name.startswith("ours"))
    theirs, torchs = took["bitsandbytes PagedAdamW32bit"], took["torch AdamW, fused"]
    assert f"{ours:.0f} ms beside {theirs:.0f} ms of" in readme and f"{torchs:.0f} ms of" in readme
