"""Support for chapters 8 to 10: conversations in, token ids and labels out.

A language model is fine-tuned on conversations, but it should only learn to write the *answers*.
So each conversation becomes two rows of the same length: ``input_ids``, which the model reads, and
``labels``, which hold -100 (ignored by the loss) on everything but the assistant's turns. The token
that ends an answer is part of the answer: a model that is never taught to stop does not stop.

Data go wrong in quiet ways, so nothing is skipped without being counted and said, and every error
names the file and the line.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

from qlora_edu.errors import DataError

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
    """A list of messages which remembers where it was read, as ``file:line``."""

    def __init__(self, messages: Sequence[Message], where: str) -> None:
        super().__init__(messages)
        self.where = where


def read_conversations(source: str | Path, split: str = "train") -> list[Conversation]:
    """Read and check every conversation of a JSONL file, a folder of them, or a Hub data set.

    A row holds ``messages`` (a list of ``{"role", "content"}``) or ``text`` in the layout of
    OASST1-Guanaco (``### Human: … ### Assistant: …``). A folder is read at ``{split}.jsonl``. Blank
    lines are passed over. Rows with an empty answer are left out, and turns after the last answer
    are dropped; both are counted and printed with file and line.

    Raises:
        DataError: for a missing or empty file, bad UTF-8, a malformed line, a missing or null
            field, an unknown role, a conversation without an answer, or a Hub data set that
            cannot be loaded.

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
    rows = _read_jsonl(path) if local else _read_hub(str(source), split)
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
            conversations.append(Conversation(messages, where))
        else:
            empty.append(where)
    _warn(empty, "left out, because of an empty answer")
    _warn(unanswered, "cut after their last answer, because nobody answers the turns that follow")
    if not conversations:
        raise DataError(f"{source} holds no conversation to learn from; look at the file")
    return conversations


def encode_conversation(
    tokenizer: Any, messages: Sequence[Message], max_length: int | None = None
) -> dict[str, list[int]]:
    """Token ids of a conversation, and labels which are -100 outside the assistant's answers.

    The tokenizer's own chat template writes the text. An answer's labels run up to and including
    the end token. Both lists have the same length, at most ``max_length`` (the end is cut off).

    Raises:
        DataError: if the tokenizer has no chat template, or one from which the answers cannot be
            told apart: it must end each answer with the end token, write earlier turns the same
            way whatever follows, and keep prompt and answer in separate tokens.
    """
    where = getattr(messages, "where", "this conversation")
    messages = list(messages)
    ids = _apply_template(tokenizer, messages)
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = encode_prompt(tokenizer, messages[:i])
        last = i == len(messages) - 1
        until = ids if last else _apply_template(tokenizer, messages[: i + 1])
        if ids[: len(prompt)] != prompt or ids[: len(until)] != until:
            raise DataError(
                f"{where}: the chat template does not write turn {i + 1} the same way in training "
                "and when asked for an answer; use another (chat_template='guanaco' is safe)"
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
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation that waits for the assistant's next answer."""
    return _apply_template(tokenizer, list(messages), add_generation_prompt=True)


def encode_conversations(
    tokenizer: Any, conversations: Sequence[Sequence[Message]], max_length: int
) -> list[dict[str, list[int]]]:
    """Encode many; count and print which answers ``max_length`` cuts short or away.

    A row whose answers are cut away entirely is left out: nothing in it can be learned. A row cut
    inside an answer stays, without the end token that it no longer reaches.

    Raises:
        DataError: if no row is left; see also ``encode_conversation``.
    """
    encoded, shortened, lost = [], [], []
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


def _apply_template(tokenizer: Any, messages: list[Message], **options: bool) -> list[int]:
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, as is usual for a "
            "base model; set chat_template='guanaco' for the paper's layout"
        )
    # Whoever asks says what is too long; the tokenizer would warn of it besides.
    kind = {"tokenize": True, "return_dict": False, "tokenizer_kwargs": {"verbose": False}}
    return tokenizer.apply_chat_template(messages, **kind, **options)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a JSONL file or the name of a Hub data set")
    if not path.read_bytes().strip():
        raise DataError(f"{path} is empty; expected one JSON object a line")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8").strip()
                if text:
                    yield where, json.loads(text)
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 ({error}); save the file as UTF-8") from error
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not a line of JSON ({error})") from error


def _read_hub(name: str, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:
        raise DataError(
            f"cannot load the data set {name!r}, split {split!r}: it is no local file, and the Hub "
            f"did not give it ({type(error).__name__}: {error}). Check the name and the network, "
            "or download it elsewhere as JSONL and give that file's path"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}[{split}]:{number}", row


def _messages(row: Any, where: str) -> list[Message]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be a JSON object, not {type(row).__name__}")
    field = "messages" if "messages" in row else "text"
    if field not in row:
        raise DataError(f"{where}: needs 'messages' or 'text', found only {sorted(row)}")
    expected = list if field == "messages" else str
    value = _checked(row, field, expected, where)
    if field == "text":
        return _split_guanaco(value, where)
    for number, turn in enumerate(value):
        place = f"{where}: messages[{number}]"
        if not isinstance(turn, dict):
            raise DataError(f"{place} must be an object with role and content, not {turn!r}")
        _checked(turn, "content", str, place)
        if _checked(turn, "role", str, place) not in ROLES:
            raise DataError(
                f"{place}: unknown role {turn['role']!r}; use one of {', '.join(ROLES)}"
            )
    return [Message(role=turn["role"], content=turn["content"]) for turn in value]


def _checked(row: dict, field: str, expected: type, where: str) -> Any:
    if field not in row:
        raise DataError(f"{where}: the field {field!r} is missing")
    if row[field] is None:
        raise DataError(f"{where}: the field {field!r} is null")
    if not isinstance(row[field], expected):
        found = type(row[field]).__name__
        raise DataError(f"{where}: the field {field!r} must be a {expected.__name__}, not {found}")
    return row[field]


def _split_guanaco(text: str, where: str) -> list[Message]:
    before, *pieces = re.split(r"### (Human|Assistant):", text)
    if before.strip() or not pieces:
        raise DataError(f"{where}: 'text' must begin with '### Human:', not {text[:30]!r}")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        Message(role=roles[speaker], content=content.strip())
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _warn(places: list[str], what: str) -> None:
    if places:
        shown = ", ".join(places[:5])
        more = f" and {len(places) - 5} more" if len(places) > 5 else ""
        print(f"warning: {len(places)} row{'s'[: len(places) > 1]} {what}: {shown}{more}")
