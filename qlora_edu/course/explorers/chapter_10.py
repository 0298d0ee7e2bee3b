"""The explorer of chapter 10: one tournament, three judges, two ratings, and who is first?"""

import json
from functools import cache
from typing import Any

import matplotlib.pyplot as plt
from ipywidgets import Dropdown, IntSlider
from matplotlib.axes import Axes

from qlora_edu.comparison import Interval
from qlora_edu.course.doctor import DATA
from qlora_edu.course.explorers.chapter_08 import STUDY_COLOURS
from qlora_edu.course.explorers.core import Explorer
from qlora_edu.course.plots import PALETTE, figure_png, words_png
from qlora_edu.errors import EvaluationError
from qlora_edu.evaluation import (
    Game,
    Judge,
    Row,
    bradley_terry_over_rows,
    elo_over_orders,
    exact_judge,
    play,
    word_judge,
)

TOURNAMENT = DATA / "results" / "tournament.json"
ELO, BRADLEY_TERRY = "Elo over 1,000 orders", "Bradley–Terry over prompts"
RATINGS = {
    ELO: "the middle 95 % of 1,000 orders of the same games",
    BRADLEY_TERRY: "the middle 95 % of 1,000 draws of the prompts",
}
SYSTEM_COLOURS = {"none": PALETTE["base"], **STUDY_COLOURS, "fp4": PALETTE["quantized"]}


def longer_judge(row: Row, first: str, second: str) -> float:
    """Longer beats shorter, whatever the answers say: the bias of which judges are suspected.

    >>> longer_judge({"prompt": "Who?"}, "Ada", "I cannot say"), longer_judge({}, "Ada", "Eva")
    (0.0, 0.5)
    """
    return 0.5 if len(first) == len(second) else float(len(first) > len(second))


JUDGES: dict[str, Judge] = {
    "exact answer": exact_judge,
    "shared words": word_judge,
    "longer answer": longer_judge,
}


@cache
def load_tournament() -> dict[str, Any]:
    """The answers of all systems to the same prompts, as benchmarks/tournament.py stored them.

    `systems` holds what each one is, by name; `rows` holds the rows of `qlora_edu.evaluation`.
    """
    return json.loads(TOURNAMENT.read_text(encoding="utf-8"))


@cache
def tournament_games(judge: str) -> list[Game]:
    """The games of all prompts under one of `JUDGES`, each pair once per prompt.

    No judge here looks at the order: a second game with the answers swapped would tell nothing new.
    """
    return play(load_tournament()["rows"], JUDGES[judge], both_orders=False)


@cache
def tournament_ratings(judge: str, rating: str, prompts: int) -> dict[str, Interval]:
    """Each system's rating from the first `prompts` prompts, the best one first.

    Raises:
        EvaluationError: if Bradley–Terry has no finite estimate from so few.
    """
    games = [game for game in tournament_games(judge) if game.row < prompts]
    rate = {ELO: elo_over_orders, BRADLEY_TERRY: bradley_terry_over_rows}[rating]
    found = rate(games, 1000)
    return dict(sorted(found.items(), key=lambda item: -item[1].mean))


def first_and_second(ratings: dict[str, Interval]) -> str:
    """Say who is first, and whether the interval reaches into that of the second.

    >>> first_and_second({"a": Interval(1100, 1050, 1150), "b": Interval(900, 840, 960)})
    'a is first, and its interval is clear of that of b'
    >>> first_and_second({"a": Interval(1100, 1050, 1150), "b": Interval(1060, 990, 1130)})
    'a is first, but its interval overlaps that of b'
    """
    (first, best), (second, next_best) = list(ratings.items())[:2]
    overlaps = best.low <= next_best.high
    what = "but its interval overlaps" if overlaps else "and its interval is clear of"
    return f"{first} is first, {what} that of {second}"


def draw_ratings(ax: Axes, ratings: dict[str, Interval]) -> None:
    """Draw a system's interval, the best on top, over the band of the first; merged ones hollow."""
    best = next(iter(ratings.values()))
    ax.axvspan(best.low, best.high, color=PALETTE["ink"], alpha=0.08, linewidth=0)
    about = load_tournament()["systems"]
    ax.set_yticks(range(len(ratings)), list(ratings))
    for y, (name, found) in enumerate(ratings.items()):
        color = SYSTEM_COLOURS.get(about.get(name, {}).get("way"), PALETTE["ink"])
        face = "white" if "merged" in about.get(name, {}) else color
        ax.plot([found.low, found.high], [y, y], color=color, linewidth=4, solid_capstyle="butt")
        ax.plot(found.mean, y, "o", color=color, markerfacecolor=face, markersize=9)
        ax.text(found.high, y, f"  {found.mean:.0f}", color=color, va="center")
        ax.get_yticklabels()[y].set_color(color)
    ax.set_ylim(len(ratings) - 0.5, -0.5)
    ax.margins(x=0.09)  # room for the last number
    ax.grid(axis="x")


def render_tournament(judge: str = "exact answer", rating: str = ELO, prompts: int = 150) -> bytes:
    """Draw the ratings of the stored tournament with their intervals, as PNG bytes."""
    try:
        ratings = tournament_ratings(judge, rating, prompts)
    except EvaluationError as error:
        return words_png(f"{prompts} prompts are too few here: {error}")
    figure, ax = plt.subplots(figsize=(9.5, 4.4), layout="constrained")
    draw_ratings(ax, ratings)
    ax.set_title(f"{judge.capitalize()}, {prompts} prompts: {first_and_second(ratings)}")
    ax.set_xlabel(f"rating; the bar is {RATINGS[rating]}")
    return figure_png(figure)


def tournament_explorer() -> Explorer:
    """Make the explorer of chapter 10: a judge, a rating, a number of prompts, and who is first."""
    return Explorer(
        render_tournament,
        judge=Dropdown(options=list(JUDGES), description="judge"),
        rating=Dropdown(options=list(RATINGS), description="rating"),
        prompts=IntSlider(90, min=10, max=150, step=20, description="prompts"),
    )
