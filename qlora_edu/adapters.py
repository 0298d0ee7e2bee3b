"""Chapter 4: adapters in a model, where they are found, added, taken out and put in.

An adapter is nothing but the `A` and `B` of every adapted layer: a dictionary of small tensors, by
the names that PEFT gives them. `add_lora` makes room for them in a model, `adapter_tensors` takes
them out, `load_adapters` puts others in, whole or not at all: that is all of "swapping".
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_edu.errors import LoRAError
from qlora_edu.lora import HoulsbyAdapter, LoRALayer, LoRALinear

PEFT_PREFIX = "base_model.model."
LISTED = 6  # names in an error message
CONV1D = " (GPT-2's Conv1D keeps its weight as [in, out]: PEFT can adapt it, this course does not)"


def find_linear_layers(
    model: nn.Module, target_modules: str | Sequence[str] = "all-linear"
) -> list[str]:
    """Find the `nn.Linear` layers to adapt: all, or those whose name ends in a target.

    The targets are a list, or one text with commas; every one must be found. "all-linear" leaves
    out the output head, as PEFT does. Returns the full names.

    Raises `LoRAError` if a target, or any layer, is found nowhere, or is no plain `nn.Linear`.

    >>> find_linear_layers(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    ['0', '2']
    """
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    if target_modules == "all-linear":
        get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = get_head()
        if kept := [name for name in linear if linear[name] is not head]:
            return kept
        kinds = sorted({type(m).__name__ for m in model.modules() if "weight" in m._parameters})
        what = f"there is no nn.Linear to adapt, but {kinds or 'no weight'}; the head is left out"
        raise LoRAError(what + (CONV1D if "Conv1D" in kinds else ""))
    listed = target_modules.split(",") if isinstance(target_modules, str) else target_modules
    wanted = [name.strip() for name in listed if name.strip()]
    found = [name for name, _ in model.named_modules() if _is_one_of(name, wanted)]
    lost = [target for target in wanted if not any(_is_one_of(name, [target]) for name in found)]
    own = sorted({name.rpartition(".")[2] for name in linear})
    if not wanted:
        raise LoRAError(f"target_modules is empty: name some of {own}, or give 'all-linear'")
    if lost:
        raise LoRAError(f"no layer is called {lost}; the linear layers are called {own}")
    for name in found:
        if name not in linear:
            kind = type(model.get_submodule(name)).__name__
            why = f"{kind} is not a plain nn.Linear{CONV1D if kind == 'Conv1D' else ''}"
            raise LoRAError(f"{name} cannot be adapted: {why}")
    return found


def refuse_adapters(model: nn.Module) -> None:
    """Refuse a model that has adapters: a second kind would adapt the first, and freeze it."""
    found = [
        f"{name}: {type(module).__name__}"
        for name, module in model.named_modules()
        if isinstance(module, LoRALayer | HoulsbyAdapter) or hasattr(module, "get_delta_weight")
    ]
    if found:
        remedy = "call remove_adapters(model), PEFT's unload(), or load a model in 4 bits again"
        raise LoRAError(f"there are {len(found)} adapted layers already ({_list(found)}): {remedy}")


def add_lora(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    *,
    target_modules: str | Sequence[str] = "all-linear",
    lora_dropout: float = 0.0,
) -> list[str]:
    """Freeze `model`, wrap linear layers in `LoRALinear`, and return their names.

    Raises `LoRAError` as `find_linear_layers`, and for a model that has adapters already.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> add_lora(model, r=2, lora_alpha=4, target_modules=["2"])
    ['2']
    """
    return _wrap(
        model, target_modules, lambda linear: LoRALinear(linear, r, lora_alpha, lora_dropout)
    )


def add_houlsby(
    model: nn.Module, bottleneck: int, target_modules: str | Sequence[str] = ("o_proj", "down_proj")
) -> list[str]:
    """Freeze `model`, put a `HoulsbyAdapter` behind the layers named, and return their names.

    They are the last of each block's attention and feed-forward part; the default is Llama's.
    """
    return _wrap(model, target_modules, lambda linear: HoulsbyAdapter(linear, bottleneck))


def _wrap(
    model: nn.Module, target_modules: str | Sequence[str], adapt: Callable[[Any], nn.Module]
) -> list[str]:
    refuse_adapters(model)
    names = find_linear_layers(model, target_modules)
    layers = {name: adapt(model.get_submodule(name)) for name in names}
    model.requires_grad_(False)
    for name, layer in layers.items():
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
    """List the tensors of an adapter, by PEFT's names; nothing is copied.

    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = add_lora(model, r=2, lora_alpha=4)
    >>> {name: tuple(tensor.shape) for name, tensor in adapter_tensors(model).items()}
    {'base_model.model.0.lora_A.weight': (2, 8), 'base_model.model.0.lora_B.weight': (8, 2)}
    """
    return {
        f"{PEFT_PREFIX}{name}.{part}.weight": getattr(layer, part).detach()
        for name, layer in lora_layers(model).items()
        for part in ("lora_A", "lora_B")
    }


@torch.no_grad()
def load_adapters(
    model: nn.Module, tensors: Mapping[str, Tensor], *, allow_untrained: bool = False
) -> None:
    """Copy an adapter under PEFT's names into the adapted layers of `model`: all of it, or none.

    Raises `LoRAError` as `check_tensors` does, or if no layer is adapted, or one is merged.
    """
    layers, own = lora_layers(model), adapter_tensors(model)
    if not own:
        raise LoRAError("the model has no adapted layer; call add_lora first")
    merged = [name for name, layer in layers.items() if getattr(layer, "merged", False)]
    if merged:
        raise LoRAError(f"unmerge() before loading: {_list(merged)} hold the adapter in the weight")
    check_tensors(own, tensors, allow_untrained)
    for name, mine in own.items():
        mine.copy_(tensors[name])


def check_tensors(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], allow_untrained: bool | None = None
) -> None:
    """Refuse an adapter that is not whole, finite, trained (`B` is not 0), and made for `own`."""
    if not tensors:
        raise LoRAError("the adapter is empty: no tensor was saved, or the file was cut")
    faults = [f"{name} is missing from the adapter" for name in own if name not in tensors]
    for name, tensor in tensors.items():
        if name not in own:
            faults.append(f"{name} is not a tensor of this model")
        elif tensor.shape != (needed := own[name].shape):
            found = tuple(tensor.shape)
            faults.append(f"{name} has shape {found}, the model needs {tuple(needed)}")
        elif not tensor.is_floating_point():
            faults.append(f"{name} holds {tensor.dtype}, which is no floating dtype")
        elif not tensor.isfinite().all():
            faults.append(f"{name} holds NaN or infinity")
    if faults:
        remedy = "use an undamaged file, and the base, target modules and rank it was trained with"
        raise LoRAError(f"tensors that do not fit ({len(faults)}): {_list(faults)}; {remedy}")
    trained = any(tensors[name].any() for name in own if ".lora_A." not in name)
    if not (allow_untrained or trained):  # None: whoever calls has no such option to offer
        remedy = "" if allow_untrained is None else ". allow_untrained=True loads it"
        raise LoRAError(
            f"B is zero in all {len(own) // 2} layers, so this adapter changes nothing: it was "
            f"saved before training, or training did not reach it{remedy}"
        )


def remove_adapters(model: nn.Module) -> None:
    """Take every adapter off; a `QLoRALinear` stays: what it was made from is gone."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear) and module.merged:
            module.unmerge()  # the layer below is handed back as it was
        if isinstance(module, LoRALinear | HoulsbyAdapter):
            replace_module(model, name, module.base)


def _is_one_of(name: str, endings: Sequence[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _list(items: Sequence[str]) -> str:
    rest = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return "; ".join(items[:LISTED]) + rest
