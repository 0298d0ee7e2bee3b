"""Support for chapter 6: rehearse a training step on tensors that have a shape and no memory.

PyTorch can run a model on *fake* tensors: every operation works out the shape and dtype of its
result and computes nothing. Whoever listens to such a run hears every allocation and every release
of the real one. For a model of any size three blocks are enough, since the middle blocks of a
transformer are alike, and three lengths, since the size of every tensor in it is
``c₀ + c₁·tokens + c₂·tokens·length``.
"""

import copy
import gc
import json
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

# Modules that PyTorch calls private; this file is the only place of the course that uses them.
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_edu.adapters import add_houlsby, add_lora, find_linear_layers, replace_module
from qlora_edu.blockwise import check_blocksize
from qlora_edu.double_quant import NESTED_BLOCKSIZE, QuantizedAbsmax
from qlora_edu.errors import LoRAError, PlanError
from qlora_edu.kernels import CHUNK_SIZE, UNPACKING
from qlora_edu.qlora import QLoRALinear, replace_linear_layers
from qlora_edu.quantized import QuantizedTensor, quantize

BLOCKS = 3
LENGTHS = (128, 256, 512)
METHODS = ("full", "lora", "qlora", "houlsby")
BACKENDS = ("qlora_edu", "bitsandbytes")
KINDS = ("activations", "logits and loss", "dequantised weights", "workspace", "gradients")


WEIGHTS = (
    "quantised weights",
    "quantisation constants",
    "linear weights",
    "embeddings and head",
    "norms and the rest",
    "adapters",
)
ROWS = (*WEIGHTS, "optimizer states", "gradients", *KINDS[:-1])


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What decides which tensors a training step makes; the planner's arguments.

    ``target_modules`` are the layers with adapters, as for ``find_linear_layers``. ``dtype`` is
    that of the weights which are not quantised, and of the computation. ``backend`` says whose
    4-bit layers and adapters they are: ours, or those of bitsandbytes and PEFT.

    Raises:
        PlanError: naming a setting, its value, and what it should have been.
    """

    method: str = "qlora"
    r: int = 64
    bottleneck: int = 64
    target_modules: str | tuple[str, ...] = "all-linear"
    lora_dropout: float = 0.0
    dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    gradient_checkpointing: bool = True
    autocast: bool = False
    padding: bool = False
    backend: str = "qlora_edu"
    device: str = "cuda"

    def __post_init__(self) -> None:
        choices = {"method": METHODS, "backend": BACKENDS, "device": ("cuda", "cpu")}
        choices |= dict.fromkeys(("dtype", "adapter_dtype"), ("float32", "bfloat16", "float16"))
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise PlanError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        for name in ("r", "bottleneck"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanError(f"{name} must be a whole number of at least 1, not {value!r}")
        if not 0 <= self.lora_dropout < 1:
            raise PlanError(f"dropout must be in [0, 1), not {self.lora_dropout!r}")


def build_model(config: Any, settings: StepSettings, fake: bool = False) -> nn.Module:
    """A causal language model of this configuration with random weights, made ready to train.

    ``fake=True``, for use inside ``FakeTensorMode``, makes 4-bit weights without quantising.

    Raises:
        PlanError: if this is no causal language model's configuration, or no layer fits the method.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.use_cache = False
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype))
    except ValueError as error:
        raise PlanError(f"no causal language model can be made of this: {error}") from error
    model.train()
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        if settings.method == "houlsby":
            add_houlsby(model, settings.bottleneck)
        elif settings.method == "lora":
            add_lora(
                model,
                settings.r,
                16,
                target_modules=settings.target_modules,
                lora_dropout=settings.lora_dropout,
            )
        elif settings.method == "qlora":
            _INSTALL[settings.backend](model, settings, fake)
    except LoRAError as error:
        raise PlanError(f"method {settings.method!r} does not fit this model: {error}") from error
    if settings.method != "full":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, settings.adapter_dtype))
    return model


def _install_ours(model: nn.Module, settings: StepSettings, fake: bool) -> None:
    arguments = {"r": settings.r, "lora_alpha": 16, "lora_dropout": settings.lora_dropout}
    quantization = {
        "levels": settings.quant_type,
        "blocksize": settings.blocksize,
        "double_quant": settings.double_quant,
    }
    if not fake:
        replace_linear_layers(
            model, target_modules=settings.target_modules, **arguments, **quantization
        )
        return
    names = find_linear_layers(model, settings.target_modules)
    model.requires_grad_(False)
    for name in names:
        linear = model.get_submodule(name)
        weight = pretend_to_quantize(linear.weight, **quantization)
        replace_module(model, name, QLoRALinear(weight, linear.bias, **arguments))


def pretend_to_quantize(
    weight: Tensor, levels: str = "nf4", blocksize: int = 64, double_quant: bool = True
) -> QuantizedTensor:
    """Make the tensors of ``quantize(weight, ...)``, each of its shape and dtype, and fill none."""
    check_blocksize(blocksize)
    blocks = -(-weight.numel() // blocksize)
    absmax = weight.new_empty(blocks, dtype=torch.float32)
    if double_quant:
        codes = absmax.new_empty(blocks, dtype=torch.uint8)
        nested = absmax.new_empty(-(-blocks // NESTED_BLOCKSIZE))
        absmax = QuantizedAbsmax(codes, nested, nested.new_empty(()), nested.new_empty(256))
    packed = weight.new_empty(-(-weight.numel() // 2), 1, dtype=torch.uint8)
    table = weight.new_empty(16, dtype=torch.float32)
    return QuantizedTensor(packed, absmax, table, levels, blocksize, weight.shape, weight.dtype)


def _install_theirs(model: nn.Module, settings: StepSettings, fake: bool) -> None:
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit
    from peft import LoraConfig, inject_adapter_in_model

    from qlora_edu.compat import forbid_cpu_repacking, quiet

    keeping = {"quant_type": settings.quant_type, "compress_statistics": settings.double_quant}
    names = find_linear_layers(model, settings.target_modules)
    for name in names:
        linear = model.get_submodule(name)
        shape = (linear.in_features, linear.out_features, linear.bias is not None)
        with unset_fake_temporarily():
            layer = Linear4bit(*shape, getattr(torch, settings.dtype), **keeping, device="meta")
        packed, state = quantize_4bit(linear.weight.data, blocksize=settings.blocksize, **keeping)
        if fake:  # a fake tensor cannot become a Params4bit; an attribute or two is all that counts
            weight = nn.Parameter(packed, requires_grad=False)
            vars(weight).update(keeping, quant_storage=torch.uint8, quant_state=state)
        else:
            weight = Params4bit(packed, quant_state=state, bnb_quantized=True, **keeping)
        layer._parameters.update(weight=weight, bias=linear.bias)
        layer.quant_state = state
        replace_module(model, name, layer)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True
    adapter = LoraConfig(
        r=settings.r, lora_alpha=16, lora_dropout=settings.lora_dropout, target_modules=names
    )
    with (
        quiet(),
        patch.object(nn.Module, "to", lambda self, *_, **__: self) if fake else nullcontext(),
    ):
        inject_adapter_in_model(adapter, model)
    forbid_cpu_repacking(model)


_INSTALL = {"qlora_edu": _install_ours, "bitsandbytes": _install_theirs}


def training_loss(model: nn.Module, ids: Tensor, settings: StepSettings) -> Tensor:
    """The loss of one step on token ids ``[batch, length]``, as every trainer takes it."""
    mask = None
    if settings.padding:
        mask = torch.ones_like(ids)
        mask[0, -1] = 0
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=settings.autocast):
        return model(input_ids=ids, attention_mask=mask, labels=ids).loss


class Allocations(TorchDispatchMode):
    """Write down each change of live bytes while operations run; works on real and fake tensors.

    ``events`` holds ``(number, change)``: a storage gets its number, and a positive change, when it
    is first seen, and a negative change when its last tensor goes. Storages of tensors passed to
    ``ignore`` were there before and never count.

    >>> x = torch.ones(1000)
    >>> with Allocations() as allocations:
    ...     y = (x + 1) * 2
    >>> allocations.changes  # float32: x + 1, twice that, and x + 1 is gone
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

    def ignore(self, tensors: Any) -> None:
        """Leave out the storages of these tensors."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._ignored[tensor.untyped_storage()._cdata] = tensor

    def mark(self, name: str) -> None:
        """Remember how many events came before this moment, the first time it comes."""
        self.marks.setdefault(name, len(self.events))

    def number(self, tensor: Tensor) -> int | None:
        """The number of a tensor's storage, if it is live and counted."""
        return self._live.get(tensor.untyped_storage()._cdata, (None, 0))[0]

    @contextmanager
    def unpacking(self) -> Iterator[None]:
        """What is allocated inside belongs to the dequantised weights."""
        self._unpacking, before = True, self._unpacking
        try:
            yield
        finally:
            self._unpacking = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), "dequantize_4bit" in str(func))
        return out

    def _note(self, storage: torch.UntypedStorage, unpacked: bool) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._ignored:
            return
        if key not in self._live:
            self._live[key] = (self._born, 0)
            if unpacked or self._unpacking:
                self.dequantised.add(self._born)
            self._born += 1
            weakref.finalize(storage, self._free, key).atexit = False
        number, known = self._live[key]
        if nbytes != known:
            self._live[key] = (number, nbytes)
            self.events.append((number, nbytes - known))

    def _free(self, key: int) -> None:
        number, nbytes = self._live.pop(key)
        self.events.append((number, -nbytes))


class _Rehearsed(NamedTuple):
    """One run: each change in bytes, its kind (an index into ``KINDS``), the moments marked."""

    changes: list[int]
    kinds: list[int]
    marks: dict[str, int]


def _rehearse(model: nn.Module, batch: int, length: int, settings: StepSettings) -> _Rehearsed:
    heard, ids = Allocations(), torch.zeros(batch, length, dtype=torch.long)
    heard.ignore([ids, *kept_tensors(model)])
    blocks = list(find_blocks(model))
    hooks = [
        block.register_forward_pre_hook(_marker(heard, i), with_kwargs=True)
        for i, block in enumerate(blocks)
    ]
    hooks.append(blocks[-1].register_forward_hook(_last_marker(heard, len(blocks))))
    hooks.append(
        model.get_output_embeddings().register_forward_pre_hook(lambda *_: heard.mark("head"))
    )
    token = UNPACKING.set(heard.unpacking)
    try:
        with heard:
            training_loss(model, ids, settings).backward()
    finally:
        UNPACKING.reset(token)
    changes = heard.changes
    for hook in hooks:
        hook.remove()
    gradients = {heard.number(p.grad) for p in model.parameters() if p.grad is not None}
    kinds = _kinds(heard, gradients)[: len(changes)]
    model.zero_grad()
    return _Rehearsed(changes, kinds, heard.marks)


def _kinds(heard: Allocations, gradients: set[int | None]) -> list[int]:
    kind_of: dict[int, int] = {}
    turn = heard.marks[f"back to {sum('block' in name for name in heard.marks)}"]
    for position, (number, _) in enumerate(heard.events):
        if number in kind_of:
            continue
        kind = "activations" if position < heard.marks["head"] else "logits and loss"
        if position >= turn:
            kind = "workspace"
        if number in heard.dequantised:
            kind = "dequantised weights"
        if number in gradients:
            kind = "gradients"
        kind_of[number] = KINDS.index(kind)
    return [kind_of[number] for number, _ in heard.events]


def _marker(heard: Allocations, i: int) -> Any:
    def before_block(block: nn.Module, args: tuple, kwargs: dict) -> None:
        if f"block {i}" not in heard.marks:  # with checkpointing a block runs again, going back
            heard.mark(f"block {i}")
            _when_back(heard, args[0] if args else kwargs["hidden_states"], i)

    return before_block


def _last_marker(heard: Allocations, i: int) -> Any:
    def after_last_block(block: nn.Module, args: tuple, out: Any) -> None:
        _when_back(heard, out[0] if isinstance(out, tuple) else out, i)

    return after_last_block


def _when_back(heard: Allocations, hidden: Tensor, i: int) -> None:
    if hidden.requires_grad:
        hidden.register_hook(lambda _: heard.mark(f"back to {i}"))


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of a transformer's blocks."""
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise PlanError(f"{type(model).__name__} has no list of {depth} blocks")


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


@contextmanager
def without_memory(settings: StepSettings) -> Iterator[None]:
    """Inside, tensors have a shape and no memory, as a step with these settings needs them."""
    from qlora_edu.compat import quiet

    with quiet():
        # Tables that are made at their first use must be real, since they outlive the fake mode.
        quantize(torch.ones(64)).dequantize()
        if settings.backend == "bitsandbytes":
            from bitsandbytes.functional import quantize_4bit

            quantize_4bit(torch.ones(64), compress_statistics=True)
        # To see whether rows are packed, transformers would look at numbers; ours are not.
        rows = patch("transformers.masking_utils.find_packed_sequence_indices", lambda *_: None)
        token = CHUNK_SIZE.set(2**26 if settings.device == "cuda" else None)
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), rows:
                yield
        finally:
            CHUNK_SIZE.reset(token)


def shortened(config: Any, blocks: int = BLOCKS) -> Any:
    """The same configuration with fewer blocks, if it has more."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if text.num_hidden_layers > blocks:
        text.num_hidden_layers = blocks
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:blocks]
    return config


def weigh(model: nn.Module, module: nn.Module | None = None, but: nn.Module | None = None) -> dict:
    """Bytes of a model's tensors (or of one module in it), by the rows of the ledger.

    Tensors that share storage count once, and those of ``but`` not at all.

    >>> weigh(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))  # (16 + 4) · 4 bytes, 8 · 4 bytes
    {'linear weights': 80, 'norms and the rest': 32}
    """
    rows: dict[str, int] = {}
    seen = {_place(tensor) for tensor in (kept_tensors(but) if but is not None else [])}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    everything = all(p.requires_grad for p in model.parameters())
    for part in (model if module is None else module).modules():
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for name, tensor in own:
            if tensor.requires_grad and not everything:
                row = "adapters"
            elif part is head or isinstance(part, nn.Embedding):
                row = "embeddings and head"
            elif isinstance(part, QLoRALinear) and name != "bias":
                row = "quantised weights" if name == "packed" else "quantisation constants"
            elif getattr(tensor, "quant_state", None) is not None:
                row = "quantised weights"
            else:
                row = "linear weights" if isinstance(part, nn.Linear) else "norms and the rest"
            constants = [(constant, "quantisation constants") for constant in _constants(tensor)]
            for kept, kind in [(tensor, row), *constants]:
                if _place(kept) not in seen:
                    seen.add(_place(kept))
                    rows[kind] = rows.get(kind, 0) + kept.untyped_storage().nbytes()
    return rows


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Rehearsal:
    """What three blocks have shown, ready for any depth, batch and length.

    ``outside`` and ``in_block`` are the bytes of the weights by row; ``trained`` the same for the
    sizes, in numbers and bytes each, of the tensors that are trained.
    """

    depth: int
    blocks: int
    outside: dict[str, int]
    in_block: dict[str, int]
    trained_outside: tuple[tuple[int, int], ...]
    trained_in_block: tuple[tuple[int, int], ...]
    changes: np.ndarray
    """``[3, events]``: bytes of each change that are constant, per token, per token and length."""
    kinds: np.ndarray
    marks: dict[str, int]

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of the whole model's weights, by row."""
        names = [row for row in WEIGHTS if row in self.outside or row in self.in_block]
        more = self.depth
        return {r: self.outside.get(r, 0) + more * self.in_block.get(r, 0) for r in names}

    @property
    def trained(self) -> list[tuple[int, int]]:
        """Numbers and bytes of each tensor of the whole model that is trained."""
        return [*self.trained_outside, *self.depth * self.trained_in_block]

    def live(self, batch: int, length: int) -> np.ndarray:
        """Live bytes above the weights after each event of a step, ``[events, kinds]``."""
        tokens = batch * length
        changes = np.array([1, tokens, tokens * length]) @ self.changes
        one_hot = np.eye(len(KINDS))[self.kinds]
        live = np.cumsum(one_hot * changes[:, None], axis=0)
        missing = self.depth - self.blocks
        if missing > 0:
            live += missing * self._per_block(live)
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


def rehearse(config: Any, settings: StepSettings, batch: int = 2, length: int = 512) -> Rehearsal:
    """Rehearse a step of this model; takes a second at the first call, and nothing afterwards.

    A batch of one may be a case of its own (a slice of it needs no copy), and lengths beyond a
    sliding window are one: they bring a mask.

    Raises:
        PlanError: see ``build_model``; or if a step needs the numbers themselves, which do not
            exist here, or takes other operations at another length.
    """
    window = getattr(config.get_text_config(), "sliding_window", None) or 0
    beyond = window if length > window else 0
    # The choice of an attention is no part of a configuration's JSON, but decides what is kept.
    attention = getattr(config, "_attn_implementation", None)
    shape = config.to_json_string()
    return _rehearse_cached(shape, type(config), attention, settings, min(batch, 2), beyond)


@lru_cache(maxsize=256)
def _rehearse_cached(
    config_json: str,
    kind: type,
    attention: str | None,
    settings: StepSettings,
    batch: int,
    beyond: int,
) -> Rehearsal:
    config = kind.from_dict(json.loads(config_json), attn_implementation=attention)
    depth = config.get_text_config().num_hidden_layers
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # what is released must be released at the same moment in every run
    try:
        with without_memory(settings):
            model = build_model(shortened(config), settings, fake=True)
            runs = [
                _rehearse(model, batch, beyond + length, settings)
                for length in (LENGTHS[0], *LENGTHS)
            ][1:]  # the first one fills caches
            parts = find_blocks(model)
            in_block = weigh(model, parts[-1], but=parts[0])
            outside = {
                row: n - len(parts) * in_block.get(row, 0) for row, n in weigh(model).items()
            }
            trained_in_block = _trained(parts[-1].parameters())
            trained_outside = _trained(set(model.parameters()) - set(parts.parameters()))
    except (DataDependentOutputException, DynamicOutputShapeException, RuntimeError) as error:
        raise PlanError(
            f"a step of {kind.__name__} cannot be rehearsed without numbers, in these dtypes at "
            f"least: {type(error).__name__}: {error}"
        ) from error
    finally:
        if collecting:
            gc.enable()
    if len({(tuple(run.kinds), tuple(run.marks.items())) for run in runs}) > 1:
        raise PlanError(f"{kind.__name__}: the steps of this model depend on the length")
    tokens = [batch * (beyond + length) for length in LENGTHS]
    basis = np.array([[1, n, n * n / batch] for n in tokens])
    changes = np.linalg.solve(basis, np.array([run.changes for run in runs], dtype=float))
    return Rehearsal(
        depth=depth,
        blocks=len(parts),
        outside=outside,
        in_block=in_block,
        trained_outside=trained_outside,
        trained_in_block=trained_in_block,
        changes=changes,
        kinds=np.array(runs[0].kinds),
        marks=runs[0].marks,
    )


def _trained(parameters: Iterable[nn.Parameter]) -> tuple[tuple[int, int], ...]:
    return tuple((p.numel(), p.nbytes) for p in parameters if p.requires_grad)
