"""How a model is made to speak, one token at a time. Support for chapter 10.

A language model gives probabilities for the next token. The rest is done here by hand: choose a
token, hand it back, stop at the end token, and keep several prompts in one batch apart.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from qlora_edu.errors import GenerationError
from qlora_edu.text.conversations import Message, encode_prompt, pad, require_counts


def next_token_probabilities(
    logits: Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> Tensor:
    """What the next token is drawn from: float32, of the shape of `logits`, `[..., vocabulary]`.

    The logits are divided by `temperature`; 0 is *greedy*, all on the likeliest token. Then the
    **nucleus** is kept: the fewest of the likeliest tokens that together have at least `top_p`,
    made to sum to 1. Of equally likely ones the first is kept (transformers keeps the last).
    Source: Holtzman and others, arXiv 1904.09751, section 3.1.

    >>> next_token_probabilities(torch.tensor([0.5, 0.3, 0.2]).log(), top_p=0.6)
    tensor([0.6250, 0.3750, 0.0000])
    """
    check_sampling(temperature, top_p)
    if temperature == 0:
        return one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0.0)  # the first always stays
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered)
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    return probabilities


def check_sampling(temperature: float, top_p: float, max_new_tokens: int = 1) -> None:
    """Raise a `GenerationError` for a setting that means nothing."""
    require_counts(GenerationError, max_new_tokens=max_new_tokens)
    if not (0 <= temperature < float("inf") and 0 < top_p <= 1):
        raise GenerationError(
            "temperature must be 0 (greedy) or more, and top_p above 0 and at most 1, "
            f"not {temperature!r} and {top_p!r}"
        )


@torch.no_grad()
def generate_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    end: int,
    max_new_tokens: int = 96,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[list[int | None]]:
    """Yield, step by step, the next token of each prompt; None for those that have had `end`.

    Prompts, lists of token ids, are padded on the *left*, the padding is masked, and positions are
    counted from each prompt's own first token: alone and in a batch the answer is the same, but for
    the last bits of floats. `model` is one of transformers, in evaluation mode. A prompt that is
    empty or fills all positions, or a bad setting, is a `GenerationError`.
    """
    check_sampling(temperature, top_p, max_new_tokens)
    if not prompts or not all(map(len, prompts)):
        raise GenerationError("a prompt is empty; there is nothing to go on from")
    device, longest = next(model.parameters()).device, max(map(len, prompts))
    room = getattr(model.config, "max_position_embeddings", None) or longest + max_new_tokens
    if longest >= room:
        raise GenerationError(
            f"the prompt has {longest:,} tokens, and the model {room:,} positions for it and the "
            "answer; shorten the prompt, or begin a new conversation"
        )
    generator = torch.Generator().manual_seed(seed)
    ids = pad(prompts, end, side="left").to(device)
    mask = pad([[1] * len(prompt) for prompt in prompts], 0, side="left").to(device)
    going, kept = [True] * len(prompts), None
    for _ in range(min(max_new_tokens, room - longest)):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        read = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        out = model(**read, past_key_values=kept, use_cache=True)
        kept = out.past_key_values
        chances = next_token_probabilities(out.logits[:, -1], temperature, top_p)
        ids = torch.multinomial(chances.cpu(), 1, generator=generator).to(device)
        tokens = ids.flatten().tolist()
        going = [g and token != end for g, token in zip(going, tokens, strict=True)]
        if not any(going):
            return
        yield [token if g else None for g, token in zip(going, tokens, strict=True)]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)


def sample_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[Message]], **settings: Any
) -> list[str]:
    """Answer conversations, all in one batch; `settings` are those of `generate_tokens`."""
    encoded = [encode_prompt(tokenizer, messages) for messages in prompts]
    steps = list(generate_tokens(model, encoded, tokenizer.eos_token_id, **settings))
    answers = [[step[i] for step in steps if step[i] is not None] for i in range(len(encoded))]
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]


def stream_answer(
    model: Any, tokenizer: Any, messages: Sequence[Message], **settings: Any
) -> Iterator[str]:
    """Yield the answer so far, longer at each step, in whole letters."""
    prompt, new = encode_prompt(tokenizer, messages), []
    for (token,) in generate_tokens(model, [prompt], tokenizer.eos_token_id, **settings):
        new.append(token)
        text = tokenizer.decode(new, skip_special_tokens=True).strip()
        yield text.rstrip("\N{REPLACEMENT CHARACTER}")  # of a letter whose last byte is to come
