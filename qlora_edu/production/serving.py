"""Support for chapter 10: what a trained adapter becomes when it goes to work.

There are two ways. **Merged**, `ΔW` is added to the weight and the adapter is gone: a plain
checkpoint that any program loads, as fast as the base, in 16 bits. **Unmerged**, one base serves
several adapters, and each request says which: a little slower, but ten assistants take the memory
of one base and ten small files.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_edu.compat import quiet
from qlora_edu.errors import LoRAError, RunExistsError
from qlora_edu.files import atomic
from qlora_edu.production.config import did_you_mean
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
    """The weights of a PEFT model with its adapter merged, under the names of the plain model.

    A base that was never quantised has only one way, and `into` is not looked at.

    Args:
        model: a PEFT model with one active adapter.
        into: as for `merge_weight`: `"dequantized"`, the base that the adapter was trained beside;
            `"original"`, whose tensors are then wanted; or `"4-bit"`.
        dtype: of the merged weights.
        original: the base's tensors before it was quantised, by name.

    Raises:
        LoRAError: if the adapter is more than LoRA on linear layers, if nothing is adapted, or if
            the merged weights would not be finite.
    """
    if into not in MERGE_TARGETS:
        raise LoRAError(f"into must be one of {MERGE_TARGETS}, not {into!r}")
    config = model.peft_config[model.active_adapter]
    for field in ("modules_to_save", "use_dora", "trainable_token_indices"):
        if getattr(config, field, None):
            raise LoRAError(
                f"this adapter has {field}; only plain LoRA can be merged here: merge it with PEFT"
            )
    base, merged, changed = model.get_base_model(), {}, 0
    for name, parameter in base.named_parameters():
        if "lora_" in name:
            continue
        owner, _, leaf = name.rpartition(".")
        owner = owner.removesuffix(".base_layer")
        module = base.get_submodule(owner)
        plain_name = f"{owner}.{leaf}"
        if leaf != "weight" or not hasattr(module, "get_delta_weight"):
            merged[plain_name] = parameter.detach().to(dtype)
            continue
        changed += 1
        delta = module.get_delta_weight(model.active_adapter).detach()
        weight = _weight_of(module.get_base_layer())
        if isinstance(weight, QuantizedTensor):
            before = None if original is None else original.get(plain_name)
            merged[plain_name] = merge_weight(weight, delta, into, before, dtype).to(dtype)
        else:
            total = weight.float() + delta.float()
            if not total.isfinite().all():
                raise LoRAError(
                    f"merging would write NaN or infinity into {plain_name}: adapter or base are "
                    "damaged; load them again"
                )
            merged[plain_name] = total.to(dtype)
    if not changed:
        raise LoRAError(
            "no layer of this model is adapted; attach an adapter, or nothing is to merge"
        )
    return merged


def write_merged(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    into: str = "dequantized",
    dtype: torch.dtype = torch.bfloat16,
    original: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the merged model as a Hugging Face folder: it loads anywhere, without PEFT.

    The folder is written whole or not at all. `merged.json` in it says what was merged into what.

    Raises:
        RunExistsError: if the folder is there already.
        LoRAError: see `merged_tensors`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    if folder.exists():
        raise RunExistsError(f"{folder} exists, and nothing is overwritten; choose another folder")
    tensors = merged_tensors(model, into, dtype, original)
    fields = model.get_base_model().config.to_dict()
    for field in ("quantization_config", "_name_or_path"):
        fields.pop(field, None)
    config = AutoConfig.for_model(**fields)
    with init_empty_weights(include_buffers=False):
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(tensors, strict=False, assign=True)
    plain.tie_weights()
    left = [name for name, parameter in plain.named_parameters() if parameter.is_meta]
    if left:
        raise LoRAError(
            f"the merged model lacks {', '.join(left)}; give the model that was fine-tuned, whole"
        )
    adapter = model.peft_config[model.active_adapter]
    metadata = {
        "base_model": adapter.base_model_name_or_path,
        "merged_into": into,
        "dtype": str(dtype).removeprefix("torch."),
        "r": adapter.r,
        "lora_alpha": adapter.lora_alpha,
    }
    with atomic.folder(folder) as part, quiet():
        plain.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "merged.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    return folder


def _weight_of(layer: nn.Module) -> Tensor | QuantizedTensor:
    """The weight of a linear layer; if bitsandbytes holds it in 4 bits, as our own kind."""
    if not hasattr(layer.weight, "quant_state"):
        return layer.weight.detach()
    return QuantizedTensor.from_state_dict(layer.state_dict())


class AdapterShelf:
    """One base in memory, several adapters beside it, and each request takes one.

    Each adapter is attached on its own; they are never added up.

    Args:
        model: the base; it is changed, and gets all adapters.
        adapters: the folder of each, by name.

    Raises:
        LoRAError: if a folder does not fit the base, or for the name "base", which means none.
    """

    def __init__(self, model: Any, adapters: Mapping[str, str | Path]) -> None:
        if BASE in adapters:
            raise LoRAError(f"{BASE!r} is the model without an adapter; choose another name")
        for name, folder in adapters.items():
            model = attach_adapter(model, folder, name=name)
        self.model = model.eval()
        self.names = [BASE, *adapters]

    @contextmanager
    def using(self, name: str) -> Iterator[Any]:
        """The model with that adapter, for as long as the block lasts.

        Raises:
            LoRAError: if there is none of that name; it names those that are there.
        """
        self.check(name)
        if len(self.names) == 1:
            yield self.model
        elif name == BASE:
            with self.model.disable_adapter():
                yield self.model
        else:
            self.model.set_adapter(name)
            yield self.model

    def check(self, name: str) -> None:
        """Raise `LoRAError` unless there is a system of that name."""
        if name not in self.names:
            raise LoRAError(f"no adapter {name!r}; {did_you_mean(name, self.names)}")

    def nbytes(self, name: str) -> int:
        """Bytes that a system needs beside the others: an adapter's tensors, or all of the base."""
        self.check(name)
        named = dict(self.model.named_parameters())
        of_base = {n for n in named if "lora_" not in n}
        if name == BASE:
            return sum(_nbytes(named[n]) for n in of_base)
        return sum(_nbytes(p) for n, p in named.items() if f".{name}." in n and n not in of_base)


def _nbytes(parameter: Tensor) -> int:
    """Bytes of a parameter, the constants of a packed one included."""
    state = getattr(parameter, "quant_state", None)
    extra = state.as_dict(packed=True).values() if state is not None else ()
    return parameter.nbytes + sum(tensor.nbytes for tensor in extra)
