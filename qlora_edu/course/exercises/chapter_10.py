"""The exercises of notebook 10: rate, sample, repair, compare, serve, and judge."""

import functools
import math
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor

from qlora_edu.course.exercises.core import (
    Answer,
    Exercise,
    Inputs,
    Seen,
    Verdict,
    as_numbers,
    dtype,
    faults_left,
)
from qlora_edu.evaluation import word_f1


def elo_update(rating: float, other: float, score: float, k: float) -> tuple[float, float]:
    """Both ratings after a game; `score` is the first one's: 1, 0.5 or 0."""
    change = _change(rating, other, score, k)
    return rating + change, other - change


def _change(rating, other, score, k, sign=1, base=10):
    return k * (score - 1 / (1 + base ** (sign * (other - rating) / 400)))


def _elo_by(change):
    """Make an answer in which what one wins the other loses."""

    def wrong(rating, other, score, k):
        won = change(rating, other, score, k)
        return rating + won, other - won

    return wrong


def _both_alike(rating, other, score, k):
    change = _change(rating, other, score, k)
    return rating + change, other + change


def _one_after_the_other(rating, other, score, k):
    after = rating + _change(rating, other, score, k)
    return after, other + _change(other, after, 1 - score, k)


def _games_of_two(random: torch.Generator) -> Inputs:
    ratings = (1000 + 400 * torch.rand(4, 2, generator=random)).round().tolist()
    ends = ((1.0, 32.0), (0.5, 32.0), (0.0, 16.0), (0.5, 24.0))
    return [(*pair, *end) for pair, end in zip(ratings, ends, strict=True)]


ex_10_1 = Exercise(
    "10.1 one game of Elo",
    elo_update,
    _games_of_two,
    atol=1e-6,
    because={
        "you expect more of the one with the lower rating: with `other` far above, the exponent "
        "(other − rating) / 400 must make the expectation small": (
            _elo_by(functools.partial(_change, sign=-1))
        ),
        "that is e^(d/400); on Elo's scale 400 points are ten wins to one: 10^(d/400)": (
            _elo_by(functools.partial(_change, base=math.e))
        ),
        "both ratings moved in the same direction; what one wins the other loses, so that their "
        "sum stays": _both_alike,
        "a tie is worth 0.5, and you counted it as a loss: use the score as it is": (
            _elo_by(lambda rating, other, score, k: _change(rating, other, float(score == 1), k))
        ),
        "a game moves the ratings by k times the surprise; k is missing": (
            _elo_by(lambda rating, other, score, k: _change(rating, other, score, 1))
        ),
        "the second rating was computed with the first one's new rating; both expectations are "
        "from before the game": _one_after_the_other,
    },
)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest tokens that together have at least `top_p`, made to sum to 1."""
    return _kept_by(lambda ordered, before, top_p: before < top_p)(probabilities, top_p)


def _kept_by(keep, renormalise=True):
    """Make an answer that keeps by the ordered probabilities and by what comes before each."""

    def kept(probabilities, top_p):
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        chosen = ordered * keep(ordered, before, top_p)
        kept = torch.zeros_like(ordered).scatter(0, order, chosen)
        return kept / kept.sum() if renormalise else kept

    return kept


def _distributions(random: torch.Generator) -> Inputs:
    def drawn(tokens):
        return torch.softmax(1.5 * torch.randn(tokens, generator=random), dim=0)

    return [
        # The first alone has more than top_p: an answer without it has nothing left.
        (torch.tensor([0.125, 0.625, 0.25]), 0.5),
        (torch.tensor([0.25, 0.0625, 0.5, 0.1875]), 0.9),
        # The first two have top_p to the bit, and are enough.
        (torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625]), 0.75),
        (drawn(12), 0.9),
        (drawn(12), 0.6),
        (drawn(6), 1.0),
    ]


def _only_in_another_order(yours, expected, probabilities, top_p):
    return torch.allclose(as_numbers(yours).sort().values, expected.double().sort().values)


ex_10_2 = Exercise(
    "10.2 the nucleus",
    nucleus,
    _distributions,
    atol=1e-6,
    because={
        "nothing is left: the token that crosses top_p belongs to the nucleus, and here it is the "
        "first one": Seen(
            _kept_by(lambda ordered, before, top_p: before + ordered <= top_p),
            lambda yours: not as_numbers(yours).sum() > 0,  # 0, or 0/0
        ),
        "yours do not sum to 1: divide what is kept by its sum": Seen(
            _kept_by(lambda ordered, before, top_p: before < top_p, renormalise=False),
            lambda yours: abs(as_numbers(yours).sum() - 1) > 1e-4,
        ),
        "the right numbers in another order: token i must stay at index i": Seen(
            lambda probabilities, top_p: nucleus(probabilities, top_p).sort(descending=True).values,
            _only_in_another_order,
        ),
        "one token short: what is kept must have *at least* top_p, so the token that crosses it is "
        "kept too": _kept_by(
            lambda ordered, before, top_p: (before + ordered <= top_p) | (before == 0)
        ),
        "where the tokens have exactly top_p together they are enough; you kept one more": (
            _kept_by(lambda ordered, before, top_p: before <= top_p)
        ),
    },
)


def points_per_game(games: Sequence[tuple[str, str, float]]) -> dict[str, float]:
    """Each system's share of the points that it could have won: a win is 1, a tie 0.5."""
    return _points(games)


def _points(games, no_ties=False, no_second=False, by_all=False, same=False):
    """The right shares, with a switch for each mistake."""
    points = {name: [] for game in games for name in game[:2]}
    for one, two, score in games:
        for name, won in ((one, score), (two, score if same else 1 - score)):
            if name == one or not no_second:
                points[name].append(float(won == 1 if no_ties else won))
    return {name: sum(won) / (len(games) if by_all else len(won)) for name, won in points.items()}


def _rounds(random: torch.Generator) -> Inputs:
    """Games in which each system is first at least once, and some have more games than others."""
    yield ([("a", "b", 1.0), ("b", "c", 0.5), ("c", "a", 0.0)],)
    for names in (("base", "lora", "qlora"), ("base", "full", "lora", "qlora")):
        pairs = [(one, two) for one in names for two in names if one != two] + [names[:2]] * 2
        drawn = torch.randint(3, (len(pairs),), generator=random).tolist()
        yield ([(*pair, i / 2) for pair, i in zip(pairs, drawn, strict=True)],)


ex_10_3 = Exercise(
    "10.3 points per game",
    points_per_game,
    _rounds,
    atol=1e-9,
    because={
        **faults_left(
            _points,
            no_ties="a tie is half a point for each, and you counted none",
            no_second="a system also played the games in which it was second: they bring it points",
            by_all="divide by the games that the system played, not by those of everybody",
        ),
        "the second system gets what the first one won; its score is 1 − score": (
            functools.partial(_points, same=True)
        ),
    },
)


def relative_percent(scores: Sequence[float], reference: Sequence[float]) -> float:
    """The sum of a system's marks in per cent of the reference's, on the same prompts."""
    return 100 * sum(scores) / sum(reference)


def _marks(random: torch.Generator) -> Inputs:
    drawn = torch.randint(2, 11, (3, 2, 6), generator=random).tolist()
    return [([1, 9], [2, 8]), *map(tuple, drawn), ([9, 7, 8], [6, 8, 3])]


ex_10_4 = Exercise(
    "10.4 99 per cent of what?",
    relative_percent,
    _marks,
    atol=1e-9,
    because={
        "in a mean of ratios a prompt with few marks counts as much as one with many; add up the "
        "marks first, then divide once": lambda scores, reference: (
            100 * sum(a / b for a, b in zip(scores, reference, strict=True)) / len(scores)
        ),
        "that is a share of the marks that could be had; the measure is one of those that the "
        "reference has": lambda scores, reference: 100 * sum(scores) / (10 * len(scores)),
        "that is how often one beats the other; the measure is a share of marks, and a system may "
        "lose every prompt by a little and still have 99 %": lambda scores, reference: (
            100 * sum(a > b for a, b in zip(scores, reference, strict=True)) / len(scores)
        ),
        "the right ratio, but not in per cent: times 100": (
            lambda scores, reference: sum(scores) / sum(reference)
        ),
        "upside down: the reference is what you divide by": (
            lambda scores, reference: 100 * sum(reference) / sum(scores)
        ),
    },
)


def how_to_serve(
    tasks: int, base_16_bytes: int, base_4_bytes: int, adapter_bytes: int, card_bytes: int
) -> str | None:
    """The fastest way in which all tasks are on the card at once; None if there is none."""
    beside = tasks * adapter_bytes
    needed = {
        "merged": tasks * base_16_bytes,
        "shelf": base_16_bytes + beside,
        "4-bit shelf": base_4_bytes + beside,
    }
    return _first_that_fits(needed, card_bytes)


def _first_that_fits(needed, card):
    return next((way for way, size in needed.items() if size <= card), None)


def _serve(needed):
    """Make an answer for which the three ways need other bytes."""

    def choose(*sizes):
        ways = ("merged", "shelf", "4-bit shelf")
        return _first_that_fits(dict(zip(ways, needed(*sizes[:4]), strict=True)), sizes[4])

    return choose


def _shelves(random: torch.Generator) -> Inputs:
    """Models of 7 and 13 billion; each case lies where a mistake chooses otherwise."""
    million = 1_000_000
    seven, thirteen = (13_477 * million, 3_866 * million), (26_032 * million, 7_079 * million)
    small, large = (
        million * int(torch.randint(low, high, (1,), generator=random))
        for low, high in ((70, 90), (300, 330))
    )
    return [
        (2, *seven, small, 2 * seven[0]),  # merged, to the byte
        (3, *seven, small, 24_000 * million),
        (5, *seven, small, 80_000 * million),
        (10, *seven, large, seven[0] + 10 * large),  # the shelf, to the byte
        (12, *seven, large, 16_000 * million),
        (2, *seven, small, seven[0] + small),
        (5, *seven, small, 12_000 * million),
        (1, *seven, small, seven[1]),
        (40, *seven, large, 16_000 * million),
        (2, *seven, small, 6_000 * million),
        (2, *thirteen, large, 48_000 * million),
        (2, *thirteen, small, 16_000 * million),
        (3, *thirteen, small, 7_000 * million),
    ]


ex_10_5 = Exercise(
    "10.5 how to serve?",
    how_to_serve,
    _shelves,
    because={
        "a merged checkpoint does one task; with several tasks each needs a whole one": (
            _serve(lambda n, big, small, one: (big, big + n * one, small + n * one))
        ),
        "the adapters are on the card as well, one for each task": (
            _serve(lambda n, big, small, one: (n * big, big, small))
        ),
        "the shelf saves bytes and costs time in every layer; where a merged checkpoint for each "
        "task fits, merged is faster": _serve(
            lambda n, big, small, one: (math.inf, big + n * one, small + n * one)
        ),
        "merged here means 16 bits: to quantise a merged weight again rounds away part of what was "
        "trained": _serve(lambda n, big, small, one: (n * small, big + n * one, small + n * one)),
        "a shelf has one base, which all tasks share": (
            _serve(lambda n, big, small, one: (n * big, n * (big + one), n * (small + one)))
        ),
    },
)


class _JudgeExercise(Exercise):
    """An exercise whose answer is a judge: it sees every pair of answers in both orders."""

    def judge(self, answer: Answer) -> Verdict:
        """Return the verdict on a judge, with its two verdicts on a pair as its answer."""
        if not callable(answer):
            return super().judge(answer)

        @functools.wraps(answer)
        def in_both_orders(row, first, second):
            given = self._ask(answer, (row, first, second))
            return {"as given": given, "swapped": self._ask(answer, (row, second, first))}

        return super().judge(in_both_orders)


def my_judge(row: Mapping[str, Any], first: str, second: str) -> float:
    """The answer that begins as the wanted one does, for longer, is better."""
    return _verdict(_shared(row, first), _shared(row, second))


def _shared(row, answer):
    return len(commonprefix([answer, row["wanted"]]))


def _verdict(first, second):
    return 0.5 if first == second else float(first > second)


WORDS = "amber basket copper dune ember ferry garden hollow island jacket kettle lantern".split()


def _pairs_of_answers(random: torch.Generator) -> Inputs:
    """Games, those first in which the plainest faults show."""
    for _ in range(3):
        words = [WORDS[i] for i in torch.randperm(len(WORDS), generator=random).tolist()]
        right, wrong, other = " ".join(words[:3]), words[4], " ".join(words[5:7])
        row = {"prompt": "Which?", "wanted": right, "family": "question"}
        for pair in (
            (right, wrong),
            (right, ""),
            (right, right),
            (wrong, wrong),
            (right, f"{right}, as far as anybody could tell on that day"),
            (right, f"{words[8]} and {words[9]} and {words[10]} and {words[11]} and {wrong}"),
            (right, " ".join(words[7:])[: len(right)]),
            (words[0], wrong),
            (other, wrong),
            ("", wrong),
        ):
            yield row, *pair


def _seen(wrong, sign):
    """A fault of a judge: `sign` is asked of both verdicts, what was wanted, and the answers."""
    return Seen(
        wrong,
        lambda yours, expected, row, first, second: sign(
            yours["as given"], yours["swapped"], row["wanted"], first, second
        ),
    )


def _is_verdict(value):
    number = as_numbers(value)
    return number is not None and number.dim() == 0 and number.item() in (0, 0.5, 1)


ex_10_6 = _JudgeExercise(
    "10.6 a judge of your own",
    my_judge,
    _pairs_of_answers,
    open=True,
    score=lambda *games: (
        f"{sum(game['as given'] != 0.5 for game in games)} of {len(games)} pairs decided"
    ),
    because={
        "True and False leave no room for a tie: return 1, 0.5 or 0": _seen(
            lambda row, first, second: _shared(row, first) > _shared(row, second),
            lambda one, two, *rest: "bool" in (dtype(one), dtype(two)),
        ),
        "your function returned nothing: every way through it needs a `return`": _seen(
            lambda row, first, second: 1 if _shared(row, first) > _shared(row, second) else None,
            lambda one, two, *rest: one is None or two is None,
        ),
        "a verdict says which is better, not by how much: 1, 0.5 or 0": _seen(
            lambda row, one, two: word_f1(one, row["wanted"]) - word_f1(two, row["wanted"]),
            lambda one, two, *rest: not (_is_verdict(one) and _is_verdict(two)),
        ),
        "an answer against itself is a tie: return 0.5 where neither is better (≥ gives the point "
        "to the first)": _seen(
            lambda row, first, second: float(_shared(row, first) >= _shared(row, second)),
            lambda one, two, wanted, first, second: first == second and one != 0.5,
        ),
        "the verdict goes by the place and not by the answer: with the answers swapped the same "
        "place won again": _seen(
            lambda row, first, second: 1,
            lambda one, two, *rest: one == two != 0.5,
        ),
        "with the answers swapped the verdict must turn round: 1 becomes 0, a tie stays a tie": (
            _seen(
                lambda row, first, second: 1 if _shared(row, first) > _shared(row, second) else 0.5,
                lambda one, two, *rest: one + two != 1,
            )
        ),
        "the right answer lost to a longer one: longer is not better, though many a judge, people "
        "and models, takes it for that": _seen(
            lambda row, first, second: _verdict(len(first), len(second)),
            lambda one, two, wanted, first, second: (
                first == wanted and one == 0 and len(second) > len(first)
            ),
        ),
        "the right answer lost: 1 means that the first answer is the better one": _seen(
            lambda row, first, second: _verdict(_shared(row, second), _shared(row, first)),
            lambda one, two, wanted, first, second: first == wanted and one == 0,
        ),
        "fair, but it tells too little: the right answer must beat an empty one, and other words": (
            _seen(
                lambda row, first, second: 0.5,
                lambda one, two, wanted, first, second: (
                    first == wanted and not second.startswith(wanted) and one == 0.5
                ),
            )
        ),
    },
)

EXERCISES = (ex_10_1, ex_10_2, ex_10_3, ex_10_4, ex_10_5, ex_10_6)
