"""Support for chapter 10: a conversation with one of several systems, in the terminal or a widget.

`python -m qlora_edu chat` loads one base and the course's four adapters. Each message is answered
by the system that is chosen, or by two. Terminal and widget have `Chat` in common.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qlora_edu.errors import GenerationError, QloraError
from qlora_edu.production.config import FinetuneConfig
from qlora_edu.production.loading import load_base, locate
from qlora_edu.production.serving import AdapterShelf
from qlora_edu.text.conversations import Message
from qlora_edu.text.generation import check_sampling, stream_answer

HELP = """\
Type a message, or one of these:
  /use NAME            answer by this system (/use alone lists them)
  /compare NAME NAME   answer by two, one after the other
  /temperature NUMBER  0 is greedy; higher is freer
  /length NUMBER       the most tokens of an answer
  /remember on|off     hand earlier messages on, or let each stand alone
  /reset               forget the conversation
  /quit                or quit, or exit"""
EXAMPLE = "Ada sold a green lamp to Otto at the well. Who sold the lamp?"
"""Shown in the opening line: the embedded adapters read a passage, and answer about it."""


@dataclass
class Chat:
    """A conversation with the systems of a shelf.

    Without `remember` each message stands alone, which is how the course's adapters were trained.
    With it, the conversation goes along, for each system its own.
    """

    shelf: AdapterShelf
    tokenizer: Any
    temperature: float = 0.0
    top_p: float = 0.9
    max_new_tokens: int = 96
    remember: bool = False
    seed: int = 0
    history: dict[str, list[Message]] = field(default_factory=dict)

    def answer(
        self, message: str, system: str, stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[str]:
        """Yield the answer as it grows; it ends, and is remembered so far, once `stopped()`.

        Raises:
            GenerationError: if the message is empty or too long, or a setting cannot be.
            LoRAError: if there is no such system.
        """
        if not message.strip():
            raise GenerationError("the message is empty; type something to be answered")
        self.shelf.check(system)
        check_sampling(self.temperature, self.top_p)
        past = self.history.get(system, []) if self.remember else []
        messages: list[Message] = [*past, {"role": "user", "content": message.strip()}]
        text = ""
        settings = (self.max_new_tokens, self.temperature, self.top_p, self.seed)
        with self.shelf.using(system) as model:
            for text in stream_answer(model, self.tokenizer, messages, *settings):
                yield text
                if stopped():
                    break
        self.seed += 1  # the same question asked twice may be answered in two ways
        if self.remember:
            self.history[system] = [*messages, {"role": "assistant", "content": text}]

    def reset(self) -> None:
        """Forget the conversations."""
        self.history.clear()


def load_chat(
    model: str = "data/base-model",
    adapters: Mapping[str, str | Path] | None = None,
    method: str = "qlora",
) -> Chat:
    """A chat with a base, in 4 bits or (`method="lora"`) as it is, and adapters by name.

    `adapters=None` takes the course's four, which belong to the embedded base.

    Raises:
        ModelUnavailableError, ConfigError, LoRAError: naming what cannot be loaded.
    """
    if adapters is None:
        found = sorted(Path(locate("data/adapters")).glob("*/adapter_config.json"))
        adapters = {path.parent.name: path.parent for path in found}
    config = FinetuneConfig.from_preset("embedded", model=model, method=method)
    base, tokenizer = load_base(config)
    return Chat(AdapterShelf(base, adapters), tokenizer)


def opening_lines(chat: Chat, systems: Sequence[str]) -> str:
    """What the terminal shows first: the systems, an example, and how to get help."""
    names = f"systems: {', '.join(chat.shelf.names)}; in use: {', '.join(systems)}; /help for help"
    return f"{names}\nGive a passage and ask about it, such as: {EXAMPLE}"


def converse(
    chat: Chat,
    systems: Sequence[str],
    read: Callable[[str], str] | None = None,
    write: Callable[[str], Any] | None = None,
) -> None:
    """The terminal's loop: read a line, answer or obey it, until /quit or the input ends."""
    with contextlib.suppress(ImportError):  # arrow keys and a history, where there are any
        import readline  # noqa: F401
    read, systems = read or input, list(systems)
    write = write or partial(print, end="", flush=True)
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        if line.lower() in ("/quit", "/exit", "quit", "exit"):
            return
        try:
            if line.startswith("/"):
                systems = _obey(chat, line, systems, write)
            else:
                for system in systems:
                    _show(chat, line, system, write)
        except KeyboardInterrupt:
            write(" (stopped)\n")
        except QloraError as error:
            write(f"{error}\n")


def _show(chat: Chat, message: str, system: str, write: Callable[[str], Any]) -> None:
    shown = ""
    for text in chat.answer(message, system):
        if not shown:
            write(f"{system}: ")
        # Letters that a later token completes are held back until they are whole.
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
        if whole.startswith(shown):
            write(whole[len(shown) :])
            shown = whole
    write("\n" if shown else f"{system}: (says nothing)\n")


def _obey(chat: Chat, line: str, systems: list[str], write: Callable[[str], Any]) -> list[str]:
    command, *words = line.split()
    if command == "/use" and not words:
        write(f"{', '.join(chat.shelf.names)}; in use: {', '.join(systems)}\n")
    elif (command, len(words)) in (("/use", 1), ("/compare", 2)):
        for name in words:
            chat.shelf.check(name)
        return words
    elif command in ("/temperature", "/length") and len(words) == 1:
        _set(chat, command, words[0])
    elif command == "/remember" and words in (["on"], ["off"]):
        chat.remember = words == ["on"]
    elif command == "/reset":
        chat.reset()
    else:
        write(HELP + "\n")
    return systems


def _set(chat: Chat, command: str, word: str) -> None:
    try:
        number = float(word) if command == "/temperature" else int(word)
    except ValueError:
        raise GenerationError(f"{command} wants a number after it, and not {word!r}") from None
    if isinstance(number, float):
        check_sampling(number, chat.top_p)
        chat.temperature = number
    elif number < 1:
        raise GenerationError(f"/length must be at least 1, not {number}")
    else:
        chat.max_new_tokens = number
