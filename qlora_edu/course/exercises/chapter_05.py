"""The exercises of notebook 5: count, differentiate, predict, repair, choose, and survive."""

from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor

from qlora_edu.codebooks import nf4_levels
from qlora_edu.course.exercises.core import Exercise, Inputs, Seen, chose, faults_left, same
from qlora_edu.qlora import merge_weight, surviving_share
from qlora_edu.quantized import QuantizedTensor, quantize


def kept_bytes(tokens: int, n_in: int, n_out: int, r: int, copy: bool) -> int:
    """Count the bytes that one adapted layer newly keeps for its backward pass, in float32."""
    return 4 * (tokens * (n_in + r) + (n_in * n_out if copy else 0))


ex_5_1 = Exercise(
    "5.1 bytes kept for the backward pass",
    kept_bytes,
    [
        (*sizes, copy)
        for sizes in ((512, 1024, 1024, 16), (7, 256, 640, 8))
        for copy in (False, True)
    ],
    because={
        "those are elements; a float32 has four bytes": lambda *layer: kept_bytes(*layer) // 4,
        "y appears in none of the three gradients: a product needs its inputs, not its output": (
            lambda tokens, n_in, n_out, r, copy: (
                kept_bytes(tokens, n_in, n_out, r, copy) + 4 * tokens * n_out
            )
        ),
        "∂L/∂B = s·gᵀ·(x·Aᵀ): the r numbers of A·x for each token are kept as well": (
            lambda tokens, n_in, n_out, r, copy: kept_bytes(tokens, n_in, n_out, 0, copy)
        ),
        "the gradient of A needs x: the layer keeps it, whoever made it": (
            lambda tokens, n_in, n_out, r, copy: (
                kept_bytes(tokens, n_in, n_out, r, copy) - 4 * tokens * n_in
            )
        ),
        "the packed weight was in memory before and stays there: it is referred to, not copied": (
            lambda tokens, n_in, n_out, r, copy: (
                kept_bytes(tokens, n_in, n_out, r, copy) + (0 if copy else n_in * n_out // 2)
            )
        ),
    },
)


def layer_gradients(
    g: Tensor, x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float
) -> dict[str, Tensor]:
    """The three gradients of y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ, given that of y."""
    thin = s * (g @ B)
    return {"A": thin.T @ x, "B": s * g.T @ (x @ A.T), "x": g @ W + thin @ A}


def _layers(random: torch.Generator) -> Inputs:
    """Square weights, so that a transposed one is a mistake and no error; one token and several."""
    for tokens, s in ((3, 2.0), (1, 0.25)):
        shapes = ((tokens, 4), (tokens, 4), (4, 4), (2, 4), (4, 2))
        yield *(torch.randn(shape, generator=random) for shape in shapes), s


def _gradients_with(**changed):
    """Make the right answer with some gradients replaced, each by a function of the arguments."""

    def wrong(*layer):
        return layer_gradients(*layer) | {name: make(*layer) for name, make in changed.items()}

    return wrong


def _lacks_s(yours, expected, *layer):
    """Whether some of the gradients are right but for s, and the others are right."""
    without = layer_gradients(*layer[:-1], 1.0)
    return all(
        same(yours[name], expected[name], 1e-4) or same(yours[name], without[name], 1e-4)
        for name in expected
    )


ex_5_2 = Exercise(
    "5.2 the three gradients",
    layer_gradients,
    _layers,
    # Sums of six products in another order.
    atol=1e-4,
    because={
        "each gradient has the shape of its tensor": Seen(
            _gradients_with(B=lambda g, x, W, A, B, s: s * (x @ A.T).T @ g),
            lambda yours, expected, *layer: any(
                yours[name].shape != expected[name].shape for name in expected
            ),
        ),
        "the update is s·B·A·x: s is a factor of all that passes through the adapter": Seen(
            lambda *layer: layer_gradients(*layer[:-1], 1.0), _lacks_s
        ),
        "forward is x·Wᵀ, so backward is g·W: each pass turns the weight the other way": (
            _gradients_with(x=lambda g, x, W, A, B, s: g @ W.T + s * (g @ B) @ A)
        ),
        "x reaches y by two paths, through W and through A and B; their gradients add up": (
            _gradients_with(x=lambda g, x, W, A, B, s: g @ W)
        ),
        "W is frozen, not absent: it gets no gradient, but the gradient of x passes through it": (
            _gradients_with(x=lambda g, x, W, A, B, s: s * (g @ B) @ A)
        ),
        "the tokens' contributions are added; a mean, if any, was taken in the loss and is in g "
        "already": _gradients_with(
            A=lambda g, x, W, A, B, s: s * (g @ B).T @ x / len(x),
            B=lambda g, x, W, A, B, s: s * g.T @ (x @ A.T) / len(x),
        ),
    },
)


def who_learns(b_is_zero: bool, detached: bool, reentrant: bool) -> dict[str, bool]:
    """Which adapter tensors of two layers get a gradient that is not zero."""
    reached = not (detached or reentrant)
    return {"A1": reached and not b_is_zero, "B1": reached, "A2": not b_is_zero, "B2": True}


def _learns(rule):
    """Make an answer of a rule for (A1, B1, A2, B2), asked of (nothing is cut, B is not 0)."""

    def wrong(b_is_zero, detached, reentrant):
        truths = rule(not (detached or reentrant), not b_is_zero)
        return dict(zip(("A1", "B1", "A2", "B2"), truths, strict=True))

    return wrong


ex_5_3 = Exercise(
    "5.3 who learns?",
    who_learns,
    list(product((False, True), repeat=3)),
    because={
        "W₂ gets no gradient itself, but ∂L/∂x = g·W₂ passes through it to the first layer": (
            _learns(lambda uncut, b: (False, False, b, True))
        ),
        "∂L/∂A = s·(g·B)ᵀ·x: while B is zero, A's gradient is zero too": (
            _learns(lambda uncut, b: (uncut, uncut, True, True))
        ),
        "∂L/∂B = s·gᵀ·(x·Aᵀ) has no B in it: a zero B gets a gradient, and so gets going": (
            _learns(lambda uncut, b: (uncut and b, uncut and b, b, b))
        ),
        "while B is zero it is A that waits, and B that learns": (
            _learns(lambda uncut, b: (uncut, uncut and b, True, b))
        ),
        "with B₂ = 0 nothing comes back through the adapter of layer 2, but g·W₂ does: layer 1 is "
        "reached": _learns(lambda uncut, b: (uncut and b, uncut and b, b, True)),
        "the reentrant checkpoint looks at its inputs: if none needs a gradient, neither does its "
        "output, whatever parameters are inside": (
            lambda b_is_zero, detached, reentrant: who_learns(b_is_zero, detached, False)
        ),
        "detach() cuts the path: nothing before it hears of the loss": (
            lambda b_is_zero, detached, reentrant: who_learns(b_is_zero, False, reentrant)
        ),
        "the gradient comes from the loss, and meets layer 2 first: a cut stops layer 1": (
            _learns(lambda uncut, b: (b, True, uncut and b, uncut))
        ),
    },
)


def repaired_backward(g: Tensor, quantized: QuantizedTensor) -> Tensor:
    """Gradient of x for y = x·Wᵀ with the weight in 4 bits: `[..., in]`, in the dtype of g."""
    return g @ quantized.dequantize(g.dtype)


def _backward(g, quantized, flat=False, turned=False, rounded=False, in_bfloat16=False):
    """The version of the notebook, each fault by itself."""
    W = quantized.dequantize() if rounded or in_bfloat16 else quantized.dequantize(g.dtype)
    W = W.T if turned else W
    x = (g.to(W.dtype) @ W).to(g.dtype) if in_bfloat16 else g @ W.to(g.dtype)
    return x.flatten(0, -2) if flat else x


def _quantized_cases(random: torch.Generator) -> Inputs:
    """Square weights that were bfloat16 before quantisation, and gradients with leading sizes."""
    for leading in ((2, 3), (5,)):
        g = torch.randn(*leading, 64, generator=random)
        yield g, quantize(torch.randn(64, 64, generator=random).bfloat16())


ex_5_4 = Exercise(
    "5.4 repair the backward pass",
    repaired_backward,
    _quantized_cases,
    # Sums of 64 float32 products of size 1 in another order: 1e-5. A bfloat16 rounding: 1e-2.
    atol=1e-4,
    exact_dtype=True,
    because={
        **faults_left(
            _backward,
            flat="g may be [batch, tokens, out]; the gradient of x must have the shape of x",
            turned="forward is x·Wᵀ, so backward is g·W; on a square weight nothing but the "
            "numbers tells",
            in_bfloat16="the whole product was taken in bfloat16; g is float32, and so is the "
            "compute type",
        ),
        "dequantize() returns the dtype from before quantisation, here bfloat16: ask for g's, or "
        "the two passes use two different weights": (
            lambda g, quantized: _backward(g, quantized, rounded=True)
        ),
    },
)


WAYS = ("apart", "4-bit", "dequantized", "original")


def choose_merges() -> dict[str, str]:
    """What to do with the adapter in each of the four situations of exercise 5.5."""
    return {"a": "apart", "b": "dequantized", "c": "4-bit", "d": "apart"}


class Spelt(Exercise):
    """An exercise whose words may be spelt as the chapter's prose spells them: dequantised."""

    def _ask(self, answer, case):
        ways = super()._ask(answer, case)
        if not isinstance(ways, Mapping):
            return ways
        return {key: str(way).casefold().replace("ise", "ize") for key, way in ways.items()}


ex_5_5 = Spelt(
    "5.5 choose a merge",
    choose_merges,
    because={
        f"one of these is no choice; the four are {', '.join(map(repr, WAYS))}": Seen(
            lambda: choose_merges() | {"b": "merge"},
            lambda yours: not set(yours.values()) <= {*WAYS},
        ),
        "a: at 3 % nearly every weight falls back to its old code, and the update is lost": (
            chose(choose_merges, "a", "4-bit")
        ),
        "a: the server holds the base in 4 bits; a 16-bit weight does not fit its memory": (
            chose(choose_merges, "a", "dequantized", "original")
        ),
        "b: the adapter was trained and measured beside the dequantised weight; the original "
        "brings back 9 % of difference that it has never seen": (
            chose(choose_merges, "b", "original")
        ),
        "b: 16 bits are allowed, so there is no need to round the sum to sixteen levels": (
            chose(choose_merges, "b", "4-bit")
        ),
        "b and c ask for one file without an adapter beside it": Seen(
            lambda: choose_merges() | {"c": "apart"},
            lambda yours: "apart" in (yours["b"], yours["c"]),
        ),
        "c: the device reads NF4 only; and an update of 40 % survives the rounding": (
            chose(choose_merges, "c", "original", "dequantized")
        ),
        "d: twenty merged models are twenty bases; twenty adapters beside one base are small": (
            chose(choose_merges, "d", "dequantized", "original", "4-bit")
        ),
    },
)


def frozen_weight() -> Tensor:
    """The weight of exercise 5.6: normal, float32 `[64, 64]`, so that a row is a block."""
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


def _normal_update(size):
    return size * torch.randn(64, 64, generator=torch.Generator().manual_seed(1))


ex_5_6 = Exercise(
    "5.6 a small update that survives",
    surviving_update,
    open=True,
    score=lambda update: (
        f"{share_in_4_bits(update.detach()):.1%} survives of an update of {update_size(update):.2%}"
    ),
    because={
        "not a tensor of shape [64, 64]": Seen(
            lambda: _normal_update(0.01)[:32], lambda update: tuple(update.shape) != (64, 64)
        ),
        f"its root mean square is more than {LIMIT:.0%} of the weight's": Seen(
            lambda: _normal_update(0.5), lambda update: not update_size(update) <= LIMIT
        ),
        "an update of zero survives anything; it has to change the weight": Seen(
            lambda: torch.zeros(64, 64), lambda update: not update.any()
        ),
        "most of it is lost when each sum goes to its nearest level. The limit is on the root mean "
        "square, and not on how it is spread": Seen(
            lambda: _normal_update(0.9 * LIMIT),
            lambda update: not share_in_4_bits(update.detach()) > 0.5,
        ),
    },
)

EXERCISES = (ex_5_1, ex_5_2, ex_5_3, ex_5_4, ex_5_5, ex_5_6)
