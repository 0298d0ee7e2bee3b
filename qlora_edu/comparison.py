"""Chapter 8: what several runs show: a mean with its interval, and whether two ways are equal."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from qlora_edu.errors import TrainingError

Runs = Sequence[float]  # the value of a measure for each run, by seed


class Interval(NamedTuple):
    """A mean over seeds, and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def no_spread(values: Runs) -> bool:
    """Whether values are the same but for rounding."""
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())


def mean_interval(values: Runs, confidence: float = 0.95) -> Interval:
    """Student's t interval for the mean of two or more independent runs.

    >>> [round(end, 3) for end in mean_interval([0.90, 0.94, 0.92])]
    [0.92, 0.87, 0.97]
    """
    from scipy.stats import ttest_1samp

    if len(values) < 2:
        raise TrainingError(f"an interval needs at least two runs, not {len(values)}: run more")
    if not np.isfinite(values).all():
        advice = "report the run that failed instead of leaving it out"
        raise TrainingError(f"not every value is finite in {list(values)}: {advice}")
    mean = float(np.mean(values))
    if no_spread(values):  # the interval is a point, where SciPy divides 0 by 0
        return Interval(mean, mean, mean)
    low, high = ttest_1samp(values, 0).confidence_interval(confidence)
    return Interval(mean, float(low), float(high))


class Equivalence(NamedTuple):
    """What two one-sided tests say of the mean difference between two methods.

    `difference` has its interval at 1 - 2 * level, `p` is the larger of the two p values. `verdict`
    is "equivalent", "different" (by more than the margin, surely) or "not shown".
    """

    difference: Interval
    p: float
    equivalent: bool
    verdict: str


def equivalence(
    first: Runs, second: Runs, margin: float, level: float = 0.05, paired: bool = True
) -> Equivalence:
    """Are two methods equal up to `margin`? Two one-sided t tests on runs paired by seed.

    "They differ by the margin or more" has to be refuted on both sides, each at `level`: to find
    *no difference* proves nothing, with few seeds. Choose the margin, in the unit of the values,
    before you look at the runs. If not `paired`, by Welch's tests. Source: Schuirmann (1987).

    >>> full, qlora = [0.95, 0.97, 0.96, 0.97], [0.94, 0.97, 0.97, 0.96]
    >>> equivalence(qlora, full, margin=0.03).verdict
    'equivalent'
    >>> equivalence(qlora, full, margin=0.005).verdict  # which is not "different"
    'not shown'
    """
    from scipy.stats import ttest_ind, ttest_rel

    if paired and len(first) != len(second):
        raise TrainingError(f"{len(first)} runs cannot be paired with {len(second)}: one per seed")
    if not margin > 0:
        raise TrainingError(f"the margin must be positive, not {margin}")
    mean = mean_interval(first).mean - mean_interval(second).mean
    groups = [np.subtract(first, second)] if paired else [first, second]
    test: Any = ttest_rel if paired else partial(ttest_ind, equal_var=False)  # Student's, Welch's
    if all(no_spread(group) for group in groups):  # nothing to estimate: the difference decides
        difference, p = Interval(mean, mean, mean), float(abs(mean) >= margin)
    else:
        low, high = test(first, second).confidence_interval(1 - 2 * level)
        difference = Interval(mean, float(low), float(high))
        above = test(np.add(first, margin), second, alternative="greater").pvalue
        below = test(np.subtract(first, margin), second, alternative="less").pvalue
        p = float(max(above, below))
    beyond = difference.low > margin or difference.high < -margin
    verdict = "equivalent" if p < level else "different" if beyond else "not shown"
    return Equivalence(difference, p, p < level, verdict)
