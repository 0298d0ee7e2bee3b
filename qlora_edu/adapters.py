"""Chapter 4: adapters in a model, where they are found, added, taken out and put in.

An adapter is nothing but the `A` and `B` of every adapted layer: a dictionary of small tensors.
`add_lora` makes room for them in a model, `adapter_tensors` takes them out, `load_adapters`
puts others in: that is all of "swapping". They go by the names that PEFT gives them, so that each
reads the other's; the folder that holds them is written in `files.peft_format`.

Nothing is half-loaded, and nothing is loaded in silence that would change nothing or spoil
everything: names and shapes must fit, NaN is refused, and so is a `B` that is zero throughout.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_edu.errors import LoRAError
from qlora_edu.lora import HoulsbyAdapter, LoRALayer, LoRALinear

PEFT_PREFIX = "base_model.model."
BIASES = ("none", "lora_only", "all")
LISTED = 6  # tensors named in an error message
_PARTS = ("lora_A", "lora_B")


def find_linear_layers(
    model: nn.Module, target_modules: str | Sequence[str] = "all-linear", skip: Sequence[str] = ()
) -> list[str]:
    """Find the `nn.Linear` layers to adapt: all, or those whose name ends in a target.

    Args:
        model: is not changed.
        target_modules: names, as a list or with commas between them; every one must be found. Or
            "all-linear", which leaves out the output head, as PEFT does.
        skip: endings of names that "all-linear" leaves out too.

    Returns the full names, in the model's order.

    Raises:
        LoRAError: nothing is found, a target is found nowhere, or it is no plain `nn.Linear`.

    >>> find_linear_layers(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), skip=["2"])
    ['0']
    """
    named = {name: module for name, module in model.named_modules() if name}
    if target_modules != "all-linear":
        wanted = split_names(target_modules)
        found = [name for name in named if any(_ends_in(name, target) for target in wanted)]
        lost = [target for target in wanted if not any(_ends_in(name, target) for name in found)]
        if lost or not found:
            own = sorted({n.rpartition(".")[2] for n, m in named.items() if type(m) is nn.Linear})
            wrong = f"no layer is called {lost}" if lost else "target_modules names no layer"
            raise LoRAError(f"{wrong}; the linear layers are called {own}")
        for name in found:
            if type(named[name]) is not nn.Linear:
                raise LoRAError(f"{name} cannot be adapted: {_why_not(named[name])}")
        return found
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
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


def split_names(names: str | Sequence[str]) -> list[str]:
    """List names that may be given with commas between them, without the spaces around them.

    >>> split_names("q_proj, v_proj")
    ['q_proj', 'v_proj']
    """
    listed = names.split(",") if isinstance(names, str) else names
    return [name.strip() for name in listed if name.strip()]


def refuse_adapters(model: nn.Module) -> None:
    """Refuse a model that has adapters: a second kind would adapt the first, and freeze it."""
    ours = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, LoRALayer | HoulsbyAdapter)
    }
    theirs = {n: "PEFT's" for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    if not (found := ours | theirs):
        return
    way_out = "load the base model again, for its weights are in 4 bits"
    if theirs:
        way_out = "unload() of the PEFT model takes it out"
    elif all(isinstance(model.get_submodule(name), LoRALinear | HoulsbyAdapter) for name in ours):
        way_out = "remove_adapters(model) takes it out"
    raise LoRAError(
        f"the model has {len(found)} adapted layers already "
        f"({_list(f'{name}: {kind}' for name, kind in found.items())}): {way_out}"
    )


def add_lora(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    lora_dropout: float = 0.0,
    bias: str = "none",
    init: str = "kaiming",
) -> list[str]:
    """Freeze `model` and wrap its linear layers in `LoRALinear`.

    Args:
        target_modules: as for `find_linear_layers`.
        bias: which biases are trained besides: "none", those of the wrapped layers ("lora_only") or
            "all". A trained bias is part of the adapter, and changes the base.

    Returns the names of the layers. A model that has adapters already is refused (`LoRAError`).

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> add_lora(model, r=2, lora_alpha=4, target_modules=["2"])
    ['2']
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['2.lora_A', '2.lora_B']
    """
    if bias not in BIASES:
        raise LoRAError(f"bias must be one of {BIASES}, not {bias!r}")
    refuse_adapters(model)
    names = find_linear_layers(model, target_modules)
    linear: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    layers = [LoRALinear(linear[n], r, lora_alpha, lora_dropout, init) for n in names]
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
    model: nn.Module, bottleneck: int, target_modules: str | Sequence[str] = ("o_proj", "down_proj")
) -> list[str]:
    """Freeze `model` and put a `HoulsbyAdapter` behind the layers named.

    Args:
        target_modules: as for `find_linear_layers`; should name the last layer of each block's
            attention and of its feed-forward part, as the default does for Llama and its kin.

    Returns the names of the layers.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> add_houlsby(model, bottleneck=4, target_modules=["2"])
    ['2']
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # 2·4·2 + 4 + 2
    22
    """
    refuse_adapters(model)
    names = find_linear_layers(model, target_modules)
    layers = [HoulsbyAdapter(model.get_submodule(name), bottleneck) for name in names]
    model.requires_grad_(False)
    for name, layer in zip(names, layers, strict=True):
        layer.down.requires_grad_()
        layer.up.requires_grad_()
        replace_module(model, name, layer)
    return names


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """List the adapted layers of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALayer)}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """List the tensors of an adapter, trained biases included, by PEFT's names; nothing is copied.

    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = add_lora(model, r=2, lora_alpha=4)
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
    """Copy an adapter under PEFT's names into the adapted layers of `model`: all of it, or none.

    Loading again swaps one adapter for another.

    `allow_untrained` takes an adapter whose `B` are all zero, too.

    Raises:
        LoRAError: a tensor is missing, left over, of another shape or no floating one: a
            list in the message, all of them in its `tensors`.
        LoRAError: there is no tensor at all, one holds NaN or infinity, or every `B` is zero.
        LoRAError: a layer is merged, or the model has no adapted layer.
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
    """Refuse an adapter `tensors` that is not whole, sound, trained, and made for `own`.

    `own` are the tensors that the model has places for; `load_adapters` raises the same errors.
    """
    if not tensors:
        raise LoRAError("the adapter is empty: no tensor was saved, or the file was cut")
    faults = {name: f"{name} is missing from the adapter" for name in own if name not in tensors}
    faults |= {name: f"{name} is not a tensor of this model" for name in tensors if name not in own}
    faults |= {
        name: f"{name} has shape {tuple(tensors[name].shape)}, the model needs {tuple(mine.shape)}"
        for name, mine in own.items()
        if name in tensors and tensors[name].shape != mine.shape
    }
    faults |= {
        name: f"{name} holds {tensor.dtype}, which is no floating dtype"
        for name, tensor in tensors.items()
        if name not in faults and not tensor.is_floating_point()
    }
    if faults:
        raise LoRAError(
            f"{len(faults)} tensors do not fit: {_list(faults.values())}. Use the base model, "
            "the target modules and the rank that the adapter was trained with",
            faults,
        )
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise LoRAError(f"NaN or infinity in {_list(bad)}: the adapter is damaged")
    if not allow_untrained and not any(
        tensors[name].any() for name in own if ".lora_A." not in name
    ):
        raise LoRAError(
            f"B is zero in all {len(own) // 2} layers, so this adapter changes nothing: it was "
            "saved before training, or training did not reach it. allow_untrained=True loads it"
        )


def remove_adapters(model: nn.Module) -> None:
    """Put what was adapted back in the place of every `LoRALinear` and `HoulsbyAdapter`.

    The adapter is lost. A `QLoRALinear` stays: the weight that it was made from is gone.

    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = add_lora(model, r=2, lora_alpha=4)
    >>> remove_adapters(model)
    >>> model
    Sequential(
      (0): Linear(in_features=8, out_features=8, bias=True)
    )
    """
    adapted = [
        (n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear | HoulsbyAdapter)
    ]
    for name, layer in adapted:
        replace_module(model, name, layer.base)


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
