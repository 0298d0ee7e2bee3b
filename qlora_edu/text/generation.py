"""How a model is made to speak, one token at a time. Support for chapter 10.

A language model gives probabilities for the next token and nothing more. Everything else is done
around it, and here by hand: choose a token (the likeliest, or by lot from the *nucleus*), hand it
back, stop at the end token, stand several prompts in one batch so that none disturbs another, and
show the text as it grows.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_edu.errors import GenerationError
from qlora_edu.text.conversations import Message, encode_prompt, pad, require_counts


class PromptTooLongError(GenerationError):
    """The prompt leaves the model no room to answer in."""


def next_token_probabilities(
    logits: Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> Tensor:
    """What the next token is drawn from.

    Args:
        logits: `[..., vocabulary]`.
        temperature: divides the logits: below 1 it sharpens, above 1 it flattens; 0 is *greedy*,
            all on the likeliest token.
        top_p: then keeps the **nucleus**: the fewest of the likeliest tokens that together have at
            least that much, made to sum to 1. Of equally likely ones the first is kept.

    Returns:
        Probabilities, float32, of the shape of `logits`.

    Raises:
        GenerationError: if `temperature` is negative or `top_p` not in (0, 1].

    Equals transformers' temperature and top-p warpers, but for ties, of which it keeps the last.
    Source: Holtzman and others, arXiv 1904.09751, section 3.1.

    >>> logits = torch.tensor([0.5, 0.3, 0.2]).log()
    >>> next_token_probabilities(logits, top_p=0.6)
    tensor([0.6250, 0.3750, 0.0000])
    >>> next_token_probabilities(logits, temperature=0)
    tensor([1., 0., 0.])
    """
    check_sampling(temperature, top_p)
    if temperature == 0:
        likeliest = logits.argmax(dim=-1)
        return torch.nn.functional.one_hot(likeliest, logits.shape[-1]).to(torch.float32)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0.0)  # the first always stays
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered)
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    return probabilities


def check_sampling(temperature: float, top_p: float) -> None:
    """Refuse a temperature or nucleus that means nothing.

    Raises:
        GenerationError: `temperature` is negative or not finite, or `top_p` not in (0, 1].
    """
    if not 0 <= temperature < float("inf"):
        raise GenerationError(f"temperature must be 0 (greedy) or more, not {temperature!r}")
    if not 0 < top_p <= 1:
        raise GenerationError(f"top_p must be above 0 and at most 1, not {top_p!r}")


@torch.no_grad()
def generate_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    end: int,
    max_new_tokens: int = 96,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[list[int | None]]:
    """Yield, step by step, the next token of each prompt; None for those that have ended.

    Prompts are padded on the *left*, the padding is masked, and positions are counted from each
    prompt's own first token: so a prompt gets the same answer alone and in a batch, but for the
    last bits of floats. Keys and values are kept from step to step.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        prompts: token ids of each.
        end: the end token, which is not yielded.
        max_new_tokens: of each answer.
        temperature, top_p: as for `next_token_probabilities`.
        generator: draws come from it and from nothing else.

    Raises:
        PromptTooLongError: if a prompt fills the positions that the model knows.
        GenerationError: for an empty prompt or a bad setting.
    """
    check_sampling(temperature, top_p)
    require_counts(GenerationError, max_new_tokens=max_new_tokens)
    _check_prompts(prompts, getattr(model.config, "max_position_embeddings", None))
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids = pad(prompts, end, side="left").to(device)
    mask = pad([[1] * len(prompt) for prompt in prompts], 0, side="left").to(device)
    # The room may run out before max_new_tokens do.
    room = getattr(model.config, "max_position_embeddings", longest + max_new_tokens)
    going, kept = [True] * len(prompts), None
    for _ in range(min(max_new_tokens, room - longest)):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=kept,
            use_cache=True,
        )
        kept = out.past_key_values
        chances = next_token_probabilities(out.logits[:, -1], temperature, top_p)
        if temperature == 0:
            ids = chances.argmax(dim=-1, keepdim=True)
        else:
            ids = torch.multinomial(chances.cpu(), 1, generator=generator).to(device)
        tokens = ids.flatten().tolist()
        going = [g and token != end for g, token in zip(going, tokens, strict=True)]
        if not any(going):
            return
        yield [token if g else None for g, token in zip(going, tokens, strict=True)]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)


def _check_prompts(prompts: Sequence[Sequence[int]], positions: int | None) -> None:
    if not prompts or not all(map(len, prompts)):
        raise GenerationError("a prompt is empty; there is nothing to go on from")
    longest = max(map(len, prompts))
    if positions is not None and longest >= positions:
        raise PromptTooLongError(
            f"the prompt has {longest:,} tokens, and the model knows {positions:,} positions, its "
            "own answer included; shorten the prompt, or begin a new conversation"
        )


def sample_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    max_new_tokens: int = 96,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
) -> list[str]:
    """Answer each conversation; greedily, unless `temperature` is above 0.

    With temperature 0 the same answers as `training.generate_answers`, which leaves the loop to
    transformers.

    Args:
        prompts: conversations that wait for an answer.
        max_new_tokens, temperature, top_p: as for `generate_tokens`.
        batch_size: prompts at a time.
        seed: of the draws.

    Raises:
        PromptTooLongError, GenerationError: see `generate_tokens`.
    """
    require_counts(GenerationError, batch_size=batch_size)
    generator = torch.Generator().manual_seed(seed)
    answers = []
    for start in range(0, len(prompts), batch_size):
        encoded = [encode_prompt(tokenizer, p) for p in prompts[start : start + batch_size]]
        new: list[list[int]] = [[] for _ in encoded]
        settings = (max_new_tokens, temperature, top_p, generator)
        for step in generate_tokens(model, encoded, tokenizer.eos_token_id, *settings):
            for tokens, token in zip(new, step, strict=True):
                tokens += [] if token is None else [token]
        answers += [tokenizer.decode(t, skip_special_tokens=True).strip() for t in new]
    return answers


def stream_answer(
    model: Any,
    tokenizer: Any,
    messages: Sequence[Message],
    max_new_tokens: int = 96,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the answer so far, longer at each step, as a chat window shows it.

    It is the whole answer each time, and not the new piece: one token is not always whole letters,
    so what the last one looks like may change when the next has come.

    Raises:
        PromptTooLongError, GenerationError: see `generate_tokens`.
    """
    prompt = encode_prompt(tokenizer, messages)
    generator, new = torch.Generator().manual_seed(seed), []
    settings = (max_new_tokens, temperature, top_p, generator)
    for (token,) in generate_tokens(model, [prompt], tokenizer.eos_token_id, *settings):
        new.append(token)
        yield tokenizer.decode(new, skip_special_tokens=True).strip()
