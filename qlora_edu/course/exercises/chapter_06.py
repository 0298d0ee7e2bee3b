"""The exercises of notebook 6: count, derive, predict, repair, search, and choose."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_edu.course.exercises.core import Case, Check, Mistake, OpenCheck
from qlora_edu.memory import GIB, RESERVE, plan_memory


def held_bytes(
    frozen: int, frozen_bits: float, trained: int, trained_bytes: int, state_bytes: int
) -> float:
    """Bytes of weights, gradients and the two states of AdamW, without anything per token.

    >>> held_bytes(0, 16, 1000, 2, 4)
    12000.0
    """
    return frozen * frozen_bits / 8 + trained * (2 * trained_bytes + 2 * state_bytes)


ex_6_1 = Check(
    "6.1 bytes that do not depend on the tokens",
    reference=held_bytes,
    cases=lambda random: [
        {
            "frozen": frozen,
            "frozen_bits": bits,
            "trained": trained,
            "trained_bytes": width,
            "state_bytes": state,
        }
        for frozen, bits, trained, width, state in (
            (1_000_000, 4.5, 3000, 4, 4),
            (1_000_000, 16, 3000, 2, 4),
            (0, 16, 5000, 2, 1),
        )
    ],
    mistakes=(
        Mistake(
            "gradients forgotten",
            lambda frozen, frozen_bits, trained, trained_bytes, state_bytes: (
                frozen * frozen_bits / 8 + trained * (trained_bytes + 2 * state_bytes)
            ),
            "each trained number has a gradient too, of its own dtype",
        ),
        Mistake(
            "one state",
            lambda frozen, frozen_bits, trained, trained_bytes, state_bytes: (
                frozen * frozen_bits / 8 + trained * (2 * trained_bytes + state_bytes)
            ),
            "AdamW keeps two states for each trained number: the running means of the gradient "
            "and of its square",
        ),
        Mistake(
            "bits taken for bytes",
            lambda frozen, frozen_bits, trained, trained_bytes, state_bytes: (
                frozen * frozen_bits + trained * (2 * trained_bytes + 2 * state_bytes)
            ),
            "frozen_bits are bits: eight of them are a byte",
        ),
        Mistake(
            "gradients and states of the frozen",
            lambda frozen, frozen_bits, trained, trained_bytes, state_bytes: (
                frozen * frozen_bits / 8
                + trained * trained_bytes
                + (frozen + trained) * (trained_bytes + 2 * state_bytes)
            ),
            "what is frozen has no gradient and no optimizer state: that is what freezing saves",
        ),
        Mistake(
            "states as wide as the parameter",
            lambda frozen, frozen_bits, trained, trained_bytes, state_bytes: (
                frozen * frozen_bits / 8 + trained * 4 * trained_bytes
            ),
            "the states have a width of their own, state_bytes; 32-bit states beside 16-bit "
            "parameters are common",
        ),
    ),
)


def bytes_kept(blocks: int, every: int, block: int, boundary: int) -> int:
    """The most bytes of activations at once, with a checkpoint before every `every` blocks.

    >>> bytes_kept(32, 1, 100, 4), bytes_kept(32, 32, 100, 4)
    (228, 3204)
    """
    return blocks // every * boundary + every * block


ex_6_2 = Check(
    "6.2 bytes kept with checkpoints",
    reference=bytes_kept,
    cases=lambda random: [
        {"blocks": blocks, "every": every, "block": block, "boundary": boundary}
        for blocks, every, block, boundary in (
            (32, 1, 186_504, 8192),
            (32, 8, 186_504, 8192),
            (12, 3, 1000, 700),
        )
    ],
    mistakes=(
        Mistake(
            "only the boundaries",
            lambda blocks, every, block, boundary: blocks // every * boundary,
            "while a segment is computed again, all that its blocks keep is there too",
        ),
        Mistake(
            "one block, whatever the segment",
            lambda blocks, every, block, boundary: blocks // every * boundary + block,
            "a segment is computed again as a whole: `every` blocks keep their activations at once",
        ),
        Mistake(
            "a boundary for each block",
            lambda blocks, every, block, boundary: blocks * boundary + every * block,
            "inside a segment nothing is kept on the way forward: one input for each segment",
        ),
        Mistake(
            "all blocks",
            lambda blocks, every, block, boundary: blocks // every * boundary + blocks * block,
            "that is worse than no checkpointing: a segment's activations go before the next "
            "segment is computed again",
        ),
        Mistake(
            "the largest of the two",
            lambda blocks, every, block, boundary: max(blocks // every * boundary, every * block),
            "boundaries and the segment in hand are there at the same time: add them",
        ),
        Mistake(
            "a block shared among the segments",
            lambda blocks, every, block, boundary: (
                blocks // every * boundary + blocks // every * block
            ),
            "`every` blocks make a segment, and blocks // every is the number of segments: the "
            "other way round",
        ),
    ),
)

SITUATIONS: dict[str, dict[str, Any]] = {
    "a": {"model": "llama-7b", "method": "full", "batch": 2, "length": 256},
    "b": {"model": "llama-3-8b", "method": "qlora", "batch": 4, "length": 512},
    "c": {"model": "llama-7b", "method": "qlora", "batch": 2, "length": 64},
    "d": {"model": "llama-2-70b", "method": "lora", "r": 8, "batch_size": 2, "max_length": 2048},
}
"""The four steps of exercise 6.3."""


def peak_moments() -> dict[str, str]:
    """The moment of the peak in each of `SITUATIONS`.

    >>> peak_moments()["a"]
    'optimizer step'
    """
    return {
        "a": "optimizer step",
        "b": "logits and loss",
        "c": "optimizer step",
        "d": "backward",
    }


def _said(situation: str, *moments: str) -> Callable[[Case, Any, Any], bool]:
    return lambda case, yours, expected: dict(yours)[situation] in moments


ex_6_3 = Check(
    "6.3 the moment of the peak",
    reference=peak_moments,
    mistakes=(
        Mistake(
            "the end of the forward pass",
            lambda: dict.fromkeys("abcd", "forward"),
            "with checkpointing the forward pass leaves one input a block, and whatever comes "
            "after it comes on top",
            lambda case, yours, expected: "forward" in yours.values(),
        ),
        Mistake(
            "a full fine-tune peaks at its activations",
            lambda: peak_moments() | {"a": "backward"},
            "a: a gradient for each of 6.7 billion weights is there when AdamW starts, and AdamW "
            "needs as much again as its workspace",
            _said("a", "backward", "logits and loss"),
        ),
        Mistake(
            "a small vocabulary",
            lambda: peak_moments() | {"b": "backward"},
            "b: 2,048 tokens times 128,256 words times 12 bytes are 2.9 GiB, more than one block "
            "and all gradients of the adapters",
            _said("b", "backward", "optimizer step"),
        ),
        Mistake(
            "tokens where there are few",
            lambda: peak_moments() | {"c": "logits and loss"},
            "c: with 128 tokens all that is counted per token is small; what is left are the "
            "gradients of 160 million adapter weights, and the workspace of AdamW",
            _said("c", "logits and loss", "backward"),
        ),
        Mistake(
            "logits before width",
            lambda: peak_moments() | {"d": "logits and loss"},
            "d: at a width of 8,192 one block that is computed again keeps some 590,000 bytes a "
            "token, and 32,000 logits take 384,000",
            _said("d", "logits and loss"),
        ),
        Mistake(
            "large states",
            lambda: peak_moments() | {"d": "optimizer step"},
            "d: at r = 8 gradients and workspace are small; 4,096 tokens in a wide block are not",
            _said("d", "optimizer step"),
        ),
    ),
)


class Dropping(nn.Module):
    """The block of exercise 6.4: a linear layer, dropout, tanh."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(64)
        self.weight = nn.Parameter(torch.randn(6, 6, generator=generator) / 6**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., 6]` to the same shape."""
        return torch.tanh(nn.functional.dropout(x @ self.weight.T, 0.5))


def recomputed_gradient(
    block: Callable[[Tensor], Tensor], x: Tensor, grad_y: Tensor, rng_state: Tensor
) -> Tensor:
    """The gradient of a block's input, from a second forward pass with the same dice.

    >>> x = torch.ones(2, 6)
    >>> recomputed_gradient(torch.exp, x, torch.zeros(2, 6), torch.get_rng_state()).sum()
    tensor(0.)
    """
    x = x.detach().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(rng_state)
        y = block(x)
    y.backward(grad_y)
    return x.grad


def _with_dice(block: Callable, x: Tensor, rng_state: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(rng_state)
        return leaf, block(leaf)


def _ones_for_gradient(block: Callable, x: Tensor, grad_y: Tensor, rng_state: Tensor) -> Tensor:
    leaf, y = _with_dice(block, x, rng_state)
    y.sum().backward()
    return leaf.grad


def _other_dice(block: Callable, x: Tensor, grad_y: Tensor, rng_state: Tensor) -> Tensor:
    leaf, y = _with_dice(block, x, torch.Generator().manual_seed(1).get_state())
    y.backward(grad_y)
    return leaf.grad


def _rolled(block: Callable, x: Tensor, grad_y: Tensor, rng_state: Tensor) -> Tensor:
    leaf, y = _with_dice(block, x, rng_state)
    return y.detach() * grad_y


def _no_dropout(block: Callable, x: Tensor, grad_y: Tensor, rng_state: Tensor) -> Tensor:
    weight = block.weight.detach()
    leaf = x.detach().requires_grad_()
    torch.tanh(leaf @ weight.T).backward(grad_y)
    return leaf.grad


def _is_gradient_of_another_roll(case: Case, yours: Any, expected: Any) -> bool:
    """Is there a pattern of dropped outputs that explains the first row of the answer?"""
    block, x, grad_y = case["block"], case["x"], case["grad_y"]
    weight = block.weight.detach()
    for pattern in range(2 ** weight.shape[0]):
        kept = torch.tensor([2.0 * (pattern >> i & 1) for i in range(weight.shape[0])])
        leaf = x[0].detach().requires_grad_()
        torch.tanh(kept * (leaf @ weight.T)).backward(grad_y[0])
        if torch.allclose(leaf.grad, yours[0], atol=1e-5):
            return True
    return False


def _roll_cases(random: torch.Generator) -> list[Case]:
    return [
        {
            "block": Dropping(),
            "x": torch.randn(3, 6, generator=random),
            "grad_y": torch.randn(3, 6, generator=random),
            "rng_state": torch.Generator().manual_seed(seed).get_state(),
        }
        for seed in (5, 6)
    ]


ex_6_4 = Check(
    "6.4 repair a checkpoint",
    reference=recomputed_gradient,
    cases=_roll_cases,
    atol=1e-6,
    mistakes=(
        Mistake(
            "a gradient of ones",
            _ones_for_gradient,
            "y.sum().backward() sends a one to every output; what arrives there is grad_y: "
            "y.backward(grad_y)",
        ),
        Mistake(
            "the output for the gradient",
            _rolled,
            "that multiplies grad_y by the output; go back through the block with "
            "y.backward(grad_y), and return the gradient of its input",
        ),
        Mistake(
            "dropout switched off",
            _no_dropout,
            "without dropout it is another function; the second forward pass must drop what the "
            "first one dropped",
        ),
        Mistake(
            "new dice",
            _other_dice,
            "dropout fell otherwise than in the forward pass: restore its dice with "
            "torch.set_rng_state(dice) before the block runs again",
            _is_gradient_of_another_roll,
        ),
    ),
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
    """The longest length in 0…`LONGEST` - 1 whose peak is at most the room; 0 if none is.

    >>> longest_that_fits(Peak(10, 2, 0), 20)
    5
    """
    low, high = 0, LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        if peak(middle) <= room:
            low = middle
        else:
            high = middle
    return low


def _at_room(peak: Peak, room: float) -> int:
    found = longest_that_fits(Peak(peak.constant, peak.per_token, peak.per_pair), room)
    return found - 1 if peak(found) == room else found


def _one_for_none(peak: Peak, room: float) -> int:
    return max(1, longest_that_fits(peak, room))


def _by_division(peak: Peak, room: float) -> int:
    constant = peak(0)
    return max(0, int((room - constant) // (peak(1) - constant)))


ex_6_5 = Check(
    "6.5 the longest row that fits",
    reference=longest_that_fits,
    cases=lambda random: [
        {"peak": Peak(*shape), "room": room}
        for shape, room in (
            ((5e9, 2e6, 0), 23e9),
            ((5e9, 2e6, 70), 23e9),
            ((30e9, 2e6, 0), 23e9),
            ((1e9, 1, 0), 2e9),
        )
    ],
    mistakes=(
        Mistake(
            "one too long",
            lambda peak, room: longest_that_fits(peak, room) + 1,
            "that is the shortest length that does not fit; the answer is one less",
        ),
        Mistake(
            "less than the room",
            _at_room,
            "a step that needs exactly the room fits: ≤, and not <",
        ),
        Mistake(
            "one token where none fits",
            _one_for_none,
            "if not even one token fits, the answer is 0",
        ),
        Mistake(
            "a straight line",
            _by_division,
            "a mask makes the peak grow with the square of the length: ask `peak`, and do not "
            "divide",
        ),
        Mistake(
            "powers of two",
            lambda peak, room: 2 ** (max(1, longest_that_fits(peak, room)).bit_length() - 1),
            "doubling stops at a power of two below the answer; go on and halve the interval",
        ),
    ),
)

CARD_GB = 24
PROPOSALS: dict[str, dict[str, Any]] = {
    "Anna": {"method": "full", "batch": 1, "length": 2048},
    "Bela": {
        "method": "qlora",
        "batch_size": 2,
        "max_length": 2048,
        "gradient_checkpointing": False,
    },
    "Cleo": {"method": "qlora", "batch": 4, "length": 512},
    "Dora": {"method": "qlora", "batch": 16, "length": 2048},
}
"""What four people would do in exercise 6.6; none of it works."""


def row_lengths() -> Tensor:
    """Tokens of each of the 2,000 rows of exercise 6.6.

    >>> int(row_lengths().max())
    1991
    """
    generator = torch.Generator().manual_seed(66)
    lengths = torch.exp(5.6 + 0.75 * torch.randn(2000, generator=generator))
    return lengths.clamp(16, 1991).long()


def choose_run() -> dict[str, Any]:
    """Settings that train llama-3-8b on every row of `row_lengths()` on a 24 GB card.

    >>> choose_run()["batch"]
    4
    """
    return {"method": "qlora", "batch": 4, "length": 2048}


def _plan(run: dict[str, Any]) -> Any:
    return plan_memory("llama-3-8b", **run)


ex_6_6 = OpenCheck(
    "6.6 choose a run",
    reference=choose_run,
    mistakes=(
        Mistake(
            "no settings",
            lambda: [4, 2048],
            'return a dictionary with at least "method", "batch" and "length"',
            lambda case, run, _: not {"method", "batch", "length"} <= dict(run).keys(),
        ),
        Mistake(
            "settings that nobody knows",
            lambda: choose_run() | {"lenght": 2048},
            "plan_memory does not take these settings: call it with them and read its error",
            lambda case, run, _: _plan(run) is None,  # an error counts as found
        ),
        Mistake(
            "rows cut",
            lambda: PROPOSALS["Cleo"],
            "rows are cut: the longest has 1,991 tokens, and answers stand at the end of a row",
            lambda case, run, _: run["length"] < int(row_lengths().max()),
        ),
        Mistake(
            "full fine-tuning",
            lambda: PROPOSALS["Anna"],
            "full fine-tuning takes eight bytes a parameter, 60 GiB, before the first token",
            lambda case, run, _: (
                run["method"] == "full" and not _plan(run).peak_bytes <= CARD_GB * GIB - RESERVE
            ),
        ),
        Mistake(
            "no checkpointing",
            lambda: PROPOSALS["Bela"],
            "without checkpointing every block keeps its activations: see plan.table(), forward",
            lambda case, run, _: (
                not run.get("gradient_checkpointing", True)
                and not _plan(run).peak_bytes <= CARD_GB * GIB - RESERVE
            ),
        ),
        Mistake(
            "too many logits",
            lambda: PROPOSALS["Dora"],
            "it does not fit: look at plan.table() for the moment of the peak. With a vocabulary "
            "of 128,256 it is the logits, and they grow with batch · length",
            lambda case, run, _: not _plan(run).peak_bytes <= CARD_GB * GIB - RESERVE,
        ),
        Mistake(
            "a batch of one",
            lambda: choose_run() | {"batch": 1},
            "it fits, and more rows at a time would too: at least three rows a step are asked for",
            lambda case, run, _: not run["batch"] >= 3,
        ),
    ),
)
