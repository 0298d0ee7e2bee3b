"""The explorer of chapter 0: size and rank against the memory of four ways to fine-tune."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from ipywidgets import Dropdown, SelectionSlider
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

from qlora_edu.course.explorers.core import Explorer
from qlora_edu.course.plots import PALE_BLUE, PALE_GREY, PALE_ORANGE, PALETTE, figure_png, use_style
from qlora_edu.files import ROOT
from qlora_edu.memory import LLAMA_SHAPES, adapter_parameters, llama_parameters, nf4_bits_per_weight

RANKS = (8, 16, 32, 64, 128, 256)


def render_training_memory(size: str = "7B", r: int = 64) -> bytes:
    """Memory of four ways to fine-tune a LLaMA, as PNG bytes.

    Raises:
        KeyError: for a size that is not in `LLAMA_SHAPES`.

    >>> render_training_memory("13B", 16)[:4]
    b'\\x89PNG'
    """
    return figure_png(draw_training_memory(size, r))


def memory_explorer() -> Explorer:
    """Size and rank against the memory of four methods."""
    return Explorer(
        render_training_memory,
        size=Dropdown(options=list(LLAMA_SHAPES), value="7B", description="LLaMA"),
        r=SelectionSlider(options=RANKS, value=64, description="rank r"),
    )


PICTURE = ROOT / "docs" / "qlora_in_one_picture.png"


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


CARDS_GB = (16, 24, 48, 80)


METHODS = {
    "full": "full fine-tuning, 16 bits",
    "lora": "LoRA, 16-bit base",
    "lora8": "LoRA, 8-bit base",
    "qlora": "QLoRA, 4-bit base",
}


def training_gigabytes(size: str, method: str, r: int = 64) -> dict[str, float]:
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
    trained, width = (linear + rest, 2) if method == "full" else (adapter_parameters(size, r), 4)
    return {
        "weights": (linear * bits / 8 + rest * 2) / 1e9,
        "adapters": 0.0 if method == "full" else trained * width / 1e9,
        "gradients": trained * width / 1e9,
        "optimizer": trained * 8 / 1e9,
    }


def draw_training_memory(size: str = "7B", r: int = 64) -> Figure:
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
        parts = training_gigabytes(size, method, r)
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
    smallest = sum(training_gigabytes(size, "qlora", r).values())
    ax.set_title(f"LLaMA-{size} at r = {r}: QLoRA needs {smallest:.1f} GB before activations")
    ax.set_xlabel("GB (10⁹ bytes); dashed: cards; activations are not counted")
    return figure


def save_picture(path: Path = PICTURE) -> Path:
    """Write the README's picture whole: to a scratch file first, then in place of the old one."""
    use_style()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_bytes(figure_png(draw_qlora_in_one_picture(), dpi=110))
    os.replace(scratch, path)
    return path
