"""Figures that a notebook shares with the README or with a widget, each drawn by one function.

    python -m qlora_edu.course.figures      # writes docs/qlora_in_one_picture.png again

The numbers in them are computed here from the settings of the paper, never typed in.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor

from qlora_edu.blockwise import block_absmax, pack_nibbles, split_blocks
from qlora_edu.codebooks import assign
from qlora_edu.course.plots import PALETTE, figure_png, use_style
from qlora_edu.memory import GIB, RESERVE, MemoryPlan

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "qlora_in_one_picture.png"
PALE_BLUE, PALE_ORANGE, PALE_GREY = "#CFE3F2", "#FBE7C2", "#E8E8E8"


def nf4_bits_per_weight(blocksize: int = 64, absmax_blocksize: int = 256) -> float:
    """Bits a weight: the 4-bit code, its share of an 8-bit absmax, its share of a 32-bit one.

    Source: QLoRA (Dettmers et al., 2023), section 3, "Double Quantization".

    >>> round(nf4_bits_per_weight(), 3)
    4.127
    """
    return 4 + 8 / blocksize + 32 / (blocksize * absmax_blocksize)


def _arrow(
    ax: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    color: str,
    *,
    bend: float = 0.0,
    dashed: bool = False,
) -> None:
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=14,
            color=color,
            linewidth=2,
            linestyle=(0, (3, 2)) if dashed else "solid",
            connectionstyle=f"arc3,rad={bend}",
            shrinkA=0,
            shrinkB=0,
        )
    )


def _grid(
    ax: Axes, x: float, y: float, width: float, height: float, shades: Sequence[Sequence[int]]
) -> None:
    """A matrix as tiles: each code 0..15 is a shade of the colour for what is quantised."""
    rows, columns = len(shades), len(shades[0])
    for i, row in enumerate(shades):
        for j, code in enumerate(row):
            corner = (x + j * width / columns, y + height - (i + 1) * height / rows)
            ax.add_patch(
                Rectangle(
                    corner,
                    width / columns,
                    height / rows,
                    facecolor=PALETTE["quantized"],
                    alpha=0.15 + 0.85 * code / 15,
                    edgecolor="white",
                    linewidth=1,
                )
            )


def draw_qlora_in_one_picture() -> Figure:
    """One layer under QLoRA: a frozen 4-bit weight, two small trained matrices, and the gradients.

    Source: QLoRA (Dettmers et al., 2023), equations 5 and 6 and figure 1.

    >>> figure = draw_qlora_in_one_picture()
    >>> any("4.127 bits" in text.get_text() for text in figure.axes[0].texts)
    True
    >>> plt.close(figure)
    """
    ink, blue = PALETTE["ink"], PALETTE["quantized"]
    orange, red = PALETTE["adapter"], PALETTE["gradient"]
    figure, ax = plt.subplots(figsize=(10, 5.8))
    ax.set(xlim=(0, 100), ylim=(0, 58))
    ax.axis("off")
    ax.set_title(
        "QLoRA in one layer: the big weight is frozen in 4 bits, only the small A and B learn"
    )

    # The stored weight, and the copy that lives for one multiplication.
    _grid(ax, 32, 43, 13, 13, [[(7 * i + 5 * j + i * j) % 16 for j in range(8)] for i in range(8)])
    ax.text(46.5, 53, "W as stored, frozen", color=blue, weight="bold", va="center")
    ax.text(
        46.5,
        48.6,
        f"{nf4_bits_per_weight():.3f} bits a weight\nno gradient, no optimizer state",
        color=blue,
        va="center",
        fontsize=10,
    )
    _arrow(ax, (38.5, 42.4), (38.5, 37.6), blue)
    ax.text(
        39.8,
        40.1,
        "dequantise: look up the level, times its block's scale",
        color=blue,
        va="center",
        fontsize=10,
    )
    ax.add_patch(
        Rectangle((32, 24), 13, 13, facecolor=PALE_BLUE, edgecolor=blue, linestyle="--", lw=1.8)
    )
    ax.text(38.5, 32, "W", color=blue, ha="center", va="center", fontsize=16, weight="bold")
    ax.text(
        38.5, 27.6, "16 bits,\nthen thrown away", color=blue, ha="center", va="center", fontsize=9
    )

    # The adapter: wide and short, tall and narrow.
    ax.add_patch(Rectangle((27, 8), 13, 3.2, facecolor=orange, edgecolor="white"))
    ax.text(33.5, 9.5, "A", ha="center", va="center", fontsize=13, weight="bold", color=ink)
    ax.text(33.5, 6.2, "r × in", ha="center", va="center", fontsize=10, color=ink)
    ax.add_patch(Rectangle((52, 3), 3.2, 13, facecolor=orange, edgecolor="white"))
    ax.text(53.6, 9.5, "B", ha="center", va="center", fontsize=13, weight="bold", color=ink)
    ax.text(53.6, 1.2, "out × r", ha="center", va="center", fontsize=10, color=ink)
    ax.text(
        66,
        4.2,
        "A and B: trained, 16 or 32 bits\nthe only optimizer states",
        color=ink,
        va="center",
        fontsize=10,
        bbox={"facecolor": PALE_ORANGE, "edgecolor": "none", "pad": 4},
    )

    # Inputs, sum, loss.
    ax.add_patch(Rectangle((9, 14), 2.6, 13, facecolor=PALE_GREY, edgecolor=ink))
    ax.text(10.3, 29, "x", ha="center", va="center", fontsize=15, weight="bold")
    ax.add_patch(Circle((70, 20.5), 2.3, facecolor="white", edgecolor=ink, linewidth=1.8))
    ax.text(70, 20.4, "+", ha="center", va="center", fontsize=17)
    ax.add_patch(Rectangle((79, 14), 2.6, 13, facecolor=PALE_GREY, edgecolor=ink))
    ax.text(80.3, 29, "y", ha="center", va="center", fontsize=15, weight="bold")
    ax.add_patch(
        FancyBboxPatch((89, 17.8), 8, 5.4, boxstyle="round,pad=0.4", facecolor=PALE_GREY, lw=0)
    )
    ax.text(93, 20.5, "loss", ha="center", va="center")

    # Forward.
    _arrow(ax, (12.2, 22.5), (31.4, 31.5), ink)
    _arrow(ax, (45.6, 31.5), (68, 22.4), ink)
    _arrow(ax, (12.2, 18), (26.4, 10.3), ink)
    _arrow(ax, (40.6, 10.2), (51.4, 10.2), ink)
    _arrow(ax, (55.8, 10.6), (68, 18.6), ink)
    _arrow(ax, (72.6, 21.3), (78.4, 21.3), ink)
    _arrow(ax, (82.2, 21.3), (88.2, 21.3), ink)
    ax.text(59, 27.6, "W x", ha="left", va="bottom", fontsize=11)
    ax.text(65, 11.4, r"$\frac{\alpha}{r}$ B A x", ha="left", va="bottom", fontsize=13)

    # Backward: through W, never into it.
    _arrow(ax, (88.2, 19.2), (82.2, 19.2), red, dashed=True)
    _arrow(ax, (78.4, 19.2), (72.6, 19.2), red, dashed=True)
    _arrow(ax, (67.2, 20.6), (45.6, 28.6), red, dashed=True)
    _arrow(ax, (31.4, 28.6), (12.2, 20), red, dashed=True)
    _arrow(ax, (68.6, 17), (55.8, 8.4), red, dashed=True)
    _arrow(ax, (51.4, 8.6), (40.6, 8.6), red, dashed=True)
    _arrow(ax, (26.4, 8.4), (12.2, 15.8), red, dashed=True)
    ax.text(
        15,
        35.4,
        "gradients pass through W\nto the layers before;\nonly A and B are changed",
        color=red,
        fontsize=10,
        va="center",
        ha="center",
    )
    _arrow(ax, (8.4, 19.5), (2.6, 19.5), red, dashed=True)
    _arrow(ax, (2.6, 21.5), (8.4, 21.5), ink)
    return figure


def draw_finetune_pipeline() -> Figure:
    """The road of a fine-tune, from a row of chat to an answer, each station with what it holds.

    >>> figure = draw_finetune_pipeline()
    >>> len(figure.axes[0].patches) >= 6
    True
    >>> plt.close(figure)
    """
    stations = (
        ("1  config", "every choice\nwritten down", PALE_GREY),
        ("2  rows of chat", "tokens, and labels\non the answer only", PALE_GREY),
        ("3  base", "4 bits, frozen\nbitsandbytes", PALE_BLUE),
        ("4  adapters", "A and B, all linear\nPEFT", PALE_ORANGE),
        ("5  training", "loss, gradients\nTRL", "#F6D5C3"),
        ("6  run folder", "adapter, config,\nmetrics", PALE_ORANGE),
    )
    figure, ax = plt.subplots(figsize=(10, 2.9))
    ax.set(xlim=(0, 120), ylim=(0, 30))
    ax.axis("off")
    ax.set_title("Six stations from a row of chat to an adapter that answers")
    for i, (name, holds, color) in enumerate(stations):
        left = 1 + 20 * i
        ax.add_patch(
            FancyBboxPatch((left, 12), 15.5, 12, boxstyle="round,pad=0.6", facecolor=color, lw=0)
        )
        ax.text(left + 7.75, 21.3, name, ha="center", va="center", weight="bold", fontsize=10.5)
        ax.text(left + 7.75, 15.6, holds, ha="center", va="center", fontsize=9)
        if i + 1 < len(stations):
            _arrow(ax, (left + 16.4, 18), (left + 19.2, 18), PALETTE["ink"])
    _arrow(ax, (108.7, 11), (48.7, 11), PALETTE["adapter"], bend=-0.16)
    ax.text(
        78.7,
        2.2,
        "loaded again onto the same base: the answers must not change",
        color=PALETTE["ink"],
        ha="center",
        va="center",
        fontsize=10,
    )
    return figure


# hidden width, layers, width of the feed-forward block; Touvron et al., "LLaMA" (2023), table 2.
LLAMA_SHAPES = {
    "7B": (4096, 32, 11008),
    "13B": (5120, 40, 13824),
    "33B": (6656, 60, 17920),
    "65B": (8192, 80, 22016),
}
LLAMA_VOCABULARY = 32_000
CARDS_GB = (16, 24, 48, 80)
METHODS = {
    "full": "full fine-tuning, 16 bits",
    "lora": "LoRA, 16-bit base",
    "lora8": "LoRA, 8-bit base",
    "qlora": "QLoRA, 4-bit base",
}


def llama_parameters(size: str) -> tuple[int, int]:
    """Weights of the linear layers (which QLoRA quantises), and everything else, of a LLaMA.

    >>> llama_parameters("7B")
    (6476005376, 262410240)
    """
    hidden, layers, inner = LLAMA_SHAPES[size]
    linear = layers * (4 * hidden * hidden + 3 * hidden * inner)
    norms = (2 * layers + 1) * hidden
    return linear, 2 * LLAMA_VOCABULARY * hidden + norms


def adapter_parameters(size: str, rank: int) -> int:
    """Trained parameters when every linear layer of a LLaMA has an adapter: r × (in + out) each.

    >>> adapter_parameters("7B", 64)
    159907840
    """
    hidden, layers, inner = LLAMA_SHAPES[size]
    return layers * rank * (4 * (hidden + hidden) + 3 * (hidden + inner))


def training_gigabytes(size: str, method: str, rank: int = 64) -> dict[str, float]:
    """Memory of weights, trained adapters, gradients and Adam's two states, in GB (10⁹ bytes).

    Activations are left out: they depend on batch and length. Adam keeps two float32 numbers for
    each trained parameter. Adapters and their gradients are float32, as PEFT keeps them.

    Raises:
        KeyError: for a size or method that is not in `LLAMA_SHAPES` or `METHODS`.

    >>> round(sum(training_gigabytes("65B", "full").values()))  # the paper: "more than 780 GB"
    783
    """
    linear, rest = llama_parameters(size)
    bits = {"full": 16, "lora": 16, "lora8": 8, "qlora": nf4_bits_per_weight()}[method]
    trained, width = (linear + rest, 2) if method == "full" else (adapter_parameters(size, rank), 4)
    return {
        "weights": (linear * bits / 8 + rest * 2) / 1e9,
        "adapters": 0.0 if method == "full" else trained * width / 1e9,
        "gradients": trained * width / 1e9,
        "optimizer": trained * 8 / 1e9,
    }


def draw_training_memory(size: str = "7B", rank: int = 64) -> Figure:
    """Four ways to fine-tune one LLaMA, as bars of memory against the sizes of cards.

    >>> figure = draw_training_memory("65B")
    >>> [text.get_text() for text in figure.axes[0].texts if "783" in text.get_text()]
    ['783 GB →']
    >>> plt.close(figure)
    """
    edge = 92
    figure, ax = plt.subplots(figsize=(9, 4.1))
    styles = {
        "adapters": (PALETTE["adapter"], ""),
        "gradients": (PALETTE["gradient"], ""),
        "optimizer": ("#FBE7C2", "////"),
    }
    for row, method in enumerate(reversed(METHODS)):
        parts = training_gigabytes(size, method, rank)
        quantised = method in ("lora8", "qlora")
        weights = PALETTE["quantized" if quantised else "base" if method == "lora" else "adapter"]
        left = 0.0
        for part, gigabytes in parts.items():
            color, hatch = styles.get(part, (weights, ""))
            ax.barh(
                row,
                max(0, min(gigabytes, edge - left)),
                left=min(left, edge),
                color=color,
                hatch=hatch,
                edgecolor=PALETTE["adapter"] if hatch else color,
                linewidth=0,
                height=0.6,
            )
            left += gigabytes
        fits = left <= edge
        ax.text(
            left + 0.8 if fits else edge - 1,
            row,
            f"{left:.1f} GB" if fits else f"{left:.0f} GB →",
            va="center",
            ha="left" if fits else "right",
            weight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
        )
    for card in CARDS_GB:
        ax.axvline(card, color=PALETTE["device"], linewidth=1.6, linestyle="--", zorder=0.5)
        ax.text(
            card,
            len(METHODS) - 0.45,
            f"{card} GB",
            color=PALETTE["device"],
            ha="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    ax.set(yticks=range(len(METHODS)), xlim=(0, edge), ylim=(-0.5, len(METHODS) - 0.2))
    ax.set_yticklabels(list(reversed(METHODS.values())))
    ax.grid(False)
    key = {
        "frozen, 16 bits": (PALETTE["base"], ""),
        "frozen, quantised": (PALETTE["quantized"], ""),
        "trained": styles["adapters"],
        "gradients": styles["gradients"],
        "optimizer states": styles["optimizer"],
    }
    patches = [
        Rectangle(
            (0, 0), 1, 1, facecolor=color, hatch=hatch, edgecolor=PALETTE["adapter"], linewidth=0
        )
        for color, hatch in key.values()
    ]
    figure.legend(
        patches,
        list(key),
        loc="outside lower center",
        ncols=5,
        fontsize=10,
        columnspacing=1.2,
        handlelength=1.4,
    )
    smallest = sum(training_gigabytes(size, "qlora", rank).values())
    ax.set_title(f"LLaMA-{size} at r = {rank}: QLoRA needs {smallest:.1f} GB before activations")
    ax.set_xlabel("GB (10⁹ bytes); dashed: cards; activations are not counted")
    return figure


ROW_STYLES = {
    "quantised weights": (PALETTE["quantized"], ""),
    "quantisation constants": ("#083D7F", ""),
    "linear weights": (PALETTE["base"], ""),
    "embeddings and head": ("#5F5F5F", ""),
    "norms and the rest": ("#5F5F5F", ""),
    "adapters": (PALETTE["adapter"], ""),
    "optimizer states": ("#FBE7C2", "////"),
    "gradients": (PALETTE["gradient"], ""),
    "activations": ("#C4C4C4", ""),
    "logits and loss": (PALETTE["highlight"], ""),
    "dequantised weights": ("#8FBFE0", ""),
    "workspace": ("#B7A8D6", ""),
}
"""Colour and hatch of each row of a memory ledger."""


def row_style(row: str, method: str) -> dict[str, object]:
    """How to paint a row of the ledger; what is trained is orange, whatever it is.

    >>> row_style("linear weights", "full")["facecolor"] == PALETTE["adapter"]
    True
    """
    color, hatch = ROW_STYLES[row]
    if method == "full" and row in ("linear weights", "embeddings and head", "norms and the rest"):
        color = PALETTE["adapter"]
    edge = PALETTE["adapter"] if hatch else color
    return {"facecolor": color, "hatch": hatch, "edgecolor": edge, "linewidth": 0}


def draw_budget(plan: MemoryPlan, card_gib: float) -> Figure:
    """A training step's memory at each of its four moments, against the memory of a card.

    The peak has a frame; the key names what can be seen at any moment; the title is the plan's
    sentence.

    >>> from qlora_edu.memory import plan_memory
    >>> figure = draw_budget(plan_memory("llama-7b", "qlora", batch=4), 24)
    >>> [text.get_text() for text in figure.axes[0].texts if "peak" in text.get_text()]
    [' 6.8 GiB, the peak']
    >>> plt.close(figure)
    """
    figure, ax = plt.subplots(figsize=(10, 4))
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
    shown: dict[str, Rectangle] = {}
    for y, (moment, rows) in enumerate(plan.moments.items()):
        left, at_peak = 0.0, moment == plan.peak_moment
        for row in ROW_STYLES:
            width = rows.get(row, 0) / GIB
            if not width:
                continue
            style = row_style(row, plan.settings.method)
            ax.barh(y, width, left=left, height=0.62, **style)
            left += width
            if width > 0.002 * plan.peak_bytes / GIB:
                shown[row] = Rectangle((0, 0), 1, 1, **style)
        if at_peak:
            frame = {"facecolor": "none", "edgecolor": PALETTE["ink"], "linewidth": 1.6}
            ax.barh(y, left, height=0.74, zorder=4, **frame)
        text = f" {left:,.1f} GiB" + (", the peak" if at_peak else "")
        weight = "bold" if at_peak else "normal"
        ax.text(left + 0.004 * plan.peak_bytes / GIB, y, text, va="center", weight=weight, bbox=box)
    green = PALETTE["device"]
    ax.axvline(card_gib, color=green, linestyle="--")
    ax.axvspan(card_gib - RESERVE / GIB, card_gib, color=green, alpha=0.2, linewidth=0)
    side = "left" if card_gib < 0.7 * plan.peak_bytes / GIB else "right"
    label = f" {card_gib:g} GB card, with its reserve "
    ax.text(card_gib, -0.62, label, color=green, ha=side, va="center", fontsize=10, bbox=box)
    ax.set(yticks=range(len(plan.moments)), yticklabels=list(plan.moments))
    ax.set(ylim=(len(plan.moments) - 0.5, -0.9))
    ax.set(xlim=(0, max(1.26 * plan.peak_bytes / GIB, 1.03 * card_gib)))
    kind = {"full": "", "houlsby": f", bottleneck {plan.settings.bottleneck}"}
    kind = kind.get(plan.settings.method, f", r = {plan.settings.r}")
    rows_of = f"{plan.batch} row{'s' * (plan.batch > 1)} of {plan.length:,} tokens"
    ax.set_xlabel(f"GiB on the device; {rows_of}{kind}, {plan.optimizer}")
    ax.grid(False)
    names = [row for row in ROW_STYLES if row in shown]
    figure.legend(
        [shown[row] for row in names], names, loc="outside lower center", ncols=5, fontsize=9
    )
    ax.set_title(plan.sentence(card_gib), fontsize=11.5)
    return figure


def draw_trained_tokens(
    tokens: Sequence[str], trained: Sequence[bool], max_length: int, title: str, *, width: int = 96
) -> Figure:
    """A training row token by token: read only, trained on, or cut away by the length limit.

    `trained[i]` says whether the loss looks at token `i`; tokens from `max_length` on are cut away.
    `width` is the line length in characters. A token that is nothing but spaces is drawn as ␣.

    >>> figure = draw_trained_tokens(["Who", " ", "Ada"], [False, False, True], 9, "a row")
    >>> [text.get_text() for text in figure.axes[0].texts][:3]
    ['Who', '␣', 'Ada']
    >>> plt.close(figure)
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
        ax.add_patch(
            Rectangle(
                (column, -row * 1.25 - 1),
                len(token) + 0.9,
                1,
                facecolor=face,
                edgecolor=edge,
                linestyle=":",
                linewidth=1.2,
            )
        )
        ax.text(
            column + (len(token) + 0.9) / 2,
            -row * 1.25 - 0.53,
            token,
            ha="center",
            va="center",
            family="monospace",
            fontsize=8.6,
            color=PALETTE["ink"] if kept else PALETTE["gradient"],
        )
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


def draw_blocks_and_bytes(weight: Tensor, levels: Tensor, blocksize: int) -> Figure:
    """A small matrix on its way to bytes: laid flat, cut into blocks, scaled, coded, packed.

    Args:
        weight: `[rows, columns]`, at most sixteen numbers in all, an even number of them.
        levels: a codebook of chapter 1.
        blocksize: weights a block; any number, for the drawing.

    >>> import torch
    >>> weight = torch.tensor([[-2.0, 2.0], [0.0, 1.0]])
    >>> figure = draw_blocks_and_bytes(weight, torch.linspace(-1, 1, 16), 2)
    >>> [text.get_text() for text in figure.axes[0].texts if "0x" in text.get_text()]
    ['0x0F', '0x7F']
    >>> plt.close(figure)
    """
    rows, columns = weight.shape
    n = weight.numel()
    blocks = split_blocks(weight, blocksize)
    absmax = block_absmax(weight, blocksize)
    scaled = (blocks / absmax[:, None]).view(-1)[:n]
    codes = assign(scaled, levels)
    grey, blue, pink = PALETTE["base"], PALETTE["quantized"], PALETTE["highlight"]
    largest = int(weight.flatten().abs().argmax())

    figure, ax = plt.subplots(figsize=(10, 5.4))
    ax.set(xlim=(-1.9, n + 0.1), ylim=(-7.9, rows + 0.2))
    ax.axis("off")

    def cell(x: float, y: float, text: str, face: str, color: str, width: float = 1.0) -> None:
        ax.add_patch(Rectangle((x, y), width, 0.8, facecolor=face, edgecolor="white", lw=1.5))
        style = {"color": color, "fontsize": 9, "weight": "bold" if color == pink else "normal"}
        ax.text(x + width / 2, y + 0.39, text, ha="center", va="center", **style)

    def name(y: float, text: str, color: str) -> None:
        ax.text(-0.2, y + 0.39, text, ha="right", va="center", fontsize=10, color=color)

    # The matrix stands in the middle, so that the eye goes down from it.
    left = (n - columns) / 2
    for i in range(n):
        row, column = divmod(i, columns)
        ink = pink if i == largest else PALETTE["ink"]
        number = f"{weight.flatten()[i]:+.3f}"
        cell(left + column, rows - 0.9 - row, number, PALE_GREY, ink)
        cell(i, -1.6, number, PALE_GREY, ink)
        cell(i, -4.2, f"{scaled[i]:+.2f}", PALE_BLUE, ink)
        cell(i, -5.5, str(int(codes[i])), blue, "white")
    name(rows - 0.9 - (rows - 1) / 2, "W", grey)
    name(-1.6, "laid flat", grey)
    for block, largest_here in enumerate(absmax.tolist()):
        start, end = block * blocksize, min((block + 1) * blocksize, n)
        ax.add_patch(
            Rectangle((start, -2.62), end - start - 0.08, 0.62, facecolor="none", edgecolor=blue)
        )
        text = f"block {block}: c = {largest_here:.3f}"
        ax.text((start + end) / 2, -2.31, text, ha="center", va="center", fontsize=9.5, color=blue)
        if block:
            ax.plot([start - 0.04] * 2, [-5.6, -0.6], color=blue, linewidth=1.4, linestyle="--")
    name(-2.7, "absmax", blue)
    name(-4.2, "w / c", blue)
    name(-5.5, "codes", blue)
    for i, value in enumerate(pack_nibbles(codes).flatten().tolist()):
        cell(2 * i, -6.9, f"0x{value:02X}", blue, "white", width=2.0)
    name(-6.9, "bytes", blue)
    ax.text(
        0, -7.6, f"{n} weights: {n // 2} bytes of codes, {4 * len(absmax)} bytes of constants",
        color=blue, fontsize=10, va="center",
    )  # fmt: skip
    ax.set_title("From a matrix to bytes: blocks run on from row to row, two codes share a byte")
    return figure


def save_picture(path: Path = PICTURE) -> Path:
    """Write the README's picture whole: to a scratch file first, then in place of the old one."""
    use_style()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_bytes(figure_png(draw_qlora_in_one_picture(), dpi=110))
    os.replace(scratch, path)
    return path


if __name__ == "__main__":
    written = save_picture()
    print(f"{written.relative_to(ROOT)}: {written.stat().st_size / 1e3:.0f} kB")
