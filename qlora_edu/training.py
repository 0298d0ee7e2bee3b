"""Chapter 8. The training loop in full view, and what it achieved.

`train` is all that fine-tuning is: forward, loss, backward, step. From the same point and given the
same batches, the stack of this course and the production stack draw the same loss curve (a test
holds them to it). The measures are the held-out loss in nats per token, and greedy answers.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_edu.errors import TrainingError
from qlora_edu.text.conversations import IGNORED, Message, encode_prompt, pad, require_counts

Batch = Mapping[str, Tensor]
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
# A base may bring sampling settings, which greedy must not heed.
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


def collate(rows: Sequence[Mapping[str, Sequence[int]]], pad_token_id: int = 0) -> Batch:
    """Pad encoded rows on the right into int64 `[rows, longest]` tensors; padding is masked out.

    >>> collate([{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [7]}])
    {'input_ids': tensor([[5, 6],
            [7, 0]]), 'attention_mask': tensor([[1, 1],
            [1, 0]]), 'labels': tensor([[-100,    6],
            [   7, -100]])}
    """
    return {
        "input_ids": pad([row["input_ids"] for row in rows], pad_token_id),
        "attention_mask": pad([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": pad([row["labels"] for row in rows], IGNORED),
    }


def completion_loss(model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
    """Cross-entropy, in nats, of each answer token given everything before it.

    `reduction` is "mean" over the answer tokens, "sum", or "none".
    """
    batch = {name: tensor.to(device_of(model)) for name, tensor in batch.items()}
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    # The logits at one position are asked for the label of the next; -100 is passed over.
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        batch["labels"][:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction=reduction,
    )


def answer_tokens(batch: Batch) -> int:
    """How many tokens of a batch the loss looks at."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def row_order(
    rows: int, wanted: int, seed: int, lengths: Sequence[int] | None = None, group: int = 1
) -> list[int]:
    """Which row is read when: `wanted` indices into `rows`, shuffled anew for every pass.

    It is settled before the first step, so a run that is resumed reads the same rows. With
    `lengths` rows of like length come together, which saves padding: stretches of `50 * group` rows
    are sorted, the longest first; `group` is the rows per step.

    >>> row_order(3, 7, seed=0)
    [2, 0, 1, 2, 1, 0, 1]
    """
    require_counts(TrainingError, rows=rows, group=group)
    generator = torch.Generator().manual_seed(seed)
    order = []
    while len(order) < wanted:
        shuffled = torch.randperm(rows, generator=generator).tolist()
        if lengths is not None:
            size = 50 * group
            stretches = [shuffled[i : i + size] for i in range(0, rows, size)]
            shuffled = [i for s in stretches for i in sorted(s, key=lambda i: -lengths[i])]
        order += shuffled
    return order[:wanted]


def learning_rate_at(
    step: int,
    lr: float,
    lr_scheduler_type: str = "constant",
    warmup_steps: int = 0,
    total_steps: int = 0,
) -> float:
    """The learning rate of step 0, 1, 2 … as `transformers.get_scheduler` would set it.

    All but "constant" rise from 0 over `warmup_steps`; "linear" and "cosine" then fall to 0 at
    `total_steps`. Another schedule, a negative warm-up or a later step raises `TrainingError`.

    >>> [learning_rate_at(step, 8.0, "linear", 2, 6) for step in range(6)]
    [0.0, 4.0, 8.0, 6.0, 4.0, 2.0]
    """
    check_schedule(step, lr_scheduler_type, warmup_steps, total_steps)
    if lr_scheduler_type == "constant":
        return lr
    if step < warmup_steps:
        return lr * step / warmup_steps
    if lr_scheduler_type == "constant_with_warmup":
        return lr
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if lr_scheduler_type == "linear":
        return lr * (1 - done)
    return lr * (1 + math.cos(math.pi * done)) / 2


def check_schedule(step: int, lr_scheduler_type: str, warmup_steps: int, total_steps: int) -> None:
    """Refuse a schedule that means nothing."""
    if lr_scheduler_type not in SCHEDULES:
        raise TrainingError(f"no schedule {lr_scheduler_type!r}; there are {', '.join(SCHEDULES)}")
    if warmup_steps < 0:
        raise TrainingError(f"warmup_steps must be 0 or more, not {warmup_steps}")
    if lr_scheduler_type in ("linear", "cosine") and not step <= total_steps > 0:
        what = f"a {lr_scheduler_type} schedule ends at {total_steps=}"
        raise TrainingError(f"{what}, and step {step} is asked for: pass the number of all steps")


def accumulate(model: nn.Module, parts: Sequence[Batch], tokens: int) -> float:
    """Add the gradients of the mean loss over `tokens` answer tokens; return that loss, in nats.

    So four batches of 2 rows give the gradient of one batch of 8; a mean of their means would not.
    """
    total = 0.0
    for part in parts:
        loss = completion_loss(model, part, reduction="sum") / tokens
        loss.backward()
        total += loss.item()
    return total


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    lr: float,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float = 0.3,
    **schedule: Any,
) -> list[float]:
    """Take one AdamW step per `gradient_accumulation_steps` batches; return the loss before each.

    Only parameters that require a gradient are trained; `lr` is the highest learning rate, and
    `schedule` goes to `learning_rate_at`. `TrainingError` if nothing is trainable, a step has no
    answer token, or the loss is not finite.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    check_training(trained, gradient_accumulation_steps, max_grad_norm)
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    model.train()
    losses, remaining = [], iter(batches)
    while parts := list(islice(remaining, gradient_accumulation_steps)):
        step, tokens = len(losses), sum(answer_tokens(part) for part in parts)
        if not tokens:
            raise TrainingError(f"no token of step {step + 1} has a label; look at its rows")
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, lr, **schedule)
        losses.append(accumulate(model, parts, tokens))
        if not math.isfinite(losses[-1]):
            raise TrainingError(f"the loss is {losses[-1]} at step {step + 1}; lower lr={lr}")
        nn.utils.clip_grad_norm_(trained, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def check_training(
    trained: Sequence[Tensor], gradient_accumulation_steps: int, max_grad_norm: float
) -> None:
    """Refuse to train nothing, or with a setting that means nothing."""
    if not trained:
        raise TrainingError("no parameter requires a gradient: call add_lora, for one, first")
    require_counts(TrainingError, gradient_accumulation_steps=gradient_accumulation_steps)
    if not max_grad_norm > 0:
        raise TrainingError(f"max_grad_norm must be above 0 (inf never clips), not {max_grad_norm}")


@torch.no_grad()
def held_out_loss(
    model: nn.Module, encoded: Sequence[Mapping[str, Sequence[int]]], batch_size: int = 32
) -> float:
    """Mean loss over all answer tokens of `encoded`, in nats per token."""
    require_counts(TrainingError, batch_size=batch_size)
    rows = sorted(encoded, key=lambda row: len(row["input_ids"]))
    total, tokens = 0.0, 0
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = collate(rows[start : start + batch_size])
            total += completion_loss(model, batch, reduction="sum").item()
            tokens += answer_tokens(batch)
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

    Prompts are padded on the left, so that each answer begins right after its question, and is the
    same alone and in a batch (up to ties within float rounding).
    """
    require_counts(TrainingError, max_new_tokens=max_new_tokens, batch_size=batch_size)
    encoded = [encode_prompt(tokenizer, messages) for messages in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    end, answers = tokenizer.eos_token_id, [""] * len(encoded)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids = pad([encoded[i] for i in chosen], tokenizer.pad_token_id, side="left")
        mask = pad([[1] * len(encoded[i]) for i in chosen], 0, side="left")
        with evaluating(model):
            out = model.generate(
                input_ids=ids.to(device_of(model)),
                attention_mask=mask.to(device_of(model)),
                max_new_tokens=max_new_tokens,
                eos_token_id=end,
                pad_token_id=tokenizer.pad_token_id,
                **GREEDY,
            )
        for i, new in zip(chosen, out[:, ids.shape[1] :].tolist(), strict=True):
            answer = new[: new.index(end)] if end in new else new
            answers[i] = tokenizer.decode(answer, skip_special_tokens=True).strip()
    return answers


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions that equal their reference, spaces at the ends aside.

    >>> exact_match(["Mara", " a red lamp"], ["Mara", "a blue lamp"])
    0.5
    """
    if not predictions or len(predictions) != len(references):
        sizes = f"{len(predictions)} predictions for {len(references)} references"
        raise TrainingError(f"{sizes}; need one for each")
    pairs = zip(predictions, references, strict=True)
    return sum(mine.strip() == theirs.strip() for mine, theirs in pairs) / len(references)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and back on if it was on."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def device_of(model: nn.Module) -> torch.device:
    """Where a model is, as its first parameter says."""
    return next(model.parameters()).device
