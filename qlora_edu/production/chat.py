"""Support for chapter 10: a conversation with one of several systems, in the terminal or a widget.

Each message is answered by the system that is chosen, or by two, one after the other.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_edu.errors import GenerationError, QloraError
from qlora_edu.production.config import FinetuneConfig
from qlora_edu.production.loading import load_base, locate
from qlora_edu.production.serving import AdapterShelf
from qlora_edu.text.conversations import Message
from qlora_edu.text.generation import stream_answer

HELP = """\
Type a message, or one of these:
  /use NAME            answer by this system
  /compare NAME NAME   answer by two, one after the other
  /reset               forget the conversation
  /quit                or quit, or exit"""
EMBEDDED = "data/base-model"
EXAMPLE = "Ada sold a green lamp to Otto at the well. Who sold the lamp?"


@dataclass
class Chat:
    """The systems of a shelf, to talk to; with `remember` they know what was said before."""

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
        """Yield the answer as it grows; it ends, and is remembered so far, once `stopped()`."""
        if not message.strip():
            raise GenerationError("the message is empty; type something to be answered")
        past = self.history.get(system, []) if self.remember else []
        messages, text = [*past, {"role": "user", "content": message.strip()}], ""
        settings = {n: getattr(self, n) for n in ("max_new_tokens", "temperature", "top_p", "seed")}
        with self.shelf.using(system) as model:
            for text in stream_answer(model, self.tokenizer, messages, **settings):
                yield text
                if stopped():
                    break
        self.seed += 1  # the same question asked twice may be answered in two ways
        if self.remember:
            self.history[system] = [*messages, {"role": "assistant", "content": text}]

    def reset(self) -> None:
        """Forget the conversations."""
        self.history.clear()


def load_chat(model: str = EMBEDDED, adapters: Mapping[str, Any] = {}, **settings: Any) -> Chat:
    """A chat with a base and folders of adapters by name; `settings` are of `FinetuneConfig`."""
    if not adapters and model == EMBEDDED:  # the course's four
        found = sorted(Path(locate("data/adapters")).glob("*/adapter_config.json"))
        adapters = {path.parent.name: path.parent for path in found}
    base, tokenizer = load_base(FinetuneConfig.from_preset("embedded", model=model, **settings))
    return Chat(AdapterShelf(base, adapters), tokenizer)


def converse(chat: Chat, systems: Sequence[str]) -> None:
    """The terminal's loop: read a line, answer or obey it, until /quit or the input ends."""
    with contextlib.suppress(ImportError):  # arrow keys and a history, where there are any
        import readline  # noqa: F401
    print(f"systems: {', '.join(chat.shelf.names)}; in use: {', '.join(systems)}; /help for help")
    print(f"Give a passage and ask about it, such as: {EXAMPLE}")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, *names = line.split() or [""]
        if command.lower() in ("/quit", "/exit") or line.lower() in ("quit", "exit"):
            return
        try:
            if (command, len(names)) in (("/use", 1), ("/compare", 2)):
                for name in names:
                    chat.shelf.check(name)
                systems = names
            elif command == "/reset":
                chat.reset()
            elif command.startswith("/"):
                print(HELP, f"systems: {', '.join(chat.shelf.names)}", sep="\n")
            else:
                for system in systems:
                    _show(system, chat.answer(line, system))
        except KeyboardInterrupt:
            print(" (stopped)")
        except QloraError as error:
            print(error)


def _show(system: str, answer: Iterator[str]) -> None:
    shown = ""
    for text in filter(None, answer):
        print(text[len(shown) :] if shown else f"{system}: {text}", end="", flush=True)
        shown = text
    print("" if shown else f"{system}: (says nothing)")
