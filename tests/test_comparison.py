"""Chapter 8: Student's interval, equivalence by two one-sided tests, and what they say in words."""

import pytest
import torch

from qlora_edu.comparison import equivalence, mean_interval
from qlora_edu.errors import TrainingError


def test_the_interval_is_students():
    from scipy import stats

    values = [0.90, 0.94, 0.92, 0.97, 0.88]
    low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    assert mean_interval(values) == pytest.approx((sum(values) / 5, low, high))
    with pytest.raises(TrainingError, match="at least two runs"):
        mean_interval([0.9])
    with pytest.raises(
        TrainingError, match="not every value is finite .*report the run that failed"
    ):
        mean_interval([0.9, float("nan")])


def test_equivalence_is_two_one_sided_paired_t_tests():
    from scipy import stats

    first, second, margin = [0.95, 0.97, 0.96, 0.99], [0.94, 0.975, 0.97, 0.96], 0.03
    found = equivalence(first, second, margin)
    differences = [a - b for a, b in zip(first, second, strict=True)]
    below = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    above = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    assert found.p == pytest.approx(max(below, above))
    # Twice the level is outside: the interval says the same as the two tests.
    inside = -margin < found.difference.low and found.difference.high < margin
    assert found.equivalent == inside == (found.p < 0.05)


def test_equivalence_without_pairs_is_two_one_sided_welch_tests():
    """The groups may have other spreads and sizes; where runs go together, pairs say more."""
    from scipy import stats

    first, second, margin = [0.95, 0.97, 0.96, 0.99], [0.90, 0.99, 0.97], 0.08
    found = equivalence(first, second, margin, paired=False)
    p = [
        stats.ttest_ind(
            [x + shift for x in first], second, equal_var=False, alternative=side
        ).pvalue
        for shift, side in ((margin, "greater"), (-margin, "less"))
    ]
    assert found.p == pytest.approx(max(p))
    low, high = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.9)
    assert found.difference == pytest.approx((0.9675 - 2.86 / 3, low, high))
    together = [0.80, 0.90, 1.00], [0.81, 0.90, 0.99]
    assert equivalence(*together, 0.05).verdict == "equivalent"
    assert equivalence(*together, 0.05, paired=False).verdict == "not shown"
    assert equivalence([0.5, 0.5], [0.5, 0.5, 0.5], 0.1, paired=False).equivalent


def test_equivalence_has_a_verdict_for_runs_without_spread(recwarn):
    assert equivalence([0.5, 0.5], [0.5, 0.5], 0.1).equivalent
    assert not equivalence([0.9, 0.9], [0.5, 0.5], 0.1).equivalent
    # The same difference twice, but for rounding; and a difference of the margin itself.
    assert equivalence([0.9, 0.7, 0.8], [0.8, 0.6, 0.7], 0.2).verdict == "equivalent"
    assert equivalence([2.0, 1.0], [1.0, 0.0], 1.0)[1:] == (1.0, False, "not shown")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("first", "verdict"),
    [
        ([0.90, 0.92, 0.91], "equivalent"),
        ([0.70, 0.72, 0.71], "different"),
        ([1.10, 1.12, 1.11], "different"),  # on the other side
        ([0.86, 0.90, 0.85], "not shown"),  # the interval reaches over the margin
        ([0.70, 0.99, 0.91], "not shown"),  # it is wide
    ],
)
def test_the_verdict_is_where_the_whole_interval_lies(first, verdict):
    found = equivalence(first, [0.91, 0.92, 0.90], 0.05)
    low, high = found.difference[1:]
    inside, beyond = low > -0.05 and high < 0.05, low > 0.05 or high < -0.05
    assert found.verdict == verdict
    assert verdict == ("equivalent" if inside else "different" if beyond else "not shown")


def test_equivalence_finds_equal_what_is_equal_and_rarely_what_is_not():
    """At the margin itself the test may err in one case of twenty; 3,000 draws bound that well."""
    generator = torch.Generator().manual_seed(0)

    def share(true_difference, count=3000):
        draws = true_difference + 0.02 * torch.randn(count, 5, generator=generator)
        zeros = [0.0] * 5
        return sum(equivalence(row, zeros, 0.05).equivalent for row in draws.tolist()) / count

    assert share(0.0, 600) > 0.95
    assert 0.035 < share(0.05) < 0.065  # 0.05, give or take four standard errors
    assert share(0.10, 600) == 0.0


@pytest.mark.parametrize(
    ("first", "second", "margin", "says"),
    [([1.0], [1.0, 2.0], 0.1, "cannot be paired"), ([1.0, 2.0], [1.0, 2.0], 0, "must be positive")],
)
def test_equivalence_refuses_what_it_cannot_test(first, second, margin, says):
    with pytest.raises(TrainingError, match=says):
        equivalence(first, second, margin)
