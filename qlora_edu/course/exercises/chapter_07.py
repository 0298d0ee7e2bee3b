"""The exercises of notebook 7: count, derive, implement, repair, and choose."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_edu.course.exercises.core import Exercise, Inputs, Seen, chose, faults_left
from qlora_edu.paging import PageTable, adamw_update


def pages_needed(elements: int, state_bytes: int, page_bytes: int) -> int:
    """Pages for the two states of a parameter; a page holds both states of an element."""
    return -(-elements // (page_bytes // (2 * state_bytes)))


ex_7_1 = Exercise(
    "7.1 pages of a parameter",
    pages_needed,
    # Full pages, a last page that is not, a page that is no whole number of elements.
    [(65_536, 4, 65_536), (1000, 4, 2048), (70_001, 2, 4096), (1000, 4, 100)],
    because={
        "AdamW has two states for each element, and a page holds both": (
            lambda elements, state, page: -(-elements // (page // state))
        ),
        "what is left over needs a page too: round up": (
            lambda elements, state, page: elements // (page // (2 * state))
        ),
        "if the last page is full there is no other: rounding up is not adding one": (
            lambda elements, state, page: elements // (page // (2 * state)) + 1
        ),
        "a page is measured in bytes: each element needs state_bytes for each of two states": (
            lambda elements, state, page: -(-elements // page)
        ),
        "no element lies in two pages: round down to the elements that fit in one, then divide": (
            lambda elements, state, page: -(-2 * elements * state // page)
        ),
    },
)


def sweep_faults(pages: int, frames: int, steps: int) -> int:
    """Pages copied in by `steps` sweeps over `pages` pages, evicting the least recently used."""
    return pages if pages <= frames else pages * steps


ex_7_2 = Exercise(
    "7.2 faults of a sweep",
    sweep_faults,
    [(8, 8, 5), (9, 8, 5), (40, 4, 3), (1, 2, 7), (12, 11, 1), (12, 12, 4), (7, 6, 3)],
    because={
        "that would be so if frames − 1 pages could stay. But the page that leaves is the one that "
        "is wanted soonest: follow five pages through four frames": lambda pages, frames, steps: (
            pages if pages <= frames else pages + (steps - 1) * (pages - frames)
        ),
        "those are the pages that had to leave; the first ones found a free frame, and that is a "
        "fault too": lambda pages, frames, steps: max(
            0, sweep_faults(pages, frames, steps) - frames
        ),
        "at the start the frames are empty: the first sweep faults at every page": Seen(
            lambda pages, frames, steps: 0 if pages <= frames else pages * (steps - 1),
            lambda faults, right, pages, frames, steps: faults == right - pages,
        ),
        "if all pages find room, none of them leaves after the first sweep": (
            lambda pages, frames, steps: pages * steps
        ),
        "with as many frames as pages all of them find room": (
            lambda pages, frames, steps: pages if pages < frames else pages * steps
        ),
    },
)


def evictions(accesses: Sequence[int], frames: int) -> list[int | None]:
    """The page that leaves at each access, or None, when the least recently used one leaves."""
    table = PageTable(frames)
    return [table.access(page).evicted for page in accesses]


def _evictions_by(choose: Callable[[list[int], list[int]], int]) -> Callable[..., list]:
    """Evictions when `choose(pages in order of arrival, accesses so far)` leaves."""

    def evict(accesses, frames):
        resident, out = [], []
        for i, page in enumerate(accesses):
            leaving = None
            if page not in resident:
                if len(resident) == frames:
                    leaving = choose(resident, accesses[:i])
                    resident.remove(leaving)
                resident.append(page)
            out.append(leaving)
        return out

    return evict


def _arrivals(accesses, frames):
    table = PageTable(frames)
    return [page if table.access(page).fault else None for page in accesses]


ex_7_3 = Exercise(
    "7.3 least recently used",
    evictions,
    lambda random: [
        ([1, 2, 3, 1, 4, 1, 2, 5, 1], 3),
        (torch.randint(6, (30,), generator=random).tolist(), 4),
        ([7, 7, 7, 8, 9], 1),
    ],
    because={
        "that is first in, first out. A hit counts too: it makes a page the most recently used": (
            _evictions_by(lambda resident, past: resident[0])
        ),
        "the page that has just been used leaves here; the one that has waited longest should": (
            _evictions_by(lambda resident, past: past[-1])
        ),
        "that is the least *often* used page; asked for is the one whose last use is longest ago": (
            _evictions_by(lambda resident, past: min(resident, key=past.count))
        ),
        "that is the page that comes in; asked for is the one that leaves": _arrivals,
        "one entry for each access is asked for: None where no page leaves": (
            lambda accesses, frames: [p for p in evictions(accesses, frames) if p is not None]
        ),
    },
)


def paged_steps(
    parameter: Tensor, gradients: Sequence[Tensor], width: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor, int]:
    """AdamW with one frame of `width` elements: parameter `[n]`, host `[2, n]`, pages copied in."""
    return _run_pages(parameter, gradients, width, options)


def _run_pages(parameter, gradients, width, options, forgets=False, by_page=False, short=False):
    """The right loop, with a switch for each mistake."""
    parameter, host, copied = parameter.clone(), torch.zeros(2, len(parameter)), 0
    pages = len(parameter) // width if short else -(-len(parameter) // width)
    for step, gradient in enumerate(gradients, start=1):
        for page in range(pages):
            part = slice(page * width, (page + 1) * width)
            frame = host[:, part].clone()
            copied += 1
            number = copied if by_page else step
            adamw_update(parameter[part], gradient[part], *frame, number, **options)
            if not forgets:
                host[:, part] = frame
    return parameter, host, copied


def _parameters_and_gradients(random: torch.Generator) -> Inputs:
    for (n, steps, width), lr, beta2 in (
        ((10, 3, 4), 0.1, 0.99),
        ((6, 2, 3), 0.02, 0.95),
        ((5, 4, 8), 0.5, 0.9),
    ):
        options = {"lr": lr, "betas": (0.9, beta2), "eps": 1e-8, "weight_decay": 0.01}
        gradients = [torch.randn(n, generator=random) for _ in range(steps)]
        yield torch.randn(n, generator=random), gradients, width, options


ex_7_4 = Exercise(
    "7.4 a loop that forgets",
    paged_steps,
    _parameters_and_gradients,
    # The same operations give the same bits; a rounding apart is still the right answer.
    atol=1e-6,
    because={
        **faults_left(
            _run_pages,
            forgets="the frame is a copy: unless it is written back the host tier stays at zero, "
            "and every step begins without a memory",
            by_page="the step number grows once per step and not once per page, or the bias "
            "correction of later pages is that of later steps",
        ),
        "the last page may be shorter than the others; it is a page all the same": (
            lambda *given: _run_pages(*given, short=True)
        ),
    },
)


def step_seconds(pages: int, compute: float, copy: float, prefetch: bool) -> float:
    """Seconds of a step: each page is copied in, then computed, in turn or overlapping."""
    return _seconds(lambda n, compute, copy: copy + (n - 1) * max(compute, copy) + compute)(
        pages, compute, copy, prefetch
    )


def _seconds(overlapping):
    """Make an answer that is right without a prefetch."""
    return lambda n, compute, copy, prefetch: (
        overlapping(n, compute, copy) if prefetch else n * (copy + compute)
    )


ex_7_5 = Exercise(
    "7.5 what a prefetch can hide",
    step_seconds,
    [
        (pages, compute, copy, prefetch)
        for pages, compute, copy in ((10, 2.0, 1.0), (10, 1.0, 2.0), (1, 3.0, 5.0))
        for prefetch in (True, False)
    ],
    atol=1e-9,
    because={
        "nobody computes while the first page comes, and nothing is left to copy while the last "
        "one is computed": _seconds(lambda n, compute, copy: n * max(compute, copy)),
        "if copying is slower than computing, the next page is not there in time": (
            _seconds(lambda n, compute, copy: copy + n * compute)
        ),
        "with a prefetch the next page is copied while this one is computed": (
            _seconds(lambda n, compute, copy: n * (copy + compute))
        ),
        "add the first copy and the last computation, which overlap with nothing": (
            _seconds(lambda n, compute, copy: (n - 1) * max(compute, copy))
        ),
    },
)

REMEDIES = ("managed memory", "bounded tier", "neither")


def choose_remedies() -> dict[str, str]:
    """One remedy for each of the three runs of exercise 7.6."""
    return {"a": "managed memory", "b": "bounded tier", "c": "neither"}


ex_7_6 = Exercise(
    "7.6 would paging help?",
    choose_remedies,
    open=True,
    score=lambda answer: (
        f"{sum(answer.get(run) == right for run, right in choose_remedies().items())} of 3 right"
    ),
    because={
        f"answer 'a', 'b' and 'c', each with one of {REMEDIES}": Seen(
            lambda: {"a": "page it", "b": "neither", "c": "neither"},
            lambda answer: not {answer[run] for run in "abc"} <= set(REMEDIES),
        ),
        "(a) the worst moment is the loss, where the states are not needed: without their 3 GiB it "
        "is 22, and it fits": chose(choose_remedies, "a", "neither"),
        "(a) both would do: the loss needs no states, and in the optimizer step all of them have "
        "room. Take the one that is in use": chose(choose_remedies, "a", "bounded tier"),
        "(b) with managed memory all states are fetched for the optimizer step, and that is the "
        "moment with 26 GiB: the driver would have to push pages out and in during the step "
        "itself. A tier of bounded size keeps it below 24": (
            chose(choose_remedies, "b", "managed memory")
        ),
        "(b) of the 26 GiB in the optimizer step 8 are states: only a few pages of them must be "
        "there at once": chose(choose_remedies, "b", "neither"),
        "(c) without any states the loss still needs 29 GiB: shorten the rows, cut the batch, "
        "compute the loss in chunks": (
            chose(choose_remedies, "c", "bounded tier", "managed memory")
        ),
    },
)

EXERCISES = (ex_7_1, ex_7_2, ex_7_3, ex_7_4, ex_7_5, ex_7_6)
