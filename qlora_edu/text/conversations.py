"""Conversations in, token ids and labels out. Support for chapters 8 to 10.

A model is fine-tuned on conversations, but should only learn to write the *answers*: labels are
-100 on everything else. The token that ends an answer is part of it: a model that is never taught
to stop does not stop. What somebody says is text, never control.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_edu.errors import DataError, QloraError, reading

IGNORED = -100
ROLES = ("system", "user", "assistant")
ROW = (
    '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]} or '
    '{"text": "### Human: … ### Assistant: …"}'
)
GUANACO = {"Human": "user", "Assistant": "assistant"}
# The layout of the paper's training data (OASST1-Guanaco), for base models without a chat template.
GUANACO_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}### Human: {{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "### Assistant: {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Assistant:{% endif %}"
)

Message = dict[str, str]  # one turn: its "role" and its "content"


class Conversation(list[Message]):
    """A list of messages that remembers where it was read, as `file:line`, and its whole row."""

    def __init__(self, messages: Sequence[Message], where: str, row: dict | None = None) -> None:
        super().__init__(messages)
        self.where, self.row = where, row or {}


def pad(lists: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """Bring lists of integers to one length: int64 `[lists, longest]`."""
    tensors = [torch.tensor(list(ids), dtype=torch.int64) for ids in lists]
    return nn.utils.rnn.pad_sequence(tensors, True, value, padding_side=side)


def require_counts(error: type[QloraError], **counts: Any) -> None:
    """Raise `error` for a setting that is no whole number of at least 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise error(f"{name} must be a whole number of at least 1, not {value!r}")


def read_conversations(source: str | Path, split: str = "train") -> list[Conversation]:
    """Read and check every conversation of a JSONL file, a folder of them, or a Hub data set.

    A folder is read at `{split}.jsonl`. Rows with an empty answer are left out, and turns after the
    last answer are cut off; both are counted and printed. Any other row that is no conversation
    with an answer, in the form of `ROW`, is a `DataError`.
    """
    path = Path(source)
    if path.is_dir():
        path = path / f"{split}.jsonl"
    local = path.exists() or path.suffix in (".jsonl", ".json")
    conversations, empty, unanswered = [], [], []
    for where, row in read_jsonl(path) if local else _read_hub(str(source), split):
        messages = messages_of(row, where)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise DataError(f"{where}: the conversation has no assistant turn to learn from")
        if not all(messages[i]["content"].strip() for i in answers):
            empty.append(where)
            continue
        if answers[-1] != len(messages) - 1:
            unanswered.append(where)
        conversations.append(Conversation(messages[: answers[-1] + 1], where, row))
    _warn(empty, "left out, because of an empty answer")
    _warn(unanswered, "cut after their last answer, because nobody answers the turns that follow")
    if not conversations:
        raise DataError(f"{source} holds no conversation to learn from; look at the file")
    return conversations


def encode_conversation(tokenizer: Any, messages: Sequence[Message]) -> dict[str, list[int]]:
    """Token ids of a conversation, and labels which are -100 outside the assistant's answers.

    The tokenizer's own chat template writes the text. An answer's labels run up to and including
    the end token; `DataError` if the template does not end answers with it.
    """
    where = getattr(messages, "where", "this conversation")
    ids = encode_messages(tokenizer, messages, where)
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = encode_messages(tokenizer, messages[:i], where, add_generation_prompt=True)
        last = i == len(messages) - 1
        until = ids if last else encode_messages(tokenizer, messages[: i + 1], where)
        answer, end = until[len(prompt) :], tokenizer.eos_token_id
        if until[: len(prompt)] != prompt or ids[: len(until)] != until or end not in answer:
            raise DataError(
                f"{where}: the chat template must write turn {i + 1} alike with and without its "
                f"answer, and end it with {tokenizer.eos_token!r}; use chat_template='guanaco'"
            )
        # What a template writes after the end token (often a newline) is never asked of the model.
        stop = len(until) - answer[::-1].index(end)
        labels[len(prompt) : stop] = ids[len(prompt) : stop]
    return {"input_ids": ids, "labels": labels}


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation that waits for the assistant's next answer."""
    return encode_messages(tokenizer, messages, add_generation_prompt=True)


def encode_messages(
    tokenizer: Any, messages: Sequence[Message], where: str = "this conversation", **options: bool
) -> list[int]:
    """Token ids of a whole conversation, as the tokenizer's template writes it; no labels."""
    from jinja2 import TemplateError

    if not messages:
        raise DataError(f"{where}: the conversation begins with an answer or is empty; ask first")
    # The template writes control tokens as text. So each that somebody has typed is replaced by a
    # character that nobody has, and spelt out once the text is written.
    said = "".join(message["content"] for message in messages)
    unused = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in said)
    typed = {next(unused): token for token in _special_tokens(tokenizer) if token in said}
    marked = [dict(message) for message in messages]
    for message in marked:
        for mark, token in typed.items():
            message["content"] = message["content"].replace(token, mark)
    try:
        text = tokenizer.apply_chat_template(marked, tokenize=False, **options)
    except (TemplateError, ValueError) as error:  # or there is no template
        raise DataError(
            f"{where}: the chat template refuses this conversation ({error}); use "
            "chat_template='guanaco', which takes any"
        ) from error
    ids = []
    for part in re.split(f"([{''.join(typed)}])", text) if typed else [text]:
        if part in typed:
            ids += encode_plain(tokenizer, typed[part], where)
        else:  # without a warning of its length
            ids += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def encode_plain(tokenizer: Any, text: str, where: str = "this text") -> list[int]:
    """Token ids of text as text: a special token in it is spelt out, or it is a `DataError`."""
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    ids = tokenizer(text, **options)["input_ids"]
    if read := set(_special_tokens(tokenizer).values()).intersection(ids):
        raise DataError(f"{where}: {tokenizer.decode([*read])!r} is read as control: take it out")
    return ids


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Every special token of a tokenizer, as it is written, and its id."""
    added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def encode_conversations(
    tokenizer: Any, conversations: Sequence[Sequence[Message]], max_length: int
) -> list[dict[str, list[int]]]:
    """Encode many; leave rows out whose whole answer is cut; print these, and what is shortened."""
    encoded, shortened, lost = [], [], []
    require_counts(DataError, max_length=max_length)
    for number, messages in enumerate(conversations, start=1):
        where = getattr(messages, "where", f"conversation {number}")
        row = encode_conversation(tokenizer, messages)
        kept, cut = row["labels"][:max_length], row["labels"][max_length:]
        if set(kept) == {IGNORED}:
            lost.append(where)
            continue
        if set(cut) - {IGNORED}:
            shortened.append(where)
        encoded.append({"input_ids": row["input_ids"][:max_length], "labels": kept})
    _warn(lost, f"left out, because max_length={max_length} cuts their whole answer away")
    _warn(shortened, f"kept with an answer cut short by max_length={max_length}")
    if not encoded:
        raise DataError(f"max_length={max_length} leaves no answer in any row; raise max_length")
    return encoded


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place, as `file:line`, and the value of every line that is not blank."""
    with reading(path, DataError, "give the path of a JSONL file"):
        content = path.read_bytes()
    if not content.strip():
        raise DataError(f"{path} is empty; write one JSON object per line")
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            with reading(f"{path}:{number}", DataError, "write one JSON object per line, in UTF-8"):
                row = json.loads(line.decode("utf-8-sig"))  # some editors put a mark before it
            yield f"{path}:{number}", row


def _read_hub(name: str, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    advice = "it is no local file: check name and network, or download it and give the file's path"
    with reading(f"{name!r}, split {split!r}, from the Hub", DataError, advice):
        rows = datasets.load_dataset(name, split=split)
    for number, row in enumerate(rows, start=1):
        yield f"{name}[{split}]:{number}", row


def messages_of(row: Any, where: str) -> list[Message]:
    """The turns of a row; `DataError` if it, or one of them, has another form than `ROW`."""
    fields: Any = row if isinstance(row, dict) else {}
    turns, text = fields.get("messages"), fields.get("text")
    if turns is None and isinstance(text, str):
        before, *pieces = re.split(r"### (Human|Assistant):", text)
        if pieces and not before.strip():
            said = zip(pieces[::2], pieces[1::2], strict=True)
            turns = [{"role": GUANACO[who], "content": content.strip()} for who, content in said]
    wrong = [t for t in turns if not _is_message(t)] if isinstance(turns, list) else [row]
    if wrong:
        raise DataError(f"{where}: write {ROW}, and not {str(wrong[0])[:80]}")
    return turns


def _is_message(turn: Any) -> bool:
    two = isinstance(turn, dict) and turn.keys() == {"role", "content"}  # others would be lost
    return two and turn["role"] in ROLES and isinstance(turn["content"], str)


def _warn(places: list[str], what: str) -> None:
    if places:
        shown = ", ".join(places[:5])
        more = f" and {len(places) - 5} more" if len(places) > 5 else ""
        print(f"warning: {len(places)} row{'s'[: len(places) > 1]} {what}: {shown}{more}")
