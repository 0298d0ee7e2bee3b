"""Adapters as files: the folder that PEFT writes and reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qlora_edu.adapters import (
    _PARTS,
    PEFT_PREFIX,
    _list,
    adapter_tensors,
    add_lora,
    load_adapters,
    lora_layers,
    refuse_adapters,
    remove_adapters,
)
from qlora_edu.errors import LoRAError
from qlora_edu.files import atomic

# Fields of PEFT's LoraConfig that say nothing about the product, or only how training began.
_HARMLESS = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "bias", "target_modules", "exclude_modules",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "base_model_name_or_path",
    "revision", "task_type", "inference_mode", "auto_mapping", "peft_version", "megatron_core",
    "qalora_group_size",
}  # fmt: skip


def save_adapter(model: nn.Module, folder: str | Path, base_model: str = "") -> None:
    """Write the adapter of `model` as a folder that `PeftModel.from_pretrained` reads.

    The folder is written whole or not at all, and names `base_model` for whoever loads it.

    Raises:
        LoRAError: there is no adapter, or its layers differ in rank, alpha or dropout.
        FileExistsError: the folder is there already.
    """
    from safetensors.torch import save_file

    layers, folder = lora_layers(model), Path(folder)
    settings = {(layer.r, layer.lora_alpha, layer.lora_dropout.p) for layer in layers.values()}
    if len(settings) != 1:
        raise LoRAError(f"one (r, alpha, dropout) fits in a file; this model has {settings or 0}")
    ((r, lora_alpha, lora_dropout),) = settings
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
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "target_modules": sorted(layers),
        "bias": "none" if not biases else "lora_only" if in_layers else "all",
    }
    with atomic.folder(folder) as part:
        save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
        (part / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def load_adapter(
    model: nn.Module, folder: str | Path, *, allow_untrained: bool = False
) -> dict[str, Any]:
    """Load a folder that `save_adapter` or PEFT has written.

    Args:
        model: gets the layers that the file has tensors for. Adapted layers that are there already,
            a `QLoRALinear` for example, must agree in rank and alpha.
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        allow_untrained: as for `load_adapters`.

    Returns:
        The contents of `adapter_config.json`.

    Raises:
        LoRAError: a file is missing or unreadable, or the adapter is of a kind (DoRA,
            rsLoRA, ranks that vary, whole modules saved) that these layers cannot hold.
        LoRAError: in the kinds of `load_adapters`; the model is then as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        r, lora_alpha, bias = config["r"], config["lora_alpha"], config.get("bias", "none")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise LoRAError(f"{folder} holds no adapter to be read: {error!r}") from error
    _refuse_other_kinds(config)
    if not tensors:
        raise LoRAError(f"{folder} holds an empty adapter: not one tensor was saved")
    layers = lora_layers(model)
    others = {
        name: f"{name} has r={layer.r}, lora_alpha={layer.lora_alpha}"
        for name, layer in layers.items()
        if (layer.r, layer.lora_alpha) != (r, lora_alpha)
    }
    if others:
        raise LoRAError(
            f"the adapter has r={r}, lora_alpha={lora_alpha}, but {_list(others.values())}; the "
            "outputs would be scaled wrongly",
            [f"{PEFT_PREFIX}{name}.{part}.weight" for name in others for part in _PARTS],
        )
    if layers:
        load_adapters(model, tensors, allow_untrained=allow_untrained)
        return config
    refuse_adapters(model)
    linear = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    suffix = ".lora_A.weight"
    names = [n.removeprefix(PEFT_PREFIX)[: -len(suffix)] for n in tensors if n.endswith(suffix)]
    if lost := [name for name in names if name not in linear]:
        starts = tuple(f"{name}." for name in lost)
        raise LoRAError(
            f"{len(lost)} of the adapted layers are no nn.Linear of this model: {_list(lost)}. Use "
            "the base model that the adapter was trained on",
            [n for n in tensors if n.removeprefix(PEFT_PREFIX).startswith(starts)],
        )
    try:
        add_lora(
            model,
            r,
            lora_alpha,
            target_modules=names,
            lora_dropout=config.get("lora_dropout", 0.0),
            bias=bias,
        )
        load_adapters(model, tensors, allow_untrained=allow_untrained)
    except Exception:
        remove_adapters(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
        raise
    return config


def _refuse_other_kinds(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise LoRAError(f"the adapter is of type {config.get('peft_type')!r}, not 'LORA'")
    other = {k: v for k, v in config.items() if k not in _HARMLESS and v}
    init = config.get("init_lora_weights", True)
    if init not in (True, False, "gaussian"):
        other["init_lora_weights"] = init  # it has changed the base, too
    if other:
        raise LoRAError(
            f"the adapter uses {other}, which plain LoRA layers cannot hold; load it with PEFT"
        )
