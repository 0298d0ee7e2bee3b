"""The exercises of notebook 10: rate, sample, repair, compare, serve, and judge."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor

from qlora_edu.course.exercises.core import (
    Case,
    Check,
    Mistake,
    OpenCheck,
    Verdict,
    as_numbers,
    show,
)
from qlora_edu.evaluation import word_f1


def elo_update(rating: float, other: float, score: float, k: float) -> tuple[float, float]:
    """Both ratings after a game; ``score`` is the first one's: 1, 0.5 or 0.

    >>> elo_update(1000, 1000, score=1, k=32)
    (1016.0, 984.0)
    """
    return _elo(rating, other, score, k)


def _elo(
    rating: float, other: float, score: float, k: float, *, sign: int = 1, base: float = 10
) -> tuple[float, float]:
    """The right update, with a switch for each mistake in the expectation."""
    expected = 1 / (1 + base ** (sign * (other - rating) / 400))
    change = k * (score - expected)
    return rating + change, other - change


def _both_alike(rating: float, other: float, score: float, k: float) -> tuple[float, float]:
    after, _ = _elo(rating, other, score, k)
    return after, other + (after - rating)


def _one_after_the_other(
    rating: float, other: float, score: float, k: float
) -> tuple[float, float]:
    after, _ = _elo(rating, other, score, k)
    return after, _elo(other, after, 1 - score, k)[0]


def _games_of_two(random: torch.Generator) -> Sequence[Case]:
    ratings = (1000 + 400 * torch.rand(4, 2, generator=random)).round().tolist()
    ends = ((1.0, 32.0), (0.5, 32.0), (0.0, 16.0), (0.5, 24.0))
    return [
        {"rating": rating, "other": other, "score": score, "k": k}
        for (rating, other), (score, k) in zip(ratings, ends, strict=True)
    ]


ex_10_1 = Check(
    "10.1 one game of Elo",
    reference=elo_update,
    cases=_games_of_two,
    mistakes=(
        Mistake(
            "the sign the wrong way round",
            lambda rating, other, score, k: _elo(rating, other, score, k, sign=-1),
            "you expect more of the one with the lower rating: with `other` far above, the "
            "exponent (other − rating) / 400 must make the expectation small",
        ),
        Mistake(
            "natural exponent",
            lambda rating, other, score, k: _elo(rating, other, score, k, base=math.e),
            "that is e^(d/400); on Elo's scale 400 points are ten wins to one: 10^(d/400)",
        ),
        Mistake(
            "both move alike",
            _both_alike,
            "both ratings moved in the same direction; what one wins the other loses, so that "
            "their sum stays",
        ),
        Mistake(
            "a tie is a loss",
            lambda rating, other, score, k: _elo(rating, other, float(score == 1), k),
            "a tie is worth 0.5, and you counted it as a loss: use the score as it is",
        ),
        Mistake(
            "no k",
            lambda rating, other, score, k: _elo(rating, other, score, 1),
            "a game moves the ratings by k times the surprise; k is missing",
        ),
        Mistake(
            "one after the other",
            _one_after_the_other,
            "the second rating was computed with the first one's new rating; both expectations "
            "are from before the game",
        ),
    ),
    atol=1e-9,
)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest tokens that together have at least ``top_p``, made to sum to 1.

    >>> nucleus(torch.tensor([0.125, 0.5, 0.375]), top_p=0.75)
    tensor([0.0000, 0.5714, 0.4286])
    """
    return _nucleus(probabilities, lambda ordered, before: before < top_p)


def _nucleus(
    probabilities: Tensor, keep: Callable[[Tensor, Tensor], Tensor], renormalise: bool = True
) -> Tensor:
    """Keep by the ordered probabilities and by what came before each of them."""
    ordered, order = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    kept = torch.zeros_like(ordered).scatter(0, order, ordered * keep(ordered, before))
    return kept / kept.sum() if renormalise else kept


def _distributions(random: torch.Generator) -> Sequence[Case]:
    def drawn(tokens: int) -> Tensor:
        return torch.softmax(1.5 * torch.randn(tokens, generator=random), dim=0)

    return [
        # The first alone has more than top_p: an answer without it has nothing left.
        {"probabilities": torch.tensor([0.125, 0.625, 0.25]), "top_p": 0.5},
        {"probabilities": torch.tensor([0.25, 0.0625, 0.5, 0.1875]), "top_p": 0.9},
        # The first two have top_p to the bit, and are enough.
        {"probabilities": torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625]), "top_p": 0.75},
        {"probabilities": drawn(12), "top_p": 0.9},
        {"probabilities": drawn(12), "top_p": 0.6},
        {"probabilities": drawn(6), "top_p": 1.0},
    ]


def _sums_to(case: Case, yours: Any) -> float:
    numbers = as_numbers(yours)
    return numbers.sum().item() if numbers.shape == case["probabilities"].shape else 1.0


def _only_in_another_order(case: Case, yours: Any, expected: Tensor) -> bool:
    return torch.allclose(as_numbers(yours).sort().values, expected.double().sort().values)


def _another_count(case: Case, yours: Any, expected: Tensor) -> bool:
    """Is it the likeliest n tokens, renormalised, with another n than the right one?"""
    count = int((as_numbers(yours) > 0).sum())
    ranks = case["probabilities"].argsort(descending=True, stable=True).argsort()
    kept = case["probabilities"] * (ranks < count)
    return torch.allclose(as_numbers(yours), (kept / kept.sum()).double(), atol=1e-6)


ex_10_2 = Check(
    "10.2 the nucleus",
    reference=nucleus,
    cases=_distributions,
    mistakes=(
        Mistake(
            "nothing left",
            lambda probabilities, top_p: _nucleus(
                probabilities, lambda ordered, before: before + ordered <= top_p
            ),
            "nothing is left: the token that crosses top_p belongs to the nucleus, and here it is "
            "the first one",
            lambda case, yours, _: not _sums_to(case, yours) > 0,  # 0, or 0/0
        ),
        Mistake(
            "not renormalised",
            lambda probabilities, top_p: _nucleus(
                probabilities, lambda ordered, before: before < top_p, renormalise=False
            ),
            "yours do not sum to 1: divide what is kept by its sum",
            lambda case, yours, _: abs(_sums_to(case, yours) - 1) > 1e-4,
        ),
        Mistake(
            "sorted",
            lambda probabilities, top_p: nucleus(probabilities, top_p).sort(descending=True).values,
            "the right numbers in another order: token i must stay at index i",
            _only_in_another_order,
        ),
        Mistake(
            "one token short",
            lambda probabilities, top_p: _nucleus(
                probabilities,
                lambda ordered, before: (before + ordered <= top_p) | (before == 0),
            ),
            "one token short: what is kept must have *at least* top_p, so the token that crosses "
            "it is kept too",
        ),
        Mistake(
            "one token too many",
            lambda probabilities, top_p: _nucleus(
                probabilities, lambda ordered, before: before <= top_p
            ),
            "where the tokens have exactly top_p together they are enough; you kept one more",
        ),
        Mistake(
            "a threshold",
            lambda probabilities, top_p: _nucleus(
                probabilities, lambda ordered, before: ordered >= 1 - top_p
            ),
            "that compares single probabilities with 1 − top_p; the nucleus is about their sum: a "
            "flat distribution keeps many small ones",
        ),
        Mistake(
            "a fixed count",
            lambda probabilities, top_p: _nucleus(
                probabilities, lambda ordered, before: torch.arange(len(ordered)) < 2
            ),
            "the likeliest, but not as many as are needed: how many is not fixed, it is where "
            "their sum reaches top_p",
            _another_count,
        ),
    ),
    atol=1e-6,
)


def points_per_game(games: Sequence[tuple[str, str, float]]) -> dict[str, float]:
    """Each system's share of the points that it could have won: a win is 1, a tie 0.5.

    >>> points_per_game([("a", "b", 1), ("b", "c", 0.5)])
    {'a': 1.0, 'b': 0.25, 'c': 0.5}
    """
    return _points(games)


def _points(
    games: Sequence[tuple[str, str, float]],
    *,
    value: Callable[[float], float] = float,
    other: Callable[[float], float] = lambda score: 1 - score,
    second: bool = True,
    own: bool = True,
) -> dict[str, float]:
    """The right shares, with a switch for each mistake."""
    points: dict[str, list[float]] = {name: [] for game in games for name in game[:2]}
    for one, two, score in games:
        points[one].append(value(score))
        if second:
            points[two].append(value(other(score)))
    return {name: sum(won) / (len(won) if own else len(games)) for name, won in points.items()}


def _won(score: float) -> float:
    return float(score == 1)


def _rounds(random: torch.Generator) -> Sequence[Case]:
    """Games in which each system is first at least once, and some have more games than others."""
    scores = (0.0, 0.5, 1.0)
    cases: list[Case] = [{"games": [("a", "b", 1.0), ("b", "c", 0.5), ("c", "a", 0.0)]}]
    for names in (("base", "lora", "qlora"), ("base", "full", "lora", "qlora")):
        pairs = [(one, two) for one in names for two in names if one != two] + [names[:2]] * 2
        drawn = torch.randint(3, (len(pairs),), generator=random).tolist()
        cases.append({"games": [(*p, scores[i]) for p, i in zip(pairs, drawn, strict=True)]})
    return cases


ex_10_3 = Check(
    "10.3 points per game",
    reference=points_per_game,
    cases=_rounds,
    mistakes=(
        Mistake(
            "all three faults",
            lambda games: _points(games, value=_won, second=False, own=False),
            "that is still the colleague's: whose points, which games, and what of a tie?",
        ),
        Mistake(
            "ties and the divisor",
            lambda games: _points(games, value=_won, own=False),
            "both systems have their points now; a tie is worth half of one, and the divisor is "
            "the system's own number of games",
        ),
        Mistake(
            "the second and the divisor",
            lambda games: _points(games, second=False, own=False),
            "ties are right now; the second system gets nothing yet, and the divisor is the "
            "system's own number of games",
        ),
        Mistake(
            "ties and the second",
            lambda games: _points(games, value=_won, second=False),
            "the divisor is right for the games as first; those as second are missing, and a tie "
            "is worth half a point",
        ),
        Mistake(
            "not turned round",
            lambda games: _points(games, other=lambda score: score),
            "the second system gets what the first one won; its score is 1 − score",
        ),
        Mistake(
            "divided by all games",
            lambda games: _points(games, own=False),
            "divide by the games that the system played, not by those of everybody",
        ),
        Mistake(
            "a tie is nothing",
            lambda games: _points(games, value=_won),
            "a tie is half a point for each, and you counted none",
        ),
        Mistake(
            "a tie is a win for both",
            lambda games: _points(games, value=lambda score: float(score > 0)),
            "a tie is half a point for each; you gave both a whole one, so that a game has two",
        ),
        Mistake(
            "only as first",
            lambda games: _points(games, second=False),
            "only the games in which a system was first are counted; it also played as second",
        ),
    ),
    atol=1e-9,
)


def relative_percent(scores: Sequence[float], reference: Sequence[float]) -> float:
    """The sum of a system's marks in per cent of the reference's, on the same prompts.

    >>> relative_percent([8, 6, 7], [8, 8, 8])
    87.5
    """
    return 100 * sum(scores) / sum(reference)


def _marks(random: torch.Generator) -> Sequence[Case]:
    drawn = torch.randint(2, 11, (3, 2, 6), generator=random).tolist()
    return [
        {"scores": [1, 9], "reference": [2, 8]},
        *({"scores": scores, "reference": reference} for scores, reference in drawn),
    ]


def _share_won(case: Case, yours: Any, expected: float) -> bool:
    """Is it a share of prompts, whatever was done with ties?"""
    pairs = list(zip(case["scores"], case["reference"], strict=True))
    won, tied = sum(a > b for a, b in pairs), sum(a == b for a, b in pairs)
    shares = [(won + tie * tied) / len(pairs) for tie in (0, 0.5, 1)]
    return any(abs(yours - unit * share) < 1e-9 for share in shares for unit in (1, 100))


ex_10_4 = Check(
    "10.4 99 per cent of what?",
    reference=relative_percent,
    cases=_marks,
    mistakes=(
        Mistake(
            "mean of the ratios",
            lambda scores, reference: (
                100 * sum(a / b for a, b in zip(scores, reference, strict=True)) / len(scores)
            ),
            "in a mean of ratios a prompt with few marks counts as much as one with many; add up "
            "the marks first, then divide once",
        ),
        Mistake(
            "share of prompts won",
            lambda scores, reference: (
                100 * sum(a > b for a, b in zip(scores, reference, strict=True)) / len(scores)
            ),
            "that is how often one beats the other; the measure is a share of marks, and a system "
            "may lose every prompt by a little and still have 99 %",
            _share_won,
        ),
        Mistake(
            "difference of means",
            lambda scores, reference: (sum(scores) - sum(reference)) / len(scores),
            "that is how many marks they are apart on a prompt; a percentage is a ratio",
        ),
        Mistake(
            "without the 100",
            lambda scores, reference: sum(scores) / sum(reference),
            "the right ratio, but not in per cent: times 100",
        ),
        Mistake(
            "upside down",
            lambda scores, reference: 100 * sum(reference) / sum(scores),
            "upside down: the reference is what you divide by",
        ),
    ),
    atol=1e-9,
)


def how_to_serve(
    tasks: int, base_16_bytes: int, base_4_bytes: int, adapter_bytes: int, card_bytes: int
) -> str | None:
    """The fastest way in which all tasks are on the card at once; None if there is none.

    >>> how_to_serve(3, base_16_bytes=14, base_4_bytes=4, adapter_bytes=1, card_bytes=24)
    'shelf'
    """
    return _serve(tasks, base_16_bytes, base_4_bytes, adapter_bytes, card_bytes)


def _serve(
    tasks: int,
    base_16_bytes: int,
    base_4_bytes: int,
    adapter_bytes: int,
    card_bytes: int,
    *,
    merged: Callable[[int, int, int], int] = lambda tasks, base_16, base_4: tasks * base_16,
    adapters: int | None = None,
    order: Sequence[str] = ("merged", "shelf", "4-bit shelf"),
    at_the_limit: bool = True,
) -> str | None:
    """The right choice, with a switch for each mistake; ``adapters``: how many are counted."""
    beside = (tasks if adapters is None else adapters) * adapter_bytes
    needed = {
        "merged": merged(tasks, base_16_bytes, base_4_bytes),
        "shelf": base_16_bytes + beside,
        "4-bit shelf": base_4_bytes + beside,
    }
    room = card_bytes if at_the_limit else card_bytes - 1
    return next((way for way in order if needed[way] <= room), None)


def _shelves(random: torch.Generator) -> Sequence[Case]:
    # The sizes of a 7-billion model, in bytes; each case lies where a mistake chooses otherwise.
    base_16, base_4, million = 13_477_000_000, 3_866_000_000, 1_000_000
    small, large = (
        million * int(torch.randint(low, high, (1,), generator=random))
        for low, high in ((70, 90), (300, 330))
    )
    return [
        {
            "tasks": tasks,
            "base_16_bytes": base_16,
            "base_4_bytes": base_4,
            "adapter_bytes": adapter,
            "card_bytes": card,
        }
        for tasks, adapter, card in (
            (2, small, 2 * base_16),  # merged, to the byte
            (3, small, 24_000 * million),
            (5, small, 80_000 * million),
            (10, large, base_16 + 10 * large),  # the shelf, to the byte
            (12, large, 16_000 * million),
            (2, small, base_16 + small),
            (5, small, 12_000 * million),
            (1, small, base_4),
            (40, large, 16_000 * million),
        )
    ]


ex_10_5 = Check(
    "10.5 how to serve?",
    reference=how_to_serve,
    cases=_shelves,
    mistakes=(
        Mistake(
            "one merged for all",
            lambda *sizes, **named: _serve(*sizes, **named, merged=lambda tasks, big, small: big),
            "a merged checkpoint does one task; with several tasks each needs a whole one",
        ),
        Mistake(
            "adapters not counted",
            lambda *sizes, **named: _serve(*sizes, **named, adapters=0),
            "the adapters are on the card as well, one a task",
        ),
        Mistake(
            "one adapter counted",
            lambda *sizes, **named: _serve(*sizes, **named, adapters=1),
            "you counted one adapter; there is one for each task",
        ),
        Mistake(
            "always the shelf",
            lambda *sizes, **named: _serve(*sizes, **named, order=("shelf", "4-bit shelf")),
            "the shelf saves bytes and costs time in every layer; where a merged checkpoint for "
            "each task fits, merged is faster",
        ),
        Mistake(
            "merged in 4 bits",
            lambda *sizes, **named: _serve(
                *sizes, **named, merged=lambda tasks, big, small: tasks * small
            ),
            "merged here means 16 bits: to quantise a merged weight again rounds away part of what "
            "was trained",
        ),
        Mistake(
            "not at the limit",
            lambda *sizes, **named: _serve(*sizes, **named, at_the_limit=False),
            "what is exactly as large as the card fits: <=, not <",
        ),
    ),
)


class JudgeCheck(OpenCheck):
    """An `OpenCheck` of a judge: a mistake is looked for in every game, played in both orders.

    `recognise` gets the case and the two verdicts, the second with the answers swapped.

    >>> ex_10_6(my_judge)
    ✓ 10.6 a judge of your own
    >>> ex_10_6(lambda row, first, second: 1)
    ✗ 10.6 a judge of your own
      given     wanted = '...', first = '...', second = '...'
      yours     1, and 1 with the answers swapped
      because   the verdict goes by the place and not by the answer...
    """

    def _judge(self, answer: Callable[..., Any]) -> Verdict:
        if not callable(answer):
            return self._fail({}, show(answer), "a function", "pass the function, not its result")
        for case in self.cases(torch.Generator().manual_seed(1006)):
            swapped = {**case, "first": case["second"], "second": case["first"]}
            given = {"wanted": case["row"]["wanted"], **case}
            del given["row"]
            try:
                yours = answer(**deepcopy(case)), answer(**deepcopy(swapped))
            except NotImplementedError:
                return Verdict("○", f"{self.title}: not attempted")
            except (Exception, SystemExit) as error:
                because = "your function stopped before it returned an answer"
                return self._fail(given, f"raised {type(error).__name__}: {error}", "", because)
            for mistake in self.mistakes:
                if mistake.recognise(case, yours, None):
                    words = f"{show(yours[0])}, and {show(yours[1])} with the answers swapped"
                    return self._fail(given, words, "", mistake.because)
        return Verdict("✓", self.title)


def my_judge(row: Mapping[str, Any], first: str, second: str) -> float:
    """The answer that begins as the wanted one does, for longer, is better.

    >>> row = {"wanted": "a red lamp"}
    >>> my_judge(row, "a red hat", "a lamp"), my_judge(row, "Ada", "Eva"), my_judge(row, "", "a")
    (1.0, 0.5, 0.0)
    """
    return _verdict(_shared(row, first), _shared(row, second))


def _shared(row: Mapping[str, Any], answer: str) -> int:
    return len(commonprefix([answer, row["wanted"]]))


def _verdict(first: float, second: float) -> float:
    return 0.5 if first == second else float(first > second)


WORDS = "amber basket copper dune ember ferry garden hollow island jacket kettle lantern".split()


def _pairs_of_answers(random: torch.Generator) -> Sequence[Case]:
    """Games, those first in which the plainest faults show."""
    cases = []
    for _ in range(3):
        words = [WORDS[i] for i in torch.randperm(len(WORDS), generator=random).tolist()]
        right, wrong, other = " ".join(words[:4]), words[4], " ".join(words[5:7])
        row = {"prompt": f"What was in the {words[7]}?", "wanted": right, "family": "question"}
        cases += [
            {"row": row, "first": one, "second": two}
            for one, two in (
                (right, wrong),
                (right, ""),
                (right, right),
                (wrong, wrong),
                (right, f"{right}, as far as anybody could tell on that day"),
                (right, f"{words[8]} and {words[9]} and {words[10]} and {words[11]} and {wrong}"),
                (words[0], wrong),
                (other, wrong),
                ("", wrong),
            )
        ]
    return cases


def _is_verdict(value: Any) -> bool:
    number = as_numbers(value)  # None for True and False
    return number is not None and number.dim() == 0 and number.item() in (0, 0.5, 1)


def _right_got(score: float) -> Callable[[Case, Any, Any], bool]:
    return lambda case, yours, _: case["first"] == case["row"]["wanted"] and yours[0] == score


ex_10_6 = JudgeCheck(
    "10.6 a judge of your own",
    reference=my_judge,
    cases=_pairs_of_answers,
    mistakes=(
        Mistake(
            "true or false",
            lambda row, first, second: _shared(row, first) > _shared(row, second),
            "True and False leave no room for a tie: return 1, 0.5 or 0",
            lambda case, yours, _: any(isinstance(verdict, bool) for verdict in yours),
        ),
        Mistake(
            "nothing",
            lambda row, first, second: 1 if _shared(row, first) > _shared(row, second) else None,
            "your function returned nothing: every way through it needs a `return`",
            lambda case, yours, _: any(verdict is None for verdict in yours),
        ),
        Mistake(
            "a difference",
            lambda row, first, second: (
                word_f1(first, row["wanted"]) - word_f1(second, row["wanted"])
            ),
            "a verdict says which is better, not by how much: 1, 0.5 or 0",
            lambda case, yours, _: not all(map(_is_verdict, yours)),
        ),
        Mistake(
            "no ties",
            lambda row, first, second: float(_shared(row, first) >= _shared(row, second)),
            "an answer against itself is a tie: return 0.5 where neither is better (≥ gives the "
            "point to the first)",
            lambda case, yours, _: case["first"] == case["second"] and yours[0] != 0.5,
        ),
        Mistake(
            "always the first",
            lambda row, first, second: 1,
            "the verdict goes by the place and not by the answer: with the answers swapped the "
            "same place won again",
            lambda case, yours, _: yours[0] == yours[1] != 0.5,
        ),
        Mistake(
            "not turned round",
            lambda row, first, second: 1 if _shared(row, first) > _shared(row, second) else 0.5,
            "with the answers swapped the verdict must turn round: 1 becomes 0, a tie stays a tie",
            lambda case, yours, _: yours[0] + yours[1] != 1,
        ),
        Mistake(
            "the longer answer",
            lambda row, first, second: _verdict(len(first), len(second)),
            "the right answer lost to a longer one: longer is not better, though many a judge, "
            "people and models, takes it for that",
            lambda case, yours, _: (
                _right_got(0)(case, yours, _) and len(case["second"]) > len(case["first"])
            ),
        ),
        Mistake(
            "the wrong way round",
            lambda row, first, second: _verdict(_shared(row, second), _shared(row, first)),
            "the right answer lost: 1 means that the first answer is the better one",
            _right_got(0),
        ),
        Mistake(
            "always a tie",
            lambda row, first, second: 0.5,
            "fair, but it tells nothing: the right answer must beat an empty one",
            lambda case, yours, _: case["second"] == "" and _right_got(0.5)(case, yours, _),
        ),
    ),
)
