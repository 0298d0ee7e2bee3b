"""The study of chapter 8: every run described, nothing done twice, nothing lost on the way."""

import json
import sys
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from benchmarks.study import __main__ as command
from benchmarks.study import measures, parts, plan, unseen, ways
from qlora_edu.comparison import equivalence

ROOT = Path(__file__).resolve().parents[2]


def test_runs_of_one_seed_see_the_same_rows(monkeypatch):
    """So that their differences may be paired."""
    seen = {}

    def train(model, batches, rate, **_):
        seen.setdefault(rate, []).append([batch["input_ids"].tolist() for batch in batches])
        return [1.0] * 60

    monkeypatch.setattr(ways, "STEPS", 3)
    monkeypatch.setattr(ways, "train", train)
    monkeypatch.setattr(ways, "measure", lambda *args: {})
    for way in ("full", "houlsby", "qlora + embeddings"):
        for seed in (0, 1):
            ways.run({"part": "tuning", "rows": 3000, "way": way, "rate": seed, "seed": seed})
    assert all(rows == seen[seed][0] for seed in (0, 1) for rows in seen[seed])
    assert seen[0][0] != seen[1][0]


def test_each_way_trains_what_it_says():
    base, tokenizer = ways.load_base()
    every, table = sum(p.numel() for p in base.parameters()), len(tokenizer) * 256
    for way, count in {
        "full": every,
        "full, table frozen": every - table,
        "lora": 286_720,
        "qlora": 286_720,
        "lloyd 2 bits": 286_720,
        "houlsby": 264_704,
        "lora + embeddings": 286_720 + table,
        "qlora + embeddings": 286_720 + table,
    }.items():
        model, _ = ways.prepare(way)
        assert ways.trainable(model, way) == count, way
    with pytest.raises(ValueError, match="no way 'qloar'"):
        ways.prepare("qloar")


def test_new_words_are_tokens_of_their_own_and_begin_alike_for_every_way():
    (lora, tokenizer), (full, _) = (ways.prepare(way, new_words=True) for way in ("lora", "full"))
    table, count = lora.get_input_embeddings().weight, len(unseen.NEW_WORDS)
    assert torch.equal(table, full.get_input_embeddings().weight)
    rows = ways.read_rows("test", new_words=True)
    new = {tokenizer.convert_tokens_to_ids(word) for word in unseen.NEW_WORDS.values()}
    assert new == set(range(len(tokenizer) - count, len(tokenizer)))
    used = Counter(measures.class_of(piece) for row in rows for piece in pieces(tokenizer, row))
    assert used["new word"] == 4 * 100 + 100  # four keys of each record, and each "Untold"
    for row, old in zip(rows, ways.read_rows("test"), strict=True):
        answer, before = row.messages[-1]["content"], old.messages[-1]["content"]
        if row.family == "record":
            assert [*json.loads(answer).values()] == [*json.loads(before).values()]
            assert row.messages[0]["content"].endswith("ware, toll, spot and date.")
        assert (answer == before) == (row.family == "question")


def pieces(tokenizer, row):
    return tokenizer.tokenize(row.messages[-1]["content"])


def test_of_the_table_only_the_rows_of_new_words_learn_and_as_pefts_do():
    """The rows are `trainable_token_indices` of PEFT: the same logits after the same steps."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    ours, tokenizer = ways.prepare("lora + token rows", new_words=True)
    before = ours.get_input_embeddings().weight.detach().clone()
    base, _ = ways.prepare("full", new_words=True)
    count = len(unseen.NEW_WORDS)
    config = LoraConfig(
        r=ways.RANK,
        lora_alpha=ways.ALPHA,
        target_modules="all-linear",
        trainable_token_indices=[*range(len(tokenizer) - count, len(tokenizer))],
    )
    torch.manual_seed(0)
    theirs = get_peft_model(base, config)
    for ours_layer, theirs_layer in zip(
        ways.adapter_tensors(ours).values(),
        [p for name, p in theirs.named_parameters() if "lora_" in name],
        strict=True,
    ):
        theirs_layer.data.copy_(ours_layer)
    conversations = [row.messages for row in ways.read_rows("train", new_words=True)[:8]]
    batch = ways.collate(ways.encode_conversations(tokenizer, conversations, 256))
    losses = [ways.train(model, [batch] * 3, 2e-3) for model in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    after = ours.get_input_embeddings().weight
    assert torch.equal(after[:-count], before[:-count])
    assert (after[-count:] != before[-count:]).any(1).all()
    assert ways.trainable(ours, "lora + token rows") == 286_720 + count * 256


@pytest.mark.parametrize("way", ["full", "lora", "qlora", "houlsby", "qlora + embeddings"])
def test_a_seed_means_the_same_on_every_machine(monkeypatch, way):
    """All that is drawn is there, in the processor's memory, before anything moves to a card."""
    moved, real = [], torch.nn.Module.to

    def to(model, device):
        if device == "the card":
            moved.append({name: p.clone() for name, p in model.named_parameters()})
            return model
        return real(model, device)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    torch.manual_seed(0)
    there, _ = ways.prepare(way, "the card")
    torch.manual_seed(0)
    here = dict(ways.prepare(way)[0].named_parameters())
    assert (
        len(moved) == 1 and moved[0].keys() == here.keys() == dict(there.named_parameters()).keys()
    )
    assert all(torch.equal(moved[0][name], here[name]) for name in here)


def test_what_is_measured_is_what_the_course_measures():
    """By family and by class of token the same loss, only told apart."""
    from qlora_edu.text.conversations import encode_conversations
    from qlora_edu.training import exact_match, generate_answers, held_out_loss

    model, tokenizer = ways.load_base()
    rows = ways.read_rows("test")[:30]
    conversations = [row.messages for row in rows]
    found = measures.measure(model, tokenizer, rows)
    encoded = encode_conversations(tokenizer, conversations, 256)
    assert found["held_out_loss"] == pytest.approx(held_out_loss(model, encoded), abs=2e-5)
    given = generate_answers(model, tokenizer, [m[:-1] for m in conversations])
    wanted = [m[-1]["content"] for m in conversations]
    assert found["exact_match"] == pytest.approx(exact_match(given, wanted), abs=1e-4)
    classes, counts = found["loss_by_class"], found["tokens_by_class"]
    assert set(classes) == {"name", "fact", "form"}
    whole = sum(classes[name] * counts[name] for name in classes) / sum(counts.values())
    assert whole == pytest.approx(found["held_out_loss"], abs=2e-5)
    assert set(found["by_family"]) == {"question", "absent", "record"}


def test_a_short_run_is_measured_on_its_own_split_and_base(monkeypatch):
    monkeypatch.setattr(ways, "STEPS", 4)
    split = []
    real = ways.read_rows
    monkeypatch.setattr(
        ways, "read_rows", lambda name, *new: split.append(name) or real(name, *new)[:30]
    )
    spec = {"part": "verdict", "rows": 100, "way": "qlora", "rate": 3e-3, "seed": 0}
    found = ways.run(spec)
    assert found.items() >= spec.items() and found["trainable"] == 286_720
    assert split == ["train", "test"] and found["on_another_base"].keys() == {"lora"}
    split.clear()
    assert "on_another_base" not in ways.run({**spec, "part": "tuning"})
    assert split == ["train", "valid"]


def tuning_run(way, rate, seed, exact_match, rows=3000, held_out_loss=1.0):
    names = {"part": "tuning", "way": way, "rate": rate, "seed": seed, "rows": rows}
    return {**names, "exact_match": exact_match, "held_out_loss": held_out_loss}


def test_a_rate_is_tuned_until_the_best_lies_between_two_others():
    runs, tried = [], []
    while wanted := parts.to_tune(runs, "lora"):
        for spec in wanted:
            tried.append(spec["rate"])
            runs.append(
                tuning_run("lora", spec["rate"], spec["seed"], 1 - abs(spec["rate"] - 8e-3))
            )
    assert sorted(set(tried)) == [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    assert parts.best_rate(runs, "lora") == 8e-3
    # Of equals, the least loss; and a rate that lacks a seed is not judged.
    equal = [tuning_run("full", r, s, 0.9, held_out_loss=r) for r in (1.0, 2.0) for s in (100, 101)]
    assert parts.best_rate([*equal, tuning_run("full", 3.0, 100, 1.0)], "full") == 1.0


def test_what_is_no_way_of_its_own_takes_the_rate_of_the_way_it_varies():
    runs = [
        tuning_run(w, r, s, 0.5) for w, r in (("qlora", 2e-3), ("lora", 1e-3)) for s in (100, 101)
    ]
    assert parts.rate_of(runs, "lloyd 2 bits") == parts.rate_of(runs, "qlora + token rows") == 2e-3
    assert parts.rate_of(runs, "lora + token rows") == 1e-3


def pilot_run(way, seed, exact_match):
    return {
        **{"part": "pilot", "way": way, "rate": 1e-3, "seed": seed, "rows": 3000},
        **{"exact_match": exact_match, "held_out_loss": 1 - exact_match},
    }


def test_the_plan_asks_for_the_seeds_that_the_spread_of_the_pilots_needs():
    """More spread, more seeds; pairs where what helps one way helps the other."""

    def planned(spread, sign):
        runs = [pilot_run("full", s, 0.9 + spread * (-1) ** s) for s in range(6)]
        runs += [pilot_run("lora", s, 0.9 + spread * (s % 3 - 1)) for s in range(6)]
        runs += [pilot_run("qlora", s, 0.9 + sign * spread * (-1) ** s) for s in range(6)]
        return plan.make_plan(runs)

    quiet, loud = planned(0.01, -1), planned(0.045, -1)
    assert quiet["seeds"] == 10 < loud["seeds"] <= 20
    primary = [row for row in quiet["rows"] if row["primary"]]
    assert len(primary) == 1 and primary[0]["pair"] == ("qlora", "full")
    assert not primary[0]["paired"] and primary[0]["pilot_correlation"] == -1.0
    together = next(row for row in planned(0.045, 1)["rows"] if row["primary"])
    assert together["paired"] and together["power_if_equal"]["10"] == 1.0


def test_an_effect_of_the_margin_itself_is_rarely_called_none():
    assert plan.power((0.02, 0.02), 0.0, 10, 0.05) > 0.99
    assert plan.power((0.02, 0.02), 0.0, 10, 0.05, difference=0.05) < 0.08


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_power_counts_what_the_test_of_chapter_8_would_find(monkeypatch, correlation):
    spreads, n, margin = (0.04, 0.06), 8, 0.05
    monkeypatch.setattr(plan, "TRIALS", 200)
    shared = correlation * 0.04 * 0.06
    draws = plan.np.random.default_rng(0).multivariate_normal(
        [0, 0], [[0.04**2, shared], [shared, 0.06**2]], size=(200, n)
    )
    found = [equivalence(*pair.T, margin, paired=correlation > 0).equivalent for pair in draws]
    assert plan.power(spreads, correlation, n, margin) == round(sum(found) / 200, 2)
    assert 0.1 < sum(found) / 200 < 0.9


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


def test_an_interrupted_study_goes_on_and_waits_for_its_plan(monkeypatch, tmp_path):
    done = Counter()

    def run(spec):
        done[json.dumps(spec, sort_keys=True)] += 1
        match = 0.9 - abs(spec["rate"] - 2e-3) + 0.01 * (spec["seed"] % 3)
        return {**spec, "held_out_loss": 1 - match, "exact_match": match}

    (tmp_path / "data" / "results").mkdir(parents=True)
    monkeypatch.setattr(command, "RESULTS", tmp_path / "data" / "results" / "study.json")
    monkeypatch.setattr(command, "PLAN", tmp_path / "data" / "results" / "study_plan.json")
    monkeypatch.setattr(sys.modules["benchmarks.stored"], "ROOT", tmp_path)
    stamp = {"command": "", "date": "", "machine": "", "versions": {}}
    monkeypatch.setattr(command, "stamp", lambda packages: stamp)
    monkeypatch.setattr(command, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(command, "as_completed", lambda futures: iter(futures))
    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(command, "untrained", lambda: [{"base": "float32"}])
    monkeypatch.setattr(command, "cost", lambda: [{"way": "full"}])
    monkeypatch.setattr(sys, "argv", ["study"])
    for lives in (7, 30):
        InThisProcess.lives = lives
        with pytest.raises(KeyboardInterrupt):
            command.main()
    InThisProcess.lives = 10**9
    command.main()  # to the plan, and no farther
    assert {json.loads(spec)["part"] for spec in done} == {"tuning", "pilot"}
    seeds = json.loads(command.PLAN.read_text())["seeds"]
    InThisProcess.lives = 11
    with pytest.raises(KeyboardInterrupt):
        command.main()
    InThisProcess.lives = 10**9
    command.main()
    report = json.loads(command.RESULTS.read_text())
    assert set(done.values()) == {1} and len(report["runs"]) == len(done)
    count = Counter(run["part"] for run in report["runs"])
    assert count["verdict"] == 3 * seeds + 7 * 5 and count["pilot"] == 18
    assert {"bits", "rows", "unseen"} < count.keys() and report["cost"] and report["base"]
