"""The exercises of notebook 6: count, derive, predict, repair, search, and choose."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_edu.course.exercises.core import Exercise, Inputs, Seen, chose
from qlora_edu.memory import GIB, RESERVE, plan_memory


def held_bytes(
    frozen: int, frozen_bits: float, trained: int, trained_bytes: int, state_bytes: int
) -> float:
    """Bytes of weights, gradients and the two states of AdamW, without anything per token."""
    return frozen * frozen_bits / 8 + trained * (2 * trained_bytes + 2 * state_bytes)


def _beside_the_frozen(of_one):
    """Count the frozen weights rightly, and a trained number's bytes by (trained, state) bytes."""

    def wrong(frozen, frozen_bits, trained, trained_bytes, state_bytes):
        return frozen * frozen_bits / 8 + trained * of_one(trained_bytes, state_bytes)

    return wrong


ex_6_1 = Exercise(
    "6.1 bytes that do not depend on the tokens",
    held_bytes,
    [(1_000_000, 4.5, 3000, 4, 4), (1_000_000, 16, 3000, 2, 4), (0, 16, 5000, 2, 1)],
    because={
        "each trained number is there as a weight and as a gradient, both of trained_bytes; one of "
        "the two is missing": _beside_the_frozen(lambda own, state: own + 2 * state),
        "AdamW keeps two states for each trained number: the running means of the gradient and of "
        "its square": _beside_the_frozen(lambda own, state: 2 * own + state),
        "the states have a width of their own, state_bytes; 32-bit states beside 16-bit parameters "
        "are common": _beside_the_frozen(lambda own, state: 4 * own),
        "frozen_bits are bits: eight of them are a byte": (
            lambda frozen, bits, *trained: held_bytes(frozen, 8 * bits, *trained)
        ),
        "what is frozen has no gradient and no optimizer state: that is what freezing saves": Seen(
            lambda frozen, bits, trained, own, state: (
                held_bytes(frozen, bits, trained, own, state) + frozen * (own + 2 * state)
            ),
            lambda yours, expected, frozen, bits, trained, own, state: (
                yours - expected
                in {frozen * n for n in (own, 2 * state, own + 2 * state, bits / 8)}
            ),
        ),
    },
)


def bytes_kept(blocks: int, every: int, block: int, boundary: int) -> int:
    """The most bytes of activations at once, with a checkpoint before every `every` blocks."""
    return blocks // every * boundary + every * block


ex_6_2 = Exercise(
    "6.2 bytes kept with checkpoints",
    bytes_kept,
    [(32, 1, 186_504, 8192), (32, 8, 186_504, 8192), (12, 3, 1000, 700)],
    because={
        "while a segment is computed again, all that its blocks keep is there too": (
            lambda blocks, every, block, boundary: blocks // every * boundary
        ),
        "a segment is computed again as a whole: `every` blocks keep their activations at once": (
            lambda blocks, every, block, boundary: blocks // every * boundary + block
        ),
        "inside a segment nothing is kept on the way forward: one input for each segment": (
            lambda blocks, every, block, boundary: blocks * boundary + every * block
        ),
        "the two counts have changed places: blocks // every inputs are kept, and `every` blocks "
        "are recorded": (
            lambda blocks, every, block, boundary: every * boundary + blocks // every * block
        ),
    },
)

SITUATIONS: dict[str, dict[str, Any]] = {
    "a": {"model": "llama-7b", "method": "full", "batch_size": 2, "max_length": 256},
    "b": {"model": "llama-3-8b", "method": "qlora", "batch_size": 2, "max_length": 512},
    "c": {"model": "llama-7b", "method": "qlora", "batch_size": 2, "max_length": 64},
    "d": {"model": "llama-2-70b", "method": "lora", "r": 8, "batch_size": 2, "max_length": 2048},
}
"""The four steps of exercise 6.3."""

MOMENTS = ("forward", "logits and loss", "backward", "optimizer step")


def peak_moments() -> dict[str, str]:
    """The moment of the peak in each of `SITUATIONS`."""
    return {"a": "optimizer step", "b": "logits and loss", "c": "optimizer step", "d": "backward"}


ex_6_3 = Exercise(
    "6.3 the moment of the peak",
    peak_moments,
    because={
        f"one of these is none of the four moments: {', '.join(map(repr, MOMENTS))}": Seen(
            lambda: peak_moments() | {"b": "loss"}, lambda yours: {*yours.values()} - {*MOMENTS}
        ),
        "with checkpointing the forward pass leaves one input a block, and whatever comes after it "
        "comes on top": Seen(
            lambda: dict.fromkeys("abcd", "forward"), lambda yours: "forward" in yours.values()
        ),
        "a: a gradient for each of 6.7 billion weights is there when AdamW starts, and AdamW needs "
        "as much again as its workspace": chose(peak_moments, "a", "backward", "logits and loss"),
        "b: 1,024 tokens times 128,256 words times 12 bytes are 1.5 GiB, more than one block and "
        "all gradients of the adapters, and more than these gradients and AdamW's workspace": (
            chose(peak_moments, "b", "backward", "optimizer step")
        ),
        "c: with 128 tokens all that is counted per token is small; what is left are the gradients "
        "of 160 million adapter weights, and the workspace of AdamW": (
            chose(peak_moments, "c", "logits and loss", "backward")
        ),
        "d: at a width of 8,192 one block that is computed again keeps some 590,000 bytes per "
        "token, and 32,000 logits take 384,000": chose(peak_moments, "d", "logits and loss"),
        "d: at r = 8 gradients and workspace are small; 4,096 tokens in a wide block are not": (
            chose(peak_moments, "d", "optimizer step")
        ),
    },
)


class Dropping(nn.Module):
    """The block of exercise 6.4: a linear layer, dropout, tanh."""

    def __init__(self, seed: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(6, 6, generator=generator) / 6**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., 6]` to the same shape."""
        return torch.tanh(nn.functional.dropout(x @ self.weight.T, 0.5))


def recomputed_gradient(
    block: Callable[[Tensor], Tensor], x: Tensor, grad_y: Tensor, rng_state: Tensor
) -> Tensor:
    """The gradient of a block's input, from a second forward pass with the same random state."""
    x = x.detach().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(rng_state)
        y = block(x)
    y.backward(grad_y)
    return x.grad


def _with_another_draw(block, x, grad_y, rng_state):
    return recomputed_gradient(block, x, grad_y, torch.Generator().manual_seed(1).get_state())


def _without_dropout(block, x, grad_y, rng_state):
    leaf = x.detach().requires_grad_()
    torch.tanh(leaf @ block.weight.detach().T).backward(grad_y)
    return leaf.grad


def _has_another_draw(yours, expected, block, x, grad_y, rng_state):
    """Is there a pattern of dropped outputs that explains the first row of the answer?"""
    weight = block.weight.detach()
    for pattern in range(2 ** weight.shape[0]):
        kept = torch.tensor([2.0 * (pattern >> i & 1) for i in range(weight.shape[0])])
        leaf = x[0].detach().requires_grad_()
        torch.tanh(kept * (leaf @ weight.T)).backward(grad_y[0])
        if torch.allclose(leaf.grad, yours[0], atol=1e-5):
            return True
    return False


def _draws(random: torch.Generator) -> Inputs:
    for seed in (5, 6):
        x, grad_y = torch.randn(2, 3, 6, generator=random)
        yield Dropping(seed), x, grad_y, torch.Generator().manual_seed(seed).get_state()


ex_6_4 = Exercise(
    "6.4 repair a checkpoint",
    recomputed_gradient,
    _draws,
    atol=1e-6,
    because={
        "nothing came back: without a `return`, or from x.grad of an x that collects no gradient; "
        "make a leaf of it with x.detach().requires_grad_()": lambda *given: None,
        "y.sum().backward() sends a one to every output; what arrives there is grad_y: "
        "y.backward(grad_y)": lambda block, x, grad_y, rng_state: recomputed_gradient(
            block, x, torch.ones_like(grad_y), rng_state
        ),
        "without dropout it is another function; the second forward pass must drop what the first "
        "one dropped": _without_dropout,
        "dropout fell otherwise than in the forward pass: restore its random state with "
        "torch.set_rng_state(rng_state) before the block runs again": Seen(
            _with_another_draw, _has_another_draw
        ),
    },
)


@dataclass
class Peak:
    """The peak of exercise 6.5 as a function of the length, to be asked sixty times at most."""

    constant: float
    per_token: float
    per_pair: float
    asked: int = 0

    def __call__(self, length: int) -> float:
        """Bytes at this length."""
        self.asked += 1
        if self.asked > 60:
            raise RuntimeError("asked more than sixty times; halve the interval each time")
        return self.constant + self.per_token * length + self.per_pair * length * length


LONGEST = 2**20


def longest_that_fits(peak: Callable[[int], float], room: float) -> int:
    """The longest length in 0…`LONGEST` - 1 whose peak is at most the room; 0 if none is."""
    low, high = 0, LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        if peak(middle) <= room:
            low = middle
        else:
            high = middle
    return low


def _by_division(peak, room):
    constant = peak(0)
    return max(0, int((room - constant) // (peak(1) - constant)))


ex_6_5 = Exercise(
    "6.5 the longest row that fits",
    longest_that_fits,
    # Exactly the room at 9,000 tokens; a curve; none fits; every length fits.
    [
        (Peak(5e9, 2e6, 0), 23e9),
        (Peak(5e9, 2e6, 70), 11e9),
        (Peak(30e9, 2e6, 0), 23e9),
        (Peak(1e9, 1, 0), 2e9),
    ],
    because={
        "that is the shortest length that does not fit; the answer is one less": (
            lambda peak, room: longest_that_fits(peak, room) + 1
        ),
        "a step that needs exactly the room fits: ≤, and not <": (
            lambda peak, room: longest_that_fits(peak, room * (1 - 1e-12))
        ),
        "if not even one token fits, the answer is 0": Seen(
            lambda peak, room: max(1, longest_that_fits(peak, room)),
            lambda yours, expected, peak, room: expected == 0,
        ),
        "a mask makes the peak grow with the square of the length: ask `peak`, and do not divide": (
            _by_division
        ),
    },
)

CARD_GB = 24
PROPOSALS: dict[str, dict[str, Any]] = {
    "Anna": {"method": "full", "batch_size": 1, "max_length": 2048},
    "Bela": {
        "method": "qlora",
        "batch_size": 2,
        "max_length": 2048,
        "gradient_checkpointing": False,
    },
    "Cleo": {"method": "qlora", "batch_size": 4, "max_length": 512},
    "Dora": {"method": "qlora", "batch_size": 16, "max_length": 2048},
}
"""What four people would do in exercise 6.6; none of it works."""


def row_lengths() -> Tensor:
    """Tokens of each of the 2,000 rows of exercise 6.6."""
    generator = torch.Generator().manual_seed(66)
    lengths = torch.exp(5.6 + 0.75 * torch.randn(2000, generator=generator))
    return lengths.clamp(16, 1991).long()


def choose_run() -> dict[str, Any]:
    """Settings that train llama-3-8b on every row of `row_lengths()` on a 24 GB card."""
    return {"method": "qlora", "batch_size": 4, "max_length": 2048, "padding": True}


_PLANS: dict[str, Any] = {}


def _plan(run):
    run = {**run, "device": "cuda"}  # a card's, whatever was said
    key = repr(sorted(run.items()))
    if key not in _PLANS:
        _PLANS[key] = plan_memory("llama-3-8b", **run)
    return _PLANS[key]


def _spare(run):
    """The bytes that are left on the card, its reserve aside."""
    return CARD_GB * GIB - RESERVE - _plan(run).peak_bytes


def _score_of_run(run):
    if "device" in run:  # a plan for a processor takes a minute
        return ""
    left = _spare(run) / GIB
    fits = f"{left:.1f} GiB to spare" if left >= 0 else f"{-left:.1f} GiB too much"
    return f"{run['batch_size']} rows at a time, {fits}"


ex_6_6 = Exercise(
    "6.6 choose a run",
    choose_run,
    open=True,
    score=_score_of_run,
    because={
        'return a dictionary with at least "method", "batch_size" and "max_length"': Seen(
            lambda: [4, 2048], lambda run: not {"method", "batch_size", "max_length"} <= run.keys()
        ),
        "that plans a step on a processor; the card is a GPU: leave `device` as it is": Seen(
            lambda: choose_run() | {"device": "cpu"},
            lambda run: run.get("device", "cuda") != "cuda",
        ),
        "plan_memory does not take these settings: call it with them and read its error": Seen(
            lambda: choose_run() | {"lenght": 2048},
            lambda run: _plan(run) is None,  # an error counts as found
        ),
        "rows are cut: the longest has 1,991 tokens, and answers stand at the end of a row": Seen(
            lambda: PROPOSALS["Cleo"], lambda run: run["max_length"] < int(row_lengths().max())
        ),
        "full fine-tuning takes eight bytes per parameter, 60 GiB, before the first token": Seen(
            lambda: PROPOSALS["Anna"], lambda run: run["method"] == "full" and _spare(run) < 0
        ),
        "it does not fit: the base alone takes 15 GiB in 16 bits; see plan.table()": Seen(
            lambda: choose_run() | {"method": "lora"},
            lambda run: run["method"] != "qlora" and _spare(run) < 0,
        ),
        "it does not fit: look at plan.table() for the moment of the peak. With a vocabulary of "
        "128,256 it is the logits, and they grow with batch_size · max_length": Seen(
            lambda: PROPOSALS["Dora"],
            lambda run: _spare(run) < 0 and _plan(run).peak_moment == "logits and loss",
        ),
        "it does not fit: look at plan.table() for the moment of the peak, and for the largest row "
        "in it": Seen(lambda: choose_run() | {"r": 2048}, lambda run: _spare(run) < 0),
        "it fits, and more rows at a time would too: at least three rows per step are asked for": (
            Seen(lambda: choose_run() | {"batch_size": 1}, lambda run: not run["batch_size"] >= 3)
        ),
    },
)

EXERCISES = (ex_6_1, ex_6_2, ex_6_3, ex_6_4, ex_6_5, ex_6_6)
