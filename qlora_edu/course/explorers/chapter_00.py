"""The explorer of chapter 0: size and rank against the memory of four ways to fine-tune."""

import matplotlib.pyplot as plt
from ipywidgets import Dropdown, SelectionSlider
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from qlora_edu.course.explorers.core import Explorer
from qlora_edu.course.plots import PALE_ORANGE, PALETTE, figure_png, paint
from qlora_edu.memory import LLAMA_SHAPES, adapter_parameters, llama_parameters, nf4_bits_per_weight

RANKS = (8, 16, 32, 64, 128, 256)


def render_training_memory(size: str = "7B", r: int = 64) -> bytes:
    """Memory of four ways to fine-tune a LLaMA, as PNG bytes."""
    return figure_png(draw_training_memory(size, r))


def memory_explorer() -> Explorer:
    """Size and rank against the memory of four methods."""
    return Explorer(
        render_training_memory,
        size=Dropdown(options=list(LLAMA_SHAPES), value="7B", description="LLaMA"),
        r=SelectionSlider(options=RANKS, value=64, description="rank r"),
    )


CARDS_GB = (16, 24, 48, 80)
METHODS = {
    "full": "full fine-tuning, 16 bits",
    "lora": "LoRA, 16-bit base",
    "lora8": "LoRA, 8-bit base",
    "qlora": "QLoRA, 4-bit base",
}


def training_gigabytes(size: str, method: str, r: int = 64) -> dict[str, float]:
    """Memory of weights, trained adapters, gradients and Adam's two states, in GB (10⁹ bytes).

    Activations are left out. Adam keeps two float32 numbers per trained
    parameter. Adapters and their gradients are float32, as PEFT keeps them.

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
    """Four ways to fine-tune one LLaMA, as bars of memory against the sizes of cards."""
    edge = 92
    figure, ax = plt.subplots(figsize=(9, 4.1))
    styles = {
        "adapters": (PALETTE["adapter"], ""),
        "gradients": (PALETTE["gradient"], ""),
        "optimizer": (PALE_ORANGE, "////"),
    }
    for row, method in enumerate(reversed(METHODS)):
        parts = training_gigabytes(size, method, r)
        quantised = method in ("lora8", "qlora")
        weights = PALETTE["quantized" if quantised else "base" if method == "lora" else "adapter"]
        left = 0.0
        for part, gigabytes in parts.items():
            color, hatch = styles.get(part, (weights, ""))
            width, start = max(0, min(gigabytes, edge - left)), min(left, edge)
            ax.barh(row, width, left=start, height=0.6, **paint(color, hatch))
            left += gigabytes
        x, said, side = left + 0.8, f"{left:.1f} GB", "left"
        if left > edge:
            x, said, side = edge - 1, f"{left:.0f} GB →", "right"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}
        ax.text(x, row, said, va="center", ha=side, weight="bold", bbox=box)
    for card in CARDS_GB:
        ax.axvline(card, color=PALETTE["device"], linewidth=1.6, linestyle="--", zorder=0.5)
        style = {"color": PALETTE["device"], "ha": "center", "fontsize": 9}
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        ax.text(card, len(METHODS) - 0.45, f"{card} GB", bbox=box, **style)
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
    patches = [Rectangle((0, 0), 1, 1, **paint(*style)) for style in key.values()]
    tight = {"fontsize": 10, "columnspacing": 1.2, "handlelength": 1.4}
    figure.legend(patches, list(key), loc="outside lower center", ncols=5, **tight)
    smallest = sum(training_gigabytes(size, "qlora", r).values())
    ax.set_title(f"LLaMA-{size} at r = {r}: QLoRA needs {smallest:.1f} GB before activations")
    ax.set_xlabel("GB (10⁹ bytes); dashed: cards; activations are not counted")
    return figure
