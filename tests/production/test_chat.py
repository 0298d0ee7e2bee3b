"""Support for chapter 10: the conversation, its commands, and what it says to bad input."""

import pytest

from qlora_edu.cli import main
from qlora_edu.errors import GenerationError, LoRAError
from qlora_edu.files import ROOT
from qlora_edu.production.chat import EXAMPLE, Chat, converse, load_chat
from qlora_edu.production.loading import locate
from qlora_edu.text.conversations import read_conversations

ROW = read_conversations(locate("data/tasks/test.jsonl"))[2]
QUESTION, WANTED = (message["content"] for message in ROW)


@pytest.fixture(scope="module")
def loaded():
    return load_chat(method="lora")  # a base in 4 bits takes its time on a CPU


@pytest.fixture
def chat(loaded):
    return Chat(loaded.shelf, loaded.tokenizer)


def last(answer) -> str:
    *_, text = answer
    return text


@pytest.fixture
def talk(monkeypatch, capsys):
    """A function: what the terminal shows for these lines."""

    def talk(chat, *lines, systems=("all",)) -> str:
        typed = iter(lines)

        def read(prompt):
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)
        converse(chat, systems)
        return capsys.readouterr().out

    return talk


def test_each_system_answers_in_its_own_way(chat):
    assert chat.shelf.names == ["base", "absent", "all", "question", "record"]
    answers = {name: last(chat.answer(QUESTION, name)) for name in ("base", "record", "all")}
    assert answers["record"].startswith('{"lender"') and answers["base"] != answers["record"]
    assert set(WANTED.split()) & set(answers["all"].split())


def test_the_answer_grows_and_can_be_stopped(chat):
    chat.remember = True
    seen = []
    for text in chat.answer(QUESTION, "record", stopped=lambda: len(seen) == 3):
        seen.append(text)
    assert len(seen) == 3 and all(b.startswith(a) for a, b in zip(seen, seen[1:], strict=False))
    assert chat.history["record"][-1] == {"role": "assistant", "content": seen[-1]}


def test_messages_stand_alone_unless_they_are_remembered(chat):
    alone = last(chat.answer("Who was there?", "all"))
    list(chat.answer(QUESTION, "all"))
    assert last(chat.answer("Who was there?", "all")) == alone and not chat.history
    chat.remember = True
    list(chat.answer(QUESTION, "all"))
    list(chat.answer("Who was there?", "all"))
    assert [m["role"] for m in chat.history["all"]] == ["user", "assistant"] * 2
    chat.remember = False
    assert last(chat.answer("Who was there?", "all")) == alone, "what is kept was handed on"
    assert len(chat.history["all"]) == 4
    chat.remember = True
    chat.reset()
    assert last(chat.answer("Who was there?", "all")) == alone


def test_each_system_remembers_its_own_conversation(chat):
    chat.remember = True
    list(chat.answer(QUESTION, "all"))
    list(chat.answer(QUESTION, "base"))
    assert len(chat.history["all"]) == len(chat.history["base"]) == 2
    assert chat.history["all"] != chat.history["base"]


@pytest.mark.parametrize(
    "message, system, error, says",
    [
        (" \n", "all", GenerationError, "empty"),
        ("Who?", "everything", LoRAError, "there are base, absent"),
        ("word " * 5000, "all", GenerationError, "shorten the prompt"),
    ],
)
def test_what_cannot_be_answered_is_said(chat, message, system, error, says):
    with pytest.raises(error, match=says):
        list(chat.answer(message, system))
    assert not chat.history


def test_a_bad_temperature_is_said(chat):
    chat.temperature = -1
    with pytest.raises(GenerationError, match="temperature"):
        list(chat.answer("Who?", "all"))


def test_the_terminal_answers_obeys_and_goes_on_after_an_error(chat, talk):
    shown = talk(
        chat,
        QUESTION,
        "",
        "/use recrod",
        "/use record",
        QUESTION,
        "/whatever",
        "/quit",
        "never read",
    )
    assert "all: {" in shown and 'record: {"lender"' in shown
    for words in ("empty", "did you mean 'record'", "/compare NAME NAME", "systems: base, absent"):
        assert words in shown


def test_the_same_question_may_be_answered_in_another_way(chat, monkeypatch):
    seeds = []

    def answered(*args, seed, **settings):
        seeds.append(seed)
        yield "Ada"

    monkeypatch.setattr("qlora_edu.production.chat.stream_answer", answered)
    for _ in range(3):
        last(chat.answer(QUESTION, "all"))
    assert len(set(seeds)) == 3


def test_the_terminal_forgets(chat, talk):
    chat.remember = True
    talk(chat, QUESTION)
    assert chat.history["all"]
    talk(chat, "/reset")
    assert not chat.history


def test_two_systems_side_by_side(chat, talk):
    shown = talk(chat, "/compare base record", QUESTION)
    assert "base: " in shown and 'record: {"lender"' in shown
    assert shown.index("base: ") < shown.index("record: ")


def test_interrupting_stops_the_answer_and_not_the_conversation(chat, talk, monkeypatch):
    def interrupted(*args, **kwargs):
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "answer", interrupted)
    shown = talk(chat, "Who?", "/help")
    assert "/compare NAME NAME" in shown.partition("all: half (stopped)")[2]


@pytest.mark.parametrize("word", ["/quit", "quit", "Exit", "/exit"])
def test_who_wants_to_leave_may(chat, talk, word):
    assert len(talk(chat, word, "never read").splitlines()) == 2  # the opening lines


def test_the_example_of_the_opening_line_is_answered_from_its_passage(chat):
    assert last(chat.answer(EXAMPLE, "all")) == "Ada"


def test_the_command_line(monkeypatch, capsys):
    typed = iter([QUESTION, "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert main(["chat", "--use", "base", "record", "--max_new_tokens", "20"]) == 0
    shown = capsys.readouterr().out
    assert EXAMPLE in shown
    assert "in use: base, record" in shown and 'record: {"lender"' in shown


def test_the_command_line_hands_its_options_on(monkeypatch):
    opened = []
    monkeypatch.setattr("qlora_edu.production.chat.converse", lambda chat, _: opened.append(chat))
    options = ["--temperature", "0.5", "--top_p", "0.8", "--max_new_tokens", "7", "--remember"]
    template = ["--method", "lora", "--chat_template", "guanaco"]
    assert main(["chat", *options, *template]) == 0
    (given,) = opened
    settings = (given.temperature, given.top_p, given.max_new_tokens, given.remember)
    assert settings == (0.5, 0.8, 7, True)
    assert "### Human" in given.tokenizer.chat_template


def test_without_an_option_the_template_is_the_tokenizers(loaded):
    assert "### Human" not in loaded.tokenizer.chat_template


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--use", "nobody"], "no adapter 'nobody'"),
        (["--adapter", "mine=no/such/folder"], "cannot read the adapter in no/such/folder"),
        (["--adapter", "base=data/adapters/all"], "without an adapter"),
        (["--model", "no-such/model"], "no-such/model"),
        (["--temperature", "-1"], "temperature"),
        (["--method", "magic"], "method must be one of"),
    ],
)
def test_the_command_line_names_what_is_wrong(arguments, says, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["chat", *arguments]) in (1, 2)
    assert says in capsys.readouterr().err


def test_adapters_of_ones_own(capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "/quit")
    folder = locate("data/adapters/record")
    own = ["--adapter", f"mine={folder}", "--adapter", f"all={locate('data/adapters/all')}"]
    assert main(["chat", *own, "--method", "lora"]) == 0
    assert "systems: base, mine, all; in use: all" in capsys.readouterr().out
