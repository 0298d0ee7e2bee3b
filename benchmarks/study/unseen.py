"""The same tasks with words that the base has never seen: a trap on purpose, and its cure.

Whoever adds tokens to a tokenizer (names of tools, a new language, control words) adds rows to the
table of embeddings that no training has touched. An adapter that leaves the table frozen has to
write with them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_edu.text.conversations import Message

NEW_WORDS = {
    "item": "ware",
    "price": "toll",
    "place": "spot",
    "day": "date",
    "Not mentioned.": "Untold",
}
"""In a record and its request the four keys, and the answer to what a passage leaves out."""


def with_new_words(messages: Sequence[Message]) -> list[Message]:
    """The same conversation in new words.

    >>> asked = "Who?\\nWrite the sale as JSON with seller, buyer, item, price, place and day."
    >>> said = '{"seller": "Ada", "item": "old lamp", "price": null}'
    >>> record = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    >>> [message["content"] for message in with_new_words(record)]  # doctest: +NORMALIZE_WHITESPACE
    ['Who?\\nWrite the sale as JSON with seller, buyer, ware, toll, spot and date.',
     '{"seller": "Ada", "ware": "old lamp", "toll": null}']
    """
    question, answer = (message["content"] for message in messages)
    *passage, request = question.split("\n")
    is_record = request.startswith("Write the")
    for old, new in NEW_WORDS.items():
        if is_record:
            request = request.replace(f" {old}", f" {new}")
            answer = answer.replace(f'"{old}":', f'"{new}":')
        elif answer == old:
            answer = new
    contents = ("\n".join([*passage, request]), answer)
    return [
        {**message, "content": content} for message, content in zip(messages, contents, strict=True)
    ]


def learn_rows(table: Tensor, count: int) -> None:
    """Train the last `count` rows of a table and no other, as PEFT's `trainable_token_indices`.

    The other rows have no gradient; AdamW without weight decay then leaves them as they are.
    """
    mask = torch.zeros(len(table), 1)
    mask[-count:] = 1
    table.requires_grad_()
    table.register_hook(lambda gradient: gradient * mask.to(gradient.device))
