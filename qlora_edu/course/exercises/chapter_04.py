"""The exercises of notebook 4: budgets, energy, two adapters at once, gradients, a broken layer."""

import math

import torch
from torch import Tensor

from qlora_edu.course.exercises.core import Case, Check, Mistake, OpenCheck
from qlora_edu.lora import energy_kept


def largest_rank(shapes: list[tuple[int, int]], budget: int) -> int:
    """Find the largest rank at which LoRA on all layers trains at most `budget` numbers.

    >>> largest_rank([(256, 256), (128, 256)], budget=10_000)
    11
    """
    return budget // sum(out + into for out, into in shapes)


def _budgets(random: torch.Generator) -> list[Case]:
    """One layer, exactly used up; some layers of the base; a block of a LLaMA-7B."""
    block = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    return [
        {"shapes": [(128, 256)], "budget": 3840},
        {"shapes": [(256, 256), (128, 256), (640, 256)], "budget": 40_000},
        {"shapes": block, "budget": 5_000_000},
    ]


ex_4_1 = Check(
    "4.1 the largest rank",
    reference=largest_rank,
    cases=_budgets,
    mistakes=(
        Mistake(
            "weights counted",
            lambda shapes, budget: budget // sum(out * into for out, into in shapes),
            "out · in numbers are what the layer holds; A and B are thin, r · in and out · r",
        ),
        Mistake(
            "A alone",
            lambda shapes, budget: budget // sum(into for out, into in shapes),
            "that counts A; B, [out, r], is trained as well",
        ),
        Mistake(
            "rounded up",
            lambda shapes, budget: math.ceil(budget / sum(out + into for out, into in shapes)),
            "this rank is one too many: *at most* the budget, so round down",
        ),
        Mistake(
            "the budget for each layer",
            lambda shapes, budget: min(budget // (out + into) for out, into in shapes),
            "the budget is for all layers together: add up out + in first, then divide",
        ),
        Mistake(
            "an average",
            lambda shapes, budget: budget // (len(shapes) * (shapes[0][0] + shapes[0][1])),
            "not every layer is as large as the first: add up each layer's own out + in",
        ),
    ),
)


def smallest_rank(singular_values: Tensor, share: float) -> int:
    """Find the smallest number of directions that hold at least `share` of the energy.

    >>> smallest_rank(torch.tensor([3.0, 1.0]), 0.85), smallest_rank(torch.tensor([3.0, 1.0]), 0.95)
    (1, 2)
    """
    return int((energy_kept(singular_values) < share).sum()) + 1


def _ceil_of_share(values: Tensor, share: float) -> int:
    return int((values < share).sum()) + 1


def _spectra(random: torch.Generator) -> list[Case]:
    """Singular values of a signal in noise, of noise alone, and ones that halve."""
    noise = torch.randn(48, 64, generator=random)
    signal = torch.randn(48, 4, generator=random) @ torch.randn(4, 64, generator=random)
    halving = 0.5 ** torch.arange(12.0)
    spectra = (torch.linalg.svdvals(signal + noise), torch.linalg.svdvals(noise), halving)
    return [{"singular_values": s, "share": share} for s in spectra for share in (0.5, 0.9, 0.97)]


ex_4_2 = Check(
    "4.2 the smallest rank for a share",
    reference=smallest_rank,
    cases=_spectra,
    mistakes=(
        Mistake(
            "not squared",
            lambda singular_values, share: _ceil_of_share(
                singular_values.cumsum(0) / singular_values.sum(), share
            ),
            "energy is the sum of *squares* of the singular values, as of the entries",
        ),
        Mistake(
            "an index",
            lambda singular_values, share: smallest_rank(singular_values, share) - 1,
            "one too few: an index counts from 0, a rank from 1",
        ),
        Mistake(
            "a share of length",
            lambda singular_values, share: _ceil_of_share(
                energy_kept(singular_values).sqrt(), share
            ),
            "you took the root at the end: that is a share of the length, not of the energy",
        ),
        Mistake(
            "a share of the directions",
            lambda singular_values, share: math.ceil(share * len(singular_values)),
            "that would be right if all directions were equally strong; add up what they hold",
        ),
        Mistake(
            "what is left over",
            lambda singular_values, share: _ceil_of_share(energy_kept(singular_values), 1 - share),
            "you asked for 1 − share: what may be *lost*, not what must be kept",
        ),
    ),
)


def with_both(
    W: Tensor, A1: Tensor, B1: Tensor, alpha1: float, A2: Tensor, B2: Tensor, alpha2: float
) -> Tensor:
    """Return the weight `[out, in]` with two adapters merged into it.

    >>> one = torch.ones(1, 1)
    >>> with_both(one, one, one, 2.0, one, one, 3.0)
    tensor([[6.]])
    """
    return W + alpha1 / len(A1) * B1 @ A1 + alpha2 / len(A2) * B2 @ A2


def _two_adapters(random: torch.Generator) -> list[Case]:
    """Square weights, so that a product the wrong way round has the right shape."""
    cases = []
    for n, r, alpha1, alpha2 in ((6, 2, 4.0, 8.0), (8, 4, 8.0, 2.0), (5, 3, 1.5, 6.0)):
        W = torch.randn(n, n, generator=random)
        A1, A2 = torch.randn(2, r, n, generator=random)
        B1, B2 = torch.randn(2, n, r, generator=random)
        names = ("W", "A1", "B1", "alpha1", "A2", "B2", "alpha2")
        cases.append(dict(zip(names, (W, A1, B1, alpha1, A2, B2, alpha2), strict=True)))
    return cases


ex_4_3 = Check(
    "4.3 two adapters at once",
    reference=with_both,
    cases=_two_adapters,
    # Entries below 100 in float32; the order of sums may differ.
    atol=1e-3,
    mistakes=(
        Mistake(
            "matrices added",
            lambda W, A1, B1, alpha1, A2, B2, alpha2: (
                W + (alpha1 / len(A1) * B1 + alpha2 / len(A2) * B2) @ (A1 + A2)
            ),
            "(B₁ + B₂)(A₁ + A₂) has the products B₁A₂ and B₂A₁ in it, which nobody trained: add "
            "the two ΔW, not their factors",
        ),
        Mistake(
            "α for α/r",
            lambda W, A1, B1, alpha1, A2, B2, alpha2: W + alpha1 * B1 @ A1 + alpha2 * B2 @ A2,
            "the factor is α/r; with α alone each change is r times too large",
        ),
        Mistake(
            "α/√r",
            lambda W, A1, B1, alpha1, A2, B2, alpha2: (
                W + alpha1 / len(A1) ** 0.5 * B1 @ A1 + alpha2 / len(A2) ** 0.5 * B2 @ A2
            ),
            "α/√r is rsLoRA; these adapters were trained with α/r",
        ),
        Mistake(
            "one scaling for both",
            lambda W, A1, B1, alpha1, A2, B2, alpha2: W + alpha1 / len(A1) * (B1 @ A1 + B2 @ A2),
            "each adapter brings its own α: the second was trained with alpha2",
        ),
        Mistake(
            "the wrong way round",
            lambda W, A1, B1, alpha1, A2, B2, alpha2: (
                W + alpha1 / len(A1) * (B1 @ A1).T + alpha2 / len(A2) * (B2 @ A2).T
            ),
            "this is ΔW transposed, [in, out]: W is [out, in], so the product is B @ A",
        ),
        Mistake(
            "the second in place of the first",
            lambda W, A1, B1, alpha1, A2, B2, alpha2: W + alpha2 / len(A2) * B2 @ A2,
            "that is a swap: the first adapter is gone; here both act",
        ),
        Mistake(
            "averaged",
            lambda W, A1, B1, alpha1, A2, B2, alpha2: (
                W + (alpha1 / len(A1) * B1 @ A1 + alpha2 / len(A2) * B2 @ A2) / 2
            ),
            "that halves both changes; merging adds them",
        ),
    ),
)


def gets_gradient(A_is_zero: bool, B_is_zero: bool, step: int) -> tuple[bool, bool]:
    """Say whether A and B have a gradient other than zero in a step; the first step is 1.

    >>> gets_gradient(A_is_zero=False, B_is_zero=True, step=1)
    (False, True)
    """
    A, B = not A_is_zero, not B_is_zero
    if step > 1:
        A = B = A or B
    return B, A


def _starts(random: torch.Generator) -> list[Case]:
    return [
        {"A_is_zero": a, "B_is_zero": b, "step": step}
        for a, b in ((False, True), (True, False), (True, True), (False, False))
        for step in (1, 2)
    ]


ex_4_4 = Check(
    "4.4 which of them learns?",
    reference=gets_gradient,
    cases=_starts,
    mistakes=(
        Mistake(
            "zero learns nothing",
            lambda A_is_zero, B_is_zero, step: (not A_is_zero, not B_is_zero),
            "the gradient of A is Bᵀ · (…), that of B is (…) · (A x)ᵀ: each hangs on the *other* "
            "being different from zero",
        ),
        Mistake(
            "the first step for ever",
            lambda A_is_zero, B_is_zero, step: (not B_is_zero, not A_is_zero),
            "after the first step the one that got a gradient has moved away from zero",
        ),
        Mistake(
            "always both",
            lambda A_is_zero, B_is_zero, step: (True, True),
            "in the first step one factor is zero, and a product with it has no gradient in the "
            "other",
        ),
        Mistake(
            "both zeros wake up",
            lambda A_is_zero, B_is_zero, step: (
                (True, True) if step > 1 else (not B_is_zero, not A_is_zero)
            ),
            "if both are zero neither moves in the first step, so the second is like the first",
        ),
        Mistake(
            "B and A exchanged",
            lambda A_is_zero, B_is_zero, step: gets_gradient(A_is_zero, B_is_zero, step)[::-1],
            "return A first: with B = 0 and A random it is B that learns first",
        ),
    ),
)


def repaired_forward(
    x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, lora_alpha: float, keep: Tensor
) -> Tensor:
    """Return `W x + bias + α/r · B A (keep · x)` for every row of `x` `[tokens, in]`.

    >>> one = torch.ones(1, 1)
    >>> repaired_forward(one, one, one[0], one, one, 2.0, 0 * one)
    tensor([[2.]])
    """
    return x @ W.T + bias + lora_alpha / len(A) * ((x * keep) @ A.T @ B.T)


def _broken(
    x: Tensor,
    W: Tensor,
    bias: Tensor,
    A: Tensor,
    B: Tensor,
    lora_alpha: float,
    keep: Tensor,
    dropped_base: bool = False,
    scaled_base: bool = False,
    undivided: bool = False,
) -> Tensor:
    """The version of the notebook, each fault by itself."""
    scaling = lora_alpha if undivided else lora_alpha / len(A)
    result = (x * keep if dropped_base else x) @ W.T + bias
    change = (x * keep) @ A.T @ B.T
    return (result + change) * scaling if scaled_base else result + scaling * change


def _layers(random: torch.Generator) -> list[Case]:
    """Layers that are not square, with half of the inputs dropped."""
    cases = []
    for tokens, into, out, r, lora_alpha in ((3, 6, 4, 2, 8.0), (5, 4, 7, 3, 1.5)):
        shapes = {"x": (tokens, into), "W": (out, into), "bias": (out,), "A": (r, into)}
        case = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
        case["B"] = torch.randn(out, r, generator=random)
        kept = torch.rand(tokens, into, generator=random) < 0.5
        cases.append(case | {"lora_alpha": lora_alpha, "keep": 2.0 * kept})
    return cases


ex_4_5 = Check(
    "4.5 repair the layer",
    reference=repaired_forward,
    cases=_layers,
    # Entries below 100 in float32; the order of sums may differ.
    atol=1e-3,
    mistakes=(
        Mistake(
            "as it was",
            lambda **case: _broken(**case, dropped_base=True, scaled_base=True, undivided=True),
            "this is the broken version: take `keep`, the place of α, and the missing r in turn",
        ),
        Mistake(
            "dropout on the base",
            lambda **case: _broken(**case, dropped_base=True),
            "the frozen W sees the input with holes: dropout belongs on the adapter's input alone",
        ),
        Mistake(
            "the base is scaled",
            lambda **case: _broken(**case, scaled_base=True),
            "W x and the bias are multiplied too: α/r belongs to the adapter alone",
        ),
        Mistake(
            "not divided by r",
            lambda **case: _broken(**case, undivided=True),
            "the factor is α/r, and r is the number of rows of A",
        ),
        Mistake(
            "no dropout",
            lambda x, keep, **case: repaired_forward(x, keep=torch.ones_like(keep), **case),
            "`keep` is not used: in training the adapter's input has holes",
        ),
        Mistake(
            "dropout on the output",
            lambda x, W, bias, A, B, lora_alpha, keep: (
                x @ W.T + bias + lora_alpha / len(A) * (x @ A.T @ B.T) * keep[:, :1]
            ),
            "`keep` has the shape of the input, one factor for each number that goes into A",
        ),
    ),
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


def _targets(answer: tuple) -> set[str]:
    target_modules = answer[0]
    if target_modules == "all-linear":
        return set(SHAPES)
    return {target_modules} if isinstance(target_modules, str) else set(target_modules)


def _trained(answer: tuple) -> int:
    return BLOCKS * answer[1] * sum(sum(SHAPES[name]) for name in _targets(answer))


ex_4_6 = OpenCheck(
    "4.6 spend 100,000 numbers",
    reference=my_adapter,
    mistakes=(
        Mistake(
            "no such layer",
            lambda: (["attention"], 16, 32.0),
            "return (targets, r, alpha): targets is 'all-linear' or names such as 'q_proj', and r "
            "a whole number",
            lambda case, answer, _: (
                len(answer) != 3
                or not _targets(answer)
                or not _targets(answer) <= set(SHAPES)
                or type(answer[1]) is not int
                or answer[1] < 1
            ),
        ),
        Mistake(
            "over the budget",
            lambda: ("all-linear", 8, 16.0),
            "over 100,000 trained numbers: add r · (in + out) over the chosen layers of all four "
            "blocks",
            lambda case, answer, _: _trained(answer) > BUDGET,
        ),
        Mistake(
            "query and value only",
            lambda: (["q_proj", "v_proj"], 16, 32.0),
            "no feed-forward layer is adapted: in the stored runs 57,344 numbers on q and v gave "
            "0.37, 71,680 spread over all layers 0.72",
            lambda case, answer, _: not _targets(answer) & FEED_FORWARD,
        ),
        Mistake(
            "half of it unused",
            lambda: ("all-linear", 2, 4.0),
            "less than half of the budget is used: the stored runs with 17,920 and 35,840 numbers "
            "reached a third of the rows",
            lambda case, answer, _: 2 * _trained(answer) < BUDGET,
        ),
        Mistake(
            "far too loud or too soft",
            lambda: ("all-linear", 5, 128.0),
            "α/r was 2 where it worked; at 1/8 the run was slow, at 16 it broke down",
            lambda case, answer, _: not 0.5 <= answer[2] / answer[1] <= 8,
        ),
    ),
)
