"""What is measured of a model: answers and loss on task rows, and what it still knows."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.stored import ROOT
from benchmarks.study.unseen import NEW_WORDS
from qlora_edu.text.conversations import IGNORED, Message, encode_conversations
from qlora_edu.text.perplexity import encode_text, surprise
from qlora_edu.training import collate, completion_loss, exact_match, generate_answers

sys.path.append(str(ROOT / "data"))
from make_world import DAYS, LOOKS, PEOPLE, PLACES, THINGS

HELD_OUT_TEXT = ROOT / "data" / "text" / "next-held-out.jsonl"


class Row(NamedTuple):
    """A conversation of the tasks, and the family that it belongs to."""

    family: str
    messages: Sequence[Message]


class Loss(NamedTuple):
    """Nats, and the tokens that they were lost on."""

    nats: float
    tokens: int


def mean(losses: Iterable[Loss]) -> float:
    """Nats per token over all tokens.

    >>> mean([Loss(3.0, 1), Loss(0.0, 3)])
    0.75
    """
    nats, tokens = zip(*losses, strict=True)
    return round(sum(nats) / sum(tokens), 5)


def class_of(piece: str) -> str:
    """To which class a piece of an answer belongs.

    >>> [class_of(piece) for piece in ("Mara", "Ġlamp", "7", "ĠJSON", "ware", "<|end|>")]
    ['name', 'fact', 'fact', 'form', 'new word', 'form']
    """
    word = piece.removeprefix("Ġ")
    if word in PEOPLE:
        return "name"
    if word.isdigit() or word in (*THINGS, *LOOKS, *PLACES, *DAYS):
        return "fact"
    return "new word" if word in NEW_WORDS.values() else "form"


@torch.no_grad()
def loss_by_class(
    model: Any, tokenizer: Any, encoded: Sequence[Mapping[str, Sequence[int]]]
) -> dict[str, Loss]:
    """The loss of the answers' tokens, class by class."""
    classes = [class_of(piece) for piece in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    rows = sorted(encoded, key=lambda row: len(row["input_ids"]))
    found: dict[str, Loss] = {}
    for start in range(0, len(rows), 50):
        batch = collate(rows[start : start + 50])
        nats = completion_loss(model, batch, reduction="none").tolist()
        labels = batch["labels"][:, 1:].flatten().tolist()
        for label, lost in zip(labels, nats, strict=True):
            if label != IGNORED:
                before = found.get(classes[label], Loss(0.0, 0))
                found[classes[label]] = Loss(before.nats + lost, before.tokens + 1)
    return found


def measure(model: Any, tokenizer: Any, rows: Sequence[Row]) -> dict:
    """Exact match and loss on task rows, by family and class of token, and the old text's loss."""
    model.eval()
    model.config.use_cache = True
    matches, losses = {}, {}
    for family in sorted({row.family for row in rows}):  # whose answers end at about one time
        asked = [row.messages for row in rows if row.family == family]
        prompts, wanted = [m[:-1] for m in asked], [m[-1]["content"] for m in asked]
        given = generate_answers(model, tokenizer, prompts, max_new_tokens=72, batch_size=100)
        matches[family] = exact_match(given, wanted)
        losses[family] = loss_by_class(
            model, tokenizer, encode_conversations(tokenizer, asked, 256)
        )
    classes = sorted({name for of_family in losses.values() for name in of_family})
    text = encode_text(tokenizer, HELD_OUT_TEXT)[:300]
    return {
        "exact_match": round(sum(matches[row.family] for row in rows) / len(rows), 4),
        "by_family": {family: round(share, 4) for family, share in matches.items()},
        "held_out_loss": mean(loss for of in losses.values() for loss in of.values()),
        "loss_by_family": {family: mean(of.values()) for family, of in losses.items()},
        "loss_by_class": {
            name: mean(of[name] for of in losses.values() if name in of) for name in classes
        },
        "tokens_by_class": {
            name: sum(of[name].tokens for of in losses.values() if name in of) for name in classes
        },
        "text_perplexity": round(surprise(model, text).perplexity, 5),
    }
