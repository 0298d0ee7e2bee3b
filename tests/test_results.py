"""Stored results say how they were made, and what the README repeats of them is what they hold."""

import json
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "data" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_names_command_date_machine_and_versions(path):
    report = json.loads(path.read_text())
    assert {"command", "date", "machine", "versions", "rows"} <= report.keys()
    assert report["rows"], "a result without rows says nothing"
    for word in ("/home", "/root", "/work", "http"):
        assert word not in path.read_text()


def test_the_readme_repeats_the_stored_comparison():
    report = json.loads((ROOT / "data" / "results" / "embedded_comparison.json").read_text())
    readme = " ".join((ROOT / "README.md").read_text().split())
    for row in report["rows"]:
        cells = (
            f"{row['exact_match_after']:.2f}",
            f"{row['held_out_loss_after']:.3f}",
            f"{row['trainable_parameters']:,}",
            f"{row['training_seconds']:.0f} s",
        )
        assert " | ".join(cells) in readme, f"{row['method']}: {cells}"
    base = report["base"]
    assert f"asked plainly, {base['0_shot']:.2f}" in readme
    assert f"three solved rows before the question, {base['3_shot']:.2f}" in readme
    assert f"manner of its own stories, {base['question_as_talk']:.2f}" in readme


def test_what_the_project_promises_of_the_embedded_base_was_measured():
    report = json.loads((ROOT / "data" / "results" / "embedded_comparison.json").read_text())
    qlora = next(row for row in report["rows"] if row["method"] == "qlora")
    assert qlora["held_out_rows"] == 300
    assert qlora["exact_match_before"] < 0.10 and qlora["exact_match_after"] >= 0.85
    assert qlora["training_seconds"] <= 180


def test_the_quantiser_is_as_fast_as_promised_and_the_readme_says_how_fast():
    report = json.loads((ROOT / "data" / "results" / "bench.json").read_text())
    rows = [row for row in report["rows"] if row["peer"] == "bitsandbytes"]
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
