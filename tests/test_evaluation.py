"""Chapter 10: judges, tournaments and ratings, held against definitions and other estimators."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from qlora_edu.errors import EvaluationError
from qlora_edu.evaluation import (
    Game,
    bradley_terry,
    bradley_terry_over_rows,
    elo,
    elo_over_orders,
    exact_judge,
    expected_score,
    play,
    word_f1,
    word_judge,
)

ROW = {"prompt": "Who?", "wanted": "Ada", "answers": {"a": "Ada", "b": "Eva", "c": "ada lovelace"}}


def make_games(strengths: dict[str, float], rows: int, seed: int = 0) -> list[Game]:
    """Games whose winners are drawn by Bradley and Terry's model, a few of them ties."""
    rng_state, games = random.Random(seed), []
    for row in range(rows):
        for first, second in itertools.combinations(strengths, 2):
            chance = expected_score(strengths[first], strengths[second])
            score = 0.5 if rng_state.random() < 0.1 else float(rng_state.random() < chance)
            games.append(Game(first, second, score, row))
    return games


# Judges


@pytest.mark.parametrize("judge", [exact_judge, word_judge])
@given(first=st.text(max_size=12), second=st.text(max_size=12), wanted=st.text(max_size=12))
def test_judges_are_fair(judge, first, second, wanted):
    """Who stands first makes no difference, equals tie, and the right answer never loses."""
    row = {"prompt": "?", "wanted": wanted}
    assert judge(row, first, second) == 1 - judge(row, second, first)
    assert judge(row, first, first) == 0.5
    assert judge(row, wanted, second) >= 0.5


def test_the_judges_differ_where_an_answer_is_nearly_right():
    assert exact_judge(ROW, "ada", "Eva") == 0.5 and word_judge(ROW, "ada", "Eva") == 1
    assert word_f1("", "") == 1 and word_f1("", "x") == word_f1("x", "") == 0
    assert word_f1("red red lamp", "red lamp lamp") == pytest.approx(2 * 2 / 6)


def test_every_pair_meets_on_every_row_in_both_orders():
    games = play([ROW, ROW], exact_judge)
    assert len(games) == 2 * 3 * 2 and len(set(games)) == len(games)
    assert {game[:2] for game in games} == set(itertools.permutations("abc", 2))
    once = play([ROW], exact_judge, both_orders=False)
    assert [game[:2] for game in once] == list(itertools.combinations("abc", 2))


def test_a_judge_sees_the_right_answers_and_must_give_a_verdict():
    def judge(row, first, second):
        assert row is ROW and {first, second} <= set(ROW["answers"].values())
        return 0.5 if first < second else 0.7

    with pytest.raises(EvaluationError, match="row 0: .*not 0.7"):
        play([ROW], judge)


def test_a_missing_answer_is_noticed():
    hole = {"prompt": "When?", "answers": {"a": "Monday", "c": "?"}}
    with pytest.raises(EvaluationError, match=r"row 1 must .*, not \['a', 'c'\]"):
        play([ROW, hole], exact_judge)


# Elo


def test_elo_by_hand():
    games = [Game("a", "b", 1.0, 0), Game("b", "a", 0.5, 0)]
    after_one = (1016.0, 984.0)
    change = 32 * (0.5 - 1 / (1 + 10 ** (32 / 400)))
    assert elo(games) == pytest.approx({"a": after_one[0] - change, "b": after_one[1] + change})


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("efgh"),
                          st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=30))  # fmt: skip
def test_elo_gives_what_it_takes(games):
    games = [Game(a, b, score, i) for i, (a, b, score) in enumerate(games)]
    ratings = elo(games)
    assert sum(ratings.values()) == pytest.approx(1000 * len(ratings))
    first, second, score, _ = games[0]
    assert (elo(games[:1])[first] - 1000) * (score - 0.5) >= 0


def test_the_mean_over_orders_is_that_over_all_permutations():
    games = [Game("a", "b", 1.0, 0), Game("b", "c", 0.5, 0), Game("a", "c", 0.0, 0),
             Game("b", "a", 1.0, 1), Game("c", "b", 1.0, 1)]  # fmt: skip
    every = [elo(list(order)) for order in itertools.permutations(games)]
    found = elo_over_orders(games, orders=20_000)
    for name, rating in found.items():
        exact = np.array([ratings[name] for ratings in every])
        # The mean of 20,000 draws is off by some deviation / 141.
        assert rating.mean == pytest.approx(exact.mean(), abs=5 * exact.std() / 141)
        assert exact.min() - 1e-9 <= rating.low <= rating.high <= exact.max() + 1e-9
    assert found == elo_over_orders(games, orders=20_000) != elo_over_orders(games, 20_000, seed=1)


def test_the_interval_over_orders_knows_nothing_of_the_prompts():
    """A hundred times the same games in each row: the order's interval does not narrow to it."""
    games = make_games({"a": 1100, "b": 1000}, 100)
    one, many = (elo_over_orders(games * n, orders=300)["a"] for n in (1, 20))
    assert many.high - many.low > 0.7 * (one.high - one.low)


# Bradley and Terry


def test_bradley_terry_is_the_likeliest():
    """The same maximum as a general optimiser finds, which knows nothing of the fixed point."""
    games = make_games({"a": 1200, "b": 1000, "c": 950, "d": 850}, 30)

    def surprise(ratings):
        at = dict(zip("abcd", [0, *ratings], strict=True))
        chances = [(g.score, expected_score(at[g.first], at[g.second])) for g in games]
        return -sum(s * math.log(p) + (1 - s) * math.log(1 - p) for s, p in chances)

    theirs = np.array([0, *minimize(surprise, [0, 0, 0], method="BFGS").x])
    mine = np.array([bradley_terry(games)[name] for name in "abcd"])
    np.testing.assert_allclose(mine - mine.mean(), theirs - theirs.mean(), atol=0.1)
    assert mine.mean() == pytest.approx(1000)


def test_bradley_terry_does_not_care_for_order_or_colour():
    games = make_games({"a": 1100, "b": 1000, "c": 900}, 20)
    turned = [Game(g.second, g.first, 1 - g.score, g.row) for g in reversed(games)]
    assert bradley_terry(games) == pytest.approx(bradley_terry(turned))


def test_bradley_terry_finds_what_the_games_were_drawn_from():
    strengths = {"a": 1150, "b": 1000, "c": 850}
    found = bradley_terry(make_games(strengths, 3000))
    for name, strength in strengths.items():
        # One game in ten is a tie whoever plays, which draws all ratings a little together.
        assert found[name] == pytest.approx(strength, abs=25)


@pytest.mark.parametrize(
    "games",
    [
        [Game("a", "b", 1.0, 0)],
        [Game("a", "b", 0.5, 0), Game("c", "d", 0.5, 0)],
        [Game("a", "b", 0.5, 0), Game("a", "c", 1.0, 0), Game("b", "c", 1.0, 0)],
    ],
)
def test_a_rating_without_an_estimate_is_refused(games):
    with pytest.raises(EvaluationError, match="no finite estimate"):
        bradley_terry(games)


def test_the_interval_over_prompts_covers_as_often_as_it_says():
    """In 60 tournaments the true difference is outside of a 95 % interval about three times."""
    truth, missed = {"a": 1060, "b": 1000, "c": 940}, 0
    for seed in range(60):
        games = [game for game in make_games(truth, 60, seed) if game.score != 0.5]
        a = bradley_terry_over_rows(games, rounds=300, seed=seed)["a"]
        assert a.low < a.mean < a.high
        missed += not a.low < 1060 < a.high
    assert missed <= 10  # 11 or more of 60 at 5 % would be rarer than one in three thousand


def test_more_prompts_narrow_the_interval():
    few, many = (
        bradley_terry_over_rows(make_games({"a": 1100, "b": 1000}, n), 300)["a"] for n in (30, 480)
    )
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4, rel=0.35)


def test_no_games_are_refused():
    for rate in (elo, elo_over_orders, bradley_terry, bradley_terry_over_rows):
        with pytest.raises(EvaluationError, match="no games"):
            rate([])
