"""Chapter 8: what several runs show: a mean with its interval, and whether two ways are equal."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from qlora_edu.errors import TrainingError


class Interval(NamedTuple):
    """A mean over seeds, and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval for the mean of a few independent runs.

    Raises:
        TrainingError: for fewer than two values, which say nothing about how far runs differ.

    >>> [round(end, 3) for end in mean_interval([0.90, 0.94, 0.92])]
    [0.92, 0.87, 0.97]
    """
    from scipy.stats import t

    if len(values) < 2:
        raise TrainingError(f"an interval needs at least two runs, not {len(values)}")
    numbers = torch.tensor(values, dtype=torch.float64)
    half = (
        float(t.ppf((1 + confidence) / 2, len(values) - 1))
        * numbers.std().item()
        / len(values) ** 0.5
    )
    return Interval(
        numbers.mean().item(), numbers.mean().item() - half, numbers.mean().item() + half
    )


class Equivalence(NamedTuple):
    """What two one-sided tests say of the mean difference between two methods."""

    difference: Interval
    """Mean of (first - second) over the seeds, with its interval at 1 - 2 * level."""
    p: float
    """The larger of the two one-sided p values."""
    equivalent: bool
    """True if the whole interval lies within (-margin, margin)."""


def equivalence(
    first: Sequence[float], second: Sequence[float], margin: float, level: float = 0.05
) -> Equivalence:
    """Are two methods equal up to ``margin``? Two one-sided t tests on runs paired by seed.

    A test that finds *no difference* proves nothing: with few seeds hardly any test finds one. So
    the burden is turned round: "they differ by the margin or more" has to be refuted on both sides.
    ``margin`` is in the unit of the values and is to be chosen before the runs are looked at.

    Raises:
        TrainingError: if the runs are not paired, fewer than two, or the margin is not positive.

    Source: Schuirmann, "A comparison of the two one-sided tests procedure" (1987).

    >>> full, qlora = [0.95, 0.97, 0.96, 0.97], [0.94, 0.97, 0.97, 0.96]
    >>> equivalence(qlora, full, margin=0.03).equivalent
    True
    >>> equivalence(qlora, full, margin=0.005).equivalent  # not shown, which is not "different"
    False
    """
    from scipy.stats import t

    if len(first) != len(second):
        raise TrainingError(f"{len(first)} runs cannot be paired with {len(second)}")
    if not margin > 0:
        raise TrainingError(f"the margin must be positive, not {margin}")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    interval = mean_interval(differences, 1 - 2 * level)
    error = torch.tensor(differences, dtype=torch.float64).std().item() / len(differences) ** 0.5
    distance = margin - abs(interval.mean)
    # Runs that differ by exactly the same amount leave nothing to estimate: t is then infinite.
    statistic = distance / error if error else math.copysign(math.inf, distance)
    p = float(t.sf(statistic, len(differences) - 1))
    return Equivalence(interval, p, p < level)
