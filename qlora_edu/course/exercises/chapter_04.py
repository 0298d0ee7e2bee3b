"""The exercises of notebook 4: budgets, energy, two adapters at once, gradients, a broken layer."""

import math

import torch
from torch import Tensor

from qlora_edu.course.exercises.core import Exercise, Inputs, Seen, faults_left
from qlora_edu.lora import energy_kept


def largest_rank(shapes: list[tuple[int, int]], budget: int) -> int:
    """Find the largest rank at which LoRA on all layers trains at most `budget` numbers."""
    return budget // sum(out + into for out, into in shapes)


LLAMA_BLOCK = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]

ex_4_1 = Exercise(
    "4.1 the largest rank",
    largest_rank,
    # Quotients of 10, exactly; of 22.8, which a rounding to the nearest takes up; and of 64.04.
    [
        ([(128, 256)], 3840),
        ([(256, 256), (128, 256), (640, 256)], 40_800),
        (LLAMA_BLOCK, 5_000_000),
    ],
    because={
        "out · in numbers are what the layer holds; A and B are thin, r · in and out · r": (
            lambda shapes, budget: budget // sum(out * into for out, into in shapes)
        ),
        "that counts A; B, [out, r], is trained as well": (
            lambda shapes, budget: budget // sum(into for out, into in shapes)
        ),
        "this rank is one too many: *at most* the budget, so round down": Seen(
            lambda shapes, budget: math.ceil(budget / sum(out + into for out, into in shapes)),
            lambda rank, expected, shapes, budget: rank == expected + 1,
        ),
        "a rank is a whole number: round down": (
            lambda shapes, budget: budget / sum(out + into for out, into in shapes)
        ),
        "the budget is for all layers together: add up out + in first, then divide": (
            lambda shapes, budget: min(budget // (out + into) for out, into in shapes)
        ),
    },
)


def smallest_rank(singular_values: Tensor, share: float) -> int:
    """Find the smallest number of directions that hold at least `share` of the energy."""
    return _first_with(energy_kept(singular_values), share)


def _first_with(kept, share):
    return int((kept < share).sum()) + 1


def _spectra(random: torch.Generator) -> Inputs:
    """Singular values of a signal in noise, of noise alone, ones that halve, four equal ones.

    Of four equal ones, two hold exactly one half.
    """
    noise = torch.randn(48, 64, generator=random)
    signal = torch.randn(48, 4, generator=random) @ torch.randn(4, 64, generator=random)
    spectra = (torch.linalg.svdvals(signal + noise), torch.linalg.svdvals(noise))
    spectra += (0.5 ** torch.arange(12.0), torch.ones(4))
    return [(values, share) for values in spectra for share in (0.5, 0.9, 0.97)]


ex_4_2 = Exercise(
    "4.2 the smallest rank for a share",
    smallest_rank,
    _spectra,
    because={
        "energy is the sum of *squares* of the singular values, as of the entries": (
            lambda values, share: _first_with(values.cumsum(0) / values.sum(), share)
        ),
        "one too few: an index counts from 0, a rank from 1": (
            lambda values, share: smallest_rank(values, share) - 1
        ),
        "*at least* the share: directions that hold exactly that much are enough": (
            lambda values, share: int((energy_kept(values) <= share).sum()) + 1
        ),
        "you took the root at the end: that is a share of the length, not of the energy": (
            lambda values, share: _first_with(energy_kept(values).sqrt(), share)
        ),
    },
)


def with_both(
    W: Tensor, A1: Tensor, B1: Tensor, alpha1: float, A2: Tensor, B2: Tensor, alpha2: float
) -> Tensor:
    """Return the weight `[out, in]` with two adapters merged into it."""
    return W + alpha1 / len(A1) * B1 @ A1 + alpha2 / len(A2) * B2 @ A2


def _scaled_by(factors):
    """Merge both changes with other factors, a function of (α₁, r₁, α₂, r₂)."""

    def wrong(W, A1, B1, alpha1, A2, B2, alpha2):
        first, second = factors(alpha1, len(A1), alpha2, len(A2))
        return W + first * B1 @ A1 + second * B2 @ A2

    return wrong


def _two_adapters(random: torch.Generator) -> Inputs:
    """Square weights, so that a product the wrong way round has the right shape.

    The first two adapters have one rank, so that their factors can be added; the others have not.
    """
    for n, r1, r2, *alphas in ((6, 2, 2, 4.0, 8.0), (8, 4, 1, 8.0, 2.0), (5, 2, 3, 1.5, 6.0)):
        W, *strips = (
            torch.randn(shape, generator=random)
            for shape in ((n, n), (r1, n), (n, r1), (r2, n), (n, r2))
        )
        yield W, *strips[:2], alphas[0], *strips[2:], alphas[1]


ex_4_3 = Exercise(
    "4.3 two adapters at once",
    with_both,
    _two_adapters,
    # Entries below 100 in float32; the order of sums may differ.
    atol=1e-3,
    because={
        "(B₁ + B₂)(A₁ + A₂) has the products B₁A₂ and B₂A₁ in it, which nobody trained: add the "
        "two ΔW, not their factors": lambda W, A1, B1, alpha1, A2, B2, alpha2: (
            W + (alpha1 / len(A1) * B1 + alpha2 / len(A2) * B2) @ (A1 + A2)
        ),
        "the factor is α/r; with α alone each change is r times too large": (
            _scaled_by(lambda alpha1, r1, alpha2, r2: (alpha1, alpha2))
        ),
        "each adapter brings its own α: the second was trained with alpha2": (
            _scaled_by(lambda alpha1, r1, alpha2, r2: (alpha1 / r1, alpha1 / r2))
        ),
        "each adapter brings its own rank: that of the second is the number of rows of A2": (
            _scaled_by(lambda alpha1, r1, alpha2, r2: (alpha1 / r1, alpha2 / r1))
        ),
        "stacked or not, each α is divided by the rank that it was trained with, not by r₁ + r₂": (
            _scaled_by(lambda alpha1, r1, alpha2, r2: (alpha1 / (r1 + r2), alpha2 / (r1 + r2)))
        ),
        "this is ΔW transposed, [in, out]: W is [out, in], so the product is B @ A": (
            lambda W, *adapters: W + with_both(0 * W, *adapters).T
        ),
    },
)


def gets_gradient(A_is_zero: bool, B_is_zero: bool, step: int) -> tuple[bool, bool]:
    """Say whether A and B have a gradient other than zero in a step; the first step is 1."""
    A, B = not A_is_zero, not B_is_zero
    if step > 1:
        A = B = A or B
    return B, A


ex_4_4 = Exercise(
    "4.4 which of them learns?",
    gets_gradient,
    [
        (a, b, step)
        for a, b in ((False, True), (True, False), (True, True), (False, False))
        for step in (1, 2)
    ],
    because={
        "the gradient of A is Bᵀ · (…), that of B is (…) · (A x)ᵀ: each hangs on the *other* being "
        "different from zero": lambda a, b, step: (not a, not b),
        "after the first step the one that got a gradient has moved away from zero": (
            lambda a, b, step: (not b, not a)
        ),
        "in the first step one factor is zero, and a product with it has no gradient in the "
        "other": lambda a, b, step: (True, True),
        "if both are zero neither moves in the first step, so the second is like the first": (
            lambda a, b, step: (True, True) if step > 1 else (not b, not a)
        ),
        "with B = 0 and A random it is B that learns first: each gradient has the *other* factor "
        "in it. (And A is returned first.)": lambda a, b, step: gets_gradient(a, b, step)[::-1],
    },
)


def repaired_forward(
    x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, lora_alpha: float, keep: Tensor
) -> Tensor:
    """Return `W x + bias + α/r · B A (keep · x)` for every row of `x` `[tokens, in]`."""
    return x @ W.T + bias + lora_alpha / len(A) * ((x * keep) @ A.T @ B.T)


def _forward(
    x, W, bias, A, B, lora_alpha, keep, dropped_base=False, scaled_base=False, undivided=False
):
    """The version of the notebook, each fault by itself."""
    scaling = lora_alpha if undivided else lora_alpha / len(A)
    result = (x * keep if dropped_base else x) @ W.T + bias
    change = (x * keep) @ A.T @ B.T
    return (result + change) * scaling if scaled_base else result + scaling * change


def _layers(random: torch.Generator) -> Inputs:
    """Layers that are not square, with half of the inputs dropped."""
    for tokens, into, out, r, lora_alpha in ((3, 6, 4, 2, 8.0), (5, 4, 7, 3, 1.5)):
        shapes = ((tokens, into), (out, into), (out,), (r, into), (out, r))
        layer = (torch.randn(shape, generator=random) for shape in shapes)
        keep = 2.0 * (torch.rand(tokens, into, generator=random) < 0.5)
        yield *layer, lora_alpha, keep


ex_4_5 = Exercise(
    "4.5 repair the layer",
    repaired_forward,
    _layers,
    # Entries below 100 in float32; the order of sums may differ.
    atol=1e-3,
    because={
        **faults_left(
            _forward,
            dropped_base="the frozen W sees the input with holes: dropout belongs on the adapter's "
            "input alone",
            scaled_base="W x and the bias are multiplied too: α/r belongs to the adapter alone",
            undivided="the factor is α/r, and r is the number of rows of A",
        ),
        "`keep` is not used: in training the adapter's input has holes": (
            lambda *layer: repaired_forward(*layer[:-1], torch.ones_like(layer[-1]))
        ),
    },
)

BUDGET = 100_000
BLOCKS = 4  # of the embedded base
SHAPES = {
    "q_proj": (256, 256),
    "k_proj": (128, 256),
    "v_proj": (128, 256),
    "o_proj": (256, 256),
    "gate_proj": (640, 256),
    "up_proj": (640, 256),
    "down_proj": (256, 640),
}
FEED_FORWARD = {"gate_proj", "up_proj", "down_proj"}


def my_adapter() -> tuple[str, int, float]:
    """Spend 100,000 numbers: every linear layer, the largest rank that fits, α/r as it worked."""
    return "all-linear", 5, 10.0


def _adapted(answer):
    names = {answer[0]} if isinstance(answer[0], str) else set(answer[0])
    return set(SHAPES) if names == {"all-linear"} else names


def _trained(answer):
    return BLOCKS * answer[1] * sum(sum(SHAPES[name]) for name in _adapted(answer))


def _is_no_adapter(answer):
    names, r = _adapted(answer), answer[1]
    whole = type(r) is int and r >= 1
    return len(answer) != 3 or not names or not names <= set(SHAPES) or not whole


ex_4_6 = Exercise(
    "4.6 spend 100,000 numbers",
    my_adapter,
    open=True,
    score=lambda answer: (
        f"{_trained(answer):,} numbers in {BLOCKS * len(_adapted(answer))} layers; α/r = "
        f"{answer[2] / answer[1]:.3g}"
    ),
    because={
        "return (target_modules, r, lora_alpha): target_modules is 'all-linear' or names such as "
        "'q_proj', and r a whole number": Seen(lambda: (["attention"], 16, 32.0), _is_no_adapter),
        "over 100,000 trained numbers: add r · (in + out) over the chosen layers of all four "
        "blocks": Seen(lambda: ("all-linear", 8, 16.0), lambda answer: _trained(answer) > BUDGET),
        "no feed-forward layer is adapted: in the stored runs 57,344 numbers on q and v alone gave "
        "0.37, 71,680 spread over all layers 0.72": Seen(
            lambda: (["q_proj", "v_proj"], 16, 32.0),
            lambda answer: not _adapted(answer) & FEED_FORWARD,
        ),
        "less than half of the budget is used: the stored runs with 17,920 and 35,840 numbers "
        "reached a third of the rows": Seen(
            lambda: ("all-linear", 2, 4.0), lambda answer: 2 * _trained(answer) < BUDGET
        ),
        "α/r was 2 where it worked; at 1/8 the run was slow, at 16 it broke down": Seen(
            lambda: ("all-linear", 5, 128.0), lambda answer: not 0.5 <= answer[2] / answer[1] <= 8
        ),
    },
)

EXERCISES = (ex_4_1, ex_4_2, ex_4_3, ex_4_4, ex_4_5, ex_4_6)
