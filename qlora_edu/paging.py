"""Chapter 7: an optimizer whose states do not fit, and pass through a small window page by page.

AdamW remembers two numbers for every parameter, and reads them once a step. They may live where
there is room (the *host tier*: pinned memory beside a GPU, a file beside a CPU) and visit the fast
memory (the *device tier*) when their turn comes. They are cut into *pages*; the device tier has
room for a few, its *frames*; a *page table* says which page is in which frame. A page that is not
there is a *fault*: it is copied in, and the page that was used least recently makes room, after
being written back if it has changed. The next page is fetched while the current one is computed.

AdamW treats every element alone, so the pages change nothing: the parameters are those of
``torch.optim.AdamW``, to the bit. bitsandbytes leaves all of this to the CUDA driver.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_edu.errors import PagingError
from qlora_edu.files.host_tier import _reserve_rows, _StreamCopier, _ThreadCopier

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BITSANDBYTES_THRESHOLD = 100_000

_STATES = ("exp_avg", "exp_avg_sq")
_OPTIONS = ("lr", "betas", "eps", "weight_decay")
_UNSUPPORTED = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused")


class BudgetError(PagingError, ValueError):
    """The budget is below one page, or a page too small for one element."""


class UnsupportedError(PagingError, ValueError):
    """A parameter, gradient or option that ``PagedAdamW`` would have to ignore."""


class StateMismatchError(PagingError, ValueError):
    """A state dict does not fit the optimizer; nothing has been loaded."""


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
    """One step of AdamW, in place, on any slice of a parameter and of its two states.

    All four tensors have one shape and dtype; ``step`` counts from 1. Beside them the update needs
    one scratch tensor of that shape, half a page.

    Source: Loshchilov and Hutter (arXiv 1711.05101), algorithm 2; operation by operation
    ``torch.optim.AdamW`` with ``foreach=False``, so that rounding is the same.

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
    """What ``PageTable.access`` found, or did."""

    frame: int
    """Where the page is now."""
    fault: bool
    """Whether it was not there before."""
    evicted: int | None
    """The page that had to leave the frame."""


class PageTable:
    """Which page is in which of ``frames`` frames; the least recently used one makes room.

    >>> table = PageTable(frames=4)
    >>> [table.access(page).frame for page in (0, 1, 2, 3)]
    [0, 1, 2, 3]
    >>> table.access(0)
    Access(frame=0, fault=False, evicted=None)
    >>> table.access(4)  # page 1 has waited longest
    Access(frame=1, fault=True, evicted=1)
    >>> table.resident, table.hits, table.faults
    ([2, 3, 0, 4], 1, 5)
    """

    def __init__(self, frames: int) -> None:
        if frames < 1:
            raise BudgetError(f"a page table needs at least one frame, not {frames}")
        self.frames = frames
        self.hits = self.faults = 0
        self._frame_of: OrderedDict[int, int] = OrderedDict()

    @property
    def resident(self) -> list[int]:
        """The pages in the frames, from least to most recently used."""
        return list(self._frame_of)

    def __contains__(self, page: int) -> bool:
        return page in self._frame_of

    def frame_of(self, page: int) -> int:
        """The frame that holds a resident page; using it so does not count as an access."""
        return self._frame_of[page]

    def access(self, page: int) -> Access:
        """Use a page: find its frame, or take a free one, or the one least recently used."""
        if page in self._frame_of:
            self.hits += 1
            self._frame_of.move_to_end(page)
            return Access(self._frame_of[page], False, None)
        self.faults += 1
        evicted, frame = None, len(self._frame_of)
        if frame == self.frames:
            evicted, frame = self._frame_of.popitem(last=False)
        self._frame_of[page] = frame
        return Access(frame, True, evicted)


@dataclass
class PagingCounters:
    """What paging has cost. Each use of a page is one of ``hits``, ``prefetched``, ``faults``."""

    hits: int = 0
    """The page was in a frame from earlier."""
    prefetched: int = 0
    """It had been sent for before it was needed."""
    faults: int = 0
    """It was neither there nor on its way, and had to be waited for."""
    evictions: int = 0
    bytes_in: int = 0
    """Copied from the host tier into frames."""
    bytes_out: int = 0
    """Written back."""


class Page(NamedTuple):
    """Some consecutive elements of one parameter's states."""

    parameter: int
    """Its number in the state dict."""
    columns: slice
    """Which elements of the flattened parameter."""
    host: Tensor
    """``[2, elements]`` in the host tier: ``exp_avg`` and ``exp_avg_sq``."""


class PageEvent(NamedTuple):
    """An entry of ``PagedAdamW.trace``."""

    page: int
    what: str
    """"hit", "prefetched" or "fault", as counted; or "prefetch", when a page is sent for early."""
    frame: int
    evicted: int | None


class PagedAdamW(torch.optim.AdamW):
    """AdamW that keeps ``budget_bytes`` of its states at hand, and the rest where there is room.

    The host tier is pinned memory for CUDA parameters and a nameless temporary file in ``folder``
    for CPU parameters; it is reserved when a group is added, 2 elements for each one trained. The
    device tier is ``budget_bytes // page_bytes`` frames beside the parameters. Besides, a step
    takes scratch of half a page, and a copy of a parameter or gradient that is not contiguous while
    its turn lasts. With two frames or more the next page is prefetched.

    Whatever the budget, parameters and states equal those of ``torch.optim.AdamW(foreach=False)``.
    (Two things torch itself does not keep between the vectorised body and the tail of a tensor:
    the payload of a NaN, and for β₁ = 0 the sign of a zero in ``exp_avg``.)

    Args:
        params, lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``; all parameters on one
            device, trained, and in float32, bfloat16, float16 or float64.
        budget_bytes: what the device tier may take.
        page_bytes: what is moved at a time: both states of up to ``page_bytes / 2`` bytes.
        folder: where the file goes; by default where ``tempfile`` puts files.

    Raises:
        BudgetError, HostTierError, UnsupportedError: nothing has been changed.

    Source: QLoRA (arXiv 2305.14314) section 3, "Paged Optimizers".

    >>> weight = torch.nn.Parameter(torch.ones(1000))
    >>> optimizer = PagedAdamW([weight], budget_bytes=4096, page_bytes=2048)
    >>> weight.grad = torch.ones(1000)
    >>> optimizer.step()
    >>> optimizer.host_bytes, optimizer.device_bytes, len(optimizer.pages)
    (8000, 4096, 4)
    >>> optimizer.counters
    PagingCounters(hits=0, prefetched=3, faults=1, evictions=2, bytes_in=8000, bytes_out=4096)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        budget_bytes: int,
        page_bytes: int = 2**20,
        folder: str | os.PathLike | None = None,
        prefetch: bool = True,
    ) -> None:
        for name, value in (("budget_bytes", budget_bytes), ("page_bytes", page_bytes)):
            if not isinstance(value, int) or value < 1:
                raise BudgetError(f"{name} must be a whole number of bytes, not {value!r}")
        if budget_bytes < page_bytes:
            raise BudgetError(
                f"a budget of {budget_bytes:,} bytes has no room for one page of {page_bytes:,}: "
                "raise budget_bytes or lower page_bytes"
            )
        self.page_bytes, self.folder = page_bytes, folder
        self.table = PageTable(budget_bytes // page_bytes)
        self.prefetch = prefetch and self.table.frames > 1
        self.frames: list[Tensor] = []
        self.pages: list[Page] = []
        self.counters = PagingCounters()
        self.trace: list[PageEvent] | None = None
        self._device: torch.device | None = None
        self._rows: dict[Tensor, Tensor] = {}  # of each parameter: [2, elements] in the host tier
        self._numbers: dict[Tensor, range] = {}  # and of its pages
        self._arrivals: dict[int, Any] = {}  # of each frame: what to wait for before using it
        self._dirty: set[int] = set()
        self._early: set[int] = set()  # pages prefetched and not used yet
        super().__init__(params, lr, betas, eps, weight_decay)

    @property
    def device_bytes(self) -> int:
        """Bytes of the device tier, as its storages measure; never above the budget."""
        return sum(frame.untyped_storage().nbytes() for frame in self.frames)

    @property
    def host_bytes(self) -> int:
        """Bytes of the states in the host tier."""
        return sum(rows.nbytes for rows in self._rows.values())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, and reserve its host tier; on an error, change nothing.

        Raises:
            BudgetError, HostTierError, UnsupportedError: see the class.
        """
        super().add_param_group(dict(param_group))
        try:
            self._admit(self.param_groups[-1])
        except BaseException:
            del self.param_groups[-1]
            raise

    def _admit(self, group: dict[str, Any]) -> None:
        _check_options(group)
        parameters = group["params"]
        device = self._device or (parameters[0].device if parameters else None)
        for i, parameter in enumerate(parameters):
            _check_parameter(parameter, f"parameter {i} of the group", device, self.page_bytes)
        if len(set(parameters)) < len(parameters):
            raise UnsupportedError("a parameter is in the group twice: pass each once")
        rows = _reserve_rows(parameters, self.folder)
        pages, numbers = [], {}
        for i, parameter in enumerate(parameters, start=len(self._rows)):
            first = len(self.pages) + len(pages)
            width = self.page_bytes // (2 * parameter.element_size())
            for start in range(0, parameter.numel(), width):
                columns = slice(start, min(start + width, parameter.numel()))
                pages.append(Page(i, columns, rows[parameter][:, columns]))
            numbers[parameter] = range(first, len(self.pages) + len(pages))
        missing = min(self.table.frames, len(self.pages) + len(pages)) - len(self.frames)
        frames = [
            torch.empty(self.page_bytes, dtype=torch.uint8, device=device) for _ in range(missing)
        ]
        if self._device is None and device is not None:
            self._device = device
            self._copier = (_StreamCopier if device.type == "cuda" else _ThreadCopier)(device)
        for frame in frames:
            self._copier.adopt(frame)
        self.frames += frames
        self.pages += pages
        self._rows |= rows
        self._numbers |= numbers

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, page by page.

        Raises:
            UnsupportedError: for a sparse gradient and the like, before anything is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = []
        for group in self.param_groups:
            _check_options(group)
            active += [(group, p) for p in group["params"] if p.grad is not None]
        for _, parameter in active:
            self._check_gradient(parameter)
        upcoming = iter([number for _, p in active for number in self._numbers[p]])
        next(upcoming, None)
        for group, parameter in active:
            self._update(parameter, group, upcoming)
        return loss

    def _check_gradient(self, parameter: Tensor) -> None:
        rows, gradient = self._rows[parameter], parameter.grad
        found = (parameter.dtype, parameter.numel(), parameter.device, gradient.dtype)
        states = (rows.dtype, rows.shape[1], self._device, rows.dtype)
        if found != states or gradient.layout != torch.strided:
            raise UnsupportedError(
                f"a parameter {tuple(parameter.shape)} is {parameter.dtype} on {parameter.device}, "
                f"with a gradient of {gradient.dtype}, {gradient.layout}; its states are "
                f"{rows.dtype} [2, {rows.shape[1]}] for {self._device}. Convert a model before you "
                "make its optimizer, and keep gradients dense (an embedding's: sparse=False)"
            )

    def _update(self, parameter: Tensor, group: dict[str, Any], upcoming: Iterator[int]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        state["step"] += 1
        step = state["step"].item()
        options = {name: group[name] for name in _OPTIONS}
        flat, gradient = parameter.detach().reshape(-1), parameter.grad.reshape(-1)
        for number in self._numbers[parameter]:
            frame = self._bring(number)
            following = next(upcoming, None)
            if self.prefetch and following is not None and following not in self.table:
                self._bring(following, early=True)
            self._copier.wait(self._arrivals[frame])
            columns, states = self.pages[number].columns, self._view(number, frame)
            self._dirty.add(number)
            adamw_update(flat[columns], gradient[columns], *states, step, **options)
        if not parameter.is_contiguous():
            parameter.copy_(flat.view(parameter.shape))

    def _bring(self, number: int, early: bool = False) -> int:
        """Have a page in a frame, or on its way there; returns the frame."""
        frame, fault, evicted = self.table.access(number)
        if fault:
            moves = self._write_back([] if evicted is None else [(evicted, frame)])
            page = self.pages[number].host
            self._arrivals[frame] = self._copier.start([*moves, (self._view(number, frame), page)])
            self._early.discard(evicted)
            self.counters.evictions += evicted is not None
            self.counters.bytes_in += page.nbytes
        what = "prefetch" if early else "fault" if fault else "hit"
        if early:
            self._early.add(number)
        elif number in self._early:
            self._early.remove(number)
            what = "prefetched"
        self.counters.hits += what == "hit"
        self.counters.faults += what == "fault"
        self.counters.prefetched += what == "prefetched"
        if self.trace is not None:
            self.trace.append(PageEvent(number, what, frame, evicted))
        return frame

    def _view(self, number: int, frame: int) -> Tensor:
        """The states of a page where they lie in a frame: ``[2, elements]``."""
        host = self.pages[number].host
        return self.frames[frame][: host.nbytes].view(host.dtype).view(host.shape)

    def _write_back(self, places: Iterable[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        """The copies that save those pages, of some in frames, that were changed there."""
        dirty = [(number, frame) for number, frame in places if number in self._dirty]
        moves = [(self.pages[number].host, self._view(number, frame)) for number, frame in dirty]
        self._dirty.difference_update(number for number, _ in dirty)
        self.counters.bytes_out += sum(host.nbytes for host, _ in moves)
        return moves

    def flush(self) -> None:
        """Write every changed page back, and wait for it; the frames keep what they hold."""
        if self.frames:
            places = [(number, self.table.frame_of(number)) for number in self.table.resident]
            self._copier.finish(self._copier.start(self._write_back(places)))

    def state_dict(self) -> dict[str, Any]:
        """The states as ``torch.optim.AdamW`` gives them, copied into ordinary host memory."""
        self.flush()
        held = self.state
        try:
            self.state = {p: self._whole_state(p) for p, state in held.items() if state}
            return super().state_dict()
        finally:
            self.state = held

    def _whole_state(self, parameter: Tensor) -> dict[str, Tensor]:
        rows = zip(_STATES, self._rows[parameter], strict=True)
        copies = {name: row.view(parameter.shape).clone() for name, row in rows}
        return {"step": self.state[parameter]["step"].clone(), **copies}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this class or ``torch.optim.AdamW`` has saved, straight into the host tier.

        Raises:
            StateMismatchError, UnsupportedError: before anything is changed.
        """
        parameter_of = self._match(state_dict)
        self.flush()
        self.table = PageTable(self.table.frames)
        self._early.clear()
        steps = {}
        for key, parameter in parameter_of.items():
            rows, state = self._rows[parameter], state_dict["state"].get(key)
            if not state:
                rows.zero_()
                continue
            for name, row in zip(_STATES, rows, strict=True):
                row.copy_(state[name].reshape(-1))
            steps[key] = {
                "step": torch.tensor(float(state["step"]), dtype=torch.float32, device="cpu")
            }
        super().load_state_dict({"state": steps, "param_groups": state_dict["param_groups"]})

    def _match(self, state_dict: dict[str, Any]) -> dict[Any, Tensor]:
        """Find the parameter of every key of a state dict, and check all there is to check."""
        groups, states = state_dict["param_groups"], state_dict["state"]
        sizes = [len(group["params"]) for group in groups]
        own_sizes = [len(group["params"]) for group in self.param_groups]
        if sizes != own_sizes:
            raise StateMismatchError(
                f"the state dict has groups of {sizes} parameters, the optimizer of {own_sizes}"
            )
        for number, group in enumerate(groups):
            lost = [name for name in _OPTIONS if name not in group]
            if lost:
                raise StateMismatchError(f"group {number} of the state dict has no {lost}")
            _check_options(group)
        keys = [key for group in groups for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        parameter_of = dict(zip(keys, parameters, strict=True))
        for key, state in states.items():
            if key not in parameter_of:
                raise StateMismatchError(f"the state dict has a state {key!r} of no parameter")
            if state:
                _check_state(state, f"parameter {key}", parameter_of[key])
        return parameter_of

    def register_load_state_dict_pre_hook(self, *_: Any, **__: Any) -> None:
        """Refused: such a hook would not see the states, which never are in one place.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("change the state dict before you give it to load_state_dict")

    def __getstate__(self) -> None:
        raise TypeError(
            "a PagedAdamW cannot be pickled or copied: its states are in a file of its own. Make "
            "another, and give it state_dict() with load_state_dict()"
        )


def pages_in_bitsandbytes(parameters: Iterable[Tensor]) -> list[bool]:
    """Which parameters' states the paged optimizers of bitsandbytes put in managed memory.

    Those with 100,000 elements or more, counted in the parameter and whatever the bytes (8-bit
    states, too); smaller ones stay in GPU memory. For parameters on a CPU nothing is paged, and
    bitsandbytes warns.

    Source: ``Optimizer8bit.get_state_buffer`` of bitsandbytes.

    >>> pages_in_bitsandbytes([torch.empty(16, 4096), torch.empty(32, 4096)])  # A for r = 16, 32
    [False, True]
    """
    return [parameter.numel() >= BITSANDBYTES_THRESHOLD for parameter in parameters]


def _check_options(group: dict[str, Any]) -> None:
    for name in _UNSUPPORTED:
        if group.get(name):
            raise UnsupportedError(f"PagedAdamW has no {name}: leave it out, or set it to False")
    for name in _OPTIONS:
        values = group[name] if name == "betas" else [group[name]]
        if not all(isinstance(value, Real) for value in values):
            raise UnsupportedError(f"{name} must be a plain number, not {group[name]!r}")


def _check_parameter(
    parameter: Tensor, name: str, device: torch.device | None, page_bytes: int
) -> None:
    size, shape = 2 * parameter.element_size(), tuple(parameter.shape)
    if parameter.device != device:
        why = f"on {parameter.device}, others on {device}: make one optimizer per device"
    elif device.type not in ("cpu", "cuda"):
        why = f"on {device}, which has no host tier here: only cpu and cuda have one"
    elif parameter.dtype not in DTYPES or parameter.layout != torch.strided:
        why = f"{parameter.dtype}, {parameter.layout}: AdamW trains dense floating-point numbers"
    elif not parameter.requires_grad:
        why = "frozen: pass [p for p in model.parameters() if p.requires_grad]"
    elif page_bytes < size:
        raise BudgetError(f"{name} needs {size} bytes for one element, a page has {page_bytes}")
    else:
        return
    raise UnsupportedError(f"{name}, of shape {shape}, is {why}")


def _check_state(state: dict[str, Any], name: str, parameter: Tensor) -> None:
    if set(state) != {"step", *_STATES}:
        raise StateMismatchError(
            f"the state of {name} has {sorted(state)}; AdamW's is step, exp_avg and exp_avg_sq"
        )
    wanted = [("step", torch.Size()), *((key, parameter.shape) for key in _STATES)]
    for key, shape in wanted:
        value = torch.tensor(state[key]) if isinstance(state[key], Real) else state[key]
        if not isinstance(value, Tensor) or value.shape != shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
            raise StateMismatchError(
                f"{key} of {name} is {found} in the state dict, but should have the shape "
                f"{tuple(shape)}: is it from another model?"
            )
