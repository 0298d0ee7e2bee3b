"""How surprised is a model, and how much more when rounded? Support for chapters 2, 3, 8 and 10.

Perplexity is the exponential of the mean loss per token: a model of perplexity 8 hesitates, on
average, as between 8 equally likely tokens. Losses come back document by document, so that two
formats can be compared in pairs.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_edu.adapters import find_linear_layers
from qlora_edu.errors import DataError
from qlora_edu.text.conversations import (
    IGNORED,
    encode_messages,
    encode_plain,
    messages_of,
    pad,
    read_jsonl,
    require_counts,
)


class Surprise(NamedTuple):
    """Loss of each document in nats, summed (float64), and its tokens (int64): `[documents]`."""

    nats: Tensor
    tokens: Tensor

    @property
    def loss(self) -> float:
        """Nats per token, over all tokens."""
        return (self.nats.sum() / self.tokens.sum()).item()

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss)


def encode_text(tokenizer: Any, path: str | Path, max_length: int = 192) -> list[list[int]]:
    """Read a JSONL file of `{"text": …}` or `{"messages": […]}` as token ids, at most `max_length`.

    A text gets the begin and the end token around it, as far as the tokenizer has them.
    """
    require_counts(DataError, max_length=max_length)
    rows = []
    for where, document in read_jsonl(Path(path)):
        if isinstance(document, dict) and isinstance(document.get("text"), str):
            plain = encode_plain(tokenizer, document["text"], where)
            around = [tokenizer.bos_token_id, *plain, tokenizer.eos_token_id]
            ids = [token for token in around if token is not None]
        else:
            ids = encode_messages(tokenizer, messages_of(document, where), where)
        rows.append(ids[:max_length])
    return rows


@torch.no_grad()
def surprise(model: Any, rows: Sequence[Sequence[int]], batch_size: int = 50) -> Surprise:
    """The loss of a causal model on each document: two tokens or more, the first is only read."""
    require_counts(DataError, batch_size=batch_size)
    tokens = torch.tensor([len(row) - 1 for row in rows])
    if (tokens < 1).any():
        raise DataError(f"document {tokens.argmin()} has no second token; leave it out")
    device = getattr(model, "device", "cpu")  # a plain function has none
    nats = torch.zeros(len(rows), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        # Padding stands at the end, where a causal model's earlier tokens do not see it.
        ids = pad([rows[i] for i in chosen], 0)
        labels = pad([rows[i][1:] for i in chosen], IGNORED)
        logits = model(input_ids=ids.to(device)).logits[:, :-1].float()
        losses = F.cross_entropy(
            logits.transpose(1, 2), labels.to(device), ignore_index=IGNORED, reduction="none"
        )
        nats[chosen] = losses.double().sum(dim=1).cpu()
    return Surprise(nats, tokens)


@contextmanager
def rounded_weights(
    model: nn.Module, round_trip: Callable[[Tensor], Tensor], names: Iterable[str] | None = None
) -> Iterator[nn.Module]:
    """Within the block, `model` computes with `linear_weights`, or `names`, after `round_trip`."""
    names = linear_weights(model) if names is None else names
    before = {parameter: parameter.data for parameter in map(model.get_parameter, names)}
    try:
        for parameter, data in before.items():
            parameter.data = round_trip(data).to(parameter.dtype)
        yield model
    finally:
        for parameter, data in before.items():
            parameter.data = data


def linear_weights(model: nn.Module) -> list[str]:
    """Name the weights that bitsandbytes quantises: of every `nn.Linear` but the output head."""
    return [f"{name}.weight" for name in find_linear_layers(model)]
