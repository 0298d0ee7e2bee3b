"""The exercises of notebook 0: bytes, levels, adapters, and rows of one's own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_edu.course.exercises.core import Case, Check, Mistake, OpenCheck

# The reader may multiply in another order than the reference; float32 sums then differ in their
# last bits, while every listed mistake is off by at least a hundredth.
ROUNDING = 1e-4


def weight_gigabytes(parameters: int, bits_per_weight: float) -> float:
    """Size of the weights in GB (10⁹ bytes).

    >>> weight_gigabytes(1_000_000_000, 16)
    2.0
    """
    return parameters * bits_per_weight / 8 / 1e9


def snap_to_levels(weights: Tensor, levels: Tensor) -> Tensor:
    """Quantise and dequantise with one absmax for the whole tensor; the shape is kept.

    >>> snap_to_levels(torch.tensor([2.0, 0.9, -1.2]), torch.tensor([-1.0, 0.0, 1.0]))
    tensor([ 2.,  0., -2.])
    """
    absmax = weights.abs().max()
    codes = ((weights / absmax)[..., None] - levels).abs().argmin(dim=-1)
    return levels[codes] * absmax


def adapted_output(x: Tensor, W: Tensor, A: Tensor, B: Tensor, lora_alpha: float, r: int) -> Tensor:
    """``x`` ``[tokens, in]`` through ``W`` ``[out, in]`` and its adapter: ``[tokens, out]``.

    >>> one = torch.ones(1, 1)
    >>> adapted_output(one, one, one, one, lora_alpha=8, r=4)
    tensor([[3.]])
    """
    return x @ W.T + (lora_alpha / r) * (x @ A.T @ B.T)


def trained_parameters(shapes: list[tuple[int, int]], r: int) -> int:
    """Parameters in adapters of rank ``r`` on layers of these ``(out, in)`` shapes.

    >>> trained_parameters([(3, 2)], r=1)
    5
    """
    return sum(r * (n_out + n_in) for n_out, n_in in shapes)


def my_rows() -> list[dict[str, list[dict[str, str]]]]:
    """Three rows in the layout of the training data.

    >>> my_rows()[0]["messages"][1]
    {'role': 'assistant', 'content': 'Ada'}
    """
    passage = "Ada sold a red lamp to Hugo. It was Monday."
    asked = [
        ("Who sold the lamp?", "Ada"),
        ("Which day was it?", "Monday"),
        ("Was it a good bargain?", "Not mentioned."),
    ]
    return [
        {
            "messages": [
                {"role": "user", "content": f"{passage}\n{question}"},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in asked
    ]


ex_0_1 = Check(
    "0.1 how large is the base?",
    reference=weight_gigabytes,
    cases=lambda random: [
        {"parameters": 3_000_000_000, "bits_per_weight": 16},
        {"parameters": 6_738_415_616, "bits_per_weight": 4.5},
    ],
    mistakes=(
        Mistake(
            "bits as bytes",
            lambda parameters, bits_per_weight: parameters * bits_per_weight / 1e9,
            "that counts bits as if they were bytes; a byte has 8 bits",
        ),
        Mistake(
            "GiB",
            lambda parameters, bits_per_weight: parameters * bits_per_weight / 8 / 2**30,
            "that is GiB (2³⁰ bytes); a GB is 10⁹ bytes, 7 % smaller",
        ),
        Mistake(
            "bytes",
            lambda parameters, bits_per_weight: parameters * bits_per_weight / 8,
            "that is in bytes; divide by 10⁹ for GB",
        ),
        Mistake(
            "whole bits",
            lambda parameters, bits_per_weight: parameters * (bits_per_weight // 8) / 1e9,
            "4.5 bits are not a whole number of bytes; divide with /, not //",
        ),
    ),
    atol=1e-6,
)


def _weights_and_levels(random: torch.Generator) -> Sequence[Case]:
    four = torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0])
    return [
        {"weights": torch.tensor([0.5, -2.0, 0.9, -0.4]), "levels": four},
        {"weights": 3 * torch.randn(4, 6, generator=random), "levels": four},
        {"weights": torch.randn(40, generator=random), "levels": torch.linspace(-1, 1, 15)},
    ]


def _no_absmax(weights: Tensor, levels: Tensor) -> Tensor:
    return levels[(weights[..., None] - levels).abs().argmin(dim=-1)]


def _not_scaled_back(weights: Tensor, levels: Tensor) -> Tensor:
    return snap_to_levels(weights, levels) / weights.abs().max()


def _signed_maximum(weights: Tensor, levels: Tensor) -> Tensor:
    largest = weights.max()
    return levels[((weights / largest)[..., None] - levels).abs().argmin(dim=-1)] * largest


def _codes(weights: Tensor, levels: Tensor) -> Tensor:
    return ((weights / weights.abs().max())[..., None] - levels).abs().argmin(dim=-1)


ex_0_2 = Check(
    "0.2 snap to levels",
    reference=snap_to_levels,
    cases=_weights_and_levels,
    mistakes=(
        Mistake(
            "no absmax",
            _no_absmax,
            "the levels lie in [-1, 1], the weights do not: divide by the absmax first",
        ),
        Mistake(
            "not scaled back",
            _not_scaled_back,
            "these are levels in [-1, 1]; the layer computes with level × absmax",
        ),
        Mistake(
            "signed maximum",
            _signed_maximum,
            "that divides by the largest weight, not by the largest magnitude; a large "
            "negative weight then falls outside [-1, 1]",
        ),
        Mistake("codes", _codes, "these are the codes (indices); look the levels up with them"),
    ),
    atol=ROUNDING,
)


def _adapted_layer(random: torch.Generator) -> Sequence[Case]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    return [
        {
            "x": normal(5, 6),
            "W": normal(4, 6),
            "A": normal(2, 6),
            "B": normal(4, 2),
            "lora_alpha": 8.0,
            "r": 2,
        },
        {
            "x": normal(3, 4),
            "W": normal(4, 4),
            "A": normal(4, 4),
            "B": normal(4, 4),
            "lora_alpha": 6.0,
            "r": 4,
        },
    ]


ex_0_3 = Check(
    "0.3 one layer, adapted",
    reference=adapted_output,
    cases=_adapted_layer,
    mistakes=(
        Mistake(
            "alpha alone",
            lambda x, W, A, B, lora_alpha, r: x @ W.T + lora_alpha * (x @ A.T @ B.T),
            "that scales by α; LoRA scales by α/r, so that r can change and the loudness stays",
        ),
        Mistake(
            "no scaling",
            lambda x, W, A, B, lora_alpha, r: x @ W.T + x @ A.T @ B.T,
            "the factor α/r is missing",
        ),
        Mistake(
            "adapter alone",
            lambda x, W, A, B, lora_alpha, r: (lora_alpha / r) * (x @ A.T @ B.T),
            "that is the lower road alone; the frozen W x must be added",
        ),
        Mistake(
            "r over alpha",
            lambda x, W, A, B, lora_alpha, r: x @ W.T + (r / lora_alpha) * (x @ A.T @ B.T),
            "the factor is upside down: α/r, not r/α",
        ),
    ),
    atol=ROUNDING,
)


ex_0_4 = Check(
    "0.4 how many parameters are trained?",
    reference=trained_parameters,
    cases=lambda random: [
        {"shapes": [(640, 256), (128, 256)], "r": 16},
        {"shapes": [(96, 64)], "r": 3},
    ],
    mistakes=(
        Mistake(
            "A alone",
            lambda shapes, r: sum(r * n_in for _, n_in in shapes),
            "that counts A alone; B is stored and trained too",
        ),
        Mistake(
            "B alone",
            lambda shapes, r: sum(r * n_out for n_out, _ in shapes),
            "that counts B alone; A is stored and trained too",
        ),
        Mistake(
            "the whole weight",
            lambda shapes, r: sum(n_out * n_in for n_out, n_in in shapes),
            "that counts W, which is frozen; the adapter's count does not multiply out by in",
        ),
        Mistake(
            "rank times weight",
            lambda shapes, r: sum(r * n_out * n_in for n_out, n_in in shapes),
            "r × out × in is larger than W itself; A has r × in numbers and B has out × r",
        ),
        Mistake(
            "r once too often",
            lambda shapes, r: sum(r * r * (o + i) for o, i in shapes),
            "r appears once in each of the two shapes; the sum is r × (out + in)",
        ),
    ),
)


def _roles_differ(rows: Any) -> bool:
    return any([m["role"] for m in row["messages"]] != ["user", "assistant"] for row in rows)


def _first_row(**changes: Any) -> list[dict]:
    rows = my_rows()
    rows[0]["messages"][1].update(changes)
    return rows


def _same_question() -> list[dict]:
    return 3 * my_rows()[:1]


ex_0_5 = OpenCheck(
    "0.5 break it",
    reference=my_rows,
    mistakes=(
        Mistake(
            "too few",
            lambda: my_rows()[:2],
            "return a list of at least three rows",
            lambda case, rows, _: not isinstance(rows, list) or len(rows) < 3,
        ),
        Mistake(
            "bare messages",
            lambda: [row["messages"] for row in my_rows()],
            'each row is a dictionary {"messages": [...]}',
            lambda case, rows, _: not all(isinstance(row["messages"], list) for row in rows),
        ),
        Mistake(
            "other roles",
            lambda: _first_row(role="bot"),
            'each row has two messages: role "user", then role "assistant"',
            lambda case, rows, _: _roles_differ(rows),
        ),
        Mistake(
            "empty answer",
            lambda: _first_row(content=" "),
            "an empty answer teaches the model to say nothing: write what is right",
            lambda case, rows, _: (
                not all(m["content"].strip() for row in rows for m in row["messages"])
            ),
        ),
        Mistake(
            "one question",
            _same_question,
            "two rows have the same user message; ask different things",
            lambda case, rows, _: len({r["messages"][0]["content"] for r in rows}) < len(rows),
        ),
    ),
)
