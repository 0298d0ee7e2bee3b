"""The explorers of notebooks 0 and 9: what a fine-tune needs, and which tokens it trains on."""

from functools import lru_cache

import ipywidgets

from qlora_edu.chat_data import IGNORED, Conversation, encode_conversation, read_conversations
from qlora_edu.course.figures import LLAMA_SHAPES, draw_trained_tokens, draw_training_memory
from qlora_edu.course.plots import figure_png
from qlora_edu.course.widgets import Explorer
from qlora_edu.loading import locate

RANKS = (8, 16, 32, 64, 128, 256)
ROWS = 30
LIMITS = (8, 128)


def render_training_memory(size: str = "7B", rank: int = 64) -> bytes:
    """Memory of four ways to fine-tune a LLaMA, as PNG bytes.

    Raises:
        KeyError: for a size that is not in `LLAMA_SHAPES`.

    >>> render_training_memory("13B", 16)[:4]
    b'\\x89PNG'
    """
    return figure_png(draw_training_memory(size, rank))


def memory_explorer() -> Explorer:
    """Size and rank against the memory of four methods."""
    return Explorer(
        render_training_memory,
        size=ipywidgets.Dropdown(options=list(LLAMA_SHAPES), value="7B", description="LLaMA"),
        rank=ipywidgets.SelectionSlider(options=RANKS, value=64, description="rank r"),
    )


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
        row=ipywidgets.IntSlider(2, min=0, max=ROWS - 1, description="row"),
        max_length=ipywidgets.IntSlider(64, min=LIMITS[0], max=LIMITS[1], description="max_length"),
    )
