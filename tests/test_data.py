"""The world, its tasks and the base model are what their scripts and their card say they are."""

import hashlib
import importlib.util
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Regex, pre_tokenizers

DATA = Path(__file__).resolve().parents[1] / "data"
BASE = DATA / "base-model"


def load_script(name: str):
    """Import a script of `data/`, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world():
    return load_script("make_world")


@pytest.fixture(scope="module")
def corpus(world) -> list[str]:
    """Every line of the pretraining text."""
    return list(world.make_documents(world.task_passages()))


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {
        split: [
            json.loads(line)
            for line in (DATA / "tasks" / f"{split}.jsonl").read_text().splitlines()
        ]
        for split in ("train", "valid", "test")
    }


def passage(row: dict) -> str:
    return row["messages"][0]["content"].rsplit("\n", 1)[0]


def test_the_committed_files_are_what_the_generator_writes(world):
    files = world.committed_files()
    assert {"tasks/train.jsonl", "text/held-out.jsonl"} <= files.keys()
    for name, content in files.items():
        assert (DATA / name).read_bytes() == content, f"{name} is stale"


def test_the_pretraining_text_is_the_one_the_base_was_made_from(corpus):
    facts = json.loads((BASE / "pretraining.json").read_text())
    text = "\n".join(corpus) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest() == facts["corpus_sha256"]


def test_held_out_text_was_kept_out_of_the_pretraining_text(world, corpus):
    held_out = (DATA / "text" / "held-out.jsonl").read_text().splitlines()
    assert len(held_out) == len(set(held_out)) == world.HELD_OUT_DOCUMENTS
    assert not set(held_out) & set(corpus)


def test_checksums_hold():
    lines = (DATA / "CHECKSUMS.txt").read_text().splitlines()
    named = {line.split("  ")[1] for line in lines}
    assert {"tasks/train.jsonl", "tasks/valid.jsonl", "tasks/test.jsonl"} <= named
    assert "text/held-out.jsonl" in named
    assert {"base-model/model.safetensors", "base-model/tokenizer.json"} <= named
    assert "adapters/all/adapter_model.safetensors" in named
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest, name


def test_splits_are_large_enough_and_hold_three_families_each(rows):
    assert len(rows["train"]) >= 2000 and len(rows["valid"]) >= 200 and len(rows["test"]) >= 300
    for split in rows.values():
        assert {row["family"] for row in split} == {"question", "absent", "record"}
        for row in split:
            assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
            if row["family"] == "record":
                assert len(json.loads(row["messages"][1]["content"])) == 6


def test_every_row_stands_on_a_passage_of_its_own(rows):
    passages = [passage(row) for split in rows.values() for row in split]
    assert len(passages) == len(set(passages))


def test_answers_follow_from_their_passages(rows):
    for row in rows["test"]:
        text, answer = passage(row), row["messages"][1]["content"]
        if row["family"] == "question":
            assert answer in text or answer[0].upper() + answer[1:] in text
        elif row["family"] == "record":
            facts = json.loads(answer).values()
            assert all(str(fact) in text for fact in facts if fact is not None)
        else:
            assert answer == "Not mentioned."


def test_pretraining_text_never_shows_a_task(corpus, rows):
    passages = {passage(row) for split in rows.values() for row in split}
    for line in corpus:
        document = json.loads(line)
        turns = document.get("messages", [{"content": document.get("text")}])
        for text in (turn["content"] for turn in turns):
            assert text not in passages and text.split("\n")[0] not in passages
            assert "Not mentioned." not in text and "as JSON with" not in text


def contents(document: dict) -> list[str]:
    """The texts of a document, without the template's tokens."""
    return [
        turn["content"] for turn in document.get("messages", [{"content": document.get("text")}])
    ]


def words(text: str) -> list[str]:
    """The words as the tokenizer takes them apart: a space before a capital stands alone."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| (?=[A-Z])"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return [word for word, _ in splitter.pre_tokenize_str(text)]


def test_in_the_next_text_every_word_of_the_tasks_lives_and_no_task_occurs(world, rows):
    """A tenth of its late documents; the whole has ten times as many of each word."""
    script, rng = load_script("make_corpus"), random.Random(0)
    passages, wanted, seen = world.task_passages(), Counter(), Counter()
    asked = {row["messages"][0]["content"].rsplit("\n", 1)[1] for row in rows["train"]}
    for row in rows["train"]:
        for turn in row["messages"]:
            wanted.update(words(turn["content"]))
    for _ in range(7_600):
        for text in contents(json.loads(script.make_document(rng, script.LATE, passages) or "{}")):
            seen.update(words(text or ""))
            assert "Not mentioned" not in text and "as JSON with" not in text
            assert text.split("\n")[0] not in passages and text.split("\n")[-1] not in asked
    rare = {word: seen[word] for word, count in wanted.items() if count >= 20 and seen[word] < 70}
    assert not rare


def test_an_event_that_hides_a_fact_never_tells_it(world):
    rng = random.Random(7)
    for _ in range(500):
        event = world.make_event(rng)
        text = world.write_passage(rng, event)
        told = {"price": f" {event.price} coins", "day": event.day, "place": f" {event.place} "}
        for fact in world.OPTIONAL:
            shown = told[fact].strip() in text.replace(".", " ")
            if fact in event.told:
                assert shown, (fact, text)
            elif fact != "place":  # weather and openings can hold a place's word, such as "well"
                assert not shown, (fact, text)


def test_base_model_is_small_safe_and_quantises_in_whole_blocks():
    weights = BASE / "model.safetensors"
    assert weights.stat().st_size <= 12e6
    assert not list(BASE.glob("*.bin")) and not list(BASE.glob("*.pt"))
    with safe_open(weights, "pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    for name, shape in shapes.items():
        if name.endswith("proj.weight"):
            assert shape[0] % 64 == 0 and shape[1] % 64 == 0, name


def test_tokenizer_and_model_agree_with_the_pretraining_script():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3
    messages = [
        {"role": "user", "content": "Mara sold a red lamp.\nWho sold the lamp?"},
        {"role": "assistant", "content": "Mara"},
    ]
    script = load_script("pretrain_base")
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == script.as_text({"messages": messages})
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == rendered
    assert ids[-1] == tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    assert model.config.model_type == "llama"
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_model_card_states_how_the_model_came_to_be():
    facts = json.loads((BASE / "pretraining.json").read_text())
    card = (BASE / "README.md").read_text()
    first, last = facts["loss_curve"][0][1], facts["loss_curve"][-1][1]
    for stated in (
        f"{facts['steps']:,} steps",
        f"{facts['tokens'] / 1e6:.1f} million tokens",
        f"{facts['seconds'] / 60:.0f} minutes",
        f"{first:.3f}",
        f"{last:.3f}",
        facts["command"],
        "license: mit",
    ):
        assert stated in card, stated


@pytest.mark.parametrize("name", ["absent", "all", "question", "record"])
def test_a_stored_adapter_fits_the_base_and_was_measured(name):
    from transformers import AutoModelForCausalLM

    from qlora_edu.adapters import lora_layers
    from qlora_edu.files.peft_format import load_adapter

    folder = DATA / "adapters" / name
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    config = load_adapter(model, folder)
    assert len(lora_layers(model)) == 28
    assert config["base_model_name_or_path"] == "data/base-model"
    measured = json.loads((folder / "measured.json").read_text())
    assert measured["exact_match_before"] <= 0.01 and measured["exact_match_after"] >= 0.95
