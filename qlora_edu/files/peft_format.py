"""Adapters as files: the folder that PEFT writes and reads."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from qlora_edu.adapters import (
    PEFT_PREFIX,
    _list,
    adapter_tensors,
    add_lora,
    load_adapters,
    lora_layers,
    remove_adapters,
)
from qlora_edu.errors import LoRAError
from qlora_edu.files import atomic

# Fields of PEFT's LoraConfig that say nothing about the product, or that are read here.
_FREE = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "auto_mapping", "peft_version", "megatron_core", "qalora_group_size",
}  # fmt: skip
# Fields that may say one of these; every other one must be empty, as it is by default.
_PLAIN: dict[str, list[Any]] = {
    "peft_type": ["LORA"],
    "bias": ["none"],
    "init_lora_weights": [True, "gaussian"],
}


def save_adapter(model: nn.Module, folder: str | Path, base_model: str = "") -> None:
    """Write the adapter of `model` as a folder that `PeftModel.from_pretrained` reads.

    The folder is written whole or not at all, and names `base_model` for whoever loads it.

    Raises `LoRAError` for layers that differ in r, lora_alpha or lora_dropout, for NaN or infinity,
    if there is none, or more than the adapter is trained; `RunExistsError` if the folder is there.
    """
    from safetensors.torch import save_file

    layers, folder = lora_layers(model), Path(folder)
    settings = {(layer.r, layer.lora_alpha, layer.lora_dropout.p) for layer in layers.values()}
    if len(settings) != 1:
        found = settings or "no adapted layer: call add_lora first"
        raise LoRAError(f"one (r, lora_alpha, lora_dropout) fits in a file; this model has {found}")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if others := [name for name in trained if not name.endswith(("lora_A", "lora_B"))]:
        raise LoRAError(f"{_list(others)} would not be saved; freeze them, or save with PEFT")
    ((r, lora_alpha, lora_dropout),) = settings
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "target_modules": sorted(layers),
        "bias": "none",
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter_tensors(model).items()}
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise LoRAError(f"NaN or infinity is never saved; go back to a checkpoint: {_list(bad)}")
    with atomic.folder(folder) as part:
        save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
        (part / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def load_adapter(
    model: nn.Module, folder: str | Path, *, allow_untrained: bool = False
) -> dict[str, Any]:
    """Load a folder that `save_adapter` or PEFT has written; returns its `adapter_config.json`.

    `model` gets the layers that the file has tensors for. Adapted layers that are there already, a
    `QLoRALinear` for example, must agree in r and lora_alpha.

    Raises `LoRAError`, and leaves the model as it was, if a file cannot be read, plain LoRA layers
    cannot hold the adapter (DoRA, rsLoRA, ...), or `load_adapters` refuses it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        r, lora_alpha, _ = config["r"], config["lora_alpha"], config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        what = f"{folder} holds no adapter_config.json and adapter_model.safetensors to be read"
        raise LoRAError(f"{what}: {error!r}") from error
    other = {k: v for k, v in config.items() if k not in _FREE and v and v not in _PLAIN.get(k, [])}
    if other:
        raise LoRAError(f"plain LoRA layers cannot hold an adapter with {other}; load it with PEFT")
    if not tensors:
        raise LoRAError(f"{folder} holds an empty adapter: not one tensor was saved")
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    layers = lora_layers(model)
    own = {(layer.r, layer.lora_alpha) for layer in layers.values()}
    if layers and list(own) != [(r, lora_alpha)]:
        what = f"the adapter has (r, lora_alpha) = {(r, lora_alpha)}, the layers of the model {own}"
        raise LoRAError(f"{what}: outputs would be scaled wrongly; make the layers with the former")
    if not layers:
        names = [name.removeprefix(PEFT_PREFIX) for name in tensors if ".lora_A." in name]
        targets = [name.removesuffix(".lora_A.weight") for name in names]
        dropout = config.get("lora_dropout", 0.0)
        add_lora(model, r, lora_alpha, target_modules=targets, lora_dropout=dropout)
    try:
        load_adapters(model, tensors, allow_untrained=allow_untrained)
    except LoRAError:
        if not layers:
            remove_adapters(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trainable[name])
        raise
    return config
