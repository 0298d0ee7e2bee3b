"""No row of the claims ledger can go stale: file, pages and a fresh test of each claim agree."""

import copy
import json
import re

import pytest

from benchmarks.claims import format, ledger, memory, parameters, quality, speed
from benchmarks.claims.__main__ import FILE
from benchmarks.claims.ledger import ClaimError

TOPICS = (ledger, memory, format, parameters, quality, speed)
FIELDS = ["id", "claim", "source", "how", "value", "verdict", "because"]


@pytest.fixture(scope="module")
def kept():
    return json.loads(FILE.read_text(encoding="utf-8"))


def test_the_file_holds_what_a_fresh_test_of_every_claim_gives(kept):
    fresh = {row["id"]: row for row in ledger.fill()}
    stale = [row["id"] for row in kept if row != fresh.get(row["id"])]
    assert not stale, f"run make claims: {', '.join(stale)} went stale"
    assert [row["id"] for row in kept] == list(fresh)


def test_every_row_is_whole_and_honest(kept):
    assert len({row["id"] for row in kept}) == len(kept)
    for row in kept:
        assert list(row) == FIELDS
        assert all(text.strip() == text and text for text in row.values()), row["id"]
        assert row["verdict"] in ledger.VERDICTS
        assert row["claim"].endswith(".")
        for word in ("/work", "/home", "/root", "http", "nan", "inf "):
            assert word not in " ".join(row.values()), (row["id"], word)
        if row["verdict"] == "not here":
            assert row["value"] == "–"
            assert re.match("not checked here, because |not measured yet: run ", row["because"])
        else:
            assert re.search(r"\d", row["value"]), row["id"]
            assert row["because"][0].isupper() or row["because"][0].isdigit()
            assert row["because"].endswith(".")


def altered(monkeypatch, name, change):
    """Let one stored result read as if ``change`` had been measured."""
    read, report = ledger.stored, copy.deepcopy(ledger.stored(name))
    change(report)
    read_all(monkeypatch, lambda asked: report if asked == name else read(asked))


def read_all(monkeypatch, stored):
    for topic in TOPICS:
        if hasattr(topic, "stored"):
            monkeypatch.setattr(topic, "stored", stored)


def too_large(report):
    for row in report["rows"]:
        if row["model"] == "llama-65b":
            row["peak_bytes"] = 50 * 10**9


def too_large_with_the_rest_of_the_card(report):
    for row in report["rows"]:
        if row["model"] == "llama-65b":
            row["outside_bytes"] = row["card_bytes"] - row["peak_bytes"] + 1


def qlora_worse(report):
    for run in report["runs"]:
        if (run["part"], run["way"]) == ("seeds", "qlora"):
            run["held_out_loss"] += 0.2
            run["exact_match"] -= 0.3


def slow_lora(report):
    for row in report["rows"]:
        if row["task"] == "lora":
            row["seconds_a_step"] *= 10


def four_bits_ruin(report):
    for row in report["base"]:
        if row["base"] == "qlora":
            row["text_perplexity"] *= 2


def all_answer_alike(report):
    for row in report["rows"]:
        row["answers"] = dict.fromkeys(row["answers"], row["wanted"])


def one_step_is_slow(report):
    for row in report["rows"]:
        row["seconds_a_step"] *= 2


@pytest.mark.parametrize(
    ("id", "name", "change", "verdict"),
    [
        ("65b-on-48gb", "gpu_headline", too_large, "contradicted"),
        ("65b-on-48gb", "gpu_headline", too_large_with_the_rest_of_the_card, "contradicted"),
        ("qlora-slower-than-lora", "gpu_steps", slow_lora, "contradicted"),
        ("nf4-keeps-quality", "three_ways", four_bits_ruin, "contradicted"),
        ("judges-disagree", "tournament", all_answer_alike, "not here"),
        ("nf4-beats-fp4-and-int4", "three_ways", four_bits_ruin, "contradicted"),
    ],
)
def test_another_measurement_gives_another_verdict(monkeypatch, kept, id, name, change, verdict):
    before = next(row for row in kept if row["id"] == id)
    altered(monkeypatch, name, change)
    now = ledger.check(id)
    assert now["verdict"] == verdict != before["verdict"]
    assert {now[field] for field in FIELDS[:4]} == {before[field] for field in FIELDS[:4]}


def test_a_small_model_does_not_contradict_what_is_said_of_large_ones(monkeypatch, kept):
    before = next(row for row in kept if row["id"] == "qlora-equals-lora")
    altered(monkeypatch, "three_ways", qlora_worse)
    now = ledger.check("qlora-equals-lora")
    assert now["verdict"] == "in part" and now["value"] != before["value"]
    assert "refuted" in now["because"] and "says nothing" in now["because"]


def test_another_measurement_changes_the_estimate_of_a_row_without_a_verdict(monkeypatch, kept):
    before = next(row for row in kept if row["id"] == "guanaco-65b-24-hours")["because"]
    altered(monkeypatch, "gpu_headline", one_step_is_slow)
    now = ledger.check("guanaco-65b-24-hours")["because"]
    hours = [float(re.search(r"would take ([\d.]+) hours", text)[1]) for text in (before, now)]
    assert hours[1] == pytest.approx(2 * hours[0], abs=0.16)


def test_a_result_that_is_missing_is_said_to_be(monkeypatch, tmp_path):
    monkeypatch.setattr(ledger, "ROOT", tmp_path)
    for id, command in (
        ("65b-on-48gb", "make gpu-report"),
        ("qlora-equals-full", "make experiments"),
        ("merging-into-4-bits", "python benchmarks/merge_lab.py"),
        ("houlsby-latency", "python benchmarks/serving.py"),
    ):
        row = ledger.check(id)
        assert (row["value"], row["verdict"]) == ("–", "not here")
        assert row["because"] == f"not measured yet: run {command}"


def test_latencies_are_judged_by_the_stored_ratios(monkeypatch):
    ratios = {"base": (1, 1), "Houlsby": (1.11, 1.18), "LoRA, merged": (0.99, 1.02)}
    rows = [
        {"way": way, "token_ratio": [ratio, 0.9, 1.3]}
        for way, two in ratios.items()
        for ratio in two
    ]
    read_all(monkeypatch, lambda name: {"rows": rows})
    found = [ledger.check(id) for id in ("houlsby-latency", "merged-no-latency")]
    assert [row["value"] for row in found] == ["+11 % to +18 % a token", "-1 % to +2 % a token"]
    assert [row["verdict"] for row in found] == ["reproduced", "reproduced"]
    for row in rows:
        row["token_ratio"] = [1.3, 1.2, 1.4]
    assert ledger.check("houlsby-latency")["verdict"] == "in part"
    assert ledger.check("merged-no-latency")["verdict"] == "contradicted"
    del rows[4:]
    with pytest.raises(ClaimError, match=r"serving\.json holds no 'LoRA, merged' as `serving`"):
        ledger.check("merged-no-latency")


def test_what_cannot_be_a_row_is_refused(monkeypatch):
    monkeypatch.setattr(ledger, "LEDGER", dict(ledger.LEDGER))
    with pytest.raises(ClaimError, match="no claim 'the-moon'"):
        ledger.check("the-moon")
    test = ledger.LEDGER["65b-on-48gb"][1]
    with pytest.raises(ClaimError, match="two claims have the id '65b-on-48gb'"):
        ledger.claim("", "", "")(test)

    def new():
        return ledger.Answer("1", "maybe", "Who knows.")

    ledger.claim("A new one.", "x", "y")(new)
    assert ledger.check("new")["claim"] == "A new one."
