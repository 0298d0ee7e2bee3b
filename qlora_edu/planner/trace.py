"""Live memory of a step: what the allocator hands out, what each operation asks for, what is kept.

`trace_memory` asks PyTorch's profiler and sees every byte of a real step on the CPU. `Allocations`
watches operations, on *fake* tensors too, which have a shape and no memory. `trace_run` sorts what
it saw by kind, `weigh` adds up what a model keeps, a `StepTrace` holds both for any depth.
"""

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_edu.errors import PlanError
from qlora_edu.kernels import UNPACKING
from qlora_edu.qlora import QLoRALinear

KINDS = ("activations", "logits and loss", "dequantised weights", "workspace", "gradients")
WEIGHTS = (
    *("quantised weights", "quantisation constants", "linear weights"),
    *("embeddings and head", "norms and the rest", "adapters"),
)
ROWS = (*WEIGHTS, "optimizer states", "gradients", *KINDS[:-1])


class Trace(NamedTuple):
    """Live bytes on the CPU above those at the start, after each allocation and release."""

    live: np.ndarray

    @property
    def peak(self) -> int:
        """The most that was live at once, in bytes."""
        return int(self.live.max(initial=0))


def trace_memory(step: Callable[[], Any]) -> Trace:
    """Call `step()` and record what PyTorch's allocator does meanwhile, to the byte.

    >>> trace_memory(lambda: torch.ones(1000).exp()).peak  # 4 bytes per number, twice
    8000
    """
    from torch.profiler import ProfilerActivity, profile

    cpu = [ProfilerActivity.CPU]
    with _silent_stderr(), profile(activities=cpu, profile_memory=True) as record:
        step()
    events = record.profiler.kineto_results.events()
    found = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return Trace(np.cumsum([nbytes for _, nbytes in found], dtype=np.int64))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler is compiled code, and announces itself there at each start."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


class Allocations(TorchDispatchMode):
    """Record each change of live bytes while operations run, on real tensors or on fake ones.

    `events` holds `(number of a storage, change)`: negative when its last tensor is released.

    >>> x = torch.ones(1000)
    >>> with Allocations() as allocations:
    ...     y = (x + 1) * 2
    >>> allocations.changes  # float32: x + 1, twice that, and x + 1 is released
    [4000, 4000, -4000]
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self.marks: dict[str, int] = {}
        self.dequantised: set[int] = set()
        self._live: dict[int, tuple[int, int]] = {}  # address -> number, bytes
        self._ignored: dict[int, Tensor] = {}
        self._born = 0
        self._unpacking = False

    @property
    def changes(self) -> list[int]:
        """The changes alone, in bytes, in order."""
        return [change for _, change in self.events]

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave out the storages of these tensors: they were there before."""
        # The tensors are held, too: a released storage's address would be given out again.
        self._ignored |= {_address(tensor): tensor for tensor in tensors}

    def mark(self, name: str) -> None:
        """Record how many events came before this moment, the first time that it comes."""
        self.marks.setdefault(name, len(self.events))

    def number(self, tensor: Tensor) -> int | None:
        """The number of a tensor's storage, if it is live and counted."""
        return self._live.get(_address(tensor), (None, 0))[0]

    @contextmanager
    def unpacking(self) -> Iterator[None]:
        """What is allocated inside belongs to the dequantised weights."""
        self._unpacking = True
        try:
            yield
        finally:
            self._unpacking = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        unpacked = self._unpacking or "dequantize_4bit" in str(func)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), unpacked)
        return out

    def _note(self, storage: torch.UntypedStorage, unpacked: bool) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._ignored:
            return
        if key not in self._live:
            self._live[key] = (self._born, 0)
            if unpacked:
                self.dequantised.add(self._born)
            self._born += 1
            weakref.finalize(storage, self._free, key).atexit = False
        number, known = self._live[key]
        if nbytes != known:  # a storage can grow in place
            self._live[key] = (number, nbytes)
            self.events.append((number, nbytes - known))

    def _free(self, key: int) -> None:
        number, nbytes = self._live.pop(key)
        self.events.append((number, -nbytes))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def kept_tensors(module: nn.Module) -> list[Tensor]:
    """Every tensor that a model keeps, the constants of bitsandbytes' weights among them."""
    found = [*module.parameters(), *module.buffers()]
    return found + [constant for tensor in found for constant in _constants(tensor)]


def _constants(tensor: Tensor) -> list[Tensor]:
    """What bitsandbytes keeps beside a 4-bit weight."""
    found, state = [], getattr(tensor, "quant_state", None)
    while state is not None:
        found += [value for value in vars(state).values() if isinstance(value, Tensor)]
        state = state.state2
    return found


def weigh(
    model: nn.Module, module: nn.Module | None = None, but: nn.Module | None = None
) -> dict[str, int]:
    """Add up the bytes of a model's tensors by the rows of the ledger; shared storage counts once.

    `module` is a part to count instead of the whole; the tensors of the part `but` do not count.

    >>> weigh(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))  # (16 + 4) · 4 bytes, 8 · 4 bytes
    {'linear weights': 80, 'norms and the rest': 32}
    """
    rows: dict[str, int] = {}
    seen = {_address(tensor) for tensor in (kept_tensors(but) if but is not None else [])}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    all_trained = all(p.requires_grad for p in model.parameters())
    for part in (model if module is None else module).modules():
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for name, tensor in own:
            if tensor.requires_grad and not all_trained:
                row = "adapters"
            elif part is head or isinstance(part, nn.Embedding):
                row = "embeddings and head"
            elif isinstance(part, QLoRALinear) and name != "bias":
                row = "quantised weights" if name == "packed" else "quantisation constants"
            elif hasattr(tensor, "quant_state"):
                row = "quantised weights"
            elif isinstance(part, nn.Linear) or (tensor.dim() > 1 and name in part._parameters):
                row = "linear weights"  # experts are one parameter, and no nn.Linear
            else:
                row = "norms and the rest"
            constants = [(constant, "quantisation constants") for constant in _constants(tensor)]
            for kept, kind in [(tensor, row), *constants]:
                if _address(kept) not in seen:
                    seen.add(_address(kept))
                    rows[kind] = rows.get(kind, 0) + kept.untyped_storage().nbytes()
    return rows


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of a transformer's blocks."""
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and 0 < len(module) == depth:
            return module
    raise PlanError(f"{type(model).__name__} has no list of {depth} blocks")


class Run(NamedTuple):
    """Each change of a traced run in bytes, its kind as an index into `KINDS`, and the marks."""

    changes: list[int]
    kinds: list[int]
    marks: dict[str, int]


def trace_run(model: nn.Module, ids: Tensor, loss: Callable[[nn.Module, Tensor], Tensor]) -> Run:
    """Trace the forward and backward pass of `loss(model, ids)`."""
    allocations = Allocations()
    allocations.ignore([ids, *kept_tensors(model)])
    hooks, token = _mark_moments(model, allocations), UNPACKING.set(allocations.unpacking)
    try:
        with allocations:
            loss(model, ids).backward()
    finally:
        UNPACKING.reset(token)
    changes = allocations.changes
    for hook in hooks:
        hook.remove()
    gradients = {allocations.number(p.grad) for p in model.parameters() if p.grad is not None}
    kinds = _kinds(allocations, gradients)[: len(changes)]
    model.zero_grad()
    return Run(changes, kinds, allocations.marks)


def _mark_moments(model: nn.Module, allocations: Allocations) -> list[Any]:
    """Mark when each block begins, when its gradient comes back, and when the head begins."""
    blocks, head = list(find_blocks(model)), model.get_output_embeddings()

    def when_back(hidden: Tensor, i: int) -> None:
        if hidden.requires_grad:
            hidden.register_hook(lambda _: allocations.mark(f"back to {i}"))

    def before(block: nn.Module, args: tuple, kwargs: dict) -> None:
        i = blocks.index(block)
        if f"block {i}" not in allocations.marks:  # with checkpointing it runs again, going back
            allocations.mark(f"block {i}")
            when_back(args[0] if args else kwargs["hidden_states"], i)

    def after_last(block: nn.Module, args: tuple, out: Any) -> None:
        when_back(out[0] if isinstance(out, tuple) else out, len(blocks))

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(after_last))
    return [*hooks, head.register_forward_pre_hook(lambda *_: allocations.mark("head"))]


def _kinds(allocations: Allocations, gradients: set[int | None]) -> list[int]:
    kind_of: dict[int, int] = {}
    head = allocations.marks["head"]
    turn = allocations.marks[f"back to {sum('block' in name for name in allocations.marks)}"]
    for position, (number, _) in enumerate(allocations.events):
        if number in gradients:
            kind = "gradients"
        elif number in allocations.dequantised:
            kind = "dequantised weights"
        elif position >= turn:
            kind = "workspace"
        else:
            kind = "activations" if position < head else "logits and loss"
        kind_of.setdefault(number, KINDS.index(kind))  # its kind is that of its first event
    return [kind_of[number] for number, _ in allocations.events]


@dataclass(frozen=True)
class StepTrace:
    """What three blocks have shown, ready for any depth, batch and length.

    `outside` and `in_block` are the bytes of the weights by row; `trained_*` the numbers and bytes
    of each tensor that is trained. `changes` is `[3, events]`: the bytes of each change that are
    constant, per token, and per token and length.
    """

    depth: int
    blocks: int
    outside: dict[str, int]
    in_block: dict[str, int]
    trained_outside: tuple[tuple[int, int], ...]
    trained_in_block: tuple[tuple[int, int], ...]
    changes: np.ndarray
    kinds: np.ndarray
    marks: dict[str, int]

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of the whole model's weights, by row."""
        rows = [row for row in WEIGHTS if row in self.outside or row in self.in_block]
        return {r: self.outside.get(r, 0) + self.depth * self.in_block.get(r, 0) for r in rows}

    @property
    def trained(self) -> list[tuple[int, int]]:
        """Numbers and bytes of each tensor of the whole model that is trained."""
        return [*self.trained_outside, *self.depth * self.trained_in_block]

    def live(self, batch_size: int, max_length: int) -> np.ndarray:
        """Live bytes above the weights after each event of a step, `[events, kinds]`."""
        changes = np.array([1, batch_size * max_length, batch_size * max_length**2]) @ self.changes
        live = np.cumsum(np.eye(len(KINDS))[self.kinds] * changes[:, None], axis=0)
        if self.depth > self.blocks:
            live += (self.depth - self.blocks) * self._per_block(live)
        return live

    def _per_block(self, live: np.ndarray) -> np.ndarray:
        """What one more block among the middle ones adds at each event."""
        last = self.blocks - 1
        before, after = self.marks[f"block {last - 1}"], self.marks[f"block {last}"]
        turn, back = self.marks[f"back to {last}"], self.marks[f"back to {last - 1}"]
        kept = live[after - 1] - live[before - 1]
        gradients = np.where(np.array(KINDS) == "gradients", live[back - 1] - live[turn - 1], 0)
        extra = np.zeros_like(live)
        extra[after:turn] = kept
        extra[turn:back] = max(kept, gradients, key=np.sum)
        extra[back:] = gradients
        return extra
