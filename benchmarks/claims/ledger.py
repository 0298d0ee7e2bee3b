"""The ledger: a claim stands above the function that tests it, and a row says what came of it."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from benchmarks.stored import ROOT

VERDICTS = ("reproduced", "in part", "contradicted", "not here")
MARGIN = 0.05
"""The margin of every test of equivalence, chapter 8's."""

QLORA, LORA = "QLoRA (arXiv 2305.14314)", "LoRA (arXiv 2106.09685)"
LITGPT = "Lightning-AI/litgpt"


class ClaimError(ValueError):
    """The ledger cannot be filled; the message names the claim or the file."""


class NotMeasuredError(LookupError):
    """A stored result is not there; the message says which command makes it."""


class Claim(NamedTuple):
    """A sentence of the literature, in our words, with its number."""

    id: str
    """The name of the function that tests it, with hyphens."""
    claim: str
    source: str
    how: str
    """How it is checked, in one clause that names the notebook or the command."""


class Answer(NamedTuple):
    """What came of a claim: our value, one of `VERDICTS`, and a sentence that says why."""

    value: str
    verdict: str
    because: str

    @classmethod
    def of(
        cls, value: str, *, reproduced: bool = False, in_part: bool = False, because: str
    ) -> Self:
        """Decide: reproduced, or at least in part, or contradicted.

        >>> Answer.of("4.127 bits", reproduced=True, in_part=True, because="Counted.").verdict
        'reproduced'
        >>> Answer.of("5 bits", because="Counted.").verdict
        'contradicted'
        """
        verdict = "reproduced" if reproduced else "in part" if in_part else "contradicted"
        return cls(value, verdict, because)


Test = Callable[[], Answer]
LEDGER: dict[str, tuple[Claim, Test]] = {}
"""Every claim with the function that tests it, in the order of the table."""


def claim(sentence: str, source: str, how: str) -> Callable[[Test], Test]:
    """Enter a claim into the ledger, above the function that tests it.

    Raises:
        ClaimError: if a function of this name is in the ledger.
    """

    def enter(test: Test) -> Test:
        id = test.__name__.lstrip("_").replace("_", "-")
        if id in LEDGER:
            raise ClaimError(f"two claims have the id {id!r}: give one function another name")
        LEDGER[id] = Claim(id, sentence, source, how), test
        return test

    return enter


def stored(name: str) -> dict[str, Any]:
    """Read a stored result, `data/results/<name>.json`.

    Raises:
        NotMeasuredError: if there is none; it names the command that makes it.

    >>> stored("gpu_moon")
    Traceback (most recent call last):
    benchmarks.claims.ledger.NotMeasuredError: not measured yet: run make gpu-report
    """
    path = ROOT / "data" / "results" / f"{name}.json"
    if not path.is_file():
        command = "make gpu-report" if name.startswith("gpu_") else f"python benchmarks/{name}.py"
        command = "make experiments" if name == "three_ways" else command
        raise NotMeasuredError(f"not measured yet: run {command}")
    return json.loads(path.read_text(encoding="utf-8"))


def not_here(because: str) -> Answer:
    """The answer to what cannot be checked in this course.

    >>> not_here("it needs a moon").because
    'not checked here, because it needs a moon'
    """
    return Answer("–", "not here", f"not checked here, because {because}")


def percent(share: float, digits: int = 0, sign: str = "") -> str:
    """A share as it is written in the course.

    >>> percent(0.742, 1), percent(0.0006, 2, "+")
    ('74.2 %', '+0.06 %')
    """
    return f"{100 * share:{sign}.{digits}f} %"


def check(id: str) -> dict[str, str]:
    """Test one claim.

    Raises:
        ClaimError: if there is no such claim.
    """
    if id not in LEDGER:
        raise ClaimError(f"no claim {id!r}; there are {', '.join(LEDGER)}")
    entry, test = LEDGER[id]
    try:
        answer = test()
    except NotMeasuredError as missing:
        answer = Answer("–", "not here", f"{missing}")
    return {**entry._asdict(), **answer._asdict()}


def fill() -> list[dict[str, str]]:
    """Test every claim; it takes some twenty seconds, nearly all of them the planner's."""
    return [check(id) for id in LEDGER]


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of the ledger as a Markdown table.

    >>> entry = {"claim": "Snow is white.", "source": "Tarski", "how": "looking", "value": "white"}
    >>> print(table([{**entry, "verdict": "reproduced"}]))
    | claim | source | how checked | our value | verdict |
    | --- | --- | --- | --- | --- |
    | Snow is white. | Tarski | looking | white | **reproduced** |
    """
    lines = ["| claim | source | how checked | our value | verdict |", "| --- " * 5 + "|"]
    for entry in rows:
        cells = [entry[name].replace("|", "\\|") for name in ("claim", "source", "how", "value")]
        lines.append("| " + " | ".join([*cells, f"**{entry['verdict']}**"]) + " |")
    return "\n".join(lines)
