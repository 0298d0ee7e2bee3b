"""A training step on tensors that have a shape and no memory.

On PyTorch's *fake* tensors every operation works out the shape and dtype of its result and computes
nothing, so a trace of them shows every allocation and release of the real step. Three blocks tell
any depth, since a transformer's middle blocks are alike; three lengths tell any other, since the
size of every tensor is `c₀ + c₁·tokens + c₂·tokens·length`.
"""

import copy
import gc
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# PyTorch calls this module private; nothing else in the course uses one.
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from qlora_edu.adapters import add_houlsby, add_lora, find_linear_layers, replace_module
from qlora_edu.blockwise import BLOCKSIZES
from qlora_edu.codebooks import LEVELS
from qlora_edu.compat import forbid_cpu_repacking, quiet, rows_never_packed
from qlora_edu.double_quant import NESTED_BLOCKSIZE, QuantizedAbsmax
from qlora_edu.errors import LoRAError, PlanError
from qlora_edu.kernels import CHUNK_SIZE
from qlora_edu.planner.trace import StepTrace, find_blocks, trace_run, weigh
from qlora_edu.qlora import FusedQLoRALinear
from qlora_edu.quantized import QuantizedTensor, quantize
from qlora_edu.text.conversations import require_counts

BLOCKS = 3
LENGTHS = (128, 256, 512)
METHODS = ("full", "lora", "qlora", "houlsby")
LORA_ALPHA = 16.0  # no byte depends on it
_DTYPES = ("float32", "bfloat16", "float16")
_CHOICES: dict[str, tuple] = {
    "method": METHODS,
    "backend": ("qlora_edu", "bitsandbytes"),
    "device": ("cuda", "cpu"),
    "dtype": _DTYPES,
    "adapter_dtype": _DTYPES,
    "blocksize": BLOCKSIZES,
    **dict.fromkeys(("double_quant", "gradient_checkpointing"), (True, False)),
    **dict.fromkeys(("autocast", "padding"), (True, False)),
}


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What decides which tensors a training step makes; `PlanError` names a wrong value.

    `dtype` is that of weights that are not quantised, and of the computation; `backend` says whose
    4-bit layers and adapters they are: ours, or bitsandbytes' and PEFT's.
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
        levels = LEVELS if self.backend == "qlora_edu" else ("nf4", "fp4")
        for name, allowed in (_CHOICES | {"quant_type": levels}).items():
            value = getattr(self, name)
            # By type, too: 1 == True and 64.0 == 64.
            if type(value) is not type(allowed[0]) or value not in allowed:
                raise PlanError(f"{name} must be one of {allowed}, not {value!r}")
        require_counts(PlanError, r=self.r, bottleneck=self.bottleneck)
        if type(self.lora_dropout) not in (int, float) or not 0 <= self.lora_dropout < 1:
            raise PlanError(f"lora_dropout must be in [0, 1), not {self.lora_dropout!r}")
        targets = self.target_modules
        if not isinstance(targets, str):
            if not isinstance(targets, list | tuple) or {type(one) for one in targets} - {str}:
                raise PlanError(f"target_modules must be names of layers, not {targets!r}")
            object.__setattr__(self, "target_modules", tuple(targets))  # a key of the cache


def build_model(config: Any, settings: StepSettings, fake: bool = False) -> nn.Module:
    """Build a causal language model with random weights, ready to train.

    `fake=True` is for use inside `without_memory`: 4-bit weights are made without quantising.
    `PlanError` says that the model is no causal language model, or has no layer for the method.
    """
    config = copy.deepcopy(config)
    config.use_cache = False
    model = causal_model(config, settings.dtype)
    try:
        return add_adapters(model, settings, quantize_layers(model, settings, fake), fake)
    except LoRAError as error:
        raise PlanError(f"method {settings.method!r} does not fit this model: {error}") from error


def causal_model(config: Any, dtype: str) -> Any:
    """The model of a configuration; `PlanError` if it does not predict the next token."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_decoder:
        what = f"a {config.model_type} fills gaps: it is no causal language model, which predicts"
        raise PlanError(f"{what} the next token; take a decoder, such as llama")
    try:
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    except (ValueError, TypeError, AttributeError, ArithmeticError, LookupError) as error:
        raise PlanError(f"no causal language model can be made of this: {error}") from error


def quantize_layers(model: nn.Module, settings: StepSettings, fake: bool = False) -> list[str]:
    """For QLoRA, put 4-bit layers in the place of the linear ones, one after the other.

    Ours are those with an adapter; bitsandbytes quantises every linear layer but the head. Returns
    the names of the layers that get an adapter.
    """
    if settings.method != "qlora":
        return []
    adapted = find_linear_layers(model, settings.target_modules)
    names = find_linear_layers(model) if settings.backend == "bitsandbytes" else adapted
    for name in names:
        replace_module(model, name, quantized_layer(model.get_submodule(name), settings, fake))
    return adapted


def quantized_layer(linear: Any, settings: StepSettings, fake: bool = False) -> nn.Module:
    """The 4-bit layer of a backend with this layer's weight and bias."""
    if settings.backend == "bitsandbytes":
        return _their_layer(linear, settings, fake)
    weight, quantise = linear.weight.detach(), pretend_to_quantize if fake else quantize
    packed = quantise(weight, settings.quant_type, settings.blocksize, settings.double_quant)
    return FusedQLoRALinear(packed, settings.r, LORA_ALPHA, settings.lora_dropout, bias=linear.bias)


def _their_layer(linear: nn.Linear, settings: StepSettings, fake: bool) -> nn.Module:
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    kept: Any = {"quant_type": settings.quant_type, "compress_statistics": settings.double_quant}
    shape = (linear.in_features, linear.out_features, linear.bias is not None)
    with unset_fake_temporarily():
        layer = Linear4bit(*shape, getattr(torch, settings.dtype), **kept, device="meta")
    packed, state = quantize_4bit(linear.weight.detach(), blocksize=settings.blocksize, **kept)
    if fake:  # a fake tensor cannot become a Params4bit; an attribute or two is all that counts
        parameter = nn.Parameter(packed, requires_grad=False)
        vars(parameter).update(kept, quant_storage=torch.uint8, quant_state=state)
    else:
        kept |= {"blocksize": settings.blocksize, "bnb_quantized": True}
        parameter = Params4bit(packed, quant_state=state, **kept)
    layer._parameters.update(weight=parameter, bias=linear.bias)
    layer.quant_state = state
    return layer


def pretend_to_quantize(
    weight: Tensor, levels: str = "nf4", blocksize: int = 64, double_quant: bool = True
) -> QuantizedTensor:
    """Make the tensors of `quantize(weight, ...)`, each of its shape and dtype, and fill none."""
    blocks = -(-weight.numel() // blocksize)
    absmax = weight.new_empty(blocks, dtype=torch.float32)
    constants: Tensor | QuantizedAbsmax = absmax
    if double_quant:
        codes = absmax.new_empty(blocks, dtype=torch.uint8)
        nested = absmax.new_empty(-(-blocks // NESTED_BLOCKSIZE))
        constants = QuantizedAbsmax(codes, nested, nested.new_empty(()), nested.new_empty(256))
    packed = weight.new_empty(-(-weight.numel() // 2), 1, dtype=torch.uint8)
    table = weight.new_empty(16, dtype=torch.float32)
    return QuantizedTensor(packed, constants, table, levels, blocksize, weight.shape, weight.dtype)


def add_adapters(
    model: nn.Module, settings: StepSettings, adapted: Sequence[str], fake: bool = False
) -> nn.Module:
    """Freeze and add what the method does, in `adapter_dtype`; `quantize_layers` gave `adapted`."""
    targets = settings.target_modules
    own: Any = {} if targets == "all-linear" else {"target_modules": targets}  # Houlsby's are fewer
    if settings.method == "houlsby":
        add_houlsby(model, settings.bottleneck, **own)
    elif settings.method == "lora":
        add_lora(model, settings.r, LORA_ALPHA, lora_dropout=settings.lora_dropout, **own)
    elif settings.method == "qlora":
        if settings.backend == "bitsandbytes":  # ours came with the layers
            _add_their_adapters(model, settings, adapted, fake)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    if settings.method != "full":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, settings.adapter_dtype))
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _add_their_adapters(
    model: nn.Module, settings: StepSettings, adapted: Sequence[str], fake: bool
) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model.is_loaded_in_4bit = True
    config = LoraConfig(
        r=settings.r,
        lora_alpha=LORA_ALPHA,
        lora_dropout=settings.lora_dropout,
        target_modules=list(adapted),
    )
    with quiet():
        if not fake:
            inject_adapter_in_model(config, model)
        else:  # PEFT moves adapters to a device, which no fake tensor can; from `meta` it does not
            with unset_fake_temporarily():
                inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
            for part in [m for m in model.modules() if type(m) is nn.Linear and m.weight.is_meta]:
                part.weight = nn.Parameter(torch.empty(part.weight.shape))
    forbid_cpu_repacking(model)


def training_loss(model: nn.Module, ids: Tensor, settings: StepSettings) -> Tensor:
    """The loss of one step on token ids `[batch, length]`, as every trainer takes it."""
    mask = None
    if settings.padding:
        mask = torch.ones_like(ids)
        mask[0, -1] = 0
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=settings.autocast):
        return model(input_ids=ids, attention_mask=mask, labels=ids).loss


@contextmanager
def without_memory(settings: StepSettings) -> Iterator[None]:
    """Inside, tensors have a shape and no memory, as a step with these settings needs them."""
    with quiet():
        # Tables that are made at their first use must be real, since they outlive the fake mode.
        quantize(torch.ones(64)).dequantize()
        if settings.backend == "bitsandbytes":
            from bitsandbytes.functional import quantize_4bit

            quantize_4bit(torch.ones(64), compress_statistics=True)
        token = CHUNK_SIZE.set(2**26 if settings.device == "cuda" else None)
        try:
            with rows_never_packed(), FakeTensorMode(allow_non_fake_inputs=True):
                yield
        finally:
            CHUNK_SIZE.reset(token)


def trace_step(config: Any, settings: StepSettings, batch_size: int, max_length: int) -> StepTrace:
    """Trace a step of this model; takes a second at the first call, and nothing afterwards.

    Raises `PlanError` as `build_model`, and for a step that needs the numbers themselves, which do
    not exist here, or takes other operations at another length.
    """
    # Lengths beyond a sliding window are a case of their own: they bring a mask. So is a batch of
    # one: a slice of it needs no copy.
    window = getattr(config.get_text_config(), "sliding_window", None) or 0
    beyond = window if max_length > window else 0
    # The choice of an attention is no part of a configuration's JSON, but decides what is kept.
    attention = getattr(config, "_attn_implementation", None)
    case = (type(config), attention, settings, min(batch_size, 2), beyond)
    return _trace_cached(config.to_json_string(), *case)


@lru_cache(maxsize=256)
def _trace_cached(
    shape: str, kind: type, attention: Any, settings: StepSettings, batch_size: int, beyond: int
) -> StepTrace:
    lengths = [beyond + length for length in LENGTHS]
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # what is released must be released at the same moment in every run
    try:
        config = kind.from_dict(json.loads(shape), attn_implementation=attention)
        text = config.get_text_config()
        depth = getattr(text, "num_hidden_layers", 0)  # what has none is refused below
        text.num_hidden_layers = min(depth, BLOCKS)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:BLOCKS]
        with without_memory(settings):
            model = build_model(config, settings, fake=True)
            rows = [torch.zeros(batch_size, n, dtype=torch.long) for n in (lengths[0], *lengths)]
            runs = [trace_run(model, x, lambda m, x: training_loss(m, x, settings)) for x in rows]
            runs = runs[1:]  # the first run fills caches
            parts = find_blocks(model)
            whole, in_block = weigh(model), weigh(model, parts[-1], but=parts[0])
    except (RuntimeError, TypeError, AttributeError, ArithmeticError, LookupError) as error:
        what = f"a step of {kind.__name__} cannot be traced without numbers, in these dtypes"
        raise PlanError(f"{what}: {type(error).__name__}: {error}") from error
    finally:
        if collecting:
            gc.enable()
    if len({(tuple(run.kinds), tuple(run.marks.items())) for run in runs}) > 1:
        raise PlanError(f"{kind.__name__}: the steps of this model depend on the length")
    basis = np.array([[1, batch_size * n, batch_size * n**2] for n in lengths])
    return StepTrace(
        depth=depth,
        blocks=len(parts),
        outside={row: n - len(parts) * in_block.get(row, 0) for row, n in whole.items()},
        in_block=in_block,
        trained_outside=_trained(set(model.parameters()) - set(parts.parameters())),
        trained_in_block=_trained(parts[-1].parameters()),
        changes=np.linalg.solve(basis, np.array([run.changes for run in runs], dtype=float)),
        kinds=np.array(runs[0].kinds),
        marks=runs[0].marks,
    )


def _trained(parameters: Iterable[nn.Parameter]) -> tuple[tuple[int, int], ...]:
    return tuple((p.numel(), p.nbytes) for p in parameters if p.requires_grad)
