"""The exercises of notebook 0: bytes, levels, adapters, and rows of one's own."""

import torch
from torch import Tensor

from qlora_edu.course.exercises.core import Exercise, Inputs, Seen

# The reader may multiply in another order than the reference; float32 sums then differ in their
# last bits, while every listed mistake is off by at least a hundredth.
ROUNDING = 1e-4


def weight_gigabytes(parameters: int, bits_per_weight: float) -> float:
    """Size of the weights in GB (10⁹ bytes)."""
    return parameters * bits_per_weight / 8 / 1e9


ex_0_1 = Exercise(
    "0.1 how large is the base?",
    weight_gigabytes,
    [(3_000_000_000, 16), (6_738_415_616, 4.5)],
    atol=1e-6,
    because={
        "that counts bits as if they were bytes; a byte has 8 bits": lambda n, bits: n * bits / 1e9,
        "that is GiB (2³⁰ bytes); a GB is 10⁹ bytes, 7 % smaller": (
            lambda n, bits: n * bits / 8 / 2**30
        ),
        "that is in bytes; divide by 10⁹ for GB": lambda n, bits: n * bits / 8,
        "that is in MB (10⁶ bytes); a GB is 10⁹ bytes": lambda n, bits: n * bits / 8 / 1e6,
    },
)


def snap_to_levels(weights: Tensor, levels: Tensor) -> Tensor:
    """Quantise and dequantise with one absmax for the whole tensor; the shape is kept."""
    absmax = weights.abs().max()
    return levels[_codes(weights / absmax, levels)] * absmax


def _codes(x, levels):
    return (x[..., None] - levels).abs().argmin(dim=-1)


def _weights_and_levels(random: torch.Generator) -> Inputs:
    """Levels spaced evenly and not; the largest magnitude is a negative weight's, and once not."""
    four = torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0])
    uneven = torch.tensor([-1.0, -0.4, -0.1, 0.0, 0.2, 1.0])
    flat, square = torch.randn(40, generator=random), torch.randn(4, 6, generator=random)
    return [
        (torch.tensor([0.5, -2.0, 0.9, -0.4]), four),
        (torch.tensor([0.5, -0.9, 1.5, 0.07]), uneven),
        (3 * square, four),
        (flat, torch.linspace(-1, 1, 15)),
        (flat, uneven),
    ]


ex_0_2 = Exercise(
    "0.2 snap to levels",
    snap_to_levels,
    _weights_and_levels,
    atol=ROUNDING,
    because={
        "the levels lie in [-1, 1], the weights do not: divide by the absmax first": (
            lambda weights, levels: levels[_codes(weights, levels)]
        ),
        "these are levels in [-1, 1]; the layer computes with level × absmax": (
            lambda weights, levels: snap_to_levels(weights, levels) / weights.abs().max()
        ),
        "that divides by the largest weight, not by the largest magnitude; a large negative weight "
        "then falls outside [-1, 1]": lambda weights, levels: (
            levels[_codes(weights / weights.max(), levels)] * weights.max()
        ),
        "these are the codes (indices); look the levels up with them": (
            lambda weights, levels: _codes(weights / weights.abs().max(), levels)
        ),
    },
)


def adapted_output(x: Tensor, W: Tensor, A: Tensor, B: Tensor, lora_alpha: float, r: int) -> Tensor:
    """Take `x` `[tokens, in]` through `W` `[out, in]` and its adapter, to `[tokens, out]`."""
    return _layer(x, W, A, B, lora_alpha / r)


def _layer(x, W, A, B, scaling):
    return x @ W.T + scaling * (x @ A.T @ B.T)


def _adapted_layers(random: torch.Generator) -> Inputs:
    for tokens, n_in, n_out, lora_alpha, r in ((5, 6, 4, 8.0, 2), (3, 4, 4, 6.0, 4)):
        shapes = ((tokens, n_in), (n_out, n_in), (r, n_in), (n_out, r))
        yield *(torch.randn(*shape, generator=random) for shape in shapes), lora_alpha, r


ex_0_3 = Exercise(
    "0.3 one layer, adapted",
    adapted_output,
    _adapted_layers,
    atol=ROUNDING,
    because={
        "that scales by α; LoRA scales by α/r, so that r can change and the loudness stays": (
            lambda x, W, A, B, alpha, r: _layer(x, W, A, B, alpha)
        ),
        "the factor α/r is missing": lambda x, W, A, B, alpha, r: _layer(x, W, A, B, 1),
        "that is the lower road alone; the frozen W x must be added": (
            lambda x, W, A, B, alpha, r: _layer(x, 0 * W, A, B, alpha / r)
        ),
        "the factor is upside down: α/r, not r/α": (
            lambda x, W, A, B, alpha, r: _layer(x, W, A, B, r / alpha)
        ),
        "the factor α/r belongs to the adapter alone, not to W x": (
            lambda x, W, A, B, alpha, r: alpha / r * _layer(x, W, A, B, 1)
        ),
    },
)


def trained_parameters(shapes: list[tuple[int, int]], r: int) -> int:
    """Parameters in adapters of rank `r` on layers of these `(out, in)` shapes."""
    return sum(r * (n_out + n_in) for n_out, n_in in shapes)


ex_0_4 = Exercise(
    "0.4 how many parameters are trained?",
    trained_parameters,
    [([(640, 256), (128, 256)], 16), ([(96, 64)], 3), (4 * [(256, 256)] + [(64, 256)], 8)],
    because={
        "that counts A alone; B is stored and trained too": (
            lambda shapes, r: sum(r * n_in for _, n_in in shapes)
        ),
        "that counts W, which is frozen; the adapter's count does not multiply out by in": (
            lambda shapes, r: sum(n_out * n_in for n_out, n_in in shapes)
        ),
        "r × out × in is larger than W itself; A has r × in numbers and B has out × r": (
            lambda shapes, r: sum(r * n_out * n_in for n_out, n_in in shapes)
        ),
    },
)


def my_rows() -> list[dict[str, list[dict[str, str]]]]:
    """Three rows in the layout of the training data."""
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


def _first_row(message, **changes):
    rows = my_rows()
    rows[0]["messages"][message].update(changes)
    return rows


def _contents(rows):
    return [message["content"] for row in rows for message in row["messages"]]


ex_0_5 = Exercise(
    "0.5 break it",
    my_rows,
    open=True,
    because={
        "return a list of at least three rows": Seen(
            lambda: my_rows()[:2], lambda rows: not isinstance(rows, list) or len(rows) < 3
        ),
        'each row is a dictionary {"messages": [...]}': Seen(
            lambda: [row["messages"] for row in my_rows()],
            lambda rows: not all(isinstance(row["messages"], list) for row in rows),
        ),
        'each row has two messages: role "user", then role "assistant"': Seen(
            lambda: _first_row(1, role="bot"),
            lambda rows: any(
                [m["role"] for m in row["messages"]] != ["user", "assistant"] for row in rows
            ),
        ),
        "the content of a message is text: put it in quotation marks": Seen(
            lambda: _first_row(1, content=17),
            lambda rows: not all(isinstance(text, str) for text in _contents(rows)),
        ),
        "an empty answer teaches the model to say nothing: write what is right": Seen(
            lambda: _first_row(1, content=" "),
            lambda rows: not all(text.strip() for text in _contents(rows)),
        ),
        "the user's message is the passage, a line break (\\n) and the question": Seen(
            lambda: _first_row(0, content="Who sold the lamp?"),
            lambda rows: any("\n" not in text.strip() for text in _contents(rows)[::2]),
        ),
        "two rows have the same user message; ask different things": Seen(
            lambda: 3 * my_rows()[:1], lambda rows: len(set(_contents(rows)[::2])) < len(rows)
        ),
    },
)

EXERCISES = (ex_0_1, ex_0_2, ex_0_3, ex_0_4, ex_0_5)
