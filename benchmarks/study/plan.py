"""What will be tested, and with how many seeds: settled from pilot runs, before the verdict runs.

The plan is `data/results/study_plan.json`. It is committed before the runs that it asks for.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from scipy.stats import ttest_1samp, ttest_ind

from benchmarks.stored import ROOT
from benchmarks.study.parts import MAIN

PLAN = ROOT / "data" / "results" / "study_plan.json"
PRIMARY, MARGINS = ("qlora", "full"), {"exact_match": 0.05, "held_out_loss": 0.01}
LEVEL, LEAST_SEEDS, MOST_SEEDS, POWER, TRIALS = 0.05, 10, 20, 0.8, 4000


def power(
    spreads: Sequence[float],
    correlation: float,
    seeds: int,
    margin: float,
    difference: float = 0.0,
) -> float:
    """How often two ways are found equivalent, if they truly differ by `difference`.

    Runs are drawn from a normal distribution with the standard deviations of the pilots, in pairs
    where the pilots' correlation is positive.

    >>> power((0.01, 0.01), 0.0, 10, 0.05), power((0.1, 0.1), 0.0, 10, 0.05)
    (1.0, 0.0)
    """
    paired, shared = correlation > 0, max(correlation, 0.0) * spreads[0] * spreads[1]
    covariance = [[spreads[0] ** 2, shared], [shared, spreads[1] ** 2]]
    runs = np.random.default_rng(0).multivariate_normal(
        [difference, 0.0], covariance, size=(TRIALS, seeds)
    )
    first, second = runs[..., 0], runs[..., 1]
    p = [
        ttest_1samp(first - second, -shift, axis=1, alternative=side).pvalue
        if paired
        else ttest_ind(first + shift, second, axis=1, equal_var=False, alternative=side).pvalue
        for shift, side in ((margin, "greater"), (-margin, "less"))
    ]
    return round(float((np.max(p, axis=0) < LEVEL).mean()), 2)


def pilot(runs: Sequence[dict], measure: str) -> dict[str, np.ndarray]:
    """The values of a measure in the pilot runs, by way, in the order of the seeds."""
    found = sorted((r for r in runs if r["part"] == "pilot"), key=lambda run: run["seed"])
    return {way: np.array([r[measure] for r in found if r["way"] == way]) for way in MAIN}


def make_plan(runs: Sequence[dict]) -> dict:
    """The pairs of ways, their spread in the pilots, and the power at each number of seeds."""
    rows = []
    for measure, margin in MARGINS.items():
        values = pilot(runs, measure)
        for pair in combinations(reversed(MAIN), 2):
            first, second = (values[way] for way in pair)
            spreads = [round(float(np.std(of_way, ddof=1)), 5) for of_way in (first, second)]
            correlation = round(float(np.corrcoef(first, second)[0, 1]), 2)
            rows.append(
                {
                    "pair": pair,
                    "measure": measure,
                    "margin": margin,
                    "primary": (pair, measure) == (PRIMARY, "exact_match"),
                    "pilot_difference": round(float(np.mean(first - second)), 5),
                    "pilot_spreads": spreads,
                    "pilot_correlation": correlation,
                    "paired": correlation > 0,
                    "power_if_equal": {
                        str(n): power(spreads, correlation, n, margin)
                        for n in range(LEAST_SEEDS, MOST_SEEDS + 1, 2)
                    },
                    "power_if_half_the_margin": {
                        str(n): power(spreads, correlation, n, margin, margin / 2)
                        for n in range(LEAST_SEEDS, MOST_SEEDS + 1, 2)
                    },
                }
            )
    asked = next(row for row in rows if row["primary"])["power_if_equal"]
    seeds = next((int(n) for n, found in asked.items() if found >= POWER), MOST_SEEDS)
    return {"seeds": seeds, "level": LEVEL, "rows": rows}
