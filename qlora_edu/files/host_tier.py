"""Where the pages of chapter 7 wait, what copies them, and what is refused before that."""

import mmap
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_edu.errors import PagingError

ALIGNMENT = 64  # bytes: every dtype, and every vector register, may start here
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STATES = ("exp_avg", "exp_avg_sq")
OPTIONS = ("lr", "betas", "eps", "weight_decay")
NEVER_PAGED = 100_000  # elements below which bitsandbytes keeps states in ordinary GPU memory
UNSUPPORTED = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused")


# Where the pages wait


def reserve_states(
    parameters: list[Tensor], folder: str | os.PathLike | None
) -> dict[Tensor, Tensor]:
    """Zeros in the host tier, `[2, n]`, for both states of every parameter of `n` elements."""
    if not parameters:
        return {}
    sizes = [-(-2 * p.nbytes // ALIGNMENT) * ALIGNMENT for p in parameters]
    host = _reserve(sum(sizes), parameters[0].device.type == "cuda", folder)
    pieces = zip(parameters, host.split(sizes), strict=True)
    return {p: piece[: 2 * p.nbytes].view(p.dtype).view(2, p.numel()) for p, piece in pieces}


def _reserve(nbytes: int, pinned: bool, folder: str | os.PathLike | None) -> Tensor:
    try:
        if pinned or nbytes == 0:
            return torch.zeros(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        # A file without a name is gone with the process even when that is killed.
        with tempfile.TemporaryFile(dir=folder) as file:
            _fill(file, nbytes)
            return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        what = f"cannot reserve {nbytes:,} bytes for optimizer states"
        place = folder or tempfile.gettempdir()
        where = "pinned memory: free some" if pinned else f"{place}: pass another folder="
        why = getattr(error, "strerror", None) or error  # a file's own message has the path twice
        raise PagingError(f"{what} ({why}) in {where}") from error


def _fill(file: Any, nbytes: int) -> None:
    # The disk space is taken now: a disk that is full later would kill the process in a step.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, nbytes)
    else:
        for start in range(0, nbytes, 2**20):
            file.write(bytes(min(2**20, nbytes - start)))
        file.flush()


class HostTierAdamW(torch.optim.AdamW):
    """What `torch.optim.AdamW` is to the outside, with its states in the host tier.

    A subclass has the `step`, and `_admit`, `flush` and `_forget_frames` for its frames.
    """

    def __init__(self, params: Any, folder: str | os.PathLike | None, **options: Any) -> None:
        self.folder = folder
        self._device: torch.device | None = None
        self._host_states: dict[Tensor, Tensor] = {}  # of each parameter: [2, elements]
        super().__init__(params, **options)

    @property
    def host_bytes(self) -> int:
        """Bytes of the states in the host tier."""
        return sum(states.nbytes for states in self._host_states.values())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, and reserve its host tier; on an error, change nothing."""
        super().add_param_group(dict(param_group))
        try:
            check_options(self.param_groups[-1])
            parameters = self.param_groups[-1]["params"]
            check_parameters(parameters, self._device, self._host_states)
            host_states = reserve_states(parameters, self.folder)
            self._admit(host_states)
        except BaseException:
            del self.param_groups[-1]
            raise
        self._host_states |= host_states
        self._device = self._device or next((p.device for p in parameters), None)

    def state_dict(self) -> dict[str, Any]:
        """The states as `torch.optim.AdamW` gives them, copied into ordinary host memory."""
        self.flush()
        held, whole = self.state, {}
        for parameter in (p for p, state in held.items() if state):
            rows = zip(STATES, self._host_states[parameter], strict=True)
            copies = {name: row.view(parameter.shape).clone() for name, row in rows}
            whole[parameter] = {"step": held[parameter]["step"].clone(), **copies}
        try:
            self.state = whole
            return super().state_dict()
        finally:
            self.state = held

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `torch.optim.AdamW` or this has saved; what does not fit changes nothing."""
        parameter_of = match_state_dict(state_dict, self.param_groups)
        self.flush()  # a copy that is under way would land on what is loaded
        self._forget_frames()
        steps = {}
        for key, parameter in parameter_of.items():
            states, state = self._host_states[parameter], state_dict["state"].get(key)
            if not state:
                states.zero_()
                continue
            for name, row in zip(STATES, states, strict=True):
                row.copy_(state[name].reshape(-1))
            steps[key] = {"step": state["step"].float().cpu().clone()}
        super().load_state_dict({"state": steps, "param_groups": state_dict["param_groups"]})

    def __getstate__(self) -> None:
        raise PagingError("a PagedAdamW is not copied: make another, and load its state_dict()")


# What copies them while something else is computed


def _copy(moves: list[tuple[Tensor, Tensor]]) -> None:
    # By NumPy: torch would start a second team of threads, and the two would wait for each other.
    for destination, source in moves:
        np.copyto(destination.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())


class ThreadCopier:
    """Copies between two places in CPU memory, on one worker thread, in the order asked for."""

    def __init__(self, device: torch.device) -> None:
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="paging")

    def adopt(self, frame: Tensor) -> None:
        """Nothing: Python keeps the memory of a copy that is under way."""

    def start(self, moves: list[tuple[Tensor, Tensor]]) -> Future:
        """Start to copy pairs of (destination, source); returns what `wait` takes."""
        return self._worker.submit(_copy, moves)

    def wait(self, copies: Future) -> None:
        """Go on once those copies are done; an error in one of them is raised here."""
        copies.result()

    finish = wait


class StreamCopier:
    """Copies between a GPU and pinned memory, on a stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def adopt(self, frame: Tensor) -> None:
        """Tell the allocator that this stream uses the frame, too."""
        # So a frame freed during a copy is handed to nobody else before the copy has ended.
        frame.record_stream(self._stream)

    def start(self, moves: list[tuple[Tensor, Tensor]]) -> torch.cuda.Event:
        """Start to copy pairs of (destination, source); returns what `wait` takes."""
        # What is written back is computed first, and a frame is overwritten after its last use.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            # Row by row: only what is contiguous on both sides goes without a detour.
            for row, source in (pair for move in moves for pair in zip(*move, strict=True)):
                row.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, copies: Any) -> None:
        """Let the GPU's computing wait for those copies; Python goes on at once."""
        torch.cuda.current_stream(self._device).wait_event(copies)

    def finish(self, copies: Any) -> None:
        """Let Python itself wait, before it reads the host tier."""
        copies.synchronize()


# What is refused before anything has changed


def check_budget(budget_bytes: int, page_bytes: int) -> None:
    """Refuse a budget that has no room for one page."""
    whole = isinstance(budget_bytes, int) and isinstance(page_bytes, int)
    if not whole or not 1 <= page_bytes <= budget_bytes:
        wanted = "one page must fit in budget_bytes, both whole numbers"
        raise PagingError(f"{wanted}; not {budget_bytes=}, {page_bytes=}")


def check_options(group: dict[str, Any]) -> None:
    """Refuse an option of `torch.optim.AdamW` that the plain update does not have."""
    wrong = {name: group[name] for name in UNSUPPORTED if group.get(name)}
    for name in OPTIONS:
        value = group.get(name)
        numbers = value if isinstance(value, tuple | list) else [value]
        if not all(isinstance(number, Real) for number in numbers):
            wrong[name] = value
    if wrong:
        wanted = f"{', '.join(OPTIONS)} must be plain numbers, {', '.join(UNSUPPORTED)} off"
        raise PagingError(f"PagedAdamW cannot do {wrong}: {wanted}")


def check_parameters(
    parameters: list[Tensor], device: torch.device | None, host_states: dict[Tensor, Tensor]
) -> None:
    """Refuse parameters, new or with states, that cannot be paged, or whose gradients cannot."""
    for p in parameters:
        device, states, gradient = device or p.device, host_states.get(p), p.grad
        if states is None:
            fits = p.requires_grad and p.dtype in DTYPES and device.type in ("cpu", "cuda")
        else:
            fits = (p.dtype, p.numel()) == (states.dtype, states.shape[1])
        for tensor in (p,) if gradient is None else (p, gradient):
            fits &= (tensor.dtype, tensor.layout) == (p.dtype, torch.strided)
            fits &= tensor.device == device
        if not fits:
            found = f"{p.dtype}, {p.layout}, on {p.device}, requires_grad={p.requires_grad}"
            wanted = f"dense floats that are trained, all on {device}, which is a CPU or a GPU"
            remedy = "convert a model before you make its optimizer, and keep gradients dense"
            raise PagingError(f"a parameter {tuple(p.shape)} is {found}; pass {wanted}: {remedy}")


def match_state_dict(
    state_dict: dict[str, Any], own_groups: Iterable[dict[str, Any]]
) -> dict[Any, Tensor]:
    """The parameter of every key of a state dict that fits these groups; else a `PagingError`."""
    saved = [group["params"] for group in state_dict["param_groups"]]
    own = [group["params"] for group in own_groups]
    sizes, own_sizes = [len(params) for params in saved], [len(params) for params in own]
    if sizes != own_sizes:
        raise PagingError(f"groups of {sizes} parameters were saved, the optimizer has {own_sizes}")
    for group in state_dict["param_groups"]:
        check_options(group)
    parameter_of = dict(zip(sum(saved, []), sum(own, []), strict=True))
    for key, state in state_dict["state"].items():
        found = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in state.items()}
        shape = tuple(parameter_of[key].shape) if key in parameter_of else "no such parameter"
        wanted = {"step": (), **dict.fromkeys(STATES, shape)}
        if found not in ({}, wanted) or key not in parameter_of:
            raise PagingError(f"the state {key!r} holds {found}, not {wanted}: another model's?")
    return parameter_of
