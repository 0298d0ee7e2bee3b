"""The exercises of notebook 5: count, differentiate, predict, repair, choose, and survive."""

from typing import Any

import torch
from torch import Tensor

from qlora_edu.codebooks import nf4_levels
from qlora_edu.course.exercises.core import Case, Check, Mistake, OpenCheck
from qlora_edu.qlora import merge_weight, surviving_share
from qlora_edu.quantized import QuantizedTensor, quantize


def kept_bytes(tokens: int, n_in: int, n_out: int, r: int, copy: bool) -> int:
    """Count the bytes that one adapted layer newly keeps between forward and backward, in float32.

    >>> kept_bytes(1, 64, 64, 8, copy=False), kept_bytes(1, 64, 64, 8, copy=True)
    (288, 16672)
    """
    return 4 * (tokens * (n_in + r) + (n_in * n_out if copy else 0))


ex_5_1 = Check(
    "5.1 bytes kept for the backward pass",
    reference=kept_bytes,
    cases=lambda random: [
        {"tokens": tokens, "n_in": n_in, "n_out": n_out, "r": r, "copy": copy}
        for tokens, n_in, n_out, r in ((512, 1024, 1024, 16), (7, 256, 640, 8))
        for copy in (False, True)
    ],
    mistakes=(
        Mistake(
            "elements",
            lambda tokens, n_in, n_out, r, copy: kept_bytes(tokens, n_in, n_out, r, copy) // 4,
            "those are elements; a float32 has four bytes",
        ),
        Mistake(
            "the output too",
            lambda tokens, n_in, n_out, r, copy: (
                kept_bytes(tokens, n_in, n_out, r, copy) + 4 * tokens * n_out
            ),
            "y appears in none of the three gradients: a product needs its inputs, not its output",
        ),
        Mistake(
            "A·x forgotten",
            lambda tokens, n_in, n_out, r, copy: kept_bytes(tokens, n_in, n_out, 0, copy),
            "∂L/∂B = s·gᵀ·(x·Aᵀ): the r numbers of A·x for each token are kept as well",
        ),
        Mistake(
            "the packed weight counted",
            lambda tokens, n_in, n_out, r, copy: (
                kept_bytes(tokens, n_in, n_out, r, copy) + (0 if copy else n_in * n_out // 2)
            ),
            "the packed weight was in memory before and stays there: it is referred to, not copied",
        ),
        Mistake(
            "the adapter counted",
            lambda tokens, n_in, n_out, r, copy: (
                kept_bytes(tokens, n_in, n_out, r, copy) + 4 * r * (n_in + n_out)
            ),
            "A and B are needed in the backward pass, but they are parameters and there anyway",
        ),
        Mistake(
            "x twice",
            lambda tokens, n_in, n_out, r, copy: (
                kept_bytes(tokens, n_in, n_out, r, copy) + 4 * tokens * n_in
            ),
            "x is kept once, for A; the frozen W asks for no x, since it gets no gradient",
        ),
    ),
)


def layer_gradients(
    g: Tensor, x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float
) -> dict[str, Tensor]:
    """The three gradients of y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ, given that of y.

    >>> one = torch.ones(1, 1)
    >>> layer_gradients(one, 5 * one, 3 * one, one, 2 * one, 10.0)["x"]
    tensor([[23.]])
    """
    thin = s * (g @ B)
    return {"A": thin.T @ x, "B": s * g.T @ (x @ A.T), "x": g @ W + thin @ A}


def _layers(random: torch.Generator) -> list[Case]:
    """Square weights, so that a transposed one is a mistake and no error; one token and several."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    return [
        {
            "g": normal(tokens, 6),
            "x": normal(tokens, 6),
            "W": normal(6, 6),
            "A": normal(2, 6),
            "B": normal(6, 2),
            "s": s,
        }
        for tokens, s in ((3, 2.0), (1, 0.25))
    ]


def _differs_in(*names: str) -> Any:
    """Whether exactly these gradients are off."""

    def recognise(case: Case, yours: Any, expected: Any) -> bool:
        off = {k for k in expected if not torch.allclose(yours[k], expected[k], atol=1e-4)}
        return off == set(names)

    return recognise


ex_5_2 = Check(
    "5.2 the three gradients",
    reference=layer_gradients,
    cases=_layers,
    # Sums of six products in another order.
    atol=1e-4,
    mistakes=(
        Mistake(
            "s forgotten",
            lambda g, x, W, A, B, s: layer_gradients(g, x, W, A, B, 1.0),
            "the update is s·B·A·x: s is a factor of all that passes through the adapter",
        ),
        Mistake(
            "W transposed",
            lambda g, x, W, A, B, s: {
                **layer_gradients(g, x, W, A, B, s),
                "x": g @ W.T + s * (g @ B) @ A,
            },
            "forward is x·Wᵀ, so backward is g·W: each pass turns the weight the other way",
        ),
        Mistake(
            "the adapter's road forgotten",
            lambda g, x, W, A, B, s: {**layer_gradients(g, x, W, A, B, s), "x": g @ W},
            "x reaches y by two roads, through W and through A and B; their gradients add up",
        ),
        Mistake(
            "W's road forgotten",
            lambda g, x, W, A, B, s: {**layer_gradients(g, x, W, A, B, s), "x": s * (g @ B) @ A},
            "W is frozen, not absent: it gets no gradient, but the gradient of x passes through it",
        ),
        Mistake(
            "the mean over tokens",
            lambda g, x, W, A, B, s: {
                **layer_gradients(g, x, W, A, B, s),
                "A": s * (g @ B).T @ x / len(x),
                "B": s * g.T @ (x @ A.T) / len(x),
            },
            "the tokens' contributions are added; a mean, if any, was taken in the loss and is in "
            "g already",
        ),
        Mistake(
            "s twice in x",
            lambda g, x, W, A, B, s: {
                **layer_gradients(g, x, W, A, B, s),
                "x": g @ W + s * s * (g @ B) @ A,
            },
            "only x is off, and only its adapter part: s enters that road once",
        ),
        Mistake(
            "A and B exchanged",
            lambda g, x, W, A, B, s: {
                **layer_gradients(g, x, W, A, B, s),
                "A": (s * g.T @ (x @ A.T)).T,
                "B": (s * (g @ B).T @ x).T,
            },
            "A's gradient needs what lies before A (x) and behind it (g·B); B's needs g and A·x",
            _differs_in("A", "B"),
        ),
    ),
)


def who_learns(b_is_zero: bool, detached: bool, reentrant: bool) -> dict[str, bool]:
    """Which adapter tensors of two layers get a gradient that is not zero.

    >>> who_learns(b_is_zero=True, detached=False, reentrant=False)
    {'A1': False, 'B1': True, 'A2': False, 'B2': True}
    """
    reached = not (detached or reentrant)
    return {"A1": reached and not b_is_zero, "B1": reached, "A2": not b_is_zero, "B2": True}


def _who_learns(
    b_is_zero: bool,
    detached: bool,
    reentrant: bool,
    a_at_once: bool = False,
    frozen_blocks: bool = False,
    cut_both: bool = False,
    b_stuck: bool = False,
) -> dict[str, bool]:
    """The answer with one misconception."""
    cut = detached or reentrant
    first = not (cut or frozen_blocks)
    second = not (cut and cut_both)
    a = a_at_once or not b_is_zero
    b = not (b_stuck and b_is_zero)
    return {"A1": first and a, "B1": first and b, "A2": second and a, "B2": second and b}


ex_5_3 = Check(
    "5.3 who learns?",
    reference=who_learns,
    cases=lambda random: [
        {"b_is_zero": b_is_zero, "detached": detached, "reentrant": reentrant}
        for b_is_zero, detached, reentrant in (
            (False, False, False),
            (True, False, False),
            (False, True, False),
            (False, False, True),
            (True, True, False),
        )
    ],
    mistakes=(
        Mistake(
            "a frozen weight stops the gradient",
            lambda **case: _who_learns(**case, frozen_blocks=True),
            "W₂ gets no gradient itself, but ∂L/∂x = g·W₂ passes through it to the first layer",
        ),
        Mistake(
            "A learns at once",
            lambda **case: _who_learns(**case, a_at_once=True),
            "∂L/∂A = s·(g·B)ᵀ·x: while B is zero, A's gradient is zero too",
        ),
        Mistake(
            "B stays at zero",
            lambda **case: _who_learns(**case, b_stuck=True),
            "∂L/∂B = s·gᵀ·(x·Aᵀ) has no B in it: a zero B gets a gradient, and so gets going",
        ),
        Mistake(
            "the checkpoint changes nothing",
            lambda b_is_zero, detached, reentrant: who_learns(b_is_zero, detached, False),
            "the reentrant checkpoint looks at its inputs: if none needs a gradient, neither does "
            "its output, whatever parameters are inside",
        ),
        Mistake(
            "detach changes nothing",
            lambda b_is_zero, detached, reentrant: who_learns(b_is_zero, False, reentrant),
            "detach() cuts the road: nothing before it hears of the loss",
        ),
        Mistake(
            "a cut stops both layers",
            lambda **case: _who_learns(**case, cut_both=True),
            "the gradient comes from the loss: layer 2 lies before the cut on its way, and learns",
        ),
    ),
)


def repaired_backward(g: Tensor, quantized: QuantizedTensor) -> Tensor:
    """Gradient of x for y = x·Wᵀ with the weight in 4 bits: `[..., in]`, in the dtype of g.

    >>> weight = quantize(torch.tensor([[-1.0, 0.0, 1.0]]), double_quant=False)
    >>> repaired_backward(torch.tensor([2.0]), weight)
    tensor([-2.,  0.,  2.])
    """
    return g @ quantized.dequantize(g.dtype)


def _quantized_cases(random: torch.Generator) -> list[Case]:
    """Square weights that were bfloat16 before quantisation, and gradients with leading sizes."""
    return [
        {
            "g": torch.randn(*leading, 64, generator=random),
            "quantized": quantize(torch.randn(64, 64, generator=random).bfloat16()),
        }
        for leading in ((2, 3), (5,))
    ]


ex_5_4 = Check(
    "5.4 repair the backward pass",
    reference=repaired_backward,
    cases=_quantized_cases,
    # Sums of 64 float32 products of size 1 in another order: 1e-5. A bfloat16 rounding: 1e-2.
    atol=1e-4,
    mistakes=(
        Mistake(
            "leading sizes lost",
            lambda g, quantized: repaired_backward(g, quantized).flatten(0, -2),
            "g may be [batch, tokens, out]; the gradient of x must have the shape of x",
            lambda case, yours, expected: yours.dim() < expected.dim(),
        ),
        Mistake(
            "transposed",
            lambda g, quantized: g @ quantized.dequantize(g.dtype).T,
            "forward is x·Wᵀ, so backward is g·W; on a square weight nothing but the numbers tells",
        ),
        Mistake(
            "the weight rounded",
            lambda g, quantized: g @ quantized.dequantize().to(g.dtype),
            "dequantize() returns the dtype from before quantisation, here bfloat16: ask for g's, "
            "or the two passes use two different weights",
        ),
        Mistake(
            "computed in bfloat16",
            lambda g, quantized: (g.bfloat16() @ quantized.dequantize()).float(),
            "the whole product was taken in bfloat16; g is float32, and so is the compute type",
        ),
        Mistake(
            "rounded and transposed",
            lambda g, quantized: g @ quantized.dequantize().to(g.dtype).T,
            "two faults are left: the weight is turned the wrong way, and it is rounded to "
            "bfloat16",
        ),
    ),
)


WAYS = ("apart", "4-bit", "dequantized", "original")


def choose_merges() -> dict[str, str]:
    """What to do with the adapter in each of the four situations of exercise 5.5."""
    return {"a": "apart", "b": "dequantized", "c": "4-bit", "d": "apart"}


def _chose(situation: str, *ways: str) -> Any:
    return lambda case, yours, expected: yours[situation] in ways


ex_5_5 = Check(
    "5.5 choose a merge",
    reference=choose_merges,
    mistakes=(
        Mistake(
            "a small update into 4 bits",
            lambda: choose_merges() | {"a": "4-bit"},
            "a: at 3 % nearly every weight falls back to its old code, and the update is lost",
            _chose("a", "4-bit"),
        ),
        Mistake(
            "16 bits where 4 are served",
            lambda: choose_merges() | {"a": "dequantized"},
            "a: the server holds the base in 4 bits; a 16-bit weight does not fit its memory",
            _chose("a", "dequantized", "original"),
        ),
        Mistake(
            "the original base",
            lambda: choose_merges() | {"b": "original"},
            "b: the adapter was trained and measured beside the dequantised weight; the original "
            "brings back 9 % of difference that it has never seen",
            _chose("b", "original"),
        ),
        Mistake(
            "4 bits though 16 are allowed",
            lambda: choose_merges() | {"b": "4-bit"},
            "b: 16 bits are allowed, so there is no need to round the sum to sixteen levels",
            _chose("b", "4-bit"),
        ),
        Mistake(
            "apart where one file is asked for",
            lambda: choose_merges() | {"c": "apart"},
            "b and c ask for one file without an adapter beside it",
            lambda case, yours, expected: "apart" in (yours["b"], yours["c"]),
        ),
        Mistake(
            "16 bits on a device that reads 4",
            lambda: choose_merges() | {"c": "original"},
            "c: the device reads NF4 only; and an update of 40 % survives the rounding",
            _chose("c", "dequantized", "original"),
        ),
        Mistake(
            "twenty merged models",
            lambda: choose_merges() | {"d": "dequantized"},
            "d: twenty merged models are twenty bases; twenty adapters beside one base are small",
            lambda case, yours, expected: yours["d"] != "apart",
        ),
    ),
)


def frozen_weight() -> Tensor:
    """The weight of exercise 5.6: normal, float32 `[64, 64]`, so that a row is a block.

    >>> frozen_weight().shape
    torch.Size([64, 64])
    """
    return torch.randn(64, 64, generator=torch.Generator().manual_seed(56))


LIMIT = 0.02


def update_size(update: Tensor) -> float:
    """Root mean square of an update over that of `frozen_weight()`."""
    return (update.square().mean().sqrt() / frozen_weight().square().mean().sqrt()).item()


def share_in_4_bits(update: Tensor) -> float:
    """How much of an update survives merging into the 4 bits of `frozen_weight()`."""
    quantized = quantize(frozen_weight())
    merged = merge_weight(quantized, update, "4-bit")
    return surviving_share(quantized.dequantize(), merged, update)


def surviving_update() -> Tensor:
    """Move thirty weights that are zero by one level each, and no other."""
    quantized = quantize(frozen_weight())
    rows, columns = (quantized.dequantize() == 0).nonzero()[:30].T
    update = torch.zeros(64, 64)
    update[rows, columns] = nf4_levels()[8] * quantized.absmax[rows]
    return update


def _normal_update(size: float) -> Tensor:
    return size * torch.randn(64, 64, generator=torch.Generator().manual_seed(1))


ex_5_6 = OpenCheck(
    "5.6 a small update that survives",
    reference=surviving_update,
    mistakes=(
        Mistake(
            "another shape",
            lambda: _normal_update(0.01)[:32],
            "not a tensor of shape [64, 64]",
            lambda case, update, _: tuple(update.shape) != (64, 64),
        ),
        Mistake(
            "too large",
            lambda: _normal_update(0.5),
            f"its root mean square is more than {LIMIT:.0%} of the weight's",
            lambda case, update, _: not update_size(update) <= LIMIT,
        ),
        Mistake(
            "no update",
            lambda: torch.zeros(64, 64),
            "an update of zero survives anything; it has to change the weight",
            lambda case, update, _: not update.any(),
        ),
        Mistake(
            "spread over all weights",
            lambda: _normal_update(0.9 * LIMIT),
            "most of it is lost: every weight moves by less than half a step. The limit is on the "
            "root mean square, and not on how it is spread",
            lambda case, update, _: not share_in_4_bits(update) > 0.5,
        ),
    ),
)
