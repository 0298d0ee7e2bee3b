"""The explorer of chapter 9: which tokens of a row are trained on, and what a limit cuts away."""

from functools import lru_cache

from ipywidgets import IntSlider

from qlora_edu.chat_data import IGNORED, Conversation, encode_conversation, read_conversations
from qlora_edu.course.figures import draw_trained_tokens
from qlora_edu.course.plots import figure_png
from qlora_edu.course.widgets.core import Explorer
from qlora_edu.loading import locate

ROWS = 30
LIMITS = (8, 128)


@lru_cache(maxsize=1)
def _rows() -> tuple[object, list[Conversation]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(locate("data/base-model"), trust_remote_code=False)
    return tokenizer, read_conversations(locate("data/tasks/train.jsonl"))[:ROWS]


def render_trained_tokens(row: int = 0, max_length: int = 64) -> bytes:
    """A training row of the embedded tasks, token by token, under a length limit, as PNG bytes.

    Raises:
        IndexError: for a row outside the first 30.

    >>> render_trained_tokens(2, 64)[:4]
    b'\\x89PNG'
    """
    tokenizer, conversations = _rows()
    encoded = encode_conversation(tokenizer, conversations[row])
    trained = [label != IGNORED for label in encoded["labels"]]
    pieces = [tokenizer.decode([token]) for token in encoded["input_ids"]]
    left = sum(trained[:max_length])
    what = f"{left} of {sum(trained)} answer tokens are trained on"
    if max_length < len(pieces):
        what = f"{what}, not the end" if left else "no answer left, the row is dropped"
    return figure_png(
        draw_trained_tokens(pieces, trained, max_length, f"Row {row}, {len(pieces)} tokens: {what}")
    )


def tokens_explorer() -> Explorer:
    """A row and a length limit against what is trained on."""
    return Explorer(
        render_trained_tokens,
        row=IntSlider(2, min=0, max=ROWS - 1, description="row"),
        max_length=IntSlider(64, min=LIMITS[0], max=LIMITS[1], description="max_length"),
    )
