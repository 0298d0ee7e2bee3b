"""Chapter 8. The training loop in full view, and three measures of what it achieved.

``train`` is all that fine-tuning is: predict, compare, go back, step. With the layers of chapter 5
and the adapters of chapter 4 in PEFT's names, both stacks can start from the same point. Given the
same batches, their loss curves are the same curve (a test holds them to it): there is nothing in
the production stack that was not derived in this course.

The measures are the held-out loss in nats a token, greedy answers, and their exact match.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_edu.chat_data import IGNORED, Message, encode_prompt

Batch = Mapping[str, Tensor]


class TrainingError(RuntimeError):
    """Training or measuring cannot go on; the message says what was found."""


def collate(rows: Sequence[Mapping[str, Sequence[int]]], pad_token_id: int = 0) -> Batch:
    """Pad encoded rows on the right into int64 ``[rows, longest]`` tensors.

    Which token pads is of no consequence: its attention mask is 0 and its label is -100.

    >>> collate([{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [7]}])
    {'input_ids': tensor([[5, 6],
            [7, 0]]), 'attention_mask': tensor([[1, 1],
            [1, 0]]), 'labels': tensor([[-100,    6],
            [   7, -100]])}
    """

    return {
        "input_ids": _pad([row["input_ids"] for row in rows], pad_token_id),
        "attention_mask": _pad([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": _pad([row["labels"] for row in rows], IGNORED),
    }


def completion_loss(model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
    """Cross-entropy, in nats, of each answer token given everything before it."""
    batch = {name: tensor.to(_device(model)) for name, tensor in batch.items()}
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        batch["labels"][:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction=reduction,
    )


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    lr: float,
    *,
    beta2: float = 0.999,
    weight_decay: float = 0.0,
    max_grad_norm: float = 0.3,
) -> list[float]:
    """Take one AdamW step a batch, at a constant ``lr``; returns the loss before each step.

    Only parameters that require a gradient are trained.

    Raises:
        TrainingError: if nothing is trainable, or the loss stops being finite.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise TrainingError(
            "no parameter requires a gradient; call add_lora or replace_linear_layers first"
        )
    optimizer = torch.optim.AdamW(trainable, lr=lr, betas=(0.9, beta2), weight_decay=weight_decay)
    model.train()
    losses: list[float] = []
    for step, batch in enumerate(batches, start=1):
        loss = completion_loss(model, batch)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise TrainingError(
                f"the loss is {losses[-1]} at step {step}; use a lower rate than {lr}"
            )
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@torch.no_grad()
def held_out_loss(
    model: nn.Module, encoded: Sequence[Mapping[str, Sequence[int]]], batch_size: int = 32
) -> float:
    """Mean loss over all answer tokens of ``encoded``, in nats a token."""
    rows = sorted(encoded, key=lambda row: len(row["input_ids"]))
    total, tokens = 0.0, 0
    with _evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = collate(rows[start : start + batch_size])
            total += completion_loss(model, batch, reduction="sum").item()
            tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
    if not tokens:
        raise TrainingError("the held-out rows hold no answer token to measure the loss on")
    return total / tokens


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    max_new_tokens: int = 96,
    batch_size: int = 64,
) -> list[str]:
    """Answer each conversation greedily, in the order given; stops at the end token.

    Prompts are padded on the left, so that every answer begins right after its question, and an
    answer is the same alone and in a batch (up to ties within float rounding).
    """
    encoded = [encode_prompt(tokenizer, messages) for messages in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    end, answers = tokenizer.eos_token_id, [""] * len(encoded)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids = _pad([encoded[i] for i in chosen], tokenizer.pad_token_id, side="left")
        mask = _pad([[1] * len(encoded[i]) for i in chosen], 0, side="left")
        with _evaluating(model):
            out = model.generate(
                input_ids=ids.to(_device(model)),
                attention_mask=mask.to(_device(model)),
                max_new_tokens=max_new_tokens,
                eos_token_id=end,
                pad_token_id=tokenizer.pad_token_id,
                do_sample=False,
                num_beams=1,
                temperature=None,  # a base may bring sampling settings, which greedy must not heed
                top_p=None,
                top_k=None,
            )
        for i, new in zip(chosen, out[:, ids.shape[1] :].tolist(), strict=True):
            answer = new[: new.index(end)] if end in new else new
            answers[i] = tokenizer.decode(answer, skip_special_tokens=True).strip()
    return answers


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions that equal their reference, spaces at the ends aside.

    Raises:
        TrainingError: if there are none, or not as many of one as of the other.

    >>> exact_match(["Mara", " a red lamp"], ["Mara", "a blue lamp"])
    0.5
    """
    if not predictions or len(predictions) != len(references):
        raise TrainingError(
            f"{len(predictions)} predictions for {len(references)} references; need one for each"
        )
    pairs = zip(predictions, references, strict=True)
    return sum(mine.strip() == theirs.strip() for mine, theirs in pairs) / len(references)


def _pad(lists: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    tensors = [torch.tensor(ids) for ids in lists]
    return nn.utils.rnn.pad_sequence(tensors, True, value, padding_side=side)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and back on if it was on."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
