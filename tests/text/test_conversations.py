"""Conversations come in checked and go out as ids and labels, and nothing is lost unsaid."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tokenizer, write_jsonl

from qlora_edu.errors import DataError
from qlora_edu.text.conversations import (
    GUANACO_TEMPLATE,
    IGNORED,
    Conversation,
    encode_conversation,
    encode_conversations,
    encode_prompt,
    read_conversations,
)

GOOD = (
    '{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ida"}]}'
)
CHATML = (
    "{% for m in messages %}<|user|>{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def talk(*contents: str) -> list[dict[str, str]]:
    """Turns of user and assistant in alternation."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def labelled(tokenizer, row) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


# Reading


def test_messages_rows_are_read_with_their_place(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n\n{GOOD}\n")
    rows = read_conversations(path)
    assert rows == [talk("Who?", "Ida")] * 2
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:3"]  # blank lines still count


def test_a_folder_is_read_at_its_split(tmp_path):
    (tmp_path / "test.jsonl").write_text(GOOD)
    assert read_conversations(tmp_path, "test") == [talk("Who?", "Ida")]
    with pytest.raises(DataError, match=r"train\.jsonl does not exist"):
        read_conversations(tmp_path)


def test_guanaco_layout_becomes_messages(tmp_path, capsys):
    text = "### Human: 1 + 1?### Assistant: 2### Human: And\n2 + 2? ### Assistant: 4"
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text}, {"text": text + "### Human: Ta!"}])
    expected = talk("1 + 1?", "2", "And\n2 + 2?", "4")
    assert read_conversations(path) == [expected, expected]
    said = capsys.readouterr().out
    assert "warning: 1 row cut after their last answer" in said and f"{path}:2" in said


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"messages": [', "not a line of JSON"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'["a"]', "must be a JSON object, not list"),
        (b'{"prompt": "a"}', "needs 'messages' or 'text', found only ['prompt']"),
        (b'{"messages": null}', "'messages' is null"),
        (b'{"text": null}', "'text' is null"),
        (b'{"text": 3}', "must be a str, not int"),
        (b'{"text": "hello"}', "must begin with '### Human:'"),
        (b'{"messages": ["a"]}', "messages[0] must be an object"),
        (b'{"messages": [{"role": "user"}]}', "messages[0]: the field 'content' is missing"),
        (b'{"messages": [{"role": "user", "content": null}]}', "'content' is null"),
        (b'{"messages": [{"content": "a"}]}', "'role' is missing"),
        (b'{"messages": [{"role": "bot", "content": "a"}]}', "unknown role 'bot'"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
        (b'{"messages": []}', "no assistant turn"),
    ],
)
def test_a_bad_line_is_an_error_with_file_and_line(tmp_path, line, says):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_conversations(path)
    assert f"{path}:2: " in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"data\.jsonl is empty"):
        read_conversations(tmp_path / "data.jsonl")


def test_empty_answers_are_counted_and_named(tmp_path, capsys):
    rows = [{"messages": talk("Who?", answer)} for answer in ("Ida", "", "Otto", " \n")]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    assert [row[-1]["content"] for row in read_conversations(path)] == ["Ida", "Otto"]
    said = capsys.readouterr().out
    assert f"warning: 2 rows left out, because of an empty answer: {path}:2, {path}:4" in said
    write_jsonl(path, rows[1:2])
    with pytest.raises(DataError, match="holds no conversation"):
        read_conversations(path)


def test_a_hub_data_set_is_read_like_a_file(monkeypatch):
    import datasets

    asked = {}

    def load(name, split):
        asked.update(name=name, split=split)
        return [{"text": "### Human: Hi### Assistant: Hello"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_conversations("someone/talks", "test")
    assert rows == [talk("Hi", "Hello")] and rows[0].where == "someone/talks[test]:1"
    assert asked == {"name": "someone/talks", "split": "test"}


def test_a_hub_data_set_out_of_reach_is_named_with_a_way_out(monkeypatch):
    import datasets

    def refuse(name, split):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"'someone/talks'.*no route.*download it elsewhere"):
        read_conversations("someone/talks")


# Encoding


def test_only_the_answer_and_its_end_are_labelled(tokenizer):
    messages = talk("Mara sold a lamp. Who?", "Mara")
    row = encode_conversation(tokenizer, messages)
    assert tokenizer.decode(row["input_ids"]) == (
        "<|begin|><|user|>Mara sold a lamp. Who?<|end|><|assistant|>Mara<|end|>"
    )
    assert labelled(tokenizer, row) == "Mara<|end|>"
    for label, token in zip(row["labels"], row["input_ids"], strict=True):
        assert label in (IGNORED, token)
    # What is asked at generation time is what stood before the first label in training.
    prompt = encode_prompt(tokenizer, messages[:-1])
    assert row["input_ids"][: len(prompt)] == prompt
    assert set(row["labels"][: len(prompt)]) == {IGNORED} != set(row["labels"][len(prompt) :])


def test_every_answer_of_a_longer_talk_is_labelled(tokenizer):
    row = encode_conversation(tokenizer, talk("Who?", "Ida", "What?", "a lamp"))
    assert labelled(tokenizer, row) == "Ida<|end|>a lamp<|end|>"


def test_the_end_token_is_learned_even_where_it_also_pads(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    row = encode_conversation(tokenizer, talk("Who?", "Ida"))
    assert row["labels"][-1] == tokenizer.eos_token_id


def test_what_a_template_writes_after_the_end_is_not_labelled(tokenizer):
    tokenizer.chat_template = CHATML
    row = encode_conversation(tokenizer, talk("Who?", "Ida", "What?", "a lamp"))
    assert labelled(tokenizer, row) == "Ida<|end|>a lamp<|end|>"
    assert row["labels"][-1] == IGNORED


def test_the_papers_layout_serves_a_base_model_without_a_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="chat_template='guanaco'"):
        encode_conversation(tokenizer, talk("Who?", "Ida"))
    tokenizer.chat_template = GUANACO_TEMPLATE
    row = encode_conversation(tokenizer, talk("Who?", "Ida"))
    text = "<|begin|>### Human: Who?### Assistant: Ida<|end|>"
    assert tokenizer.decode(row["input_ids"]) == text
    assert labelled(tokenizer, row) == " Ida<|end|>"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}", "never learn to stop"),
        ("{{ messages[-1]['content'] }}{{ eos_token }}", "does not write turn 2 the same way"),
    ],
)
def test_a_template_that_hides_the_answer_is_refused(tokenizer, template, says):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=says):
        encode_conversation(tokenizer, Conversation(talk("Who?", "Ida"), "f.jsonl:7"))


CHARACTERS = st.characters(exclude_categories=("Cs",), exclude_characters="<|")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text(CHARACTERS, min_size=1), min_size=2, max_size=4).filter(lambda t: len(t) != 3)
)
def test_labels_spell_the_answers_for_any_text(contents):
    tokenizer = make_tokenizer_once()
    row = encode_conversation(tokenizer, talk(*contents))
    assert labelled(tokenizer, row) == "".join(f"{text}<|end|>" for text in contents[1::2])


def make_tokenizer_once(kept: list = []):  # noqa: B006
    if not kept:
        kept.append(make_tokenizer())
    return kept[0]


def test_answers_cut_by_the_limit_are_counted_and_named(tokenizer, capsys):
    short, long = talk("Who?", "Ida"), talk("Who?", "Ida sold a lamp and a rope and a bell")
    late = talk("Mara sold a lamp. Otto sold a rope. Ida sold a bell. Hugo sold a chair.", "Ida")
    rows = [Conversation(m, f"f.jsonl:{i}") for i, m in enumerate((short, long, late), start=1)]
    limit = len(encode_conversation(tokenizer, short)["input_ids"]) + 2
    encoded = encode_conversations(tokenizer, rows, limit)
    said = capsys.readouterr().out
    assert len(encoded) == 2 and all(len(row["input_ids"]) <= limit for row in encoded)
    assert encoded[1]["labels"][-1] != tokenizer.eos_token_id  # cut, so it does not end there
    assert (
        f"1 row left out, because max_length={limit} cuts their whole answer away: f.jsonl:3"
        in said
    )
    assert f"1 row kept with an answer cut short by max_length={limit}: f.jsonl:2" in said
    with pytest.raises(DataError, match="max_length=3 leaves no answer"):
        encode_conversations(tokenizer, rows, 3)


def test_a_long_list_of_places_is_shortened(tokenizer, capsys):
    rows = [Conversation(talk("Who?", "Ida " * 30), f"f.jsonl:{i}") for i in range(8)]
    encode_conversations(tokenizer, rows, 20)
    said = capsys.readouterr().out
    assert "8 rows kept" in said and "f.jsonl:4 and 3 more" in said and "f.jsonl:5" not in said


def test_rows_within_the_limit_say_nothing(tokenizer, capsys):
    encode_conversations(tokenizer, [talk("Who?", "Ida")], 100)
    assert capsys.readouterr().out == ""


def test_the_templates_special_tokens_are_not_added_twice(tokenizer):
    ids = encode_conversation(tokenizer, talk("Who?", "Ida"))["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert json.dumps(ids)  # plain integers, ready for any data set
