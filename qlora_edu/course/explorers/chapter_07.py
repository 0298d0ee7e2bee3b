"""The explorer of chapter 7: a page table at work, one event after the other of a real trace."""

from functools import cache
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from ipywidgets import Dropdown, IntSlider
from matplotlib.axes import Axes

from qlora_edu.course.explorers.core import Explorer
from qlora_edu.course.plots import PALETTE, figure_png
from qlora_edu.kernels import PageEvent, PrefetchingPagedAdamW

PAGES_OF = {"a": 3, "b": 2, "c": 1, "d": 4}
"""Pages that the states of each parameter fill; in the second step b has no gradient."""
PAGE_BYTES = 1024
EVENTS = 34  # of the longest trace: 18 uses, 16 of them announced by a prefetch
_NAMES = [f"{name}{i}" for name, count in PAGES_OF.items() for i in range(count)]


@cache
def record_trace(frames: int = 4, prefetch: bool = False) -> tuple[PageEvent, ...]:
    """What a real `PrefetchingPagedAdamW` does in two steps, with its states cut into ten pages."""
    elements = PAGE_BYTES // 8  # two float32 states for each
    parameters = {n: torch.nn.Parameter(torch.zeros(k * elements)) for n, k in PAGES_OF.items()}
    sizes = {"budget_bytes": frames * PAGE_BYTES, "page_bytes": PAGE_BYTES}
    optimizer = PrefetchingPagedAdamW(parameters.values(), **sizes, prefetch=prefetch)
    optimizer.trace = []
    for skipped in (None, "b"):
        for name, parameter in parameters.items():
            parameter.grad = None if name == skipped else torch.ones_like(parameter)
        optimizer.step()
    return tuple(optimizer.trace)


class TierState(NamedTuple):
    """Where everything is after some events."""

    holds: list[int | None]
    """The page in each frame."""
    dirty: set[int]
    """Pages whose frame has what the host tier has not yet."""
    counts: dict[str, int]
    """Uses of each sort, and kibibytes copied in and written back."""


def replay_trace(trace: tuple[PageEvent, ...], events: int, frames: int) -> TierState:
    """Follow the first `events` events of a trace.

    >>> replay_trace(record_trace(4), 5, 4).holds, replay_trace(record_trace(4), 5, 4).counts
    ([4, 1, 2, 3], {'hits': 0, 'prefetched': 0, 'faults': 5, 'KiB in': 5, 'KiB out': 1})
    """
    holds: list[int | None] = [None] * frames
    dirty: set[int] = set()
    counts = dict.fromkeys(("hits", "prefetched", "faults", "KiB in", "KiB out"), 0)
    for page, what, frame, evicted in trace[:events]:
        if what in ("fault", "prefetch"):
            counts["KiB in"] += 1
            counts["KiB out"] += evicted in dirty
            dirty.discard(evicted)
            holds[frame] = page
        if what != "prefetch":
            counts["prefetched" if what == "prefetched" else f"{what}s"] += 1
            dirty.add(page)
    return TierState(holds, dirty, counts)


def describe_event(event: PageEvent, dirty: set[int]) -> str:
    """One sentence on what has just happened; `dirty` is how it was before."""
    page = _NAMES[event.page]
    said = {
        "hit": f"{page} is wanted and there: a hit",
        "prefetched": f"{page} is wanted, and had been sent for",
        "fault": f"{page} is wanted and not there: a fault",
        "prefetch": f"{page} is sent for early",
    }[event.what]
    if event.evicted is None:
        return said
    leaving = _NAMES[event.evicted]
    return f"{said}; {leaving} {'is written back and ' if event.evicted in dirty else ''}leaves"


def draw_tiers(ax: Axes, state: TierState, event: PageEvent | None, written: bool) -> None:
    """Draw the pages of the host tier above the frames of the device tier."""
    host, device, orange, pink = map(PALETTE.get, ("host", "device", "adapter", "highlight"))
    for page, name in enumerate(_NAMES):
        here = page in state.holds
        ax.add_patch(plt.Rectangle((page, 2), 0.9, 0.7, color=host, alpha=0.35 if here else 1))
        ax.text(page + 0.45, 2.35, name, ha="center", va="center")
    left = (len(_NAMES) - len(state.holds)) / 2
    for frame, page in enumerate(state.holds):
        style = {"edgecolor": orange if page in state.dirty else "none", "linewidth": 3}
        box = plt.Rectangle((left + frame, 0), 0.9, 0.7, facecolor=device, **style)
        box.set_alpha(0.25 if page is None else 1)
        ax.add_patch(box)
        text = "" if page is None else _NAMES[page]
        ax.text(left + frame + 0.45, 0.35, text, ha="center", va="center", color="white")
    if event is None:
        return
    x = left + event.frame + 0.45
    if event.what in ("fault", "prefetch"):
        style = "--" if event.what == "prefetch" else "-"
        arrow = {"arrowstyle": "-|>", "color": pink, "linewidth": 2, "linestyle": style}
        ax.annotate("", (x, 0.75), (event.page + 0.45, 1.95), arrowprops=arrow)
        if written:
            arrow = {"arrowstyle": "-|>", "color": orange, "linewidth": 2}
            ax.annotate("", (event.evicted + 0.45, 1.95), (x, 0.75), arrowprops=arrow)
    else:
        ring = plt.Rectangle((x - 0.51, -0.08), 1.02, 0.86, fill=False, edgecolor=pink, linewidth=2)
        ax.add_patch(ring)


def render_paging(events: int = 5, frames: int = 4, prefetch: bool = False) -> bytes:
    """Draw both tiers after some events of two real steps, and say what the last one was."""
    trace = record_trace(frames, prefetch)
    events = min(events, len(trace))
    state = replay_trace(trace, events, frames)
    event = trace[events - 1] if events else None
    before = replay_trace(trace, max(events - 1, 0), frames).dirty
    figure, ax = plt.subplots(figsize=(9, 3.6))
    draw_tiers(ax, state, event, event is not None and event.evicted in before)
    ax.text(-0.15, 2.35, "host tier", ha="right", va="center", color=PALETTE["host"])
    ax.text(-0.15, 0.35, "device tier", ha="right", va="center", color=PALETTE["device"])
    counted = ", ".join(f"{name} {count}" for name, count in state.counts.items())
    ax.text(5, -0.55, counted, ha="center", va="center")
    said = describe_event(event, before) if event else "two steps lie ahead"
    ax.set_title(f"Event {events} of {len(trace)}: {said}", fontsize=12)
    ax.set(xlim=(-1.9, 10.1), ylim=(-0.85, 2.85))
    ax.axis("off")
    return figure_png(figure)


def paging_explorer() -> Explorer:
    """Make the explorer of chapter 7: step through the trace, with more or fewer frames."""
    return Explorer(
        render_paging,
        events=IntSlider(5, min=0, max=EVENTS, description="events"),
        frames=IntSlider(4, min=2, max=10, description="frames"),
        prefetch=Dropdown(options=[("no", False), ("yes", True)], description="prefetch"),
    )
