"""The exercises of notebook 9: steps, masks, merging, cards, checkpoints, and one change."""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from qlora_edu.course.exercises.chapter_00 import ROUNDING
from qlora_edu.course.exercises.core import Case, Check, Mistake, OpenCheck
from qlora_edu.production.config import FinetuneConfig

CARDS = (16, 24, 48, 80)
# Not experiments: how long the run is, what it is called and how many answers are looked at.
FREE_SETTINGS = set("name max_steps answer_rows output_dir sample_steps save_steps seed".split())


def optimizer_steps(rows: int, batch_size: int, accumulation: int, epochs: int) -> int:
    """Updates of the weights; an epoch's last, smaller batch is one of them.

    >>> optimizer_steps(rows=10, batch_size=2, accumulation=2, epochs=2)
    6
    """
    return epochs * math.ceil(rows / (batch_size * accumulation))


def completion_labels(input_ids: Tensor, prompt_length: int, attention_mask: Tensor) -> Tensor:
    """Labels of one padded row, -100 on the prompt and on padding.

    >>> completion_labels(torch.tensor([7, 8, 2, 2]), 1, torch.tensor([1, 1, 1, 0]))
    tensor([-100,    8,    2, -100])
    """
    labels = input_ids.clone()
    labels[:prompt_length] = -100
    labels[attention_mask == 0] = -100
    return labels


def merged_weight(W: Tensor, A: Tensor, B: Tensor, lora_alpha: float, r: int) -> Tensor:
    """``W + ΔW``, ``[out, in]``.

    >>> merged_weight(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 1), lora_alpha=2, r=1)
    tensor([[2., 2.]])
    """
    return W + (lora_alpha / r) * (B @ A)


def smallest_card(
    linear: int, rest: int, adapter: int, activations_gb: float, cards: Sequence[int] = CARDS
) -> int | None:
    """The smallest card, in GB, that holds a QLoRA run; None if none does.

    >>> smallest_card(1_000_000_000, 0, 0, activations_gb=1.0)
    16
    """
    needed = (linear * 4.127 / 8 + rest * 2 + adapter * 16) / 1e9 + activations_gb
    return min((card for card in cards if card >= needed), default=None)


def resumes_to_the_same(saved: Sequence[str], optimizer: str, lora_dropout: float) -> bool:
    """Does a run that kept only ``saved`` end as if it had not been interrupted?

    >>> resumes_to_the_same(("adapter", "step"), optimizer="sgd", lora_dropout=0.0)
    True
    """
    needed = {"adapter", "step"}
    if optimizer == "adamw":
        needed.add("optimizer")
    if lora_dropout > 0:
        needed.add("dice")
    return needed <= set(saved)


def my_config() -> FinetuneConfig:
    """The embedded preset with one setting changed.

    >>> my_config().r
    2
    """
    return FinetuneConfig.from_preset("embedded", max_steps=200, answer_rows=60, r=2)


ex_9_1 = Check(
    "9.1 how many steps?",
    reference=optimizer_steps,
    cases=lambda random: [
        {"rows": 1000, "batch_size": 4, "accumulation": 8, "epochs": 3},
        {"rows": 96, "batch_size": 2, "accumulation": 16, "epochs": 2},
        {"rows": 101, "batch_size": 10, "accumulation": 1, "epochs": 2},
    ],
    mistakes=(
        Mistake(
            "no accumulation",
            lambda rows, batch_size, accumulation, epochs: epochs * math.ceil(rows / batch_size),
            "those are forward and backward passes; a step comes after `accumulation` of them",
        ),
        Mistake(
            "rounded down",
            lambda rows, batch_size, accumulation, epochs: (
                epochs * (rows // (batch_size * accumulation))
            ),
            "the last, smaller batch of an epoch is a step too: round up",
        ),
        Mistake(
            "rounded at the end",
            lambda rows, batch_size, accumulation, epochs: math.ceil(
                epochs * rows / (batch_size * accumulation)
            ),
            "each epoch ends with its own smaller batch: round up before multiplying by epochs",
        ),
        Mistake(
            "accumulation multiplies",
            lambda rows, batch_size, accumulation, epochs: (
                epochs * math.ceil(rows / batch_size) * accumulation
            ),
            "accumulation makes fewer steps, not more: it gathers rows for each of them",
        ),
    ),
)


def _padded_rows(random: torch.Generator) -> Sequence[Case]:
    def row(prompt: int, answer: int, pads: int, pad: int) -> Case:
        words = torch.randint(10, 99, (prompt + answer,), generator=random)
        ids = torch.cat([words, torch.tensor([2]), torch.full((pads,), pad)])
        mask = torch.tensor([1] * (prompt + answer + 1) + [0] * pads)
        return {"input_ids": ids, "prompt_length": prompt, "attention_mask": mask}

    # In the second row pad and EOS are the same token, 2.
    return [row(5, 3, 3, 0), row(4, 2, 3, 2), row(3, 4, 0, 0)]


def _everything_real(input_ids: Tensor, prompt_length: int, attention_mask: Tensor) -> Tensor:
    return input_ids.masked_fill(attention_mask == 0, -100)


def _padding_trained(input_ids: Tensor, prompt_length: int, attention_mask: Tensor) -> Tensor:
    labels = input_ids.clone()
    labels[:prompt_length] = -100
    return labels


def _end_token_masked(input_ids: Tensor, prompt_length: int, attention_mask: Tensor) -> Tensor:
    labels = completion_labels(input_ids, prompt_length, attention_mask)
    labels[labels == 2] = -100
    return labels


def _shifted(input_ids: Tensor, prompt_length: int, attention_mask: Tensor) -> Tensor:
    labels = completion_labels(input_ids, prompt_length, attention_mask)
    return torch.cat([labels[1:], labels.new_tensor([-100])])


def _prompt_trained(input_ids: Tensor, prompt_length: int, attention_mask: Tensor) -> Tensor:
    labels = torch.full_like(input_ids, -100)
    labels[:prompt_length] = input_ids[:prompt_length]
    return labels


ex_9_2 = Check(
    "9.2 the completion mask",
    reference=completion_labels,
    cases=_padded_rows,
    mistakes=(
        Mistake(
            "prompt trained on too",
            _everything_real,
            "the prompt is trained on as well; set its labels to -100",
        ),
        Mistake(
            "padding trained on",
            _padding_trained,
            "the padding carries labels; the attention mask says where it is",
        ),
        Mistake(
            "end token masked",
            _end_token_masked,
            "the answer's end token has no label, so the model never learns to stop; mask "
            "padding by position, not by the value of the token",
        ),
        Mistake(
            "shifted", _shifted, "the labels are shifted by one; the model's loss does that itself"
        ),
        Mistake(
            "the wrong half",
            _prompt_trained,
            "that trains on the prompt and ignores the answer: the wrong way round",
        ),
    ),
)


def _adapters(random: torch.Generator) -> Sequence[Case]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    return [
        {"W": normal(4, 4), "A": normal(2, 4), "B": normal(4, 2), "lora_alpha": 8.0, "r": 2},
        {"W": normal(3, 3), "A": normal(3, 3), "B": normal(3, 3), "lora_alpha": 2.0, "r": 3},
    ]


ex_9_3 = Check(
    "9.3 find the bugs",
    reference=merged_weight,
    cases=_adapters,
    mistakes=(
        Mistake(
            "transposed product, alpha alone",
            lambda W, A, B, lora_alpha, r: W + lora_alpha * (A.T @ B.T),
            "that is still the colleague's: AᵀBᵀ is (BA)ᵀ, and the factor is α, not α/r",
        ),
        Mistake(
            "alpha alone",
            lambda W, A, B, lora_alpha, r: W + lora_alpha * (B @ A),
            "the product is right now; the factor is α/r, not α",
        ),
        Mistake(
            "transposed product",
            lambda W, A, B, lora_alpha, r: W + (lora_alpha / r) * (A.T @ B.T),
            "the factor is right now; AᵀBᵀ is (BA)ᵀ, [in, out], which nobody notices while W "
            "is square",
        ),
        Mistake(
            "base left out",
            lambda W, A, B, lora_alpha, r: (lora_alpha / r) * (B @ A),
            "that is ΔW; the merged weight is W + ΔW",
        ),
        Mistake(
            "root of r",
            lambda W, A, B, lora_alpha, r: W + (lora_alpha / r**0.5) * (B @ A),
            "α/√r is another method (rsLoRA); this adapter was trained with α/r",
        ),
    ),
    atol=ROUNDING,
)


def _fits(needed: float, cards: Sequence[int]) -> int | None:
    return min((card for card in cards if card >= needed), default=None)


def _runs(random: torch.Generator) -> Sequence[Case]:
    # Each run is just above a card because of one part: leave that part out, and the card changes.
    parts = ("linear", "rest", "adapter", "activations_gb")
    billion = 1_000_000_000
    return [
        dict(zip(parts, run, strict=True))
        for run in (
            (10 * billion, billion // 5, billion * 4 // 5, 1.0),
            (20 * billion, 0, 0, 8.0),
            (28 * billion, 0, billion * 3 // 10, 0.5),
            (29 * billion, billion // 2, 0, 0.5),
            (200 * billion, 0, 0, 1.0),
        )
    ]


def _without(part: str) -> Any:
    def wrong(
        linear: int, rest: int, adapter: int, activations_gb: float, cards: Sequence[int] = CARDS
    ) -> int | None:
        bytes_each = 0 if part == "adapter" else 4 if part == "optimizer" else 16
        rest_bytes = 4.127 / 8 if part == "rest" else 2
        needed = (linear * 4.127 / 8 + rest * rest_bytes + adapter * bytes_each) / 1e9
        return _fits(needed + (0 if part == "activations" else activations_gb), cards)

    return wrong


def _bits_as_bytes(
    linear: int, rest: int, adapter: int, activations_gb: float, cards: Sequence[int] = CARDS
) -> int | None:
    return _fits((linear * 4.127 + rest * 2 + adapter * 16) / 1e9 + activations_gb, cards)


ex_9_4 = Check(
    "9.4 which card?",
    reference=smallest_card,
    cases=_runs,
    mistakes=(
        Mistake(
            "no activations",
            _without("activations"),
            "the activations need room too, on top of everything that is counted",
        ),
        Mistake(
            "no optimizer states",
            _without("optimizer"),
            "an adapter parameter costs 16 bytes: itself, its gradient, and Adam's two states",
        ),
        Mistake(
            "no adapter",
            _without("adapter"),
            "the adapters, their gradients and Adam's states are missing",
        ),
        Mistake(
            "all in 4 bits",
            _without("rest"),
            "embeddings and output head are not quantised: 2 bytes each",
        ),
        Mistake("bits as bytes", _bits_as_bytes, "4.127 are bits; divide by 8 for bytes"),
    ),
)


def _checkpoints(random: torch.Generator) -> Sequence[Case]:
    names = ("saved", "optimizer", "lora_dropout")
    everything = ("adapter", "optimizer", "step", "dice")
    without = [tuple(part for part in everything if part != left_out) for left_out in everything]
    return [
        dict(zip(names, (saved, optimizer, lora_dropout), strict=True))
        for saved in (everything, *without, ("adapter", "step"))
        for optimizer in ("adamw", "sgd")
        for lora_dropout in (0.0, 0.1)
    ]


def _needs(*always: str, adamw: str = "optimizer", rng_state: bool = True) -> Any:
    def wrong(saved: Sequence[str], optimizer: str, lora_dropout: float) -> bool:
        needed = set(always) | ({adamw} if optimizer == "adamw" else set())
        return needed | ({"dice"} if rng_state and lora_dropout > 0 else set()) <= set(saved)

    return wrong


ex_9_5 = Check(
    "9.5 what must be on the disk?",
    reference=resumes_to_the_same,
    cases=_checkpoints,
    mistakes=(
        Mistake(
            "the adapter is enough",
            _needs("adapter", adamw="adapter", rng_state=False),
            "AdamW begins again with empty means, and its first steps have another size",
        ),
        Mistake(
            "no step",
            _needs("adapter"),
            "the step decides which rows come next (and the learning rate): without it the run "
            "reads the first rows again",
        ),
        Mistake(
            "no dice",
            _needs("adapter", "step", rng_state=False),
            "with dropout, other dice switch other numbers off",
        ),
        Mistake(
            "everything, always",
            _needs("adapter", "step", "optimizer", "dice"),
            "plain SGD has no state to lose, and without dropout nobody throws the dice",
        ),
    ),
)


def _changed(config: Any) -> set[str]:
    preset = FinetuneConfig.from_preset("embedded")
    names = {field.name for field in fields(preset)} - FREE_SETTINGS
    return {name for name in names if getattr(config, name) != getattr(preset, name)}


def _preset(**changes: Any) -> FinetuneConfig:
    return FinetuneConfig.from_preset("embedded", **changes)


ex_9_6 = OpenCheck(
    "9.6 one change",
    reference=my_config,
    mistakes=(
        Mistake(
            "a dictionary",
            lambda: {"r": 2},
            'return a FinetuneConfig: FinetuneConfig.from_preset("embedded", ...)',
            lambda case, config, _: not isinstance(config, FinetuneConfig),
        ),
        Mistake(
            "other data",
            lambda: _preset(held_out_data="data/tasks/valid.jsonl"),
            "with other data or another model the two runs cannot be compared",
            lambda case, config, _: bool(
                _changed(config) & {"model", "train_data", "held_out_data"}
            ),
        ),
        Mistake(
            "nothing changed",
            lambda: _preset(max_steps=200),
            "nothing is changed that could teach you anything; change one setting",
            lambda case, config, _: not _changed(config),
        ),
        Mistake(
            "two changes",
            lambda: _preset(r=2, lora_alpha=4.0),
            "more than one setting is changed; you will not know which of them did it",
            lambda case, config, _: len(_changed(config)) > 1,
        ),
    ),
)
