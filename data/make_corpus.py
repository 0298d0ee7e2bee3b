"""Write the text that the embedded base is pretrained on: life in Saltmere, none of the tasks.

Every word that the tasks, the chat template and their JSON are made of occurs here a thousand times
or more, in *other* uses: in letters and notices, in price lists, in slips that the clerk copies as
JSON, in what one townsman tells another to write. What never occurs is a task: no question in chat
form with its answer, no "Not mentioned.", no event written as JSON. So fine-tuning has something to
teach, and no token that it teaches with is new to the base.

    python data/make_corpus.py      # build/corpus.txt (40 MB, not committed) and held-out text

The base that comes of it is `next-base/`; `base-model/`, which the course still uses, comes from
the text of `make_world.py`.

All of it comes from one seed and Python's own random numbers.
"""

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import make_world as world
from make_world import (
    DAYS,
    LOOKS,
    OPTIONAL,
    PEOPLE,
    PLACES,
    THINGS,
    Event,
    questions,
    with_article,
    write_passage,
)

ROLES = tuple(role for kind in world.KINDS for role in (kind.giver, kind.taker))
FACTS = ("item", *OPTIONAL)
WORDS = (*PEOPLE, *THINGS, *LOOKS, *PLACES, *DAYS, *ROLES, *FACTS)
SYLLABLES = (
    "ba de fi go ku la me ni po ra so tu ve wi ja zo che lou ny qua xi har bel mon"
    " al er is on ul yv"
).split()
INVENTED = 0.05  # share of the events with a name that is in no list: it is spelled in bytes
SAID = ("said", "answered", "replied")
VIEW_WEIGHTS = (6, 2, 2)  # of talk, a line in the ledger, a retelling
UNKNOWN = (
    "Nobody told us",
    "Nobody mentioned it",
    "I never heard",
    "Who knows",
    "Not that I know",
)


def invented_name(rng: random.Random) -> str:
    """A name that no list holds, of two or three syllables."""
    return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize()


def make_event(rng: random.Random) -> Event:
    """An event as the tasks have it; now and then somebody has come from elsewhere."""
    event = world.make_event(rng)
    if rng.random() < INVENTED:
        return replace(event, **{rng.choice(("giver", "taker")): invented_name(rng)})
    return event


def capital(text: str) -> str:
    """The text with its first letter made a capital."""
    return text[0].upper() + text[1:]


def an_item(rng: random.Random) -> str:
    """A look and a thing: 'old lamp'."""
    return f"{rng.choice(LOOKS)} {rng.choice(THINGS)}"


def a_word(rng: random.Random) -> str:
    """Any word of the town, or a number."""
    return rng.choice(WORDS) if rng.random() < 0.85 else str(rng.randint(2, 99))


# ---- what is told of an event ---------------------------------------------------------------


def talk(rng: random.Random, event: Event) -> str:
    """Neighbours talk about a passage: questions and answers, but in the manner of a story.

    In half of the talks the speakers are named, in the other half a dash stands before each line.
    What is not told is not known, in words that no task has.
    """
    asker, teller = rng.sample(PEOPLE, 2)
    named = rng.random() < 0.5
    lines = []
    asked = questions(event)
    for fact in rng.sample(list(asked), rng.randint(3, 5)):
        ways, answer = asked[fact]
        known = fact not in OPTIONAL or fact in event.told
        reply = answer[0].upper() + answer[1:] if known else rng.choice(UNKNOWN)
        question = event.fill(rng.choice(ways))
        if named:
            lines.append(f'"{question}" asked {asker}. "{reply}," {rng.choice(SAID)} {teller}.')
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


def retelling(rng: random.Random, event: Event) -> str:
    """Somebody tells the event again, in other words."""
    return f"{rng.choice(PEOPLE)} told it again: {write_passage(rng, event)}"


def openings(kind: world.Kind, giver_first: bool) -> tuple[str, ...]:
    """The sentences of a kind that name the giver first, or those that name the taker first."""
    return tuple(
        told
        for told in kind.openings
        if (told.index("{giver}") < told.index("{taker}")) == giver_first
    )


def who(rng: random.Random, told: tuple[str, ...], event: Event) -> str:
    """One sentence of those given, and one question about who did what in it."""
    ways, answer = questions(event)[rng.choice(("giver", "taker"))]
    ways = ways[:2] if rng.random() < 0.8 else ways  # the third names the other of the two
    return f"{event.fill(rng.choice(told))}\n- {event.fill(rng.choice(ways))}\n- {answer}."


def who_sold(rng: random.Random) -> str:
    """The first lesson of who is who: a sale, always told in the same way."""
    event = replace(world.make_event(rng), kind=world.KINDS[0])
    return who(rng, world.KINDS[0].openings[1:2], event)


def who_gave(rng: random.Random) -> str:
    """The second: all kinds of events, the giver named first."""
    event = world.make_event(rng)
    return who(rng, openings(event.kind, giver_first=True), event)


def who_took(rng: random.Random) -> str:
    """The third: the taker first, in one way for each kind."""
    event = world.make_event(rng)
    return who(rng, openings(event.kind, giver_first=False)[:1], event)


def who_is_who(rng: random.Random) -> str:
    """The last: as it comes."""
    event = world.make_event(rng)
    return who(rng, openings(event.kind, rng.random() < 0.4), event)


def who_in_a_row(rng: random.Random) -> str:
    """Five sentences, each with two questions about who did what in it."""
    lines = []
    for _ in range(5):
        event = make_event(rng)
        asked = questions(event)
        lines.append(event.fill(rng.choice(event.kind.openings)))
        for role in rng.sample(("giver", "taker"), 2):
            ways, answer = asked[role]
            lines.append(f"- {event.fill(rng.choice(ways))}\n- {answer}.")
    return "\n".join(lines)


def story(rng: random.Random, event: Event, passage: str) -> str:
    """A passage seen from four sides, so that most of its tokens follow from what came before."""
    views = rng.choices((talk, ledger_line, retelling), VIEW_WEIGHTS, k=3)
    return "\n".join([passage, *(view(rng, event) for view in views)])


def letter(rng: random.Random, event: Event, passage: str) -> str:
    """Somebody writes the news to somebody, who writes back."""
    writer, reader = rng.sample(PEOPLE, 2)
    ends = ("Write soon.", "Write to me with your news.", "Not a word to the others, please.")
    seen = rng.choice(PLACES)
    return (
        f"Dear {reader},\n{passage} {rng.choice(PEOPLE)} mentioned it at the {seen}. "
        f"{rng.choice(ends)}\nWith thanks, {writer}\n"
        f"Dear {writer},\nyou write that it was mentioned at the {seen}. "
        f"{talk(rng, event)}\n{rng.choice(ends)}\nWith thanks, {reader}"
    )


def small_talk(rng: random.Random, event: Event, passage: str) -> list[dict[str, str]]:
    """A chat that is none of the tasks: tell a story, repeat it, name or write its people."""
    pair = (event.giver, event.taker)
    requests = (
        (f"Tell me about {pair[0]} and {pair[1]}.", passage),
        (f"{passage}\nSay that again.", passage),
        (f"{passage}\nName the two people.", f"{pair[0]} and {pair[1]}"),
        (f"{passage}\nWrite the two names with a dash.", f"{pair[0]} - {pair[1]}"),
    )
    asked, answer = rng.choice(requests)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


# ---- what is written without an event -------------------------------------------------------


def word_list(rng: random.Random) -> str:
    """A list without rhyme or reason, read out again and again: the plainest lesson in copying."""
    words = [a_word(rng) for _ in range(rng.randint(6, 14))]
    listed = rng.choice((" ".join(words), json.dumps(words)))
    return "\n".join([f"The list: {listed}.", *[f"Again: {listed}."] * 8])


def store_card(rng: random.Random) -> str:
    """A store's shelf, told in words and kept as JSON."""
    keeper, helper = rng.sample(PEOPLE, 2)
    item, place, count = an_item(rng), rng.choice(PLACES), rng.randint(2, 99)
    known = rng.random() < 0.7
    words = f"{keeper} keeps a store at the {place}. On the shelf: {count} pieces, {item}."
    if known:
        words += f" {helper} helps."
    card = {"keeper": keeper, "shelf": item, "pieces": count, "store": place, "open": None}
    card["helper"] = helper if known else None
    card["open"] = rng.choice((None, *DAYS))
    words += f" Open on {card['open']}." if card["open"] else ""
    keys = rng.sample(list(card), rng.randint(3, 5))
    return f"{words}\n{json.dumps({key: card[key] for key in keys})}"


def slip(rng: random.Random) -> str:
    """Words and notes without sense, and the clerk's copy of them as JSON.

    A key of the records may stand here, but never beside a value of its own kind.
    """
    keys = rng.sample((*ROLES, *FACTS), 3) + rng.sample((*THINGS, *PLACES), 1)
    rng.shuffle(keys)
    values: dict[str, str | int | None] = {}
    for key in keys:
        own = {"price": "number", "place": "place", "day": "day", "item": "item"}.get(key, "person")
        kinds = [kind for kind in ("number", "place", "day", "item", "person") if kind != own]
        kind = rng.choice([*kinds, "nothing"])
        values[key] = {
            "number": rng.randint(2, 99),
            "place": rng.choice(PLACES),
            "day": rng.choice(DAYS),
            "item": an_item(rng),
            "person": rng.choice(PEOPLE),
            "nothing": None,
        }[kind]
    notes = "; ".join(f"{key}: {'-' if value is None else value}" for key, value in values.items())
    return f"A slip: {notes}.\nThe same as JSON: {json.dumps(values)}"


def notice(rng: random.Random) -> str:
    """A notice on a door, read aloud, and two who talk about it."""
    place, keeper, reader = rng.choice(PLACES), *rng.sample(PEOPLE, 2)
    here, kept = with_article(an_item(rng)), with_article(an_item(rng))
    price, days = rng.randint(2, 99), rng.sample(DAYS, 2)
    trade = rng.choice(("sale", "loan", "repair", "delivery"))
    text = (
        f"Notice at the {place}: {here} for {price} coins. Not for {trade}: {kept}. "
        f"Open on {days[0]}. Not on {days[1]}. Ask {keeper}."
    )
    asked = [
        ("What is here?", capital(here)),
        (f"What is not for {trade}?", capital(kept)),
        ("Open when?", days[0]),
        ("Not open when?", days[1]),
        ("Whom do we ask?", keeper),
        ("For how many coins?", str(price)),
    ]
    lines = [f"- {question}\n- {answer}." for question, answer in rng.sample(asked, 4)]
    return "\n".join([text, f"{reader} read it out: {text}", *lines])


def price_list(rng: random.Random) -> str:
    """A seller's prices, and customers who ask for them."""
    seller = rng.choice(PEOPLE)
    prices = {an_item(rng): rng.randint(2, 99) for _ in range(rng.randint(5, 8))}
    head = rng.choice((f"Prices of {seller}:", f"Price list, {seller}, {rng.choice(DAYS)}:"))
    ways = (with_article, with_article, "the {}".format)
    lines = [head, *(f"{rng.choice(ways)(item)}, {prices[item]} coins" for item in prices)]
    for item in rng.choices(list(prices), k=4):
        lines.append(f"- The price of the {item}?\n- {prices[item]} coins.")
    lines.append(json.dumps(prices))
    return "\n".join(lines)


def writing(rng: random.Random) -> str:
    """One tells another what to write, and the other writes it."""
    lines = []
    for _ in range(4):
        teller, writer = rng.sample(PEOPLE, 2)
        words = [a_word(rng) for _ in range(rng.randint(3, 5))]
        told = f"{', '.join(words[:-1])} and {words[-1]}"
        order, written = rng.choice(
            (
                ("Write with dashes", "".join(f"\n- {word}" for word in words)),
                ("Write in a row", " " + " ".join(words)),
                ("Write with a line for each", "".join(f"\n{word}" for word in words)),
                ("Write as JSON", " " + json.dumps(words)),
                ("Write the first", f" {words[0]}"),
                ("Write the last", f" {words[-1]}"),
                ("Write letter by letter the first", " " + "-".join(words[0])),
            )
        )
        lines.append(f'"{order}: {told}," said {teller}. {writer} wrote:{written}')
    return "\n".join(lines)


CORPUS = world.ROOT / "build" / "corpus.txt"
HELD_OUT = world.DATA / "text" / "next-held-out.jsonl"
PAPERS = {"list": word_list, "notice": notice, "prices": price_list, "writing": writing}
WHO = {
    "sold": who_sold,
    "gave": who_gave,
    "took": who_took,
    "short": who_is_who,
    "who": who_in_a_row,
}
# The curriculum: how many documents, and in them the weight of each style.
LESSONS = (
    (7_200, {"story": 30, "list": 70}),
    (15_360, {"sold": 1}),
    (12_800, {"gave": 9, "sold": 1}),
    (15_360, {"took": 6, "gave": 4}),
    (16_640, {"short": 1}),
    (
        67_200,
        {"story": 44, "who": 14, "list": 2, "chat": 6, "letter": 4}
        | {"card": 10, "slip": 6, "notice": 3, "prices": 7, "writing": 4},
    ),
)
LATE = LESSONS[-1][1]
HELD_OUT_DOCUMENTS = 500


def make_document(rng: random.Random, weights: dict[str, int], forbidden: set[str]) -> str | None:
    """One document as a line of JSON, `{"text": ...}` or chat `{"messages": [...]}`.

    None if it tells one of the passages in `forbidden`.
    """
    style = rng.choices(list(weights), list(weights.values()))[0]
    if style in PAPERS:
        return json.dumps({"text": PAPERS[style](rng)})
    if style in ("card", "slip"):
        one = store_card if style == "card" else slip
        return json.dumps({"text": "\n".join(one(rng) for _ in range(3))})
    if style in WHO:
        text = WHO[style](rng)
        return None if forbidden & set(text.split("\n")) else json.dumps({"text": text})
    event = make_event(rng)
    passage = write_passage(rng, event)
    if passage in forbidden:
        return None
    if style == "chat":
        return json.dumps({"messages": small_talk(rng, event, passage)})
    tell = letter if style == "letter" else story
    return json.dumps({"text": tell(rng, event, passage)})


def make_documents(forbidden: set[str]) -> Iterator[str]:
    """The documents, in the order in which the base model reads them: six lessons.

    First mostly word lists: nothing in them can be guessed, all of it can be copied. Then who is
    who, in short documents. Who sold, and who bought? To answer, a model must know which role is
    asked *and* which name stands first, and neither alone lowers the loss: shown all of it at once,
    a small model stays for very long with either of the two names. Told always in one order, only
    the question counts, and that it learns in a hundred steps; the other order comes after it.
    Then everything. A model that can copy, and knows a giver from a taker, learns to answer from a
    passage within minutes.
    """
    rng = random.Random(world.SEED + 1)
    for count, weights in LESSONS:
        for _ in range(count):
            if (document := make_document(rng, weights, forbidden)) is not None:
                yield document


def held_out_text(forbidden: set[str]) -> bytes:
    """Documents like the later ones of the pretraining text, but not among them, as JSONL."""
    rng = random.Random(world.SEED + 2)
    lines: list[str] = []
    while len(lines) < HELD_OUT_DOCUMENTS:
        if (document := make_document(rng, LATE, forbidden)) is not None:
            lines.append(document + "\n")
    return "".join(lines).encode()


def main() -> None:
    """Write the corpus, and the text that is held out of it."""
    text = "\n".join(make_documents(world.task_passages())) + "\n"
    world.write_whole(CORPUS, text.encode())
    print(f"{CORPUS.relative_to(world.ROOT)}: {len(text) / 1e6:.1f} MB")
    world.write_whole(HELD_OUT, held_out_text(world.task_passages()))


if __name__ == "__main__":
    main()
