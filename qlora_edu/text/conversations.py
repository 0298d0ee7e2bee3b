"""Conversations in, token ids and labels out. Support for chapters 8 to 10.

A model is fine-tuned on conversations, but should only learn to write the *answers*: labels are
-100 on everything else. The token that ends an answer is part of it: a model that is never taught
to stop does not stop. What somebody says is text, never control. Nothing is skipped without a word.
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from qlora_edu.errors import DataError, QloraError

IGNORED = -100
ROLES = ("system", "user", "assistant")
# The layout of the paper's training data (OASST1-Guanaco), for base models without a chat template.
GUANACO_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}### Human: {{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "### Assistant: {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Assistant:{% endif %}"
)


class Message(TypedDict):
    """One turn: who speaks, and what is said."""

    role: str
    content: str


class Conversation(list[Message]):
    """A list of messages that remembers where it was read, as `file:line`, and its whole row."""

    def __init__(self, messages: Sequence[Message], where: str, row: dict | None = None) -> None:
        super().__init__(messages)
        self.where, self.row = where, row or {}


def pad(lists: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """Bring lists of integers to one length: int64 `[lists, longest]`.

    >>> pad([[5, 6], [7]], 0, side="left")
    tensor([[5, 6],
            [0, 7]])
    """
    tensors = [torch.tensor(list(ids), dtype=torch.int64) for ids in lists]
    return nn.utils.rnn.pad_sequence(tensors, True, value, padding_side=side)


def require_counts(error: type[QloraError], **counts: Any) -> None:
    """Raise `error` for a setting that is no whole number of at least 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise error(f"{name} must be a whole number of at least 1, not {value!r}")


def read_conversations(source: str | Path, split: str = "train") -> list[Conversation]:
    """Read and check every conversation of a JSONL file, a folder of them, or a Hub data set.

    A folder is read at `{split}.jsonl`. A row holds `messages` (a list of `{"role", "content"}`) or
    `text` in the layout of OASST1-Guanaco (`### Human: … ### Assistant: …`). Rows with an empty
    answer are left out, and turns after the last answer are dropped; both are counted and printed
    with file and line.

    Raises:
        DataError: the source cannot be read, or a row of it is no conversation with an answer.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "talk.jsonl"
    ...     _ = path.write_text('{"text": "### Human: 2 + 2?### Assistant: 4"}')
    ...     read_conversations(path)
    [[{'role': 'user', 'content': '2 + 2?'}, {'role': 'assistant', 'content': '4'}]]
    """
    path = Path(source)
    if path.is_dir():
        path = path / f"{split}.jsonl"
    local = path.exists() or path.suffix in (".jsonl", ".json")
    rows = read_jsonl(path) if local else _read_hub(str(source), split)
    conversations, empty, unanswered = [], [], []
    for where, row in rows:
        messages = _messages(row, where)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise DataError(f"{where}: the conversation has no assistant turn to learn from")
        if answers[-1] != len(messages) - 1:
            unanswered.append(where)
            messages = messages[: answers[-1] + 1]
        if all(messages[i]["content"].strip() for i in answers):
            conversations.append(Conversation(messages, where, row))
        else:
            empty.append(where)
    _warn(empty, "left out, because of an empty answer")
    _warn(unanswered, "cut after their last answer, because nobody answers the turns that follow")
    if not conversations:
        raise DataError(f"{source} holds no conversation to learn from; look at the file")
    return conversations


def encode_conversation(tokenizer: Any, messages: Sequence[Message]) -> dict[str, list[int]]:
    """Token ids of a conversation, and labels which are -100 outside the assistant's answers.

    The tokenizer's own chat template writes the text. An answer's labels run up to and including
    the end token.

    Raises:
        DataError: the tokenizer has no chat template, or one that refuses the conversation or hides
            its answers: it must end each with the end token, write earlier turns the same way
            whatever follows, and keep prompt and answer in separate tokens.
    """
    where, messages = getattr(messages, "where", "this conversation"), list(messages)
    ids = _apply_template(tokenizer, messages, where)
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _apply_template(tokenizer, messages[:i], where, add_generation_prompt=True)
        last = i == len(messages) - 1
        until = ids if last else _apply_template(tokenizer, messages[: i + 1], where)
        if ids[: len(prompt)] != prompt or ids[: len(until)] != until:
            raise DataError(
                f"{where}: the chat template does not write turn {i + 1} the same way in training "
                "and when asked for an answer; use another, such as chat_template='guanaco'"
            )
        answer = until[len(prompt) :]
        if tokenizer.eos_token_id not in answer:
            raise DataError(
                f"{where}: the chat template does not end answers with {tokenizer.eos_token!r}, so "
                "the model would never learn to stop; use another (chat_template='guanaco' does)"
            )
        # What a template writes after the end token (often a newline) is never asked of the model.
        stop = len(until) - answer[::-1].index(tokenizer.eos_token_id)
        labels[len(prompt) : stop] = ids[len(prompt) : stop]
    return {"input_ids": ids, "labels": labels}


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation that waits for the assistant's next answer."""
    return encode_messages(tokenizer, messages, add_generation_prompt=True)


def encode_messages(tokenizer: Any, messages: Sequence[Message], **options: bool) -> list[int]:
    """Token ids of a whole conversation, without labels."""
    where = getattr(messages, "where", "this conversation")
    return _apply_template(tokenizer, list(messages), where, **options)


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text as text: a special token in it is spelt out in ordinary ones.

    Raises:
        DataError: the tokenizer has no other way to write it than as a special token.
    """
    if not text:
        return []
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    ids = tokenizer(text, **options)["input_ids"]
    control = set(_special_tokens(tokenizer).values()).intersection(ids)
    if control:
        names = tokenizer.convert_ids_to_tokens(sorted(control))
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path!r} reads {names} in {text[:40]!r} as "
            "control, and cannot spell it out: take it out of the text"
        )
    return ids


def encode_conversations(
    tokenizer: Any, conversations: Sequence[Sequence[Message]], max_length: int
) -> list[dict[str, list[int]]]:
    """Encode many; count and print which answers `max_length` cuts short or away.

    A row whose answers are cut away entirely is left out: nothing in it can be learned. A row cut
    inside an answer stays, without the end token that it no longer reaches.
    """
    encoded, shortened, lost = [], [], []
    require_counts(DataError, max_length=max_length)
    for number, messages in enumerate(conversations, start=1):
        where = getattr(messages, "where", f"conversation {number}")
        row = encode_conversation(tokenizer, messages)
        cut = {name: ids[:max_length] for name, ids in row.items()}
        if all(label == IGNORED for label in cut["labels"]):
            lost.append(where)
            continue
        if any(label != IGNORED for label in row["labels"][max_length:]):
            shortened.append(where)
        encoded.append(cut)
    _warn(lost, f"left out, because max_length={max_length} cuts their whole answer away")
    _warn(shortened, f"kept with an answer cut short by max_length={max_length}")
    if not encoded:
        raise DataError(f"max_length={max_length} leaves no answer in any row; raise max_length")
    return encoded


def _apply_template(
    tokenizer: Any, messages: list[Message], where: str, **options: bool
) -> list[int]:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, which is "
            "usual for a base model; set chat_template='guanaco' for the paper's layout"
        )
    if not messages:
        raise DataError(f"{where}: the conversation begins with an answer; put its question before")
    # The template writes control tokens as text. So those that somebody has typed are marked first,
    # and spelt out afterwards: once the text is written nobody could tell them apart.
    said = "".join(message["content"] for message in messages)
    typed = [token for token in _special_tokens(tokenizer) if token in said]
    mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in said)
    pattern = re.compile("|".join(map(re.escape, typed)) or "(?!)")  # nothing typed, no match
    marks = partial(pattern.sub, lambda token: f"{mark}{typed.index(token[0])}{mark}")
    marked = [{**message, "content": marks(message["content"])} for message in messages]
    try:
        text = tokenizer.apply_chat_template(marked, tokenize=False, **options)
    except TemplateError as error:
        raise DataError(
            f"{where}: the chat template refuses this conversation ({error}); change its turns, or "
            "use chat_template='guanaco', which takes any"
        ) from error
    ids, plain = [], {"add_special_tokens": False, "verbose": False}  # no warning of its length
    for i, part in enumerate(re.split(f"{mark}(\\d+){mark}", text)):
        if i % 2 == 0:
            ids += tokenizer(part, **plain)["input_ids"]
        else:  # what stands between two marks is the number of a token
            ids += encode_plain(tokenizer, typed[int(part)])
    return ids


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Every special token of a tokenizer, as it is written, and its id."""
    added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place, as `file:line`, and the object of every line that is not blank."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a JSONL file or the name of a Hub data set")
    if not path.read_bytes().strip():
        raise DataError(f"{path} is empty; expected one JSON object per line")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))  # some editors put a mark before it
            except ValueError as error:
                raise DataError(
                    f"{where}: not a line of JSON in UTF-8 ({error}); write one object per line"
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: a row must be a JSON object, not {type(row).__name__}")
            yield where, row


def _read_hub(name: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:
        raise DataError(
            f"{name!r}, split {split!r}, is no local file, and the Hub did not give it ({error}): "
            "check name and network, or download it elsewhere as JSONL and give that file's path"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}[{split}]:{number}", row


def _messages(row: dict[str, Any], where: str) -> list[Message]:
    if "messages" not in row:
        if "text" not in row:
            raise DataError(f"{where}: needs 'messages' or 'text', found only {sorted(row)}")
        return _split_guanaco(_checked(row, "text", str, where), where)
    turns = _checked(row, "messages", list, where)
    for number, turn in enumerate(turns):
        place = f"{where}: messages[{number}]"
        if not isinstance(turn, dict):
            raise DataError(f"{place} must be an object with role and content, not {turn!r}")
        _checked(turn, "content", str, place)
        if _checked(turn, "role", str, place) not in ROLES:
            raise DataError(f"{place}: unknown role {turn['role']!r}; use {', '.join(ROLES)}")
    return [Message(role=turn["role"], content=turn["content"]) for turn in turns]


def _checked(row: dict, field: str, expected: type, where: str) -> Any:
    if not isinstance(value := row.get(field), expected):
        found = "null" if value is None else type(value).__name__
        found = found if field in row else "missing"
        raise DataError(
            f"{where}: the field {field!r} is {found}; it must be a {expected.__name__}"
        )
    return value


def _split_guanaco(text: str, where: str) -> list[Message]:
    before, *pieces = re.split(r"### (Human|Assistant):", text)
    if before.strip() or not pieces:
        raise DataError(f"{where}: 'text' must begin with '### Human:', not {text[:30]!r}")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [Message(role=roles[speaker], content=said.strip()) for speaker, said in turns]


def _warn(places: list[str], what: str) -> None:
    if places:
        shown = ", ".join(places[:5])
        more = f" and {len(places) - 5} more" if len(places) > 5 else ""
        print(f"warning: {len(places)} row{'s'[: len(places) > 1]} {what}: {shown}{more}")
