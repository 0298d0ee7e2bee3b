"""Chapter 4, second part. Adapters in a model, and in a file that PEFT writes and reads.

An adapter is nothing but the ``A`` and ``B`` of every adapted layer: a dictionary of small tensors.
``add_lora`` makes room for them in a model, ``adapter_tensors`` takes them out, ``load_adapters``
puts others in: that is all of "swapping". In a folder they are two files, a safetensors file and
``adapter_config.json``, under the names that PEFT gives them, so that each reads the other's.

Nothing is half-loaded, and nothing is loaded in silence that would change nothing or spoil
everything: names and shapes must fit, NaN is refused, and so is a ``B`` that is zero throughout.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_edu.lora import HoulsbyAdapter, LoRAError, LoRALayer, LoRALinear

PEFT_PREFIX = "base_model.model."
BIASES = ("none", "lora_only", "all")
LISTED = 6  # tensors named in an error message
_PARTS = ("lora_A", "lora_B")

# Fields of PEFT's LoraConfig that say nothing about the product, or only how training began.
_HARMLESS = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "bias", "target_modules", "exclude_modules",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "base_model_name_or_path",
    "revision", "task_type", "inference_mode", "auto_mapping", "peft_version", "megatron_core",
    "qalora_group_size",
}  # fmt: skip


class AdapterMismatchError(LoRAError):
    """Adapter tensors do not fit the model; nothing has been loaded.

    Attributes:
        tensors: the names of all that do not fit, under PEFT's names; the message lists the first.

    >>> AdapterMismatchError("1 tensor does not fit", ["base_model.model.0.lora_A.weight"]).tensors
    ('base_model.model.0.lora_A.weight',)
    """

    def __init__(self, message: str, tensors: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.tensors = tuple(tensors)


class DamagedAdapterError(LoRAError):
    """An adapter is empty, or holds NaN or infinity; nothing has been loaded."""


class UntrainedAdapterError(LoRAError):
    """Every ``B`` of an adapter is zero, so that it would change nothing."""


class AdapterFileError(LoRAError):
    """A folder is no adapter, or one of a kind that these layers cannot hold."""


def find_linear_layers(
    model: nn.Module, targets: str | Sequence[str] = "all-linear", skip: Sequence[str] = ()
) -> list[str]:
    """Names of the ``nn.Linear`` layers to adapt: all, or those whose name ends in a target.

    "all-linear" leaves out the output head (as PEFT does) and names that end in one of ``skip``.

    Raises:
        LoRAError: if nothing is found, a target is found nowhere, or it is no plain ``nn.Linear``.

    >>> find_linear_layers(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), skip=["2"])
    ['0']
    """
    named = {name: module for name, module in model.named_modules() if name}
    if targets != "all-linear":
        wanted = [targets] if isinstance(targets, str) else list(targets)
        found = [name for name in named if any(_ends_in(name, target) for target in wanted)]
        lost = [target for target in wanted if not any(_ends_in(name, target) for name in found)]
        if lost or not found:
            own = sorted({n.rpartition(".")[2] for n, m in named.items() if type(m) is nn.Linear})
            raise LoRAError(f"no layer is called {lost}; the linear layers are called {own}")
        for name in found:
            if type(named[name]) is not nn.Linear:
                raise LoRAError(f"{name} cannot be adapted: {_why_not(named[name])}")
        return found
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = [
        name
        for name, module in named.items()
        if type(module) is nn.Linear and module is not head and not _is_one_of(name, skip)
    ]
    if not found:
        layers = [m for m in named.values() if "weight" in m._parameters]
        others = [m for m in layers if type(m) is not nn.Linear and m is not head]
        kinds = {type(m).__name__: m for m in others}
        nothing = "all are left out" if layers else "it has no weights"
        reasons = "; ".join(_why_not(kinds[kind]) for kind in sorted(kinds)) or nothing
        raise LoRAError(f"{type(model).__name__} has no nn.Linear to adapt: {reasons}")
    return found


def add_lora(
    model: nn.Module,
    r: int,
    alpha: float,
    *,
    targets: str | Sequence[str] = "all-linear",
    dropout: float = 0.0,
    bias: str = "none",
    init: str = "kaiming",
) -> list[str]:
    """Freeze ``model`` and wrap its linear layers in ``LoRALinear``, in place; returns their names.

    ``targets`` is as for ``find_linear_layers``. ``bias`` says which biases are trained besides:
    "none", those of the wrapped layers ("lora_only") or "all"; a trained bias is part of the
    adapter, and changes the base.

    Raises:
        LoRAError: see ``find_linear_layers`` and ``LoRALayer``, or an unknown ``bias``.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> add_lora(model, r=2, alpha=4, targets=["2"])
    ['2']
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['2.lora_A', '2.lora_B']
    """
    if bias not in BIASES:
        raise LoRAError(f"bias must be one of {BIASES}, not {bias!r}")
    names = find_linear_layers(model, targets)
    layers = [LoRALinear(model.get_submodule(n), r, alpha, dropout, init) for n in names]
    model.requires_grad_(False)
    for name, layer in zip(names, layers, strict=True):
        replace_module(model, name, layer)
        layer.lora_A.requires_grad_()
        layer.lora_B.requires_grad_()
        if bias == "lora_only" and layer.base.bias is not None:
            layer.base.bias.requires_grad_()
    if bias == "all":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or _is_one_of(name, ["bias"]))
    return names


def add_houlsby(
    model: nn.Module, bottleneck: int, targets: str | Sequence[str] = ("o_proj", "down_proj")
) -> list[str]:
    """Freeze ``model`` and put a ``HoulsbyAdapter`` behind the layers named; returns their names.

    ``targets`` is as for ``find_linear_layers`` and should name the last layer of each block's
    attention and of its feed-forward part, as the default does for Llama and its kin.

    Raises:
        LoRAError: see ``find_linear_layers`` and ``HoulsbyAdapter``.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> add_houlsby(model, bottleneck=4, targets=["2"])
    ['2']
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # 2·4·2 + 4 + 2
    22
    """
    names = find_linear_layers(model, targets)
    layers = [HoulsbyAdapter(model.get_submodule(name), bottleneck) for name in names]
    model.requires_grad_(False)
    for name, layer in zip(names, layers, strict=True):
        layer.down.requires_grad_()
        layer.up.requires_grad_()
        replace_module(model, name, layer)
    return names


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule called ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALayer)}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter of ``model``, trained biases included, under PEFT's names; nothing is copied.

    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = add_lora(model, r=2, alpha=4)
    >>> {name: tuple(tensor.shape) for name, tensor in adapter_tensors(model).items()}
    {'base_model.model.0.lora_A.weight': (2, 8), 'base_model.model.0.lora_B.weight': (8, 2)}
    """
    layers = lora_layers(model)
    tensors = {
        f"{PEFT_PREFIX}{name}.{part}.weight": getattr(layer, part).detach()
        for name, layer in layers.items()
        for part in _PARTS
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and _is_one_of(name, ["bias"]):
            owner = name.removesuffix(".bias").removesuffix(".base")
            kept_as = "base_layer.bias" if owner in layers else "bias"
            tensors[f"{PEFT_PREFIX}{owner}.{kept_as}"] = parameter.detach()
    return tensors


@torch.no_grad()
def load_adapters(
    model: nn.Module, tensors: Mapping[str, Tensor], *, allow_untrained: bool = False
) -> None:
    """Copy an adapter under PEFT's names into the adapted layers of ``model``: all of it, or none.

    The tensors may be of any floating dtype. Loading again swaps one adapter for another.

    Raises:
        AdapterMismatchError: if a tensor is missing, left over or of another shape: a list in
            the message, all of them in ``tensors``.
        DamagedAdapterError: if there is no tensor at all, or one holds NaN or infinity.
        UntrainedAdapterError: if every ``B`` is zero, unless ``allow_untrained``.
        LoRAError: if a layer is merged, or the model has no adapted layer.
    """
    own = adapter_tensors(model)
    if not own:
        raise LoRAError("the model has no adapted layer; call add_lora first")
    merged = [n for n, layer in lora_layers(model).items() if getattr(layer, "merged", False)]
    if merged:
        raise LoRAError(f"unmerge() before loading: {_list(merged)} hold the adapter in the weight")
    check_tensors(own, tensors, allow_untrained=allow_untrained)
    for name, mine in own.items():
        mine.copy_(tensors[name])


def check_tensors(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, allow_untrained: bool = False
) -> None:
    """Refuse an adapter ``tensors`` that is not whole, sound, trained, and made for ``own``.

    ``own`` are the tensors that the model has places for; the raises are those of
    ``load_adapters``.
    """
    if not tensors:
        raise DamagedAdapterError("the adapter is empty: no tensor was saved, or the file was cut")
    faults = {name: f"{name} is missing from the adapter" for name in own if name not in tensors}
    faults |= {name: f"{name} is not a tensor of this model" for name in tensors if name not in own}
    faults |= {
        name: f"{name} has shape {tuple(tensors[name].shape)}, the model needs {tuple(mine.shape)}"
        for name, mine in own.items()
        if name in tensors and tensors[name].shape != mine.shape
    }
    if faults:
        raise AdapterMismatchError(
            f"{len(faults)} tensors do not fit: {_list(faults.values())}. Use the base model, "
            "the target modules and the rank that the adapter was trained with",
            faults,
        )
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise DamagedAdapterError(f"NaN or infinity in {_list(bad)}: the adapter is damaged")
    if not allow_untrained and not any(
        tensors[name].any() for name in own if ".lora_A." not in name
    ):
        raise UntrainedAdapterError(
            f"B is zero in all {len(own) // 2} layers, so this adapter changes nothing: it was "
            "saved before training, or training did not reach it. allow_untrained=True loads it"
        )


def save_adapter(model: nn.Module, folder: str | Path, base_model: str = "") -> None:
    """Write the adapter of ``model`` as a folder that ``PeftModel.from_pretrained`` reads.

    ``base_model`` is the name or path of the base, for whoever loads it. The folder is written
    whole or not at all.

    Raises:
        LoRAError: if there is no adapter, or its layers differ in rank, alpha or dropout.
        FileExistsError: if the folder is there already.
    """
    from safetensors.torch import save_file

    layers, folder = lora_layers(model), Path(folder)
    settings = {(layer.r, layer.alpha, layer.dropout.p) for layer in layers.values()}
    if len(settings) != 1:
        raise LoRAError(f"one (r, alpha, dropout) fits in a file; this model has {settings or 0}")
    ((r, alpha, dropout),) = settings
    if folder.exists():
        raise FileExistsError(f"{folder} exists, and nothing is overwritten; choose another folder")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter_tensors(model).items()}
    biases = [name for name in tensors if name.endswith("bias")]
    in_layers = all(name.endswith("base_layer.bias") for name in biases)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(layers),
        "bias": "none" if not biases else "lora_only" if in_layers else "all",
    }
    with whole_or_absent(folder) as part:
        save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
        (part / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def load_adapter(
    model: nn.Module, folder: str | Path, *, allow_untrained: bool = False
) -> dict[str, Any]:
    """Load a folder that ``save_adapter`` or PEFT has written; returns its ``adapter_config.json``.

    A model without adapted layers gets the ones that the file has tensors for. Layers that are
    there already, a ``QLoRALinear`` for example, must agree in rank and alpha.

    Raises:
        AdapterFileError: if a file is missing or unreadable, or the adapter is of a kind (DoRA,
            rsLoRA, ranks that vary, whole modules saved) that these layers cannot hold.
        LoRAError: in the kinds of ``load_adapters``; the model is then as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        r, alpha, bias = config["r"], config["lora_alpha"], config.get("bias", "none")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise AdapterFileError(f"{folder} holds no adapter to be read: {error!r}") from error
    _refuse_other_kinds(config)
    if not tensors:
        raise DamagedAdapterError(f"{folder} holds an empty adapter: not one tensor was saved")
    layers = lora_layers(model)
    others = {
        name: f"{name} has r={layer.r}, alpha={layer.alpha}"
        for name, layer in layers.items()
        if (layer.r, layer.alpha) != (r, alpha)
    }
    if others:
        raise AdapterMismatchError(
            f"the adapter has r={r}, alpha={alpha}, but {_list(others.values())}; the outputs "
            "would be scaled wrongly",
            [f"{PEFT_PREFIX}{name}.{part}.weight" for name in others for part in _PARTS],
        )
    if layers:
        load_adapters(model, tensors, allow_untrained=allow_untrained)
        return config
    linear = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    suffix = ".lora_A.weight"
    names = [n.removeprefix(PEFT_PREFIX)[: -len(suffix)] for n in tensors if n.endswith(suffix)]
    if lost := [name for name in names if name not in linear]:
        raise AdapterMismatchError(
            f"{len(lost)} of the adapted layers are no nn.Linear of this model: {_list(lost)}. Use "
            "the base model that the adapter was trained on",
            [
                n
                for n in tensors
                if n.removeprefix(PEFT_PREFIX).startswith(tuple(f"{name}." for name in lost))
            ],
        )
    try:
        add_lora(model, r, alpha, targets=names, dropout=config.get("lora_dropout", 0.0), bias=bias)
        load_adapters(model, tensors, allow_untrained=allow_untrained)
    except Exception:
        remove_lora(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
        raise
    return config


def remove_lora(model: nn.Module) -> None:
    """Put the plain ``nn.Linear`` back in the place of every ``LoRALinear``; the adapter is lost.

    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = add_lora(model, r=2, alpha=4)
    >>> remove_lora(model)
    >>> model
    Sequential(
      (0): Linear(in_features=8, out_features=8, bias=True)
    )
    """
    for name, layer in lora_layers(model).items():
        if isinstance(layer, LoRALinear):
            replace_module(model, name, layer.base)


@contextmanager
def whole_or_absent(folder: Path) -> Iterator[Path]:
    """A folder beside the one wanted, which becomes it in one move when all is on the disk."""
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed and had this number
    part.mkdir(parents=True)
    try:
        yield part
        for path in (*part.rglob("*"), part):
            _flush(path)
        os.rename(part, folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk and not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_other_kinds(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterFileError(f"the adapter is of type {config.get('peft_type')!r}, not 'LORA'")
    other = {k: v for k, v in config.items() if k not in _HARMLESS and v}
    init = config.get("init_lora_weights", True)
    if init not in (True, False, "gaussian"):
        other["init_lora_weights"] = init  # it has changed the base, too
    if other:
        raise AdapterFileError(
            f"the adapter uses {other}, which plain LoRA layers cannot hold; load it with PEFT"
        )


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _is_one_of(name: str, endings: Sequence[str]) -> bool:
    return any(_ends_in(name, ending) for ending in endings)


def _why_not(module: nn.Module) -> str:
    kind = type(module).__name__
    if kind == "Conv1D":
        return (
            "Conv1D (GPT-2) keeps its weight as [in, out], the other way round from nn.Linear; "
            "this course does not support it, PEFT does (fan_in_fan_out=True)"
        )
    return f"{kind} is not a plain nn.Linear"


def _list(items: Iterable[str]) -> str:
    items = list(items)
    rest = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return "; ".join(items[:LISTED]) + rest
