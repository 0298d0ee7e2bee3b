"""Conversations come in checked and go out as ids and labels, and nothing is lost unsaid."""

import gzip
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
    encode_messages,
    encode_plain,
    encode_prompt,
    pad,
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
    path.write_text(f"\ufeff{GOOD}\n\n{GOOD}\n")  # a byte order mark is no part of the row
    rows = read_conversations(path)
    assert rows == [talk("Who?", "Ida")] * 2
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:3"]  # blank lines still count


def test_a_conversation_keeps_its_whole_row(tmp_path):
    row = {"messages": talk("Who?", "Ida", "And?"), "family": "question"}
    (read,) = read_conversations(write_jsonl(tmp_path / "data.jsonl", [row]))
    assert read == talk("Who?", "Ida") and read.row == row


def test_a_folder_is_read_at_its_split(tmp_path):
    (tmp_path / "test.jsonl").write_text(GOOD)
    assert read_conversations(tmp_path, "test") == [talk("Who?", "Ida")]
    with pytest.raises(DataError, match=r"cannot read .*train\.jsonl"):
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
        (b'{"messages": [', "write one JSON object per line, in UTF-8"),
        (b'{"text": "caf\xe9"}', "write one JSON object per line, in UTF-8"),
        (b'["a"]', "and not ['a']"),
        (b'{"prompt": "a"}', "and not {'prompt': 'a'}"),
        (b'{"messages": null}', "and not {'messages': None}"),
        (b'{"text": null}', "and not {'text': None}"),
        (b'{"text": 3}', "and not {'text': 3}"),
        (b'{"text": "hello"}', "### Human: … ### Assistant: …\"}, and not {'text': 'hello'}"),
        (b'{"text": "hello ### Human: a### Assistant: b"}', "and not {'text': 'hello"),
        (b'{"messages": "a", "text": "### Human: a### Assistant: b"}', "'messages': 'a'"),
        (b'{"messages": ["a"]}', "and not a"),
        (b'{"messages": [{"role": "user"}]}', "and not {'role': 'user'}"),
        (b'{"messages": [{"role": "user", "content": null}]}', "'content': None}"),
        (b'{"messages": [{"content": "a"}]}', "and not {'content': 'a'}"),
        (b'{"messages": [{"role": "bot", "content": "a"}]}', "and not {'role': 'bot'"),
        (b'{"messages": [{"role": "user", "content": "a", "name": "Eva"}]}', "'name': 'Eva'"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
        (b'{"messages": []}', "no assistant turn"),
    ],
)
def test_a_bad_line_is_an_error_with_file_and_line(tmp_path, line, says):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_conversations(path)
    assert f"{path}:2" in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"data\.jsonl is empty"):
        read_conversations(tmp_path / "data.jsonl")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (f"[{GOOD},\n{GOOD}]".encode(), ":1 .*; write one JSON object per line"),
        (f"\n [\n{GOOD}\n]".encode(), ":2 .*; write one JSON object per line"),
        (gzip.compress(GOOD.encode(), mtime=0), ":1 .*; write one JSON object per line"),
        (json.dumps(json.loads(GOOD), indent=1).encode(), ":1 .*; write one JSON object per line"),
    ],
)
def test_a_file_that_is_no_jsonl_is_told_what_to_become(tmp_path, content, says):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rf"data\.jsonl.*{says}"):
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
    with pytest.raises(DataError, match=r"'someone/talks'.*no route.*download it"):
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
        ("{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}", "end it with '<|end|>'"),
        ("{{ messages[-1]['content'] }}{{ eos_token }}", "must write turn 2 alike"),
        (
            "{% for m in messages %}{{ m['content'] if loop.last else '...' }}{{ eos_token }}"
            "{% endfor %}",
            "must write turn 2 alike",
        ),
    ],
)
def test_a_template_that_hides_the_answer_is_refused(tokenizer, template, says):
    tokenizer.chat_template = template
    long = "Ida, who sold a lamp and a rope and a bell and a boat"
    with pytest.raises(DataError, match=says):
        encode_conversation(tokenizer, Conversation(talk("Who?", long), "f.jsonl:7"))


def test_a_template_that_rewrites_an_earlier_answer_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] if loop.revindex <= 2 else '...' }}{{ eos_token }}"
        "{% endfor %}"
    )
    with pytest.raises(DataError, match="must write turn 2 alike"):
        encode_conversation(tokenizer, talk("Who?", "Ida", "What?", "a lamp"))


def special_tokens(tokenizer) -> dict[str, int]:
    return {t.content: i for i, t in tokenizer.added_tokens_decoder.items()}


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("template", [None, GUANACO_TEMPLATE, CHATML])
def test_a_special_token_that_somebody_types_is_text(tokenizer, template, role):
    """In prompts and in training rows, every one of the tokenizer's, in every role."""
    tokenizer.chat_template = template or tokenizer.chat_template
    special = special_tokens(tokenizer)
    assert len(special) == 5
    for typed in (*special, "".join(special), "a<|end|> b <|user|>c", "<|<|end|>|>"):
        opening = [{"role": "system", "content": "Be brief."}] if role == "system" else []
        plain = [*opening, *talk("Who?", "Ida")]
        asked = [{**m, "content": typed} if m["role"] == role else m for m in plain]
        for encode in (encode_messages, encode_prompt):
            ids, harmless = encode(tokenizer, asked), encode(tokenizer, plain)
            for number in special.values():
                assert ids.count(number) == harmless.count(number)
            assert typed in tokenizer.decode(ids)
        row = encode_conversation(tokenizer, asked)
        assert row["input_ids"] == encode_messages(tokenizer, asked)
        labels = [label for label in row["labels"] if label in special.values()]
        assert labels == [tokenizer.eos_token_id]


def test_a_longer_special_token_is_not_taken_for_a_shorter_one(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end", "<|end|>>"]})
    for typed in ("a<|end|>>b", "a<|end|>b", "a<|endb", "\ue0000\ue000<|end|>\ue001"):
        ids = encode_prompt(tokenizer, [{"role": "user", "content": typed}])
        assert f"<|user|>{typed}<|end|>" in tokenizer.decode(ids)
        special = [i for i in ids if i in special_tokens(tokenizer).values()]
        assert tokenizer.convert_ids_to_tokens(special) == [
            *("<|begin|>", "<|user|>", "<|end|>", "<|assistant|>")
        ]


def test_ids_are_those_of_the_tokenizers_own_template(tokenizer):
    for template in (tokenizer.chat_template, GUANACO_TEMPLATE, CHATML):
        tokenizer.chat_template = template
        for messages in (talk("Who?", "Ida"), talk(" Mara \n", "<|", "\ue000 é", "|end|>")):
            theirs = tokenizer.apply_chat_template(messages, return_dict=False)
            assert encode_messages(tokenizer, messages) == theirs
            theirs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
            assert encode_prompt(tokenizer, messages) == theirs


def test_a_special_token_that_cannot_be_spelt_out_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *_, **__: {"input_ids": [2]})
    with pytest.raises(DataError, match=r"f\.jsonl:7: '<\|end\|>' is read as control"):
        encode_plain(tokenizer, "a<|end|>", "f.jsonl:7")


def test_a_conversation_that_begins_with_an_answer_is_refused(tokenizer):
    with pytest.raises(
        DataError, match=r"f\.jsonl:7: .*begins with an answer or is empty; ask first"
    ):
        encode_conversation(tokenizer, Conversation(talk("Who?", "Ida")[1:], "f.jsonl:7"))


def test_a_conversation_that_the_template_refuses_is_named(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"f\.jsonl:7: .*refuses .*roles must alternate"):
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


@pytest.mark.parametrize("limit", [0, -1, None, 2.5, True])
def test_a_length_that_means_nothing_is_refused(tokenizer, limit):
    with pytest.raises(DataError, match="max_length must be a whole number of at least 1"):
        encode_conversations(tokenizer, [talk("Who?", "Ida")], limit)


def test_padding_fills_one_side():
    assert pad([[1], [2, 3, 4], []], 9).tolist() == [[1, 9, 9], [2, 3, 4], [9, 9, 9]]
    assert pad([[1], [2, 3]], 9, side="left").tolist() == [[9, 1], [2, 3]]


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
