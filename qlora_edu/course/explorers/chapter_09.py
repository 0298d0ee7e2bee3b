"""The explorer of chapter 9: which tokens of a row are trained on, and what a limit cuts away."""

from collections.abc import Sequence
from functools import lru_cache

import matplotlib.pyplot as plt
from ipywidgets import IntSlider
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from qlora_edu.course.explorers.core import Explorer
from qlora_edu.course.plots import PALE_GREY, PALETTE, figure_png
from qlora_edu.production.loading import locate
from qlora_edu.text.conversations import (
    IGNORED,
    Conversation,
    encode_conversation,
    read_conversations,
)

ROWS = 30


@lru_cache(maxsize=1)
def _rows() -> tuple[object, list[Conversation]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(locate("data/base-model"), trust_remote_code=False)
    return tokenizer, read_conversations(locate("data/tasks/train.jsonl"))[:ROWS]


def render_trained_tokens(row: int = 0, max_length: int = 64) -> bytes:
    """A training row of the embedded tasks, token by token, under a length limit, as PNG bytes."""
    tokenizer, conversations = _rows()
    encoded = encode_conversation(tokenizer, conversations[row])
    trained = [label != IGNORED for label in encoded["labels"]]
    pieces = [tokenizer.decode([token]) for token in encoded["input_ids"]]
    left = sum(trained[:max_length])
    what = f"{left} of {sum(trained)} answer tokens are trained on"
    if max_length < len(pieces):
        what = f"{what}, not the end" if left else "no answer left, the row is dropped"
    title = f"Row {row}, {len(pieces)} tokens: {what}"
    return figure_png(draw_trained_tokens(pieces, trained, max_length, title))


def tokens_explorer() -> Explorer:
    """A row and a length limit against what is trained on."""
    return Explorer(
        render_trained_tokens,
        row=IntSlider(2, min=0, max=ROWS - 1, description="row"),
        max_length=IntSlider(64, min=8, max=128, description="max_length"),
    )


def draw_trained_tokens(
    tokens: Sequence[str], trained: Sequence[bool], max_length: int, title: str, *, width: int = 96
) -> Figure:
    """A training row token by token: read only, trained on, or cut away by the length limit.

    `trained[i]` says whether the loss looks at token `i`; tokens from `max_length` on are cut away.
    `width` is the line length in characters. A token that is nothing but spaces is drawn as ␣.
    """
    tokens = [token.replace("\n", "↵") for token in tokens]
    tokens = [token if token.strip(" ") else "␣" * len(token) for token in tokens]
    places, column, line = [], 0.0, 0
    for token in tokens:
        needed = len(token) + 0.9
        if column and column + needed > width:
            column, line = 0.0, line + 1
        places.append((column, line))
        column += needed + 0.25
    figure, ax = plt.subplots(figsize=(9.6, 1.15 + 0.36 * (line + 1)))
    ax.set(xlim=(-0.5, width + 0.5), ylim=(-(line + 1) * 1.25, 0.1))
    ax.axis("off")
    ax.set_title(title)
    for i, (token, (column, row)) in enumerate(zip(tokens, places, strict=True)):
        kept = i < max_length
        face = "white" if not kept else PALETTE["adapter"] if trained[i] else PALE_GREY
        edge = PALETTE["gradient"] if not kept else "none"
        style = {"facecolor": face, "edgecolor": edge, "linestyle": ":", "linewidth": 1.2}
        y, room = -row * 1.25, len(token) + 0.9
        ax.add_patch(Rectangle((column, y - 1), room, 1, **style))
        font = {"family": "monospace", "fontsize": 8.6, "ha": "center", "va": "center"}
        ink = PALETTE["ink" if kept else "gradient"]
        ax.text(column + room / 2, y - 0.53, token, color=ink, **font)
    kinds = {
        "read, not trained on": (PALE_GREY, "none", "-"),
        "trained on": (PALETTE["adapter"], "none", "-"),
    }
    if max_length < len(tokens):
        kinds["cut away"] = ("white", PALETTE["gradient"], ":")
    patches = [
        Rectangle((0, 0), 1, 1, facecolor=face, edgecolor=edge, linestyle=style)
        for face, edge, style in kinds.values()
    ]
    figure.legend(patches, list(kinds), loc="outside lower center", ncols=3, fontsize=10)
    return figure
