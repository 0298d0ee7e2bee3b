"""The exercises of notebook 8: weigh, implement, repair, test, judge, and plan a comparison."""

import math
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from qlora_edu.course.exercises.core import Exercise, Inputs, Seen, chose, faults_left
from qlora_edu.text.conversations import IGNORED
from qlora_edu.training import learning_rate_at


def step_loss(means: Sequence[float], tokens: Sequence[int]) -> float:
    """The loss of a step over all its answer tokens, from the mean loss of each micro-batch."""
    return _sum_of_losses(means, tokens) / sum(tokens)


def _sum_of_losses(means, tokens):
    return sum(mean * count for mean, count in zip(means, tokens, strict=True))


ex_8_1 = Exercise(
    "8.1 the loss of a step",
    step_loss,
    lambda random: [
        ([2.0, 1.0], [1, 3]),
        ([0.5, 4.0, 1.5], [40, 2, 8]),
        (torch.rand(4, generator=random).tolist(), [17, 3, 46, 29]),
    ],
    atol=1e-6,
    because={
        "a mean of means counts a token of a short micro-batch more than one of a long one: weigh "
        "each mean by its tokens": lambda means, tokens: sum(means) / len(means),
        "that is the sum over the tokens; the loss of a step is their mean": _sum_of_losses,
        "divide by the number of tokens, not by the number of micro-batches": (
            lambda means, tokens: _sum_of_losses(means, tokens) / len(means)
        ),
    },
)


def rate_at(step: int, lr: float, warmup: int, total: int) -> float:
    """The rate of step 0, 1, 2 …: up a line for `warmup` steps, down half a cosine to `total`."""
    return learning_rate_at(step, lr, "cosine", warmup, total)


def _down_by(share):
    """Make an answer with the right warm-up, which then falls as `share(step, warmup, total)`."""
    return lambda step, lr, warmup, total: (
        lr * (step / warmup if step < warmup else share(step, warmup, total))
    )


def _half_wave(done):
    return (1 + math.cos(math.pi * done)) / 2


ex_8_2 = Exercise(
    "8.2 warm-up and cosine",
    rate_at,
    [
        *((step, 0.003, 10, 60) for step in (0, 3, 10, 11, 35, 59)),
        *((step, 0.02, 25, 65) for step in (1, 24, 30, 45, 64)),
    ],
    atol=1e-8,
    because={
        "steps count from 0 here: the first step of a warm-up has rate 0": (
            lambda step, lr, warmup, total: (
                lr * (step + 1) / warmup if step < warmup else rate_at(step, lr, warmup, total)
            )
        ),
        "the cosine begins where the warm-up ends, at the full rate: subtract `warmup` above and "
        "below the line": _down_by(lambda step, warmup, total: _half_wave(step / total)),
        "a cosine ends at −1, and a rate at 0: take (1 + cos) / 2": (
            _down_by(lambda step, warmup, total: math.cos(math.pi * _done(step, warmup, total)))
        ),
        "that falls along a line; a cosine is flat at first": (
            _down_by(lambda step, warmup, total: 1 - _done(step, warmup, total))
        ),
        "the fall takes total − warmup steps, not total: subtract `warmup` below the line too": (
            _down_by(lambda step, warmup, total: _half_wave((step - warmup) / total))
        ),
    },
)


def _done(step, warmup, total):
    return (step - warmup) / (total - warmup)


def labels_with_end(ids: Tensor, prompt_lengths: Sequence[int], end: int) -> Tensor:
    """Labels `[rows, tokens]` of rows that are padded with their own end token."""
    return _labels(ids, prompt_lengths, end)


def _labels(
    ids, prompt_lengths, end, no_end=False, shift=False, padding=False, prompt=False, anywhere=False
):
    """The right labels, with a switch for each mistake."""
    labels = ids.clone()
    for row, length in zip(labels, prompt_lengths, strict=True):
        ends = [i for i in range(0 if anywhere else length, len(row)) if row[i] == end]
        if ends and not padding:
            row[ends[0] + 1 :] = IGNORED
        if no_end:
            row[row == end] = IGNORED
        if not prompt:
            row[: length + shift] = IGNORED
    return labels


def _rows_with_ends(random: torch.Generator) -> Inputs:
    """Rows whose prompt holds an end token too; a full row, and one cut off before its end."""
    for end, stops in ((2, (6, 8, 7)), (0, (10, 11, 12)), (3, (7, 12, 9))):
        ids = torch.randint(5, 99, (3, 12), generator=random)
        for row, stop in zip(ids, stops, strict=True):
            row[1] = end
            row[stop:] = end
        yield ids, torch.randint(3, 6, (3,), generator=random).tolist(), end


ex_8_3 = Exercise(
    "8.3 where did the end go?",
    labels_with_end,
    _rows_with_ends,
    because={
        **faults_left(
            _labels,
            no_end="masking every token that equals the pad token masks the end of the answer as "
            "well: the first end token after the prompt is to be learned",
            shift="the first token of the answer has lost its label. The loss shifts by itself: "
            "labels stand where their tokens stand",
        ),
        "only the first end token is the answer's; those after it are padding, to be ignored": (
            partial(_labels, padding=True)
        ),
        "the prompt has labels: it is read, and not to be written": partial(_labels, prompt=True),
        "a prompt may hold end tokens too, of earlier turns: look for the first one after it": (
            partial(_labels, anywhere=True)
        ),
    },
)


def two_one_sided(
    first: Sequence[float], second: Sequence[float], margin: float, t: float
) -> dict[str, Any]:
    """The interval of the mean paired difference, and whether it lies within the margin.

    `t` is the one-sided quantile of Student's distribution for these runs.
    """
    return _judge_pairs(first, second, margin, t)


def _within(low, high, margin):
    return -margin < low and high < margin


def _judge_pairs(
    first, second, margin, t, *, paired=True, freedom=1, single=False, verdict=_within
):
    """The right test, with a switch for each mistake."""
    one, two = (torch.tensor(runs, dtype=torch.float64) for runs in (first, second))
    spread = (one - two).std(correction=freedom) if paired else (one.var() + two.var()).sqrt()
    error = spread.item() / (1 if single else len(one) ** 0.5)
    mean = (one - two).mean().item()
    low, high = mean - t * error, mean + t * error
    return {"low": low, "high": high, "equivalent": bool(verdict(low, high, margin))}


def _verdict_by(verdict):
    return lambda *given: _judge_pairs(*given, verdict=verdict)


def _pairs(random: torch.Generator) -> Inputs:
    """Runs whose seeds matter much, and whose methods differ little; one pair each way."""
    # A mean of nearly 0.
    yield [0.93, 0.87, 0.91, 0.90], [0.90, 0.90, 0.92, 0.90], 0.01, 2.353
    for count, t, shift, margin in (
        (5, 2.132, 0.013, 0.02),
        (4, 2.353, 0.0, 0.003),
        (5, 2.132, 0.05, 0.02),
    ):
        seeds = 0.9 + 0.05 * torch.randn(count, generator=random, dtype=torch.float64)
        noise = 0.004 * torch.randn(2, count, generator=random, dtype=torch.float64)
        yield (seeds + shift + noise[0]).tolist(), (seeds + noise[1]).tolist(), margin, t


ex_8_4 = Exercise(
    "8.4 two one-sided tests",
    two_one_sided,
    _pairs,
    # In float32 a difference of two accuracies is known to 1e-7.
    atol=1e-6,
    because={
        "the two runs of a seed are a pair: take the spread of their differences, in which "
        "whatever a seed does to both is gone": lambda *given: _judge_pairs(*given, paired=False),
        "the standard deviation of a sample divides by n − 1": (
            lambda *given: _judge_pairs(*given, freedom=0)
        ),
        "that is how far single runs scatter; their mean is known better, by √n": (
            lambda *given: _judge_pairs(*given, single=True)
        ),
        "an interval that holds 0 fails to show a difference, which is not to show equality: it "
        "has to lie within the margin as a whole": (
            _verdict_by(lambda low, high, margin: low <= 0 <= high)
        ),
        "the mean alone within the margin may be luck: both ends have to be": (
            _verdict_by(lambda low, high, margin: abs(low + high) / 2 < margin)
        ),
        "the difference is first minus second: you took second minus first": (
            lambda first, second, *given: _judge_pairs(second, first, *given)
        ),
    },
)

VERDICTS = ("equivalent", "different", "not shown")
WAYS = ("full", "lora", "qlora")


def judge_claims() -> dict[str, str]:
    """The verdicts on the four reports of exercise 8.5, and the way to choose."""
    reports = dict(zip("abcd", ("equivalent", "not shown", "different", "not shown"), strict=True))
    return {**reports, "choose": "lora"}


ex_8_5 = Exercise(
    "8.5 is the claim supported?",
    judge_claims,
    open=True,
    score=lambda answer: (
        f"{sum(answer.get(name) == right for name, right in judge_claims().items())} of 5 right"
    ),
    because={
        f"answer 'a' to 'd', each with one of {VERDICTS}, and 'choose' with full, lora, qlora": (
            Seen(
                lambda: {"a": "equal", "b": "equal", "c": "worse", "d": "better"},
                lambda answer: (
                    not {answer[name] for name in "abcd"} <= set(VERDICTS)
                    or answer["choose"] not in WAYS
                ),
            )
        ),
        "(a) the whole interval lies within the margin: that is what equivalence asks, though the "
        "difference is not nothing": chose(judge_claims, "a", "not shown"),
        "(a) the interval is on one side of 0, so there is a difference; but it is smaller than "
        "what was agreed beforehand to matter": chose(judge_claims, "a", "different"),
        "(b) p = 0.5 means that no difference was found. Three runs would hardly find one: the "
        "interval reaches far beyond the margin on both sides": (
            chose(judge_claims, "b", "equivalent")
        ),
        "(b) the interval holds 0 as well as differences that would matter: nothing is shown": (
            chose(judge_claims, "b", "different")
        ),
        "(c) the whole interval lies beyond the margin: what matters has been shown to differ": (
            chose(judge_claims, "c", "not shown", "equivalent")
        ),
        "(d) one run each has no spread to compare with: the next seed may turn it round": (
            chose(judge_claims, "d", "different", "equivalent")
        ),
        "QLoRA is the smallest, but LoRA fits as well, is as good, and takes less time: bytes that "
        "lie idle buy nothing": chose(judge_claims, "choose", "qlora"),
        "full fine-tuning needs more than the card has": chose(judge_claims, "choose", "full"),
    },
)

ROWS = ("same rows, same order", "same rows", "drawn anew")


def plan_comparison() -> dict[str, Any]:
    """One plan for exercise 8.6; the numbers of seeds and rates are on the safe side."""
    rates = (1e-4, 2e-4, 4e-4, 8e-4)
    return {
        "rates": {"lora": rates, "qlora": rates},
        "tune_on": "valid",
        "report_on": "test",
        "seeds": 22,
        "rows": "same rows, same order",
        "margin": "before the runs",
    }


def _plan(**changed):
    return lambda: {**plan_comparison(), **changed}


def _runs(plan):
    """How many seeds a plan has, which may also list them."""
    seeds = plan["seeds"]
    return len(seeds) if isinstance(seeds, list | tuple | set | range) else int(seeds)


@cache
def _half_widths(seeds):
    """The half of a 90 % interval in standard deviations of the sample."""
    from scipy.special import stdtrit  # a chapter loads faster without

    return float(stdtrit(seeds - 1, 0.95)) / seeds**0.5 if seeds > 1 else math.inf


def _chance(plan):
    """How often equal ways are shown equivalent, if differences scatter by 0.03."""
    seeds = min(_runs(plan), 1000)
    draws = 0.03 * torch.randn(20_000, seeds, generator=torch.Generator().manual_seed(0))
    widest = draws.mean(dim=1).abs() + _half_widths(seeds) * draws.std(dim=1)
    return (widest < 0.02).float().mean().item()


def _cannot_choose_alike(plan):
    rates = [set(plan["rates"][way]) for way in ("lora", "qlora")]
    return len(rates[0]) != len(rates[1]) or len(rates[0]) < 3


ex_8_6 = Exercise(
    "8.6 a fair comparison",
    plan_comparison,
    open=True,
    score=lambda plan: f"equal ways are shown equivalent in {_chance(plan):.0%} of such plans",
    because={
        "decide on 'rates', 'tune_on', 'report_on', 'seeds', 'rows' and 'margin'": Seen(
            lambda: {"seeds": 5}, lambda plan: not set(plan) >= set(plan_comparison())
        ),
        "with one rate for a way, or rates that only one of them may choose from, you compare "
        "rates: give each at least three to choose from, the same number": Seen(
            _plan(rates={"lora": (2e-4,), "qlora": (2e-4,)}), _cannot_choose_alike
        ),
        "whoever chooses rates on the rows that are reported reports how well they chose: tune on "
        "one split, report another, and neither of them is the training split": Seen(
            _plan(tune_on="test"),
            lambda plan: (
                plan["tune_on"] == plan["report_on"]
                or not {plan["tune_on"], plan["report_on"]} <= {"valid", "test"}
            ),
        ),
        "the test rows are kept for the report: tune on the others": Seen(
            _plan(tune_on="test", report_on="valid"), lambda plan: plan["tune_on"] == "test"
        ),
        "with differences that scatter by 0.03, and this many seeds, the interval is wider than "
        "the margin even if the mean is exactly 0: equivalence cannot be shown, whatever comes "
        "out. Put numbers into t · s / √n": Seen(
            _plan(seeds=5), lambda plan: 0.03 * _half_widths(_runs(plan)) >= 0.02
        ),
        "the interval is narrow enough only if the mean happens to be near 0: most such plans "
        "would not show that equal ways are equivalent. Take more seeds": Seen(
            _plan(seeds=9), lambda plan: _chance(plan) < 0.5
        ),
        f"'rows' is one of {ROWS}, and 'margin' 'before the runs' or 'after the runs'": Seen(
            _plan(rows="as they come"),
            lambda plan: (
                plan["rows"] not in ROWS
                or plan["margin"] not in ("before the runs", "after the runs")
            ),
        ),
        "then rows differ as well as ways, or their order; with the same rows in the same order "
        "the runs of a seed are pairs, and whatever the rows do to both cancels": Seen(
            _plan(rows="drawn anew"), lambda plan: plan["rows"] != ROWS[0]
        ),
        "a margin chosen after a look can always be made to fit": Seen(
            _plan(margin="after the runs"), lambda plan: plan["margin"] == "after the runs"
        ),
    },
)

EXERCISES = (ex_8_1, ex_8_2, ex_8_3, ex_8_4, ex_8_5, ex_8_6)
