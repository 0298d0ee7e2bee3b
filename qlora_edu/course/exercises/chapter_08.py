"""The exercises of notebook 8: weigh, implement, repair, test, judge, and plan a comparison."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_edu.course.exercises.core import Case, Check, Mistake, OpenCheck
from qlora_edu.text.conversations import IGNORED
from qlora_edu.training import learning_rate_at


def step_loss(means: Sequence[float], tokens: Sequence[int]) -> float:
    """The loss of a step over all its answer tokens, from the mean loss of each micro-batch.

    >>> step_loss([2.0, 1.0], [1, 3])
    1.25
    """
    return sum(mean * count for mean, count in zip(means, tokens, strict=True)) / sum(tokens)


ex_8_1 = Check(
    "8.1 the loss of a step",
    reference=step_loss,
    cases=lambda random: [
        {"means": [2.0, 1.0], "tokens": [1, 3]},
        {"means": [0.5, 4.0, 1.5], "tokens": [40, 2, 8]},
        {
            "means": torch.rand(4, generator=random).tolist(),
            "tokens": torch.randint(1, 50, (4,), generator=random).tolist(),
        },
    ],
    mistakes=(
        Mistake(
            "mean of means",
            lambda means, tokens: sum(means) / len(means),
            "a mean of means counts a token of a short micro-batch more than one of a long one: "
            "weigh each mean by its tokens",
        ),
        Mistake(
            "not divided",
            lambda means, tokens: sum(m * n for m, n in zip(means, tokens, strict=True)),
            "that is the sum over the tokens; the loss of a step is their mean",
        ),
        Mistake(
            "divided by the micro-batches",
            lambda means, tokens: (
                sum(m * n for m, n in zip(means, tokens, strict=True)) / len(means)
            ),
            "divide by the number of tokens, not by the number of micro-batches",
        ),
        Mistake(
            "weighed the wrong way round",
            lambda means, tokens: (
                sum(m / n for m, n in zip(means, tokens, strict=True)) / sum(1 / n for n in tokens)
            ),
            "a micro-batch with more answer tokens weighs more, not less",
        ),
    ),
    atol=1e-9,
)


def rate_at(step: int, lr: float, warmup: int, total: int) -> float:
    """The rate of step 0, 1, 2 …: up a line for ``warmup`` steps, down half a cosine to ``total``.

    >>> [round(rate_at(step, 8.0, 2, 6), 3) for step in range(6)]
    [0.0, 4.0, 8.0, 6.828, 4.0, 1.172]
    """
    return learning_rate_at(step, lr, "cosine", warmup, total)


ex_8_2 = Check(
    "8.2 warm-up and cosine",
    reference=rate_at,
    cases=lambda random: [
        {"step": step, "lr": 0.003, "warmup": 10, "total": 60} for step in (0, 3, 10, 11, 35, 59)
    ],
    mistakes=(
        Mistake(
            "counted from one",
            lambda step, lr, warmup, total: (
                lr * (step + 1) / warmup if step < warmup else rate_at(step, lr, warmup, total)
            ),
            "steps count from 0 here: the first step of a warm-up has rate 0",
        ),
        Mistake(
            "the cosine starts at step 0",
            lambda step, lr, warmup, total: (
                lr * step / warmup
                if step < warmup
                else lr * (1 + math.cos(math.pi * step / total)) / 2
            ),
            "the cosine begins where the warm-up ends, at the full rate: subtract `warmup` above "
            "and below the line",
        ),
        Mistake(
            "down to the negative",
            lambda step, lr, warmup, total: (
                lr * step / warmup
                if step < warmup
                else lr * math.cos(math.pi * (step - warmup) / (total - warmup))
            ),
            "a cosine ends at −1, and a rate at 0: take (1 + cos) / 2",
        ),
        Mistake(
            "a quarter of a wave",
            lambda step, lr, warmup, total: (
                lr * step / warmup
                if step < warmup
                else lr * math.cos(math.pi / 2 * (step - warmup) / (total - warmup))
            ),
            "half a wave is meant, from the top to the bottom: it is flat at both ends",
        ),
        Mistake(
            "a line down",
            lambda step, lr, warmup, total: learning_rate_at(step, lr, "linear", warmup, total),
            "that falls along a line; a cosine is flat at first",
        ),
    ),
    atol=1e-12,
)


def labels_with_end(ids: Tensor, prompt_lengths: Sequence[int], end: int) -> Tensor:
    """Labels ``[rows, tokens]`` of rows that are padded with their own end token.

    >>> labels_with_end(torch.tensor([[5, 6, 7, 2, 2]]), [2], end=2)
    tensor([[-100, -100,    7,    2, -100]])
    """
    return _labels(ids, prompt_lengths, end)


def _labels(
    ids: Tensor,
    prompt_lengths: Sequence[int],
    end: int,
    *,
    shift: int = 0,
    keep_end: bool = True,
    keep_padding: bool = False,
    keep_prompt: bool = False,
    from_start: bool = False,
) -> Tensor:
    """The right labels, with a switch for each mistake."""
    labels = ids.clone()
    for row, length in zip(labels, prompt_lengths, strict=True):
        start = length + shift
        searched = 0 if from_start else length
        ends = [i for i in range(searched, len(row)) if row[i] == end]
        stop = ends[0] if ends else len(row)
        if not keep_padding:
            row[stop + 1 :] = IGNORED
        if not keep_end:
            row[row == end] = IGNORED
        if not keep_prompt:
            row[:start] = IGNORED
    return labels


def _rows_with_ends(random: torch.Generator) -> list[Case]:
    """Rows whose prompt holds an end token too, as that of a second question does."""
    cases = []
    for _ in range(3):
        ids = torch.randint(5, 99, (3, 12), generator=random)
        lengths = torch.randint(3, 6, (3,), generator=random).tolist()
        for row, length in zip(ids, lengths, strict=True):
            row[1] = 2
            row[length + 3 :] = 2
        cases.append({"ids": ids, "prompt_lengths": lengths, "end": 2})
    return cases


ex_8_3 = Check(
    "8.3 where did the end go?",
    reference=labels_with_end,
    cases=_rows_with_ends,
    mistakes=(
        Mistake(
            "no end",
            lambda ids, prompt_lengths, end: _labels(ids, prompt_lengths, end, keep_end=False),
            "masking every token that equals the pad token masks the end of the answer as well: "
            "the first end token after the prompt is to be learned",
        ),
        Mistake(
            "shifted by one",
            lambda ids, prompt_lengths, end: _labels(ids, prompt_lengths, end, shift=1),
            "the first token of the answer has lost its label. The loss shifts by itself: labels "
            "stand where their tokens stand",
        ),
        Mistake(
            "both faults",
            lambda ids, prompt_lengths, end: _labels(
                ids, prompt_lengths, end, shift=1, keep_end=False
            ),
            "the end of the answer has no label, and the first token of the answer neither",
        ),
        Mistake(
            "padding is learned",
            lambda ids, prompt_lengths, end: _labels(ids, prompt_lengths, end, keep_padding=True),
            "only the first end token is the answer's; those after it are padding, to be ignored",
        ),
        Mistake(
            "the prompt is learned",
            lambda ids, prompt_lengths, end: _labels(ids, prompt_lengths, end, keep_prompt=True),
            "the prompt has labels: it is read, and not to be written",
        ),
        Mistake(
            "the first end of the row",
            lambda ids, prompt_lengths, end: _labels(ids, prompt_lengths, end, from_start=True),
            "a prompt may hold end tokens too, of earlier turns: look for the first one after it",
        ),
    ),
)


def two_one_sided(
    first: Sequence[float], second: Sequence[float], margin: float, t: float
) -> dict[str, Any]:
    """The interval of the mean paired difference, and whether it lies within the margin.

    ``t`` is the one-sided quantile of Student's distribution for these runs.

    >>> found = two_one_sided([0.9, 0.8, 0.85], [0.9, 0.82, 0.85], 0.05, t=2.92)
    >>> round(found["low"], 4), round(found["high"], 4), found["equivalent"]
    (-0.0261, 0.0128, True)
    """
    return _judge_pairs(first, second, margin, t)


def _judge_pairs(
    first: Sequence[float],
    second: Sequence[float],
    margin: float,
    t: float,
    *,
    paired: bool = True,
    freedom: int = 1,
    root: bool = True,
    verdict: Callable[[float, float, float], bool] = lambda low, high, margin: (
        -margin < low and high < margin
    ),
) -> dict[str, Any]:
    """The right test, with a switch for each mistake."""
    one, two = (torch.tensor(runs, dtype=torch.float64) for runs in (first, second))
    count = len(one)
    if paired:
        spread = (one - two).std(correction=freedom).item()
    else:
        spread = (one.var() + two.var()).sqrt().item()
    error = spread / count**0.5 if root else spread
    mean = (one - two).mean().item()
    low, high = mean - t * error, mean + t * error
    return {"low": low, "high": high, "equivalent": bool(verdict(low, high, margin))}


def _pairs(random: torch.Generator) -> list[Case]:
    """Runs whose seeds matter much, and whose methods differ little; one pair each way."""
    first, second = [0.93, 0.87, 0.91, 0.90], [0.90, 0.90, 0.92, 0.90]  # a mean of nearly 0
    cases = [{"first": first, "second": second, "margin": 0.01, "t": 2.353}]
    for count, t, shift, margin in (
        (5, 2.132, 0.004, 0.02),
        (4, 2.353, 0.0, 0.003),
        (5, 2.132, 0.05, 0.02),
    ):
        seeds = 0.9 + 0.05 * torch.randn(count, generator=random, dtype=torch.float64)
        noise = 0.004 * torch.randn(2, count, generator=random, dtype=torch.float64)
        first, second = seeds + shift + noise[0], seeds + noise[1]
        cases.append({"first": first.tolist(), "second": second.tolist(), "margin": margin, "t": t})
    return cases


ex_8_4 = Check(
    "8.4 two one-sided tests",
    reference=two_one_sided,
    cases=_pairs,
    mistakes=(
        Mistake(
            "not paired",
            lambda first, second, margin, t: _judge_pairs(first, second, margin, t, paired=False),
            "runs of one seed saw the same rows: take the spread of the differences, in which what "
            "the seeds have in common is gone",
        ),
        Mistake(
            "divided by n",
            lambda first, second, margin, t: _judge_pairs(first, second, margin, t, freedom=0),
            "the standard deviation of a sample divides by n − 1",
        ),
        Mistake(
            "no root of n",
            lambda first, second, margin, t: _judge_pairs(first, second, margin, t, root=False),
            "that is how far single runs scatter; their mean is known better, by √n",
        ),
        Mistake(
            "no difference found",
            lambda first, second, margin, t: _judge_pairs(
                first, second, margin, t, verdict=lambda low, high, margin: low <= 0 <= high
            ),
            "an interval that holds 0 fails to show a difference, which is not to show equality: "
            "it has to lie within the margin as a whole",
        ),
        Mistake(
            "only the mean",
            lambda first, second, margin, t: _judge_pairs(
                first,
                second,
                margin,
                t,
                verdict=lambda low, high, margin: abs(low + high) / 2 < margin,
            ),
            "the mean alone within the margin may be luck: both ends have to be",
        ),
    ),
    atol=1e-9,
)

VERDICTS = ("equivalent", "different", "not shown")


def judge_claims() -> dict[str, str]:
    """The verdicts on the four reports of exercise 8.5, and the way to choose.

    >>> judge_claims()["b"]
    'not shown'
    """
    return {
        "a": "equivalent",
        "b": "not shown",
        "c": "different",
        "d": "not shown",
        "choose": "lora",
    }


def _says(name: str, words: Sequence[str]) -> Callable[[Case, Any, Any], bool]:
    return lambda _, answer, __: answer[name] in words


def _but(**changed: str) -> Callable[[], dict[str, str]]:
    return lambda: {**judge_claims(), **changed}


ex_8_5 = OpenCheck(
    "8.5 is the claim supported?",
    reference=judge_claims,
    mistakes=(
        Mistake(
            "another word",
            lambda: {"a": "equal", "b": "equal", "c": "worse", "d": "better"},
            f"answer 'a' to 'd', each with one of {VERDICTS}, and 'choose' with full, lora, qlora",
            lambda _, answer, __: (
                set(answer) != {"a", "b", "c", "d", "choose"}
                or not {answer[name] for name in "abcd"} <= set(VERDICTS)
                or answer["choose"] not in ("full", "lora", "qlora")
            ),
        ),
        Mistake(
            "a: not believed",
            _but(a="not shown"),
            "(a) the whole interval lies within the margin: that is what equivalence asks, though "
            "the difference is not nothing",
            _says("a", ["not shown"]),
        ),
        Mistake(
            "a: a difference",
            _but(a="different"),
            "(a) the interval is on one side of 0, so there is a difference; but it is smaller "
            "than what was agreed beforehand to matter",
            _says("a", ["different"]),
        ),
        Mistake(
            "b: not significant, so equal",
            _but(b="equivalent"),
            "(b) p = 0.5 means that no difference was found. Three runs would hardly find one: the "
            "interval reaches far beyond the margin on both sides",
            _says("b", ["equivalent"]),
        ),
        Mistake(
            "b: a difference",
            _but(b="different"),
            "(b) the interval holds 0 as well as differences that would matter: nothing is shown",
            _says("b", ["different"]),
        ),
        Mistake(
            "c: within the noise",
            _but(c="not shown"),
            "(c) the whole interval lies beyond the margin: what matters has been shown to differ",
            _says("c", ["not shown", "equivalent"]),
        ),
        Mistake(
            "d: the better one wins",
            _but(d="different"),
            "(d) one run each has no spread to compare with: the next seed may turn it round",
            _says("d", ["different", "equivalent"]),
        ),
        Mistake(
            "choose: the smallest",
            _but(choose="qlora"),
            "QLoRA is the smallest, but LoRA fits as well, is as good, and takes less time: bytes "
            "that lie idle buy nothing",
            _says("choose", ["qlora"]),
        ),
        Mistake(
            "choose: the best on paper",
            _but(choose="full"),
            "full fine-tuning needs more than the card has",
            _says("choose", ["full"]),
        ),
    ),
)


def plan_comparison() -> dict[str, Any]:
    """One plan for exercise 8.6; the numbers of seeds and rates are on the safe side.

    >>> plan_comparison()["report_on"]
    'test'
    """
    return {
        "rates": {"lora": (1e-4, 2e-4, 4e-4, 8e-4), "qlora": (1e-4, 2e-4, 4e-4, 8e-4)},
        "tune_on": "valid",
        "report_on": "test",
        "seeds": 22,
        "rows": "the same, in the same order",
        "margin": "before the runs",
    }


def _too_few(seeds: int) -> bool:
    """Is the interval wider than a margin of 0.02, if paired differences scatter by 0.03?"""
    from scipy.stats import t

    return seeds < 2 or float(t.ppf(0.95, seeds - 1)) * 0.03 / seeds**0.5 >= 0.02


def _plan(**changed: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {**plan_comparison(), **changed}


ex_8_6 = OpenCheck(
    "8.6 a fair comparison",
    reference=plan_comparison,
    mistakes=(
        Mistake(
            "a plan with a hole",
            lambda: {"seeds": 5},
            "decide on 'rates', 'tune_on', 'report_on', 'seeds', 'rows' and 'margin'",
            lambda _, plan, __: set(plan) != set(plan_comparison()),
        ),
        Mistake(
            "one rate for both",
            _plan(rates={"lora": (2e-4,), "qlora": (2e-4,)}),
            "with one rate for a way, or rates that only one of them may choose from, you compare "
            "rates: give each at least three to choose from, the same number",
            lambda _, plan, __: (
                set(plan["rates"]) != {"lora", "qlora"}
                or len({len(set(rates)) for rates in plan["rates"].values()}) > 1
                or min(len(set(rates)) for rates in plan["rates"].values()) < 3
            ),
        ),
        Mistake(
            "tuned on what is reported",
            _plan(tune_on="test"),
            "whoever chooses rates on the rows that are reported reports how well they chose: "
            "tune on one split, report another, and neither of them is the training split",
            lambda _, plan, __: (
                plan["tune_on"] == plan["report_on"]
                or "train" in (plan["tune_on"], plan["report_on"])
                or plan["report_on"] not in ("valid", "test")
            ),
        ),
        Mistake(
            "too few seeds",
            _plan(seeds=5),
            "with differences that scatter by 0.03, and this many seeds, the interval is wider "
            "than the margin even if the mean is exactly 0: equivalence cannot be shown, whatever "
            "comes out. Put numbers into t · s / √n",
            lambda _, plan, __: _too_few(plan["seeds"]),
        ),
        Mistake(
            "each its own rows",
            _plan(rows="drawn anew for each"),
            "then rows differ as well as ways; with the same rows in the same order the runs of a "
            "seed are pairs, and most of what a seed does cancels",
            lambda _, plan, __: "same" not in plan["rows"],
        ),
        Mistake(
            "a margin that fits",
            _plan(margin="after the runs"),
            "a margin chosen after a look can always be made to fit",
            lambda _, plan, __: "before" not in plan["margin"],
        ),
    ),
)
