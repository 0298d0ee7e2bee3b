"""The look of the course: one colour for one meaning, labels beside the thing they name.

The colours are Okabe and Ito's, which readers with colour-blindness can tell apart. Take them from
`PALETTE` by meaning and never by number: an adapter has one colour in every chapter.
"""

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import SVG
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from qlora_edu.files import ROOT

PALETTE = {
    "base": "#7F7F7F",  # the frozen base model
    "quantized": "#0072B2",
    "adapter": "#E69F00",  # whatever is trained
    "gradient": "#D55E00",
    "host": "#56B4E9",  # memory of the machine
    "device": "#009E73",  # memory of the graphics card
    "highlight": "#CC79A7",  # the one thing a figure points at
    "ink": "#222222",  # text and axes
}
PALE_BLUE, PALE_ORANGE, PALE_GREY = "#CFE3F2", "#FBE7C2", "#E8E8E8"

_STYLE = Path(__file__).with_name("course.mplstyle")


def use_style() -> None:
    """Give every figure drawn from here on the look of the course."""
    plt.style.use(_STYLE)


def label_line(
    ax: Axes, text: str, x: float, y: float, color: str, *, offset: tuple[float, float] = (6, 0)
) -> Annotation:
    """Write a curve's name beside the point (x, y) of the data, moved by `offset` points."""
    alignment = "left" if offset[0] > 0 else "right" if offset[0] < 0 else "center"
    place = {"xytext": offset, "textcoords": "offset points", "annotation_clip": False}
    return ax.annotate(text, (x, y), color=color, ha=alignment, va="center", **place)


def label_bars(
    ax: Axes, bars: BarContainer, labels: Iterable[str] | None = None, *, fmt: str = "{:.3g}"
) -> None:
    """Write each bar's value, or the text given for it, at the end of the bar."""
    ax.bar_label(bars, labels=None if labels is None else list(labels), fmt=fmt, padding=3)


def level_ticks(ax: Axes, levels: Iterable[float], color: str, *, height: float = 0.06) -> None:
    """Stand a short mark on the x axis at every level; `height` is a fraction of the axes'."""
    for level in levels:
        ax.axvline(float(level), ymax=height, color=color, linewidth=2)


def picture(name: str) -> SVG:
    """Show a picture of `docs/` in a notebook, by its name."""
    return SVG(filename=str(ROOT / "docs" / f"{name}.svg"))


def paint(color: str, hatch: str = "") -> dict[str, object]:
    """How to fill a part of a bar; hatched is what is trained, in pale."""
    edge = PALETTE["adapter"] if hatch else color
    return {"facecolor": color, "hatch": hatch, "edgecolor": edge, "linewidth": 0}


def words_png(words: str) -> bytes:
    """Say in the place of a figure why there is none."""
    figure, ax = plt.subplots(figsize=(9.5, 3.8))
    ax.text(0.5, 0.5, words, ha="center", va="center", wrap=True)
    ax.axis("off")
    return figure_png(figure)


def figure_png(figure: Figure, *, dpi: int = 100) -> bytes:
    """Draw a figure into PNG bytes and close it; the same figure gives the same bytes."""
    buffer = BytesIO()
    # Without this, matplotlib writes its version into the file.
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
