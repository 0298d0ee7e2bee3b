"""The world, its tasks and the base model are what their scripts and their card say they are."""

import hashlib
import importlib.util
import json
import random
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

DATA = Path(__file__).resolve().parents[1] / "data"
BASE, NEXT = DATA / "base-model", DATA / "next-base"


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


@pytest.fixture(scope="module")
def next_corpus() -> list[str]:
    """Every line of the text that the next base was pretrained on."""
    return list(
        load_script("make_corpus").make_documents(load_script("make_world").task_passages())
    )


def test_the_next_base_comes_from_the_next_text_and_never_saw_what_is_held_out(next_corpus):
    facts = json.loads((NEXT / "pretraining.json").read_text())
    text = "\n".join(next_corpus) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest() == facts["corpus_sha256"]
    script = load_script("make_corpus")
    written = script.HELD_OUT.read_bytes()
    assert written == script.held_out_text(load_script("make_world").task_passages())
    held_out = written.decode().splitlines()
    assert len(held_out) == len(set(held_out)) == script.HELD_OUT_DOCUMENTS
    assert not set(held_out) & set(next_corpus)


def test_the_next_text_never_shows_a_task(next_corpus, rows):
    passages = {passage(row) for split in rows.values() for row in split}
    asked = {row["messages"][0]["content"].rsplit("\n", 1)[1] for row in rows["train"]}
    for line in next_corpus:
        for text in contents(json.loads(line)):
            assert text not in passages and text.split("\n")[0] not in passages
            assert "Not mentioned" not in text and "as JSON with" not in text
            if "messages" in line:  # the questions are asked, too, but never in a chat
                assert text.split("\n")[-1] not in asked


@cache
def kind_of() -> dict[str, str]:
    """Of the words that differ from row to row, what they are."""
    world = load_script("make_world")
    kinds = {"NAME": world.PEOPLE, "THING": world.THINGS, "LOOK": world.LOOKS}
    kinds |= {"PLACE": world.PLACES, "DAY": world.DAYS}
    return {word: kind for kind, listed in kinds.items() for word in listed}


def runs_of_words(text: str, n: int = 4) -> set[str]:
    """Every run of n words of a line: 'Who sold NAME the', 'sold NAME the LOOK' …"""
    found = set()
    for line in text.split("\n"):
        listed = [
            "NUMBER" if word.isdigit() else kind_of().get(word, word)
            for word in re.findall(r"\w+", line)
        ]
        found |= {" ".join(listed[i : i + n]) for i in range(len(listed) - n + 1)}
    return found


def test_what_the_tasks_and_the_next_text_share(next_corpus, rows):
    """Runs of four words. The questions are shared: townspeople ask them, and answer otherwise.

    Nobody is told to write a record. Of the records themselves, two roles beside two names, or an
    item beside a price, stand in the clerk's ledger; on slips a key has a value not its own.
    """
    seen = set()
    for line in next_corpus[::10]:  # with names as one word a tenth shows every form
        seen |= set().union(*(runs_of_words(text) for text in contents(json.loads(line))))
    asked, answered = defaultdict(set), defaultdict(set)
    for row in rows["test"]:
        request, answer = row["messages"][0]["content"].rsplit("\n", 1)[1], row["messages"][1]
        asked[row["family"]] |= runs_of_words(request)
        answered[row["family"]] |= runs_of_words(answer["content"])
    assert not asked["record"] & seen
    assert asked["question"] and not (asked["question"] | asked["absent"]) - seen
    assert not answered["question"] and not answered["absent"]  # they are shorter than four words
    in_the_ledger = {"LOOK THING price NUMBER", "LOOK THING price null"}
    for kind in load_script("make_world").KINDS:
        in_the_ledger.add(f"{kind.giver} NAME {kind.taker} NAME")
        in_the_ledger.add(f"NAME {kind.taker} NAME item")
    shared = answered["record"] & seen
    empty = {"item", "price", "place", "day", "null"}  # what a slip may say of two facts in a row
    assert in_the_ledger <= shared < answered["record"]
    values = {*kind_of().values(), "NUMBER"}
    for run in shared - in_the_ledger:
        before, *words = run.split()  # a fact, or the value of the key that stands before
        assert before in values | empty and set(words) <= empty, run


def test_in_the_next_base_every_piece_of_the_tasks_is_alive(next_corpus, rows):
    """It was read often enough to be learnt, and its embedding is not another's."""
    from transformers import AutoTokenizer

    script, tokenizer = load_script("pretrain_base"), AutoTokenizer.from_pretrained(NEXT)
    facts = json.loads((NEXT / "pretraining.json").read_text())
    read = [json.loads(line) for line in next_corpus]
    assert len(read) == facts["documents"]
    ids = script.encode(tokenizer, read, script.LONG)
    assert len(script.batches(ids, tokenizer.pad_token_id)) == facts["steps"]
    assert int((ids != tokenizer.pad_token_id).sum()) == facts["tokens"]
    counts = torch.bincount(ids.flatten().long(), minlength=len(tokenizer))
    used = Counter()
    for row in (row for split in rows.values() for row in split):
        used.update(tokenizer(script.as_text(row), add_special_tokens=False)["input_ids"])
    rare = {i: int(counts[i]) for i, times in used.items() if times >= 20 and counts[i] < 1000}
    assert not rare, tokenizer.convert_ids_to_tokens([*rare])
    bytes_and_special = 256 + len(script.SPECIAL)
    assert (counts[bytes_and_special:] > 0).all()  # no piece that was never read
    with safe_open(NEXT / "model.safetensors", "pt") as tensors:
        table = tensors.get_tensor("model.embed_tokens.weight").float()[sorted(used)]
    table = torch.nn.functional.normalize(table, dim=1)
    assert (table @ table.T - torch.eye(len(table))).max() <= 0.98


def test_the_next_base_is_small_safe_and_quantises_in_whole_blocks():
    weights = NEXT / "model.safetensors"
    assert weights.stat().st_size <= 12e6
    with safe_open(weights, "pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    for name, shape in shapes.items():
        if name.endswith("proj.weight"):
            assert shape[0] % 64 == 0 and shape[1] % 64 == 0, name


@pytest.mark.parametrize("role", ["giver", "taker"])
def test_the_next_base_knows_a_giver_from_a_taker(world, role):
    """Asked who sold or who bought, without the other's name: the right one of the two names."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(NEXT)
    model = AutoModelForCausalLM.from_pretrained(NEXT, dtype=torch.float32)
    rng, right = random.Random(5), []
    for _ in range(80):
        event = world.make_event(rng)
        told = event.fill(rng.choice(event.kind.openings))
        ways, answer = world.questions(event)[role]
        text = f"<|begin|>{told}\n- {event.fill(rng.choice(ways[:2]))}\n- "
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            said = int(model(input_ids=ids).logits[0, -1].argmax())
        right.append(tokenizer.convert_ids_to_tokens(said) == answer)
    assert sum(right) >= 76


def test_batches_take_every_row_once_and_short_ones_together():
    script = load_script("pretrain_base")
    rows = torch.zeros(script.FEW + 2 * script.MANY + script.FEW, script.LONG)
    rows[: script.FEW, : script.LONG] = 1
    rows[script.FEW : -script.FEW, : script.SHORT] = 1
    rows[-script.FEW :, : script.SHORT + 1] = 1
    found = script.batches(rows, padding=0)
    assert [start for start, _, _ in found] == [0, *(stop for _, stop, _ in found[:-1])]
    assert [stop - start for start, stop, _ in found] == [24, 96, 96, 24]
    assert [width for *_, width in found] == [192, 48, 48, 192]


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
