"""No row of the claims ledger can go stale: file, README and a fresh test of each claim agree."""

import copy
import json
import re

import pytest
from qlora_edu.course.claims import ClaimError

from qlora_edu.course import claims

PROMISED = """
    65b-on-48gb 65b-full-over-780gb 33b-on-24gb guanaco-memory 7b-base-5048mb 7b-lora-26mb
    gradients-567-to-18mb lora-3-times-less-memory 4-bit-75-percent-less 70-percent-less
    nf4-dq-4.127-bits dq-saves-0.373-bits dq-saves-3gb litgpt-dq-saves-0.3gb nf4-16-levels
    nf4-equation-4 nf4-equal-use nf4-keeps-quality nf4-beats-fp4-and-int4
    less-than-1-percent-trained 0.5-to-5-percent-trained lora-10000-times-fewer 345m-24m-12m
    qlora-equals-lora qlora-equals-full all-layers-matter rank-hardly-matters
    merging-into-4-bits judges-disagree qlora-slower-than-lora paging-no-slower paging-same-peak
    paging-critical houlsby-latency merged-no-latency guanaco-65b-24-hours guanaco-99.3-percent
    mmlu-nf4-dq
""".split()
FIELDS = ["id", "claim", "source", "how", "value", "verdict", "because"]


@pytest.fixture(scope="module")
def kept():
    return json.loads(claims.FILE.read_text(encoding="utf-8"))


def test_the_file_holds_what_a_fresh_test_of_every_claim_gives(kept):
    fresh = {row["id"]: row for row in claims.fill()}
    stale = [row["id"] for row in kept if row != fresh.get(row["id"])]
    assert not stale, f"run make claims: {', '.join(stale)} went stale"
    assert [row["id"] for row in kept] == list(fresh)


def test_the_readme_holds_the_table_of_the_file(kept):
    readme = claims.README.read_text(encoding="utf-8")
    assert "\n## The claims ledger\n" in readme
    between = readme.split(f"{claims.BEGIN}\n")[1].split(f"{claims.END}\n")[0]
    assert between == claims.table(kept) + "\n", "run make claims"


def test_every_row_is_whole_and_honest(kept):
    assert len({row["id"] for row in kept}) == len(kept)
    for row in kept:
        assert list(row) == FIELDS
        assert all(text.strip() == text and text for text in row.values()), row["id"]
        assert row["verdict"] in claims.VERDICTS
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


def test_every_verdict_occurs(kept):
    assert {row["verdict"] for row in kept} == set(claims.VERDICTS)


def test_every_promised_claim_is_there(kept):
    assert [row["id"] for row in kept] == PROMISED == list(claims.LEDGER)


def altered(monkeypatch, name, change):
    """Let one stored result read as if ``change`` had been measured."""
    read, report = claims.stored, copy.deepcopy(claims.stored(name))
    change(report)
    monkeypatch.setattr(claims, "stored", lambda asked: report if asked == name else read(asked))


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
        ("qlora-equals-lora", "three_ways", qlora_worse, "contradicted"),
        ("qlora-slower-than-lora", "gpu_steps", slow_lora, "contradicted"),
        ("nf4-keeps-quality", "three_ways", four_bits_ruin, "contradicted"),
        ("judges-disagree", "tournament", all_answer_alike, "not here"),
        ("nf4-beats-fp4-and-int4", "three_ways", four_bits_ruin, "contradicted"),
    ],
)
def test_another_measurement_gives_another_verdict(monkeypatch, kept, id, name, change, verdict):
    before = next(row for row in kept if row["id"] == id)
    altered(monkeypatch, name, change)
    now = claims.check(id)
    assert now["verdict"] == verdict != before["verdict"]
    assert {now[field] for field in FIELDS[:4]} == {before[field] for field in FIELDS[:4]}


def test_another_measurement_changes_the_estimate_of_a_row_without_a_verdict(monkeypatch, kept):
    before = next(row for row in kept if row["id"] == "guanaco-65b-24-hours")["because"]
    altered(monkeypatch, "gpu_headline", one_step_is_slow)
    now = claims.check("guanaco-65b-24-hours")["because"]
    hours = [float(re.search(r"would take ([\d.]+) hours", text)[1]) for text in (before, now)]
    assert hours[1] == pytest.approx(2 * hours[0], abs=0.16)


def test_a_result_that_is_missing_is_said_to_be(monkeypatch, tmp_path):
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    for id, command in (
        ("65b-on-48gb", "make gpu-report"),
        ("qlora-equals-full", "make experiments"),
        ("merging-into-4-bits", "python benchmarks/merge_lab.py"),
        ("houlsby-latency", "python benchmarks/serving.py"),
    ):
        row = claims.check(id)
        assert (row["value"], row["verdict"]) == ("–", "not here")
        assert row["because"] == f"not measured yet: run {command}"


def test_latencies_are_judged_by_the_stored_ratios(monkeypatch):
    ratios = {"base": (1, 1), "Houlsby": (1.11, 1.18), "LoRA, merged": (0.99, 1.02)}
    rows = [
        {"way": way, "token_ratio": [ratio, 0.9, 1.3]}
        for way, two in ratios.items()
        for ratio in two
    ]
    monkeypatch.setattr(claims, "stored", lambda name: {"rows": rows})
    found = [claims.check(id) for id in ("houlsby-latency", "merged-no-latency")]
    assert [row["value"] for row in found] == ["+11 % to +18 % a token", "-1 % to +2 % a token"]
    assert [row["verdict"] for row in found] == ["reproduced", "reproduced"]
    for row in rows:
        row["token_ratio"] = [1.3, 1.2, 1.4]
    assert claims.check("houlsby-latency")["verdict"] == "in part"
    assert claims.check("merged-no-latency")["verdict"] == "contradicted"
    del rows[4:]
    with pytest.raises(ClaimError, match=r"serving\.json holds no 'LoRA, merged' as `serving`"):
        claims.check("merged-no-latency")


def test_what_cannot_be_a_row_is_refused(monkeypatch):
    monkeypatch.setattr(claims, "LEDGER", dict(claims.LEDGER))
    with pytest.raises(ClaimError, match="no claim 'the-moon'"):
        claims.check("the-moon")
    with pytest.raises(ClaimError, match="two claims have the id '65b-on-48gb'"):
        claims.claim("65b-on-48gb", "", "", "")(lambda: None)
    claims.claim("new", "A new one.", "x", "y")(lambda: claims.Answer("1", "maybe", "Who knows."))
    with pytest.raises(ClaimError, match="claim 'new': the verdict 'maybe' is none of"):
        claims.check("new")


def test_the_readme_is_written_between_the_lines_and_nowhere_else(tmp_path, kept):
    page = tmp_path / "README.md"
    page.write_text(f"# before\n{claims.BEGIN}\nold\n{claims.END}\nafter\n", encoding="utf-8")
    claims.write_readme(kept[:2], page)
    text = f"# before\n{claims.BEGIN}\n{claims.table(kept[:2])}\n{claims.END}\nafter\n"
    assert page.read_text(encoding="utf-8") == text
    for broken in ("nothing", f"{claims.END}\n{claims.BEGIN}\n", f"{text}{claims.BEGIN}\n"):
        page.write_text(broken, encoding="utf-8")
        with pytest.raises(ClaimError, match=r"README\.md must hold the lines"):
            claims.write_readme(kept[:2], page)
        assert page.read_text(encoding="utf-8") == broken


def test_the_file_is_written_whole_or_not_at_all(tmp_path, kept, monkeypatch):
    path = tmp_path / "claims.json"
    claims.write(kept, path)
    assert path.read_bytes() == claims.FILE.read_bytes()
    with pytest.raises(TypeError):
        claims.write([*kept, {"id": object()}], path)
    monkeypatch.setattr(claims.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        claims.write(kept[:1], path)
    assert path.read_bytes() == claims.FILE.read_bytes()
