"""The chat widget: what its controls do, without a browser (`test_browser.py` has one)."""

import threading

import pytest

from qlora_edu.course.explorers.playground import BASES, NOBODY, Playground
from qlora_edu.production.chat import Chat, load_chat

PATIENCE = 1500  # seconds; it only ends a test that hangs


@pytest.fixture(scope="module")
def loaded():
    return load_chat(method="lora")


@pytest.fixture
def asked():
    return []


@pytest.fixture
def widget(loaded, asked):
    def load(base):
        asked.append(base)
        return Chat(loaded.shelf, loaded.tokenizer)

    return Playground(load)


def ask(widget) -> list[str]:
    widget.send_button.click()
    widget.wait(PATIENCE)
    return [pane.value for pane in widget.panes]


def test_one_system_answers(widget):
    left, right = ask(widget)
    assert left.startswith("<b>all</b><br>{&quot;l") and right == ""
    assert widget.status.value == "" and not widget.send_button.disabled
    assert widget.stop_button.disabled


def test_two_answer_side_by_side(widget):
    widget.left.value, widget.right.value, widget.length.value = "record", "base", 16
    left, right = ask(widget)
    assert left.startswith("<b>record</b><br>{") and right.startswith("<b>base</b><br>")
    assert left.partition("<br>")[2] != right.partition("<br>")[2]


def test_controls_reach_the_chat(widget):
    widget.temperature.value, widget.length.value, widget.remember.value = 0.7, 8, True
    ask(widget)
    chat = widget.chat
    assert (chat.temperature, chat.max_new_tokens, chat.remember) == (0.7, 8, True)
    assert len(chat.history["all"]) == 2
    widget.reset_button.click()
    assert not chat.history and widget.panes[0].value == ""


def test_each_base_is_loaded_once_and_when_it_is_wanted(widget, asked):
    assert asked == [next(iter(BASES))]
    widget.length.value = 8
    for base in (*BASES, *BASES):
        widget.base.value = base
        ask(widget)
    assert asked == list(BASES)


def test_the_answer_grows_and_stop_works(widget, monkeypatch):
    go, grown, seen = threading.Semaphore(0), threading.Event(), []
    real = Chat.answer

    def slowly(self, *args):
        for text in real(self, *args):
            yield text
            go.acquire()

    def watch(change):
        seen.append(change.new)
        if len(seen) == 4:
            grown.set()

    monkeypatch.setattr(Chat, "answer", slowly)
    widget.panes[0].observe(watch, names="value")
    widget.right.value = "base"
    widget.send_button.click()
    go.release(3)
    assert grown.wait(PATIENCE)
    assert widget.send_button.disabled and not widget.stop_button.disabled
    widget.send()
    assert "still growing" in widget.status.value
    widget.stop_button.click()
    go.release(1000)
    widget.wait(PATIENCE)
    assert "stopped" in widget.status.value and widget.panes[1].value == ""
    assert 4 <= len(seen) <= 7 and len(seen[-1]) > len(seen[1])
    assert not widget.send_button.disabled
    widget.length.value = 8
    assert all(ask(widget)) and widget.status.value == "", "stopped once is not stopped for ever"


@pytest.mark.parametrize(
    "message, says", [("  ", "the message is empty"), ("word " * 3000, "shorten the prompt")]
)
def test_what_cannot_be_answered_is_said_and_the_next_is_answered(widget, message, says):
    widget.message.value, widget.length.value = message, 8
    assert ask(widget) == ["", ""] and says in widget.status.value
    widget.message.value = "Who <b>was</b> there?"
    assert ask(widget)[0].startswith("<b>all</b>") and widget.status.value == ""


def test_an_error_of_any_kind_is_shown(widget, monkeypatch):
    monkeypatch.setattr(Chat, "answer", lambda *args: 1 / 0)
    ask(widget)
    assert "ZeroDivisionError" in widget.status.value and not widget.send_button.disabled


def test_answers_are_text_and_not_html(widget, monkeypatch):
    monkeypatch.setattr(Chat, "answer", lambda *args: iter(["<script>x</script>"]))
    assert "<script>" not in ask(widget)[0]


def test_nobody_is_beside_at_first(widget):
    assert widget.right.value == NOBODY and widget.systems == ["all"]
