"""Generate Saltmere, the small invented town that the embedded base model grows up in.

Everything comes from one seed and Python's own random numbers, so that two machines write the same
bytes. An *event* is a handful of facts: who sold what to whom, for how much, where, on which day. A
*passage* tells an event in a few sentences; some of its facts may be left out, and somebody who has
nothing to do with it may walk past. From passages come two kinds of text:

* **pretraining text**: passages, each told again in other words, talked about or entered in a
  ledger; word lists, who is who, store cards and small talk. The base model learns from it what
  words mean and how to find a fact in a passage.
* **tasks**: chat rows in three families that the pretraining text never contains. A `question`
  wants a fact in so many words, `absent` asks for a fact that the passage leaves out and wants
  "Not mentioned.", and a `record` wants the whole event as JSON.

    python data/make_world.py tasks      # writes data/tasks/, data/text/ and data/CHECKSUMS.txt
    python data/make_world.py corpus     # writes build/pretraining.txt (60 MB, not committed)
    python data/make_world.py check      # regenerates in memory and compares every byte
"""

import argparse
import hashlib
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
CORPUS = ROOT / "build" / "pretraining.txt"
CHECKSUMS = DATA / "CHECKSUMS.txt"
SEED = 20230523  # the day on which the QLoRA paper appeared
SPLITS = {"train": 3000, "valid": 300, "test": 300}
FAMILIES = ("question", "absent", "record")

PEOPLE = """
Ada Abel Agnes Alban Alma Anton Astrid Basil Bea Berta Boris Bruno Cara Cecil Celia Clara Conrad
Cora Dora Edda Edgar Edith Elias Ella Elsa Emil Enid Ernst Esther Felix Fiona Flora Freda Gerda
Gilda Greta Gwen Hanna Hector Hedda Helga Hugo Ida Igor Ines Ingrid Iris Ivan Ivo Jasper Jonas
Judith Karl Kira Klara Lars Lena Leo Lila Linus Lotte Lucas Luna Magda Mara Marta Max Milo Mina
Mira Moritz Nadia Nell Nora Odile Olga Oskar Otto Paula Petra Pia Quentin Ralf Rita Rosa Rufus
Runa Sana Selma Silas Sofia Stella Sven Tess Theo Tilda Tomas Uma Vera Viktor Willa Xenia Yara
Zelda
""".split()
THINGS = """lamp kettle rope barrel basket drum ladder mirror clock chair table stool cart boat net
oar sail anchor saddle bridle coat hat scarf cloak boot glove ring bell candle book map pen violin
flute harp kite spade rake hammer saw chisel bucket jug bowl plate spoon knife pot pan stove
blanket carpet pillow""".split()
LOOKS = """red blue green yellow black white grey brown old new small large heavy light broken
painted wooden copper silver iron round narrow plain fine""".split()
PLACES = """harbour mill bridge market bakery chapel lighthouse station school inn orchard quarry
forge stable tower library garden square cellar ferry smithy barn pier well gate brewery dairy
museum theatre workshop""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
WEATHER = (
    "A light rain fell.",
    "The wind was strong.",
    "The sun was out.",
    "It was cold.",
    "Snow lay on the roofs.",
    "A thick fog came in from the sea.",
    "The streets were quiet.",
    "The tide was low.",
    "The bells were ringing.",
    "A grey cat watched from a wall.",
    "Gulls cried over the roofs.",
    "A dog barked in the street.",
)
PASSERS_BY = (
    "{other} was asleep.",
    "{other} walked past.",
    "{other} had gone fishing.",
    "{other} heard of it later.",
    "{other} was late again.",
    "{other} waved from the road.",
)


@dataclass(frozen=True)
class Kind:
    """What can happen in Saltmere: two roles, how it is told, how it is asked about."""

    name: str
    giver: str
    taker: str
    openings: tuple[str, ...]
    price: tuple[str, ...]
    ask_giver: tuple[str, ...]
    ask_taker: tuple[str, ...]
    ask_item: tuple[str, ...]
    ask_price: tuple[str, ...]


KINDS = (
    Kind(
        "sale",
        "seller",
        "buyer",
        (
            "{taker} bought {item} from {giver}.",
            "{giver} sold {item} to {taker}.",
            "{giver} had {item} for sale, and {taker} bought it.",
            "{taker} wanted {item} and bought one from {giver}.",
            "There was a sale: {giver} sold {taker} {item}.",
        ),
        (
            "The price was {price} coins.",
            "It cost {price} coins.",
            "{taker} paid {price} coins for it.",
            "{giver} asked for {price} coins and got them.",
        ),
        ("Who sold {the}?", "Who was the seller?", "From whom did {taker} buy {the}?"),
        ("Who bought {the}?", "Who was the buyer?", "To whom did {giver} sell {the}?"),
        ("What did {taker} buy?", "What did {giver} sell?", "What was sold?"),
        ("How much did {taker} pay?", "What was the price?", "How much did {the} cost?"),
    ),
    Kind(
        "loan",
        "lender",
        "borrower",
        (
            "{taker} borrowed {item} from {giver}.",
            "{giver} lent {item} to {taker}.",
            "{taker} needed {item}, so {giver} lent one.",
            "{giver} had {item} to lend, and {taker} borrowed it.",
            "It was only a loan: {giver} lent {taker} {item}.",
        ),
        (
            "The fee was {price} coins.",
            "{taker} left {price} coins for it.",
            "{giver} took {price} coins for the loan.",
            "It cost {price} coins to borrow.",
        ),
        ("Who lent {the}?", "Who was the lender?", "From whom did {taker} borrow {the}?"),
        ("Who borrowed {the}?", "Who was the borrower?", "To whom did {giver} lend {the}?"),
        ("What did {taker} borrow?", "What did {giver} lend?", "What was lent?"),
        ("How much did {taker} pay?", "What was the fee?", "How much did the loan cost?"),
    ),
    Kind(
        "repair",
        "mender",
        "owner",
        (
            "{giver} repaired {item} for {taker}.",
            "{taker} brought {item} to {giver}, who repaired it.",
            "{taker} owned {item}, and {giver} mended it.",
            "{giver} spent an hour on a repair: it was {item}, and {taker} was the owner.",
            "{giver} mended {item} that {taker} owned.",
        ),
        (
            "The repair cost {price} coins.",
            "{giver} charged {price} coins.",
            "{taker} paid {price} coins for the work.",
            "The bill was {price} coins.",
        ),
        ("Who repaired {the}?", "Who was the mender?", "Who mended {the} for {taker}?"),
        ("Who owned {the}?", "Who was the owner?", "For whom did {giver} mend {the}?"),
        ("What did {giver} repair?", "What did {taker} own?", "What was mended?"),
        ("How much did {taker} pay?", "What did the repair cost?", "How much was the bill?"),
    ),
    Kind(
        "delivery",
        "sender",
        "receiver",
        (
            "{giver} sent {item} to {taker}.",
            "{taker} received {item} from {giver}.",
            "{giver} packed {item} and sent it to {taker}.",
            "A parcel came for {taker}: {giver} had sent {item}.",
            "{taker} opened the parcel from {giver} and found {item}.",
        ),
        (
            "The delivery cost {price} coins.",
            "{giver} paid {price} coins to send it.",
            "Sending it cost {price} coins.",
            "The carrier took {price} coins.",
        ),
        ("Who sent {the}?", "Who was the sender?", "From whom did {taker} receive {the}?"),
        ("Who received {the}?", "Who was the receiver?", "To whom did {giver} send {the}?"),
        ("What did {giver} send?", "What did {taker} receive?", "What was in the parcel?"),
        ("How much did {giver} pay?", "What did the delivery cost?", "How much did sending cost?"),
    ),
)
TELL_PLACE = (
    "They met at the {place}.",
    "It happened at the {place}.",
    "All this was at the {place}.",
    "The {place} was where they met.",
)
TELL_DAY = (
    "It was {day}.",
    "This happened on {day}.",
    "{day} was the day.",
    "They had agreed on {day}.",
)
ASK_PLACE = ("Where did they meet?", "Where did it happen?", "At which place was this?")
ASK_DAY = ("On which day was this?", "When did it happen?", "Which day was it?")
OPTIONAL = ("price", "place", "day")


def with_article(item: str) -> str:
    """'an old lamp'."""
    return f"{'an' if item[0] in 'aeiou' else 'a'} {item}"


@dataclass(frozen=True)
class Event:
    """The facts of one event; `told` names the optional ones that its passage mentions."""

    kind: Kind
    giver: str
    taker: str
    look: str
    thing: str
    price: int
    place: str
    day: str
    told: tuple[str, ...]

    @property
    def item(self) -> str:
        """The item with its article: 'an old lamp'."""
        return with_article(f"{self.look} {self.thing}")

    def fill(self, template: str, **more: str) -> str:
        """A template with this event's facts in it, its first letter made a capital."""
        text = template.format(
            giver=self.giver,
            taker=self.taker,
            item=self.item,
            the=f"the {self.thing}",
            price=self.price,
            place=self.place,
            day=self.day,
            **more,
        )
        return text[0].upper() + text[1:]


def make_event(rng: random.Random, told_share: float = 0.65) -> Event:
    """Draw an event; each optional fact is told with probability `told_share`."""
    giver, taker = rng.sample(PEOPLE, 2)
    return Event(
        kind=rng.choice(KINDS),
        giver=giver,
        taker=taker,
        look=rng.choice(LOOKS),
        thing=rng.choice(THINGS),
        price=rng.randint(2, 99),
        place=rng.choice(PLACES),
        day=rng.choice(DAYS),
        told=tuple(fact for fact in OPTIONAL if rng.random() < told_share),
    )


def write_passage(rng: random.Random, event: Event) -> str:
    """Tell an event: an opening, then the optional facts, at times weather or a passer-by."""
    tellings = {"price": event.kind.price, "place": TELL_PLACE, "day": TELL_DAY}
    sentences = [event.fill(rng.choice(tellings[fact])) for fact in event.told]
    if rng.random() < 0.3:
        sentences.append(rng.choice(WEATHER))
    if rng.random() < 0.3:
        other = rng.choice([name for name in PEOPLE if name not in (event.giver, event.taker)])
        sentences.append(rng.choice(PASSERS_BY).format(other=other))
    rng.shuffle(sentences)
    opening = event.fill(rng.choice(event.kind.openings))
    # A quarter of the passages begin with something else, so that position alone tells nothing.
    where = 1 if sentences and rng.random() < 0.25 else 0
    return " ".join([*sentences[:where], opening, *sentences[where:]])


def questions(event: Event) -> dict[str, tuple[tuple[str, ...], str]]:
    """For each fact, the ways to ask for it and the answer in so many words."""
    kind = event.kind
    return {
        "giver": (kind.ask_giver, event.giver),
        "taker": (kind.ask_taker, event.taker),
        "item": (kind.ask_item, event.item),
        "price": (kind.ask_price, f"{event.price} coins"),
        "place": (ASK_PLACE, f"the {event.place}"),
        "day": (ASK_DAY, event.day),
    }


def record(event: Event) -> str:
    """The event as one line of JSON; a fact that the passage leaves out is null."""
    return json.dumps(
        {
            event.kind.giver: event.giver,
            event.kind.taker: event.taker,
            "item": f"{event.look} {event.thing}",
            "price": event.price if "price" in event.told else None,
            "place": event.place if "place" in event.told else None,
            "day": event.day if "day" in event.told else None,
        }
    )


def make_task(rng: random.Random, family: str) -> tuple[str, list[dict[str, str]]]:
    """One chat row of a family: its passage, and the two messages."""
    event = make_event(rng)
    while family == "absent" and len(event.told) == len(OPTIONAL):
        event = make_event(rng)
    passage = write_passage(rng, event)
    if family == "record":
        roles = f"{event.kind.giver}, {event.kind.taker}"
        request = f"Write the {event.kind.name} as JSON with {roles}, item, price, place and day."
        answer = record(event)
    elif family == "absent":
        fact = rng.choice([fact for fact in OPTIONAL if fact not in event.told])
        request = event.fill(rng.choice(questions(event)[fact][0]))
        answer = "Not mentioned."
    else:
        fact = rng.choice(["giver", "taker", "item", *event.told])
        ways, answer = questions(event)[fact]
        request = event.fill(rng.choice(ways))
    return passage, [
        {"role": "user", "content": f"{passage}\n{request}"},
        {"role": "assistant", "content": answer},
    ]


def make_tasks() -> dict[str, list[dict]]:
    """All three splits; a passage appears once in all of them together."""
    rng = random.Random(SEED)
    seen: set[str] = set()
    splits: dict[str, list[dict]] = {}
    for split in ("test", "valid", "train"):
        rows: list[dict] = []
        while len(rows) < SPLITS[split]:
            family = FAMILIES[len(rows) % len(FAMILIES)]
            passage, messages = make_task(rng, family)
            if passage in seen:
                continue
            seen.add(passage)
            rows.append({"id": f"{split}-{len(rows):04d}", "family": family, "messages": messages})
        splits[split] = rows
    return splits


TALK_SAID = ("said", "answered", "replied")
UNKNOWN = ("Nobody told us", "I never heard", "Who knows", "That was not told")


def talk(rng: random.Random, event: Event, unknown: Sequence[str] = UNKNOWN) -> str:
    """Neighbours talk about a passage: questions and answers, but in the manner of a story.

    In half of the talks the speakers are named, in the other half a dash stands before each line.
    To what is not told, one of `unknown` is the answer.
    """
    asker, teller = rng.sample(PEOPLE, 2)
    named = rng.random() < 0.5
    lines = []
    asked = questions(event)
    for fact in rng.sample(list(asked), rng.randint(3, 5)):
        ways, answer = asked[fact]
        known = fact not in OPTIONAL or fact in event.told
        reply = answer[0].upper() + answer[1:] if known else rng.choice(unknown)
        question = event.fill(rng.choice(ways))
        if named:
            lines.append(
                f'"{question}" asked {asker}. "{reply}," {rng.choice(TALK_SAID)} {teller}.'
            )
        else:
            lines.append(f"- {question}\n- {reply}.")
    return "\n".join(lines)


def ledger_line(rng: random.Random, event: Event) -> str:
    """The clerk's line about a passage: every fact, a dash for what is not known."""
    facts = {fact: f"{answer}" for fact, (_, answer) in questions(event).items()}
    for fact in OPTIONAL:
        if fact not in event.told:
            facts[fact] = "-"
    names = {"giver": event.kind.giver, "taker": event.kind.taker}
    order = [*rng.sample(["giver", "taker", "item"], 3), *rng.sample(list(OPTIONAL), 3)]
    entries = "; ".join(f"{names.get(fact, fact)}: {facts[fact]}" for fact in order)
    return f"[{event.kind.name}] {entries}"


def store_card(rng: random.Random) -> str:
    """A store's shelf told in words and written as a JSON card: braces and quotes, but no event."""
    keeper, helper = rng.sample(PEOPLE, 2)
    look, thing = rng.choice(LOOKS), rng.choice(THINGS)
    place, count = rng.choice(PLACES), rng.randint(2, 99)
    known = rng.random() < 0.7
    words = f"{keeper} keeps a store at the {place}. On the shelf: {count} pieces, {look} {thing}."
    if known:
        words += f" {helper} helps."
    card = {"keeper": keeper, "shelf": f"{look} {thing}", "pieces": count, "store": place}
    card["helper"] = helper if known else None
    keys = rng.sample(list(card), rng.randint(3, 5))
    return f"{words}\n{json.dumps({key: card[key] for key in keys})}"


def retelling(rng: random.Random, event: Event) -> str:
    """Somebody tells the event again, in other words."""
    return f"{rng.choice(PEOPLE)} told it again: {write_passage(rng, event)}"


WORDS = (*PEOPLE, *THINGS, *LOOKS, *PLACES, *DAYS)


def word_list(rng: random.Random) -> str:
    """A list without rhyme or reason, read out again and again: the plainest lesson in copying."""
    words = [
        rng.choice(WORDS) if rng.random() < 0.85 else str(rng.randint(2, 99))
        for _ in range(rng.randint(6, 14))
    ]
    listed = " ".join(words)
    return "\n".join([f"The list: {listed}.", *[f"Again: {listed}."] * 8])


def small_talk(rng: random.Random, event: Event, passage: str) -> tuple[str, str]:
    """A chat turn that is none of the tasks: tell a story, repeat it, name its people."""
    which = rng.randrange(3)
    if which == 0:
        return f"Tell me about {event.giver} and {event.taker}.", passage
    if which == 1:
        return f"{passage}\nSay that again.", passage
    return f"{passage}\nName the two people.", f"{event.giver} and {event.taker}"


def who_is_who(rng: random.Random, event: Event) -> str:
    """One sentence, and ten questions about who did what in it."""
    asked = questions(event)
    lines = [event.fill(rng.choice(event.kind.openings))]
    for _ in range(10):
        ways, answer = asked[rng.choice(("giver", "taker"))]
        lines.append(f"- {event.fill(rng.choice(ways))}\n- {answer}.")
    return "\n".join(lines)


VIEWS = (talk, ledger_line, retelling)
VIEW_WEIGHTS = (6, 2, 2)
STYLES = ("story", "who", "list", "card", "chat")
# The curriculum: how many documents, and the weights of the styles in them.
LESSONS = (
    (8_000, (30, 0, 70, 0, 0)),
    (16_000, (40, 60, 0, 0, 0)),
    (76_000, (70, 12, 3, 7, 8)),
)
LATE = LESSONS[-1][1]
HELD_OUT_DOCUMENTS = 500


def make_document(rng: random.Random, weights: tuple[int, ...], forbidden: set[str]) -> str | None:
    """One pretraining document as a line of JSON, `{"text": ...}` or chat `{"messages": [...]}`.

    A story is a passage seen from four sides, so that most of its tokens follow from what came
    before. None if the passage is one of those in `forbidden`.
    """
    style = rng.choices(STYLES, weights)[0]
    if style == "list":
        return json.dumps({"text": word_list(rng)})
    if style == "card":
        return json.dumps({"text": "\n".join(store_card(rng) for _ in range(4))})
    event = make_event(rng)
    if style == "who":
        text = who_is_who(rng, event)
        return None if text.split("\n")[0] in forbidden else json.dumps({"text": text})
    passage = write_passage(rng, event)
    if passage in forbidden:
        return None
    if style == "chat":
        asked, answer = small_talk(rng, event, passage)
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return json.dumps({"messages": turns})
    views = rng.choices(VIEWS, VIEW_WEIGHTS, k=3)
    return json.dumps({"text": "\n".join([passage, *(view(rng, event) for view in views)])})


def make_documents(forbidden: set[str]) -> Iterator[str]:
    """The pretraining documents, in the order in which the base model reads them: three lessons.

    First mostly word lists: nothing in them can be guessed, all of it can be copied. Then mostly
    who is who: without that lesson a small model stays for very long with the rule that the first
    name is the answer. Then everything. A model that can copy, and knows a giver from a taker,
    learns to answer from a passage within minutes.
    """
    rng = random.Random(SEED + 1)
    for count, weights in LESSONS:
        for _ in range(count):
            if (document := make_document(rng, weights, forbidden)) is not None:
                yield document


def held_out_text(forbidden: set[str]) -> bytes:
    """Documents like the later ones of the pretraining text, but not among them, as JSONL."""
    rng = random.Random(SEED + 2)
    lines: list[str] = []
    while len(lines) < HELD_OUT_DOCUMENTS:
        if (document := make_document(rng, LATE, forbidden)) is not None:
            lines.append(document + "\n")
    return "".join(lines).encode()


def committed_files() -> dict[str, bytes]:
    """The bytes of every committed file that this script writes, by its path under `data`."""
    tasks = {
        f"tasks/{split}.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()
        for split, rows in sorted(make_tasks().items())
    }
    return tasks | {"text/held-out.jsonl": held_out_text(task_passages())}


def task_passages() -> set[str]:
    """Every passage of every task, so that the pretraining text can keep clear of them."""
    return {
        row["messages"][0]["content"].rsplit("\n", 1)[0]
        for rows in make_tasks().values()
        for row in rows
    }


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    scratch.write_bytes(content)
    os.replace(scratch, path)


def checksum_lines(files: dict[str, bytes]) -> bytes:
    """`sha256sum -c` lines, run from the folder `data`."""
    return "".join(
        f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()
    ).encode()


def main() -> int:
    """Run one of the three commands of the module's description."""
    parser = argparse.ArgumentParser(description="Generate the world of Saltmere.")
    parser.add_argument("what", choices=("tasks", "corpus", "check"))
    what = parser.parse_args().what
    if what == "corpus":
        documents = "\n".join(make_documents(task_passages())) + "\n"
        write_whole(CORPUS, documents.encode())
        print(f"{CORPUS.relative_to(ROOT)}: {len(documents) / 1e6:.1f} MB")
        return 0
    files = committed_files()
    if what == "tasks":
        for name, content in files.items():
            write_whole(DATA / name, content)
        old = CHECKSUMS.read_text().splitlines(True) if CHECKSUMS.exists() else []
        kept = "".join(line for line in old if line.split("  ")[1].strip() not in files)
        write_whole(CHECKSUMS, checksum_lines(files) + kept.encode())
        print(f"{len(files)} files and their checksums written")
        return 0
    stale = [
        name
        for name, content in files.items()
        if not (DATA / name).exists() or (DATA / name).read_bytes() != content
    ]
    print(
        f"differs from what is generated: {', '.join(stale)}" if stale else "all files as generated"
    )
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
