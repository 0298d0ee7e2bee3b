"""Support for chapter 10: what a trained adapter becomes when it goes to work.

**Merged**, `ΔW` is added to the weight and the adapter is gone: a plain checkpoint in 16 bits that
any program loads, as fast as the base. **Unmerged**, one base serves several adapters, and each
request says which: a little slower, but ten assistants take one base and ten small files.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_edu.compat import quiet
from qlora_edu.errors import LoRAError, did_you_mean
from qlora_edu.files import atomic
from qlora_edu.production.loading import attach_adapter
from qlora_edu.qlora import MERGE_TARGETS, merge_weight
from qlora_edu.quantized import QuantizedTensor

BASE = "base"
"""The name of the system without any adapter."""


def merged_tensors(
    model: Any,
    into: str = "dequantized",
    dtype: torch.dtype = torch.bfloat16,
    original: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The weights of a PEFT model with its adapter merged, in `dtype`, by the plain model's names.

    `into` is as for `merge_weight`, and `original` the base's tensors from before it was quantised;
    a base that never was has only one way. `LoRAError` if the adapter is more than plain LoRA.
    """
    if into not in MERGE_TARGETS:
        raise LoRAError(f"into must be one of {MERGE_TARGETS}, not {into!r}")
    config = model.peft_config[model.active_adapter]
    for field in ("modules_to_save", "use_dora", "lora_bias", "trainable_token_indices"):
        if getattr(config, field, None):
            raise LoRAError(f"only plain LoRA can be merged here; with {field}, merge with PEFT")
    base, tensors = model.get_base_model(), {}
    for name, parameter in base.named_parameters():
        if "lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        layer, weight = base.get_submodule(name.rpartition(".")[0]), parameter.detach()
        packed = hasattr(parameter, "quant_state")
        if packed:
            state = getattr(layer, "base_layer", layer).state_dict()
            weight = QuantizedTensor.from_state_dict(state)
        if name.endswith(".weight") and hasattr(layer, "get_delta_weight"):
            delta = layer.get_delta_weight(model.active_adapter).detach()
            before = (original or {}).get(name) if packed else weight
            weight = merge_weight(weight, delta, into if packed else "original", before, dtype)
        elif packed:
            weight = weight.dequantize(dtype)
        tensors[name] = weight.to(dtype)
    return tensors


def write_merged(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    into: str = "dequantized",
    dtype: torch.dtype = torch.bfloat16,
    original: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the merged model as a Hugging Face folder: it loads anywhere, without PEFT.

    It is written whole or not at all; `merged.json` in it says what was merged into what. Nothing
    is overwritten: `RunExistsError`. The rest is as for `merged_tensors`.
    """
    base, adapter = model.get_base_model(), model.peft_config[model.active_adapter]
    merged = {"base_model": adapter.base_model_name_or_path, "merged_into": into}
    merged |= {"r": adapter.r, "lora_alpha": adapter.lora_alpha}
    with atomic.folder(folder) as part, quiet():
        tensors = merged_tensors(model, into, dtype, original)
        fields = base.config.to_dict()
        for field in ("quantization_config", "_name_or_path"):
            fields.pop(field, None)
        with torch.device("meta"):
            plain = type(base)(type(base.config)(**fields))
        plain.load_state_dict(tensors, strict=False, assign=True)  # a tied head has no tensor
        plain.tie_weights()
        plain.generation_config = base.generation_config
        if lost := [name for name, tensor in plain.state_dict().items() if tensor.is_meta]:
            raise LoRAError(f"the model has no tensor for {lost}; merge it with PEFT")
        plain.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "merged.json").write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    return Path(folder)


class AdapterShelf:
    """One base in memory, adapters beside it, by name, from their folders; each request takes one.

    `LoRAError` if a folder does not fit the base, or for the name "base", which means none.
    """

    def __init__(self, model: Any, adapters: Mapping[str, str | Path]) -> None:
        if BASE in adapters:
            raise LoRAError(f"{BASE!r} is the model without an adapter; choose another name")
        for name, folder in adapters.items():
            model = attach_adapter(model, folder, name=name)
        self.model = model.eval()
        self.names = [BASE, *adapters]

    def check(self, name: str) -> None:
        """Raise `LoRAError` unless there is a system of that name."""
        if name not in self.names:
            raise LoRAError(f"no adapter {name!r}; {did_you_mean(name, self.names)}")

    @contextmanager
    def using(self, name: str) -> Iterator[Any]:
        """The model with that adapter, while the block lasts; `LoRAError` if there is none."""
        self.check(name)
        if name != BASE:
            self.model.set_adapter(name)
        bare = name == BASE and hasattr(self.model, "disable_adapter")
        with self.model.disable_adapter() if bare else nullcontext():
            yield self.model
