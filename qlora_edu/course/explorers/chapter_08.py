"""The explorer of chapter 8: which two ways, how many seeds, which margin, and what is shown?"""

import json
import math
from functools import cache
from typing import Any

import matplotlib.pyplot as plt
from ipywidgets import Dropdown, FloatSlider, IntSlider
from matplotlib.axes import Axes

from qlora_edu.comparison import Equivalence, equivalence
from qlora_edu.course.doctor import DATA
from qlora_edu.course.explorers.core import Explorer
from qlora_edu.course.plots import PALETTE, figure_png, words_png

STUDY_WAYS = (
    *("full", "lora", "qlora", "houlsby"),
    *("nf4 without DQ", "fp4", "int4", "qlora + embeddings"),
)
STUDY_MEASURES = {
    "exact match": "exact match (share of the answers)",
    "held-out loss": "held-out loss (nats per token)",
    "forgetting": "loss on pretraining text (nats per token)",
}
STUDY_COLOURS = {
    "full": PALETTE["gradient"],
    "lora": PALETTE["adapter"],
    "qlora": PALETTE["quantized"],
    "houlsby": PALETTE["highlight"],
}


@cache
def load_study() -> dict[str, Any]:
    """What `make experiments` has stored of the study; without runs if there is nothing yet."""
    path = DATA / "results" / "three_ways.json"
    return json.loads(path.read_text()) if path.exists() else {"runs": []}


def study_values(measure: str, way: str, rows: int = 3000) -> dict[int, float]:
    """What each seed of a way came to, by seed; `rows` is the number of different rows."""
    key = measure.replace(" ", "_").replace("-", "_")
    return {
        run["seed"]: math.log(run["text_perplexity"]) if measure == "forgetting" else run[key]
        for run in sorted(load_study()["runs"], key=lambda run: run["seed"])
        if run["part"] != "tuning" and run["way"] == way and run["rows"] == rows
    }


def study_pairs(
    measure: str, first: str, second: str, seeds: int = 99
) -> tuple[list[float], list[float]]:
    """The runs of two ways, paired by seed; the first `seeds` that both have."""
    one, two = study_values(measure, first), study_values(measure, second)
    shared = sorted(one.keys() & two.keys())[:seeds]
    return [one[seed] for seed in shared], [two[seed] for seed in shared]


def draw_runs(ax: Axes, runs: dict[str, list[float]]) -> None:
    """Draw every run as a dot, and a line between the two runs of a seed."""
    for pair in zip(*runs.values(), strict=True):
        ax.plot([0, 1], pair, color=PALETTE["ink"], alpha=0.3, linewidth=1)
    for x, (way, values) in enumerate(runs.items()):
        color = STUDY_COLOURS.get(way.strip(), PALETTE["quantized"])
        ax.plot([x] * len(values), values, "o", color=color, markersize=8, alpha=0.8)
        ax.hlines(sum(values) / len(values), x - 0.12, x + 0.12, color=color, linewidth=3)
    ax.set_xticks([0, 1], [way.strip() for way in runs])
    ax.set_xlim(-0.4, 1.4)


def draw_difference(
    ax: Axes, differences: list[float], found: Equivalence, margin: float, names: tuple[str, str]
) -> None:
    """Draw the interval of the mean difference over the band of the margin."""
    middle, low, high = found.difference
    ax.axvspan(-margin, margin, color=PALETTE["device"], alpha=0.18)
    ax.axvline(0, color=PALETTE["ink"], linewidth=1)
    ax.plot([low, high], [0, 0], color=PALETTE["ink"], linewidth=4, solid_capstyle="butt")
    ax.plot(middle, 0, "D", color=PALETTE["ink"], markersize=8)
    ax.plot(differences, [-0.5] * len(differences), "o", color=PALETTE["highlight"], alpha=0.8)
    ax.text(0, 0.62, "the margin", ha="center", color=PALETTE["device"])
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
    ax.text(middle, 0.18, "mean, and its interval", ha="center", color=PALETTE["ink"], bbox=box)
    ax.text(middle, -0.82, "each seed", ha="center", color=PALETTE["highlight"], bbox=box)
    reach = 1.25 * max(margin, abs(low), abs(high), *map(abs, differences))
    ax.set(ylim=(-1, 0.9), xlim=(-reach, reach), yticks=[])
    ax.set_xlabel(f"{names[0]} minus {names[1]}")
    ax.spines["left"].set_visible(False)


def render_study(
    measure: str = "exact match",
    first: str = "qlora",
    second: str = "full",
    margin: float = 0.05,
    seeds: int = 3,
) -> bytes:
    """Draw the stored runs of two ways, the interval of their difference, and the verdict."""
    one, two = study_pairs(measure, first, second, seeds)
    if len(one) < 2:
        return words_png(f"{first} and {second} have no two seeds in common yet: make experiments")
    if first == second:
        return words_png(f"{first} is {second}: choose two ways")
    found = equivalence(one, two, margin)
    figure, (left, right) = plt.subplots(
        ncols=2, figsize=(9.5, 3.8), width_ratios=(2, 3), layout="constrained"
    )
    draw_runs(left, {first: one, second: two})
    left.set_ylabel(STUDY_MEASURES[measure])
    differences = [a - b for a, b in zip(one, two, strict=True)]
    draw_difference(right, differences, found, margin, (first, second))
    verdict = {
        "equivalent": f"equivalent within ±{margin:g}",
        "different": f"different, by more than {margin:g}",
        "not shown": f"nothing is shown at a margin of {margin:g}",
    }[found.verdict]
    figure.suptitle(f"{len(one)} seeds: {verdict}", fontsize=13, fontweight="bold")
    return figure_png(figure)


def study_explorer() -> Explorer:
    """Make the explorer of chapter 8: two ways, a margin, a number of seeds, and the verdict."""
    return Explorer(
        render_study,
        measure=Dropdown(options=list(STUDY_MEASURES), description="measure"),
        first=Dropdown(options=STUDY_WAYS, value="qlora", description="first"),
        second=Dropdown(options=STUDY_WAYS, value="full", description="second"),
        margin=FloatSlider(0.05, min=0.005, max=0.2, step=0.005, readout_format=".3f",
                           description="margin"),
        seeds=IntSlider(3, min=2, max=5, description="seeds"),
    )  # fmt: skip
