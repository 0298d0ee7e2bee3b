"""Chapter 10. Which of these systems is better? Judges, a tournament, and ratings.

A judge, which is a plain function, says which of two answers to a prompt is better. From many such
*games* each system gets a rating: by Elo, or by the model that Elo approximates, Bradley and
Terry's. Intervals say how far other prompts or another order of the games would have moved it.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qlora_edu.comparison import Interval
from qlora_edu.errors import EvaluationError

K, START = 32, 1000  # Elo as in the paper: points at stake in a game, and the first rating

Row = Mapping[str, Any]  # {"prompt": str, "answers": {system: str}}, maybe "wanted": str
Judge = Callable[[Row, str, str], float]  # 1: the first answer is better; 0.5: a tie; 0: not


class Game(NamedTuple):
    """One verdict: which two systems met on which row, and the score of the first."""

    first: str
    second: str
    score: float
    row: int


def exact_judge(row: Row, first: str, second: str) -> float:
    """Right beats wrong: an answer is right if it equals `row["wanted"]`."""
    return _compare(*(answer.strip() == row["wanted"].strip() for answer in (first, second)))


def word_judge(row: Row, first: str, second: str) -> float:
    """Nearer beats farther: by the words that an answer shares with `row["wanted"]`."""
    return _compare(*(word_f1(answer, row["wanted"]) for answer in (first, second)))


def word_f1(answer: str, wanted: str) -> float:
    """F1 of the words, each counted as often as it occurs; what SQuAD measured answers with.

    >>> word_f1("a lamp", "a red lamp")  # precision 2/2, recall 2/3
    0.8
    """
    mine, theirs = (re.findall(r"[^\W_]+", text.lower()) for text in (answer, wanted))
    common = (Counter(mine) & Counter(theirs)).total()
    return 2 * common / (len(mine) + len(theirs)) if mine or theirs else 1.0


def _compare(first: float, second: float) -> float:
    return 0.5 if first == second else float(first > second)


def play(rows: Sequence[Row], judge: Judge, both_orders: bool = True) -> list[Game]:
    """Let every two systems meet on every row; with `both_orders` twice, each first once.

    >>> row = {"prompt": "Who?", "wanted": "Ada", "answers": {"base": "Eva", "tuned": "Ada"}}
    >>> play([row], exact_judge, both_orders=False)
    [Game(first='base', second='tuned', score=0.0, row=0)]
    """
    games = []
    meet = itertools.permutations if both_orders else itertools.combinations
    for i, row in enumerate(rows):
        answers, systems = row["answers"], rows[0]["answers"].keys()
        if answers.keys() != systems:
            raise EvaluationError(f"row {i} must have answers of {[*systems]}, not {[*answers]}")
        for first, second in meet(answers, 2):
            score = judge(row, answers[first], answers[second])
            if score not in (0, 0.5, 1):
                raise EvaluationError(f"row {i}: a verdict is 1, 0.5 (a tie) or 0, not {score!r}")
            games.append(Game(first, second, float(score), i))
    return games


def expected_score(rating: float, other: float) -> float:
    """Elo's expectation of a game: 400 points ahead are ten wins to one.

    >>> round(expected_score(1400, 1000), 4)
    0.9091
    """
    return 1 / (1 + 10 ** ((other - rating) / 400))


def elo(games: Sequence[Game]) -> dict[str, float]:
    """Elo ratings after the games, in the order given: each moves `K` times the surprise.

    >>> elo([Game("a", "b", 1.0, 0)])
    {'a': 1016.0, 'b': 984.0}
    """
    ratings = dict.fromkeys(_systems(games), float(START))
    for first, second, score, _ in games:
        change = K * (score - expected_score(ratings[first], ratings[second]))
        ratings[first] += change
        ratings[second] -= change
    return ratings


def elo_over_orders(
    games: Sequence[Game], orders: int = 10_000, seed: int = 0
) -> dict[str, Interval]:
    """Mean Elo over random orders of the games, and the middle 95 % (section 5 of the paper).

    >>> games = [Game("a", "b", 1.0, 0), Game("a", "b", 1.0, 1), Game("a", "b", 0.0, 2)]
    >>> {name: round(rating.mean) for name, rating in elo_over_orders(games, 1000).items()}
    {'a': 1015, 'b': 985}
    """
    systems = _systems(games)
    first, second = (np.array([systems.index(game[side]) for game in games]) for side in (0, 1))
    score = np.array([game.score for game in games])
    rng, ratings = np.random.default_rng(seed), np.full((orders, len(systems)), float(START))
    for at in range(0, orders, 1000):  # all orders together would take a gigabyte
        some = ratings[at : at + 1000]
        each, all_games = np.arange(len(some)), np.arange(len(games), dtype=np.int32)
        order = rng.permuted(np.tile(all_games, (len(some), 1)), axis=1)
        for game in order.T:  # the n-th game of every order at once
            a, b = first[game], second[game]
            surprise = score[game] - expected_score(some[each, a], some[each, b])
            some[each, a] += K * surprise
            some[each, b] -= K * surprise
    return _intervals(systems, ratings.mean(axis=0), ratings)


def bradley_terry(games: Sequence[Game]) -> dict[str, float]:
    """The ratings under which the games are likeliest, on Elo's scale; no order comes into it.

    A tie is half a win for each. By the fixed point of Zermelo (1929): a system's strength is its
    wins over the sum, over its games, of 1 / (its strength + the other's). `EvaluationError` if
    some systems never lost a point to the others: their ratings would be infinite.

    >>> games = [Game("a", "b", 1.0, 0)] * 10 + [Game("b", "a", 1.0, 0)]
    >>> {name: round(rating) for name, rating in bradley_terry(games).items()}
    {'a': 1200, 'b': 800}
    """
    systems, points = _points(games)
    return dict(zip(systems, _fit(points.sum(axis=0)[None])[0].tolist(), strict=True))


def bradley_terry_over_rows(
    games: Sequence[Game], rounds: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Bradley–Terry ratings, and the middle 95 % over prompts drawn anew (a bootstrap)."""
    systems, points = _points(games)
    shares = np.full(len(points), 1 / len(points))
    draws = np.random.default_rng(seed).multinomial(len(points), shares, size=rounds)
    # Half a tie more between every two systems: so no draw gives an infinite rating.
    drawn = np.einsum("bn,nij->bij", draws, points) + 0.25 * (1 - np.eye(len(systems)))
    return _intervals(systems, _fit(points.sum(axis=0)[None])[0], _fit(drawn))


def _systems(games: Sequence[Game]) -> list[str]:
    if not games:
        raise EvaluationError("no games, so no ratings; let the systems play first")
    return list(dict.fromkeys(name for game in games for name in game[:2]))


def _points(games: Sequence[Game]) -> tuple[list[str], np.ndarray]:
    """The systems, and the points that i took from j in each row: `[rows, systems, systems]`."""
    from scipy.sparse.csgraph import connected_components

    systems = _systems(games)
    index = {name: i for i, name in enumerate(systems)}
    rows = {row: i for i, row in enumerate(sorted({game.row for game in games}))}
    points = np.zeros((len(rows), len(systems), len(systems)))
    for first, second, score, row in games:
        points[rows[row], index[first], index[second]] += score
        points[rows[row], index[second], index[first]] += 1 - score
    # There is a maximum if each system took points from each other, maybe by way of others.
    count, group = connected_components(points.sum(axis=0) > 0, connection="strong")
    if count > 1:
        aside = [name for name, g in zip(systems, group, strict=True) if g == group[-1]]
        raise EvaluationError(
            f"no finite estimate of how far {aside} are from the others: points must go both ways "
            "between them; play more games, or leave them out"
        )
    return systems, points


def _fit(wins: np.ndarray) -> np.ndarray:
    """Ratings around `START`, on Elo's scale, for a batch of matrices of points `[b, n, n]`."""
    games, won = wins + wins.transpose(0, 2, 1), wins.sum(axis=2)
    strength = np.ones(won.shape)
    for _ in range(10_000):
        before = strength
        pairs = strength[:, :, None] + strength[:, None, :]
        strength = won / (games / pairs).sum(axis=2)
        strength /= np.exp(np.log(strength).mean(axis=1, keepdims=True))
        if np.abs(np.log(strength / before)).max() < 1e-9:
            break
    return START + 400 / math.log(10) * np.log(strength)


def _intervals(systems: list[str], centre: np.ndarray, found: np.ndarray) -> dict[str, Interval]:
    columns = zip(systems, centre, *np.quantile(found, (0.025, 0.975), axis=0), strict=True)
    return {name: Interval(*map(float, numbers)) for name, *numbers in columns}
