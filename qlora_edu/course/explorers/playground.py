"""The chat of chapter 10 as a widget: one system or two side by side, answers as they grow."""

import html
import threading
from collections.abc import Callable

from ipywidgets import (
    HTML,
    Button,
    Checkbox,
    Dropdown,
    FloatSlider,
    HBox,
    IntSlider,
    Textarea,
    VBox,
)

from qlora_edu.errors import QloraError
from qlora_edu.production.chat import Chat, load_chat

BASES = {"as it is": "lora", "in 4 bits": "qlora"}
NOBODY = "(nobody)"
EXAMPLE = (
    "Ada had a plain pan to lend, and Runa borrowed it. It happened at the workshop.\n"
    "Write the loan as JSON with lender, borrower, item, price, place and day."
)
PANE = {"width": "48%", "border": "1px solid #bbb", "padding": "6px", "min_height": "90px"}


def load_base_chat(base: str) -> Chat:
    """The embedded base, as it is or in 4 bits, with the course's four adapters."""
    return load_chat(method=BASES[base])


class Playground(VBox):
    """A message, one or two systems, and their answers, word by word.

    Answers are made in a thread of their own, so that *stop* works while they grow. `load`
    gives the `Chat` of a base; each is loaded once, when it is first chosen.

    >>> playground = Playground()
    >>> playground.right.value
    '(nobody)'
    """

    def __init__(self, load: Callable[[str], Chat] = load_base_chat) -> None:
        self._load, self._chats = load, {}
        self._stopped, self._worker = threading.Event(), None
        self.base = Dropdown(options=list(BASES), description="base")
        names = self.chat.shelf.names
        last = "all" if "all" in names else names[-1]
        self.left = Dropdown(options=names, value=last, description="system")
        self.right = Dropdown(options=[NOBODY, *names], description="beside it")
        wide = {"description_width": "initial"}  # or long descriptions are cut
        self.temperature = FloatSlider(
            0.0, min=0, max=1.5, step=0.1, description="temperature", style=wide
        )
        self.length = IntSlider(96, min=8, max=160, step=8, description="length", style=wide)
        self.remember = Checkbox(False, description="remember the conversation")
        self.message = Textarea(EXAMPLE, rows=3, layout={"width": "97%"})
        self.send_button = Button(description="Send", button_style="primary")
        self.stop_button = Button(description="Stop", disabled=True)
        self.reset_button = Button(description="Reset")
        self.status = HTML()
        self.panes = [HTML(layout=PANE), HTML(layout=PANE)]
        self.send_button.on_click(lambda _: self.send())
        self.stop_button.on_click(lambda _: self.stop())
        self.reset_button.on_click(lambda _: self.reset())
        who = HBox([self.base, self.left, self.right])
        how = HBox([self.temperature, self.length, self.remember])
        buttons = HBox([self.send_button, self.stop_button, self.reset_button])
        super().__init__([who, how, self.message, buttons, self.status, HBox(self.panes)])

    @property
    def chat(self) -> Chat:
        """The chat of the base that is chosen, loaded when it is first wanted."""
        name = self.base.value
        if name not in self._chats:
            self._chats[name] = self._load(name)
        return self._chats[name]

    @property
    def systems(self) -> list[str]:
        """Who is asked: one system, or two."""
        return [name for name in (self.left.value, self.right.value) if name != NOBODY]

    def send(self) -> None:
        """Begin to answer; returns at once. `wait` waits for the end."""
        if self._worker is not None and self._worker.is_alive():
            self._say("an answer is still growing; stop it first")
            return
        self._stopped.clear()
        self._busy(True)
        self._clear()
        self._worker = threading.Thread(target=self._answer, daemon=True)
        self._worker.start()

    def stop(self) -> None:
        """End the answer where it is."""
        self._stopped.set()

    def reset(self) -> None:
        """Stop, forget the conversation and clear the panes."""
        self.stop()
        self.wait()
        for chat in self._chats.values():
            chat.reset()
        self._clear()
        self._say("")

    def wait(self, seconds: float = 120) -> None:
        """Wait until the answers have ended."""
        if self._worker is not None:
            self._worker.join(seconds)

    def _answer(self) -> None:
        try:
            chat = self.chat
            chat.temperature, chat.max_new_tokens = self.temperature.value, self.length.value
            chat.remember = self.remember.value
            for pane, system in zip(self.panes, self.systems, strict=False):
                pane.value = self._framed(system, "…")
                for text in chat.answer(self.message.value, system, self._stopped.is_set):
                    pane.value = self._framed(system, text)
                if self._stopped.is_set():
                    self._say("stopped")
                    return
            self._say("")
        except QloraError as error:
            self._say(str(error))
            self._clear()
        except Exception as error:  # whatever it is, it must be seen: a thread has no cell
            self._say(f"{type(error).__name__}: {error}")
        finally:
            self._busy(False)

    def _clear(self) -> None:
        for pane in self.panes:
            pane.value = ""

    def _busy(self, busy: bool) -> None:
        self.send_button.disabled, self.stop_button.disabled = busy, not busy
        if busy:
            self._say("…")

    def _say(self, text: str) -> None:
        self.status.value = f"<i>{html.escape(text)}</i>" if text else ""

    @staticmethod
    def _framed(system: str, text: str) -> str:
        lines = html.escape(text).replace("\n", "<br>")
        return f"<b>{html.escape(system)}</b><br>{lines}"


def playground() -> Playground:
    """The chat playground of notebook 10."""
    return Playground()
