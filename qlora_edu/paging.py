"""Chapter 7: an optimizer whose states do not fit, and pass through a small window page by page.

AdamW's states wait where there is room, in the *host tier*, cut into *pages*. The *device tier* has
room for a few, its *frames*; a *page table* says which page is in which. A page that is not there
is a *fault*: it is copied in, and the page used least recently is written back to make room. AdamW
treats every element alone, so the parameters are those of `torch.optim.AdamW`, to the bit.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_edu.errors import PagingError
from qlora_edu.files.host_tier import (
    OPTIONS,
    HostTierAdamW,
    check_budget,
    check_options,
    check_parameters,
)


def adamw_update(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of AdamW, in place, on slices of one shape and dtype; `step` counts from 1.

    Source: Loshchilov and Hutter (arXiv 1711.05101), algorithm 2, in the operations of
    `torch.optim.AdamW(foreach=False)`, so that rounding is the same.

    >>> parameter, gradient = torch.tensor([1.0]), torch.tensor([0.5])
    >>> states = torch.zeros(1), torch.zeros(1)
    >>> adamw_update(parameter, gradient, *states, 1, 0.1, (0.9, 0.999), 1e-8, weight_decay=0.0)
    >>> parameter  # the first step is lr · sign(gradient)
    tensor([0.9000])
    """
    beta1, beta2 = betas
    if weight_decay != 0:
        parameter.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    parameter.addcdiv_(exp_avg, denominator, value=-(lr / (1 - beta1**step)))


class Access(NamedTuple):
    """Where a page is now, whether it had to be fetched, and which page had to leave the frame."""

    frame: int
    fault: bool
    evicted: int | None


class PageTable:
    """Which page is in which of `frames` frames; the least recently used one makes room.

    >>> table = PageTable(frames=4)
    >>> [table.access(page).frame for page in (0, 1, 2, 3)]
    [0, 1, 2, 3]
    >>> table.access(4)  # page 0 has waited longest
    Access(frame=0, fault=True, evicted=0)
    """

    def __init__(self, frames: int) -> None:
        if frames < 1:
            raise PagingError(f"a page table needs at least one frame, not {frames}")
        self.frames = frames
        self.hits = self.faults = 0
        # Of each page that is in a frame, from least to most recently used.
        self.frame_of: OrderedDict[int, int] = OrderedDict()

    def access(self, page: int) -> Access:
        """Use a page: find its frame, or take a free one, or the one least recently used."""
        if page in self.frame_of:
            self.hits += 1
            self.frame_of.move_to_end(page)
            return Access(self.frame_of[page], False, None)
        self.faults += 1
        evicted, frame = None, len(self.frame_of)
        if frame == self.frames:
            evicted, frame = self.frame_of.popitem(last=False)
        self.frame_of[page] = frame
        return Access(frame, True, evicted)


class Page(NamedTuple):
    """Columns of a flattened parameter; `host` is their states in the host tier, `[2, n]`."""

    columns: slice
    host: torch.Tensor


def cut_into_pages(host_states: Tensor, page_bytes: int) -> list[Page]:
    """Cut both states of one parameter, `[2, n]`, into pages of at most `page_bytes`.

    >>> [page.columns for page in cut_into_pages(torch.zeros(2, 3), page_bytes=16)]
    [slice(0, 2, None), slice(2, 3, None)]
    """
    elements, size = host_states.shape[1], 2 * host_states.element_size()
    width = page_bytes // size
    if not width:
        raise PagingError(f"one element needs {size} bytes, {page_bytes=}: raise page_bytes")
    starts = range(0, elements, width)
    columns = [slice(start, min(start + width, elements)) for start in starts]
    return [Page(part, host_states[:, part]) for part in columns]


class PagedAdamW(HostTierAdamW):
    """AdamW that keeps `budget_bytes` of its states at hand, and the rest where there is room.

    The host tier is pinned memory beside a GPU, and a nameless file in `folder` beside a CPU. The
    device tier has `budget_bytes // page_bytes` frames; a step takes scratch of half a page more.
    Results equal `torch.optim.AdamW(foreach=False)`, but for what torch itself does not keep alike:
    the payload of a NaN, and for β₁ = 0 the sign of a zero.

    Raises `PagingError`, with nothing changed, where something would be ignored or does not fit.

    Source: QLoRA (arXiv 2305.14314) section 3, "Paged Optimizers".

    >>> weight = torch.nn.Parameter(torch.ones(1000))
    >>> optimizer = PagedAdamW([weight], budget_bytes=4096, page_bytes=2048)
    >>> weight.grad = torch.ones(1000)
    >>> optimizer.step()
    >>> optimizer.host_bytes, optimizer.device_bytes, optimizer.table.faults
    (8000, 4096, 4)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        budget_bytes: int = 2**26,
        page_bytes: int = 2**20,
        folder: str | os.PathLike | None = None,
    ) -> None:
        check_budget(budget_bytes, page_bytes)
        self.page_bytes = page_bytes
        self.table = PageTable(budget_bytes // page_bytes)
        self.frames: list[Tensor] = []
        self.pages: list[Page] = []
        self._pages_of: dict[Tensor, range] = {}  # of each parameter: the numbers of its pages
        super().__init__(params, folder, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @property
    def device_bytes(self) -> int:
        """Bytes of the device tier, as its storages measure; never above the budget."""
        return sum(frame.untyped_storage().nbytes() for frame in self.frames)

    def _admit(self, host_states: dict[Tensor, Tensor]) -> None:
        cut = {p: cut_into_pages(states, self.page_bytes) for p, states in host_states.items()}
        count = len(self.pages) + sum(len(pages) for pages in cut.values())
        missing = range(len(self.frames), min(self.table.frames, count))
        empty = torch.empty(0, dtype=torch.uint8, device=next((p.device for p in cut), None))
        self.frames += [empty.new_empty(self.page_bytes) for _ in missing]
        for parameter, pages in cut.items():
            self._pages_of[parameter] = range(len(self.pages), len(self.pages) + len(pages))
            self.pages += pages

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update what has a gradient, page by page; a `PagingError` changes nothing."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            check_options(group)
        active = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        check_parameters([p for _, p in active], self._device, self._host_states)
        visits = self._visit([number for _, p in active for number in self._pages_of[p]])
        for group, parameter in active:
            self._update(parameter, group, visits)
        return loss

    def _visit(self, sweep: Sequence[int]) -> Iterator[Tensor]:
        for number in sweep:
            frame, fault, evicted = self.table.access(number)
            if evicted is not None:
                # Whatever is in a frame has been updated there, so it is always written back.
                self.pages[evicted].host.copy_(self._view(evicted, frame))
            if fault:
                self._view(number, frame).copy_(self.pages[number].host)
            yield self._view(number, frame)

    def _view(self, number: int, frame: int) -> Tensor:
        host = self.pages[number].host
        return self.frames[frame][: host.nbytes].view(host.dtype).view(host.shape)

    def _update(self, parameter: Tensor, group: dict[str, Any], visits: Iterator[Tensor]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        state["step"] += 1
        step, options = state["step"].item(), {name: group[name] for name in OPTIONS}
        # Of a parameter that is not contiguous `flat` is a copy, which has to go back.
        flat, gradient = parameter.detach().reshape(-1), parameter.grad.reshape(-1)
        for number in self._pages_of[parameter]:
            columns, states = self.pages[number].columns, next(visits)
            adamw_update(flat[columns], gradient[columns], *states, step, **options)
        if not parameter.is_contiguous():
            parameter.copy_(flat.view(parameter.shape))

    def flush(self) -> None:
        """Write every page that is in a frame back; the frames keep what they hold."""
        for number, frame in self.table.frame_of.items():
            self.pages[number].host.copy_(self._view(number, frame))

    def _forget_frames(self) -> None:
        self.table = PageTable(self.table.frames)
