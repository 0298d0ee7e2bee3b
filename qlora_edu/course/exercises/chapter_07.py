"""The exercises of notebook 7: count, derive, implement, repair, and choose."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_edu.course.exercises.core import Case, Check, Mistake, OpenCheck
from qlora_edu.paging import PageTable, adamw_update


def pages_needed(elements: int, state_bytes: int, page_bytes: int) -> int:
    """Pages for the two states of a parameter; a page holds both states of an element.

    >>> pages_needed(1000, 4, 2048)
    4
    """
    return -(-elements // (page_bytes // (2 * state_bytes)))


ex_7_1 = Check(
    "7.1 pages of a parameter",
    reference=pages_needed,
    cases=lambda random: [
        {"elements": elements, "state_bytes": state, "page_bytes": page}
        for elements, state, page in ((65_536, 4, 65_536), (1000, 4, 2048), (70_001, 2, 4096))
    ],
    mistakes=(
        Mistake(
            "one state",
            lambda elements, state_bytes, page_bytes: -(-elements // (page_bytes // state_bytes)),
            "AdamW has two states for each element, and a page holds both",
        ),
        Mistake(
            "rounded down",
            lambda elements, state_bytes, page_bytes: elements // (page_bytes // (2 * state_bytes)),
            "what is left over needs a page too: round up",
        ),
        Mistake(
            "one page too many",
            lambda elements, state_bytes, page_bytes: (
                elements // (page_bytes // (2 * state_bytes)) + 1
            ),
            "if the last page is full there is no other: rounding up is not adding one",
        ),
        Mistake(
            "elements taken for bytes",
            lambda elements, state_bytes, page_bytes: -(-elements // page_bytes),
            "a page is measured in bytes: each element needs state_bytes for each of two states",
        ),
    ),
)


def sweep_faults(pages: int, frames: int, steps: int) -> int:
    """Pages copied in by ``steps`` sweeps over ``pages`` pages, evicting the least recently used.

    >>> sweep_faults(4, 4, 10), sweep_faults(5, 4, 10)
    (4, 50)
    """
    return pages if pages <= frames else pages * steps


ex_7_2 = Check(
    "7.2 faults of a sweep",
    reference=sweep_faults,
    cases=lambda random: [
        {"pages": pages, "frames": frames, "steps": steps}
        for pages, frames, steps in ((8, 8, 5), (9, 8, 5), (40, 4, 3), (1, 2, 7), (12, 11, 1))
    ],
    mistakes=(
        Mistake(
            "only what has no room",
            lambda pages, frames, steps: (
                pages if pages <= frames else pages + (steps - 1) * (pages - frames)
            ),
            "that would be so if frames − 1 pages could stay. But the page that leaves is the one "
            "that is wanted soonest: follow five pages through four frames",
        ),
        Mistake(
            "the first sweep is free",
            lambda pages, frames, steps: 0 if pages <= frames else pages * (steps - 1),
            "at the start the frames are empty: the first sweep faults at every page",
        ),
        Mistake(
            "always all",
            lambda pages, frames, steps: pages * steps,
            "if all pages find room, none of them leaves after the first sweep",
        ),
        Mistake(
            "a frame too few",
            lambda pages, frames, steps: pages if pages < frames else pages * steps,
            "with as many frames as pages all of them find room",
        ),
    ),
)


def evictions(accesses: Sequence[int], frames: int) -> list[int | None]:
    """The page that leaves at each access, or None, when the least recently used one leaves.

    >>> evictions([1, 2, 1, 3], frames=2)
    [None, None, None, 2]
    """
    table = PageTable(frames)
    return [table.access(page).evicted for page in accesses]


def _evictions_by(choose: Callable[[list[int], list[int]], int]) -> Callable[..., list]:
    """Evictions when ``choose(pages in order of arrival, pages in order of use)`` leaves."""

    def evict(accesses: Sequence[int], frames: int) -> list[int | None]:
        arrived: list[int] = []
        used: list[int] = []
        out: list[int | None] = []
        for page in accesses:
            leaving = None
            if page not in arrived:
                if len(arrived) == frames:
                    leaving = choose(arrived, used)
                    arrived.remove(leaving)
                    used.remove(leaving)
                arrived.append(page)
            if page in used:
                used.remove(page)
            used.append(page)
            out.append(leaving)
        return out

    return evict


ex_7_3 = Check(
    "7.3 least recently used",
    reference=evictions,
    cases=lambda random: [
        {"accesses": [1, 2, 3, 1, 4, 1, 2, 5, 1], "frames": 3},
        {"accesses": torch.randint(6, (30,), generator=random).tolist(), "frames": 4},
        {"accesses": [7, 7, 7, 8, 9], "frames": 1},
    ],
    mistakes=(
        Mistake(
            "the oldest arrival leaves",
            _evictions_by(lambda arrived, used: arrived[0]),
            "that is first in, first out. A hit counts too: it makes a page the most recently used",
        ),
        Mistake(
            "the most recently used leaves",
            _evictions_by(lambda arrived, used: used[-1]),
            "the page that has just been used leaves here; the one that has waited longest should",
        ),
        Mistake(
            "the smallest number leaves",
            _evictions_by(lambda arrived, used: min(arrived)),
            "a page's number says nothing of when it was used",
        ),
        Mistake(
            "faults instead of evictions",
            lambda accesses, frames: [
                page if fault else None
                for page, fault in zip(accesses, _faults(accesses, frames), strict=True)
            ],
            "that is the page that comes in; asked for is the one that leaves",
        ),
    ),
)


def _faults(accesses: Sequence[int], frames: int) -> list[bool]:
    table = PageTable(frames)
    return [table.access(page).fault for page in accesses]


def paged_steps(
    parameter: Tensor, gradients: Sequence[Tensor], width: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """AdamW with one frame of ``width`` elements; returns parameter ``[n]`` and host ``[2, n]``.

    >>> options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    >>> paged_steps(torch.ones(3), [torch.ones(3)], 2, options)[0]
    tensor([0.9000, 0.9000, 0.9000])
    """
    return _run_pages(parameter, gradients, width, options)


def _run_pages(
    parameter: Tensor,
    gradients: Sequence[Tensor],
    width: int,
    options: dict[str, Any],
    *,
    write_back: bool = True,
    step_of: Callable[[int, int, int], int] = lambda step, page, pages: step,
    keep: bool = True,
    last: bool = True,
) -> tuple[Tensor, Tensor]:
    """The right loop, with a switch for each mistake."""
    parameter, host = parameter.clone(), torch.zeros(2, len(parameter))
    pages = -(-len(parameter) // width) if last else len(parameter) // width
    for step, gradient in enumerate(gradients, start=1):
        for page in range(pages):
            part = slice(page * width, (page + 1) * width)
            frame = host[:, part].clone() if keep else torch.zeros_like(host[:, part])
            number = step_of(step, page, pages)
            adamw_update(parameter[part], gradient[part], *frame, number, **options)
            if write_back:
                host[:, part] = frame
    return parameter, host


ex_7_4 = Check(
    "7.4 a loop that forgets",
    reference=paged_steps,
    cases=lambda random: [
        {
            "parameter": torch.randn(n, generator=random),
            "gradients": [torch.randn(n, generator=random) for _ in range(steps)],
            "width": width,
            "options": {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01},
        }
        for n, steps, width in ((10, 3, 4), (6, 2, 3), (5, 4, 8))
    ],
    mistakes=(
        Mistake(
            "no write-back",
            lambda parameter, gradients, width, options: _run_pages(
                parameter, gradients, width, options, write_back=False
            ),
            "the frame is a copy: unless it is written back the host tier stays at zero, and "
            "every step is AdamW's first",
        ),
        Mistake(
            "a step for each page",
            lambda parameter, gradients, width, options: _run_pages(
                parameter,
                gradients,
                width,
                options,
                step_of=lambda step, page, pages: (step - 1) * pages + page + 1,
            ),
            "the step number grows once a step and not once a page, or the bias correction of "
            "later pages is that of later steps",
        ),
        Mistake(
            "the last page is lost",
            lambda parameter, gradients, width, options: _run_pages(
                parameter, gradients, width, options, last=False
            ),
            "the last page may be shorter than the others; it is a page all the same",
        ),
        Mistake(
            "the step starts at two",
            lambda parameter, gradients, width, options: _run_pages(
                parameter, gradients, width, options, step_of=lambda step, page, pages: step + 1
            ),
            "steps count from 1: the bias correction of the first step is 1 − β, and not 1 − β²",
        ),
    ),
    # The same operations give the same bits; a rounding apart is still the right answer.
    atol=1e-6,
)


def step_seconds(pages: int, compute: float, copy: float, prefetch: bool) -> float:
    """Seconds of a step: each page is copied in and computed, one after the other or overlapping.

    >>> step_seconds(3, compute=2.0, copy=1.0, prefetch=False)
    9.0
    >>> step_seconds(3, compute=2.0, copy=1.0, prefetch=True)
    7.0
    """
    if not prefetch:
        return pages * (copy + compute)
    return copy + (pages - 1) * max(compute, copy) + compute


ex_7_5 = Check(
    "7.5 what a prefetch can hide",
    reference=step_seconds,
    cases=lambda random: [
        {"pages": pages, "compute": compute, "copy": copy, "prefetch": prefetch}
        for pages, compute, copy in ((10, 2.0, 1.0), (10, 1.0, 2.0), (1, 3.0, 5.0))
        for prefetch in (True, False)
    ],
    mistakes=(
        Mistake(
            "everything hidden",
            lambda pages, compute, copy, prefetch: (
                pages * max(compute, copy) if prefetch else pages * (copy + compute)
            ),
            "nobody computes while the first page comes, and nothing is left to copy while the "
            "last one is computed",
        ),
        Mistake(
            "only the computing counts",
            lambda pages, compute, copy, prefetch: (
                copy + pages * compute if prefetch else pages * (copy + compute)
            ),
            "if copying is slower than computing, the next page is not there in time",
        ),
        Mistake(
            "prefetching or not",
            lambda pages, compute, copy, prefetch: pages * (copy + compute),
            "with a prefetch the next page is copied while this one is computed",
        ),
        Mistake(
            "the sum of the larger ones without the ends",
            lambda pages, compute, copy, prefetch: (
                (pages - 1) * max(compute, copy) if prefetch else pages * (copy + compute)
            ),
            "add the first copy and the last computation, which overlap with nothing",
        ),
    ),
    atol=1e-9,
)

REMEDIES = ("managed memory", "bounded tier", "neither")


def choose_remedies() -> dict[str, str]:
    """One remedy for each of the three runs of exercise 7.6.

    >>> choose_remedies()["a"]
    'managed memory'
    """
    return {"a": "managed memory", "b": "bounded tier", "c": "neither"}


def _says(case: str, remedies: Sequence[str]) -> Callable[[Case, Any, Any], bool]:
    return lambda _, answer, __: answer[case] in remedies


ex_7_6 = OpenCheck(
    "7.6 would paging help?",
    reference=choose_remedies,
    mistakes=(
        Mistake(
            "another word",
            lambda: {"a": "page it", "b": "neither", "c": "neither"},
            f"answer 'a', 'b' and 'c', each with one of {REMEDIES}",
            lambda _, answer, __: (
                set(answer) != {"a", "b", "c"} or not set(answer.values()) <= set(REMEDIES)
            ),
        ),
        Mistake(
            "a: no help",
            lambda: {"a": "neither", "b": "bounded tier", "c": "neither"},
            "(a) the worst moment is the loss, where the states are not needed: without their 3 "
            "GiB it is 22, and it fits",
            _says("a", ["neither"]),
        ),
        Mistake(
            "b: managed memory",
            lambda: {"a": "managed memory", "b": "managed memory", "c": "neither"},
            "(b) bitsandbytes fetches all states for the optimizer step, and that is the moment "
            "with 26 GiB: the driver would push pages out and in during the step itself, at best. "
            "A tier of bounded size keeps it below 24",
            _says("b", ["managed memory"]),
        ),
        Mistake(
            "b: no help",
            lambda: {"a": "bounded tier", "b": "neither", "c": "neither"},
            "(b) of the 26 GiB in the optimizer step 8 are states: only a few pages of them must "
            "be there at once",
            _says("b", ["neither"]),
        ),
        Mistake(
            "c: paging",
            lambda: {"a": "bounded tier", "b": "bounded tier", "c": "bounded tier"},
            "(c) without any states the loss still needs 29 GiB: shorten the rows, cut the batch, "
            "compute the loss in chunks",
            _says("c", ["managed memory", "bounded tier"]),
        ),
    ),
)
