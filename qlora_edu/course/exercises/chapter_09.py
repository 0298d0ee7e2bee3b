"""The exercises of notebook 9: steps, masks, merging, cards, checkpoints, and one change."""

import math
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from qlora_edu.course.exercises.core import Exercise, Inputs, Seen
from qlora_edu.production.config import FinetuneConfig


def optimizer_steps(
    rows: int, batch_size: int, gradient_accumulation_steps: int, epochs: int
) -> int:
    """Updates of the weights; an epoch's last, smaller batch is one of them."""
    return epochs * math.ceil(rows / (batch_size * gradient_accumulation_steps))


ex_9_1 = Exercise(
    "9.1 how many steps?",
    optimizer_steps,
    [(1000, 4, 8, 3), (96, 2, 16, 2), (101, 10, 1, 2)],
    because={
        "those are forward and backward passes; a step comes after gradient_accumulation_steps of "
        "them": lambda rows, batch, gathered, epochs: epochs * math.ceil(rows / batch),
        "the last, smaller batch of an epoch is a step too: round up": (
            lambda rows, batch, gathered, epochs: epochs * (rows // (batch * gathered))
        ),
        "each epoch ends with its own smaller batch: round up before multiplying by epochs": (
            lambda rows, batch, gathered, epochs: math.ceil(epochs * rows / (batch * gathered))
        ),
        "those are the steps of one epoch": (
            lambda rows, batch, gathered, epochs: math.ceil(rows / (batch * gathered))
        ),
    },
)


def completion_labels(input_ids: Tensor, prompt_length: int, attention_mask: Tensor) -> Tensor:
    """Labels of one padded row, -100 on the prompt and on padding."""
    return _labels(input_ids, prompt_length, attention_mask == 0)


def _labels(ids, prompt_length, padding, ignored=-100):
    labels = ids.masked_fill(padding, ignored)
    labels[:prompt_length] = ignored
    return labels


def _end_token_masked(ids, prompt_length, mask):
    return completion_labels(ids, prompt_length, mask).masked_fill(ids == 2, -100)


def _shifted(ids, prompt_length, mask):
    labels = completion_labels(ids, prompt_length, mask)
    return torch.cat([labels[1:], labels.new_tensor([-100])])


def _padded_rows(random: torch.Generator) -> Inputs:
    """Rows with padding, with padding that looks like the end token (2), and without any."""
    for prompt, answer, pads, pad in ((5, 3, 3, 0), (4, 2, 3, 2), (3, 4, 0, 0)):
        words = torch.randint(10, 99, (prompt + answer,), generator=random)
        ids = torch.cat([words, torch.tensor([2]), torch.full((pads,), pad)])
        yield ids, prompt, torch.tensor([1] * (prompt + answer + 1) + [0] * pads)


ex_9_2 = Exercise(
    "9.2 the completion mask",
    completion_labels,
    _padded_rows,
    because={
        "the prompt is trained on as well; set its labels to -100": (
            lambda ids, prompt_length, mask: _labels(ids, 0, mask == 0)
        ),
        "the padding carries labels; the attention mask says where it is": (
            lambda ids, prompt_length, mask: _labels(ids, prompt_length, mask < 0)
        ),
        "the answer's end token has no label, so the model never learns to stop; mask padding by "
        "position, not by the value of the token": _end_token_masked,
        "the labels are shifted by one; the model's loss does that itself": _shifted,
        "0 is a token like any other: what the loss ignores is -100": (
            lambda ids, prompt_length, mask: _labels(ids, prompt_length, mask == 0, ignored=0)
        ),
        "the answer's first token has no label: it stands at index prompt_length": (
            lambda ids, prompt_length, mask: _labels(ids, prompt_length + 1, mask == 0)
        ),
    },
)


def merged_weight(W: Tensor, A: Tensor, B: Tensor, lora_alpha: float, r: int) -> Tensor:
    """`W + ΔW`, `[out, in]`."""
    return W + (lora_alpha / r) * (B @ A)


def _adapters(random: torch.Generator) -> Inputs:
    """Square weights, whose transposed product shows by its numbers alone; one that is not."""
    for n_out, n_in, r, lora_alpha in ((4, 4, 2, 8.0), (3, 3, 3, 2.0), (4, 6, 2, 5.0)):
        shapes = ((n_out, n_in), (r, n_in), (n_out, r))
        yield *(torch.randn(*shape, generator=random) for shape in shapes), lora_alpha, r


ex_9_3 = Exercise(
    "9.3 find the bugs",
    merged_weight,
    _adapters,
    # The sums may be taken in another order; every listed mistake is off by more.
    atol=1e-4,
    because={
        "that is still the colleague's: AᵀBᵀ is (BA)ᵀ, and the factor is α, not α/r": (
            lambda W, A, B, alpha, r: W + alpha * (A.T @ B.T)
        ),
        "the product is right now; the factor is α/r, not α": (
            lambda W, A, B, alpha, r: W + alpha * (B @ A)
        ),
        "the factor is right now; AᵀBᵀ is (BA)ᵀ, [in, out], which nobody notices while W is "
        "square": lambda W, A, B, alpha, r: W + (alpha / r) * (A.T @ B.T),
        "that is ΔW; the merged weight is W + ΔW": (
            lambda W, A, B, alpha, r: (alpha / r) * (B @ A)
        ),
    },
)

CARDS = (16, 24, 48, 80)


def smallest_card(
    linear: int, rest: int, adapter: int, activations_gb: float, cards: Sequence[int] = CARDS
) -> int | None:
    """The smallest card, in GB, that holds a QLoRA run; None if none does."""
    return _card(_gigabytes(linear, rest, adapter, activations_gb), cards)


def _card(needed, cards):
    return min((card for card in cards if card >= needed), default=None)


def _gigabytes(linear, rest, adapter, activations, bits=4.127, rest_bytes=2, adapter_bytes=16):
    held = linear * bits / 8 + rest * rest_bytes + adapter * adapter_bytes
    return held / 1e9 + activations


def _card_with(**changes):
    """Choose by another sum."""
    return lambda *given: _card(_gigabytes(*given[:4], **changes), given[4])


def _runs(random: torch.Generator) -> Inputs:
    """Runs just above a card because of one part, which leaves it out and finds another card."""
    billion, every = 1_000_000_000, tuple(range(40, 81))
    return [
        (10 * billion, billion // 5, billion * 4 // 5, 1.0, CARDS),
        (20 * billion, 0, 0, 8.0, CARDS),
        (28 * billion, 0, billion * 3 // 10, 0.5, CARDS),
        (29 * billion, billion // 2, 0, 0.5, CARDS),
        (200 * billion, 0, 0, 1.0, CARDS),
        (0, 7 * billion, 0, 2.0, CARDS),  # 16 GB to the byte
        # Cards of every size: a gigabyte more or less shows.
        (70 * billion, 2 * billion, billion, 3.6, every),
        (33 * billion, 6 * billion, billion // 2, 9.1, every),
    ]


ex_9_4 = Exercise(
    "9.4 which card?",
    smallest_card,
    _runs,
    because={
        "the activations need room too, on top of everything that is counted": (
            lambda *given: _card(_gigabytes(*given[:3], 0), given[4])
        ),
        "an adapter parameter costs 16 bytes: itself, its gradient, and Adam's two states": (
            _card_with(adapter_bytes=4)
        ),
        "the adapters, their gradients and Adam's states are missing": _card_with(adapter_bytes=0),
        "embeddings and output head are not quantised: 2 bytes each": (
            _card_with(rest_bytes=4.127 / 8)
        ),
        "4.127 are bits; divide by 8 for bytes": _card_with(bits=4.127 * 8),
        "with the constants of its blocks a weight takes 4.127 bits, not 4": _card_with(bits=4.0),
        "what is exactly as large as the card fits: >=, not >": (
            lambda *given: _card(_gigabytes(*given[:4]) + 1e-6, given[4])
        ),
    },
)


PARTS = ("adapter", "step", "optimizer", "rng_state")


def resumes_to_the_same(saved: Sequence[str], optimizer: str, lora_dropout: float) -> bool:
    """Does a run that kept only `saved` end as if it had not been interrupted?"""
    return _needed(optimizer, lora_dropout) <= {*saved}


def _needed(optimizer, lora_dropout):
    unneeded = {"optimizer": optimizer == "sgd", "rng_state": lora_dropout == 0}
    return {part for part in PARTS if not unneeded.get(part)}


def _forgets(part):
    return lambda saved, *run: _needed(*run) - {part} <= {*saved}


def _asks_for(*parts):
    return lambda saved, *run: _needed(*run) | {*parts} <= {*saved}


def _checkpoints(random: torch.Generator) -> Inputs:
    without = [tuple(part for part in PARTS if part != left_out) for left_out in PARTS]
    return [
        (saved, optimizer, lora_dropout)
        for saved in (PARTS, *without, ("adapter", "step"))
        for optimizer in ("adamw", "sgd")
        for lora_dropout in (0.0, 0.1)
    ]


ex_9_5 = Exercise(
    "9.5 what must be on the disk?",
    resumes_to_the_same,
    _checkpoints,
    because={
        "the step decides which rows come next (and the learning rate): without it the run reads "
        "the first rows again": _forgets("step"),
        "AdamW remembers two numbers for each parameter: without them its steps are others": (
            _forgets("optimizer")
        ),
        "with dropout, another random state switches other numbers off": _forgets("rng_state"),
        "without the adapter all that was trained is lost": _forgets("adapter"),
        "plain SGD has no state to lose, and without dropout nothing is drawn at random": (
            _asks_for("optimizer", "rng_state")
        ),
        "plain SGD has no state to lose": _asks_for("optimizer"),
        "without dropout nothing is drawn at random": _asks_for("rng_state"),
    },
)


def my_config() -> FinetuneConfig:
    """The embedded preset with one setting changed."""
    return _preset(max_steps=200, answer_rows=60, r=2)


def _preset(**changes):
    return FinetuneConfig.from_preset("embedded", **changes)


# Not experiments: how long the run is, what it is called, what is looked at and how often.
FREE_SETTINGS = set(
    "name max_steps held_out_rows answer_rows output_dir sample_steps save_steps save_total_limit "
    "logging_steps seed".split()
)
# They move memory and time; the numbers that are trained stay the same.
IDLE_SETTINGS = set("optim eval_batch_size gradient_checkpointing".split())


def _changed(config):
    preset = _preset()
    names = {field.name for field in fields(preset)} - FREE_SETTINGS
    return {name for name in names if getattr(config, name) != getattr(preset, name)}


ex_9_6 = Exercise(
    "9.6 one change",
    my_config,
    open=True,
    score=lambda config: f"changed: {', '.join(sorted(_changed(config)))}",
    because={
        'return a FinetuneConfig: FinetuneConfig.from_preset("embedded", ...)': Seen(
            lambda: {"r": 2}, lambda config: not isinstance(config, FinetuneConfig)
        ),
        "with other data or another model the two runs cannot be compared": Seen(
            lambda: _preset(held_out_data="data/tasks/valid.jsonl"),
            lambda config: bool(_changed(config) & {"model", "train_data", "held_out_data"}),
        ),
        "nothing is changed that could teach you anything; change one setting": Seen(
            lambda: _preset(max_steps=200), lambda config: not _changed(config)
        ),
        "that moves memory or time, and not the held-out loss; change what is trained": Seen(
            lambda: _preset(optim="adamw_torch"), lambda config: _changed(config) <= IDLE_SETTINGS
        ),
        "more than one setting is changed; you will not know which of them did it": Seen(
            lambda: _preset(r=2, lora_alpha=4.0),
            lambda config: len(_changed(config) - IDLE_SETTINGS) > 1,
        ),
    },
)

EXERCISES = (ex_9_1, ex_9_2, ex_9_3, ex_9_4, ex_9_5, ex_9_6)
