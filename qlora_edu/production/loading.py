"""Support for chapters 9 and 10: load a base, and the adapter that was trained on it.

Weights come from safetensors only, and no code from the Hub is ever run.
"""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_edu.adapters import PEFT_PREFIX, check_tensors, refuse_adapters
from qlora_edu.compat import forbid_cpu_repacking, quiet
from qlora_edu.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DoesNotFitError,
    LoRAError,
    ModelUnavailableError,
    did_you_mean,
    reading,
)
from qlora_edu.files import ROOT
from qlora_edu.production.checkpoints import fingerprint, verify_manifest
from qlora_edu.production.config import FinetuneConfig
from qlora_edu.text.conversations import GUANACO_TEMPLATE


def quantization_config(config: FinetuneConfig) -> Any:
    """The `BitsAndBytesConfig`, every field said; None unless the method is QLoRA."""
    from transformers import BitsAndBytesConfig

    if config.method != "qlora":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quant_type,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, config.compute_dtype),
        bnb_4bit_quant_storage=torch.uint8,
        load_in_8bit=False,
        llm_int8_threshold=6.0,  # the llm_int8 fields act in 8 bits only, save for the next one
        llm_int8_skip_modules=["lm_head"],
        llm_int8_enable_fp32_cpu_offload=False,
        llm_int8_has_fp16_weight=False,
    )


def load_base(config: FinetuneConfig) -> tuple[Any, Any]:
    """Model and tokenizer, from a folder or the Hub; the tokenizer has a token to pad with."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = locate(config.model)
    try:
        if not Path(source).is_dir() and try_to_load_from_cache(source, "config.json") is None:
            # One quick question; transformers would ask for a minute before giving up.
            HfApi().model_info(source, timeout=10)
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=getattr(torch, config.base_dtype),
                quantization_config=quantization_config(config),
                device_map={"": 0} if torch.cuda.is_available() else None,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except torch.OutOfMemoryError as error:
        said = f"{config.model!r} does not fit in memory"
        raise DoesNotFitError(f"{said}; take method=qlora or a smaller model") from error
    except Exception as error:  # configuration, tokenizer and weights have errors of their own
        raise ModelUnavailableError(
            f"cannot load the base model {config.model!r} ({type(error).__name__}: {error}). Name "
            "one of the Hub or a folder with safetensors ('hf download NAME --local-dir FOLDER'), "
            "or take the preset 'embedded', which needs no network"
        ) from error
    model, found = loaded
    if lacking := sorted(found["missing_keys"]):
        said = f"the weights of {config.model!r} lack {len(lacking)} tensors ({lacking[0]}, …)"
        raise ModelUnavailableError(f"{said}, which would be drawn at random; download it again")
    if extra := sorted(found["unexpected_keys"]):
        print(f"warning: left out: there is no layer for {len(extra)} tensors ({extra[0]}, …)")
    if config.chat_template == "guanaco":
        tokenizer.chat_template = GUANACO_TEMPLATE
    if tokenizer.pad_token is None:
        # Padding is masked by position, never by its id, so sharing the end token is harmless here.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    forbid_cpu_repacking(model)
    if getattr(model.config, "random_init", False):
        print(f"RANDOM WEIGHTS: {config.model} was never trained; only time and memory are real")
    return model, tokenizer


def locate(name: str) -> str:
    """A local path as it is, or under the repository's root if it is there; else a Hub name."""
    exists = os.path.exists  # which says no to what can be no path, instead of raising
    return name if exists(name) or not exists(ROOT / name) else str(ROOT / name)


def load_run(folder: str | Path, base: str | None = None) -> tuple[Any, Any]:
    """The fine-tuned model of a run folder and its tokenizer; `base` if the base has moved."""
    folder = Path(folder)
    metadata = verify_manifest(folder)
    config = FinetuneConfig.from_yaml(folder / "config.yaml")
    if config.method == "full":
        return load_base(config.replace(model=str(folder)))
    config = config.replace(model=base or config.model)
    model, tokenizer = load_base(config)
    if fingerprint(locate(config.model)) != metadata["base_sha256"]:
        said = f"the adapter in {folder} was trained on other weights than {config.model!r} has"
        advice = f"pass base= with {metadata['base_model']!r} as it was"
        raise CheckpointError(f"{said}. It would load, and answer badly; {advice}")
    return attach_adapter(model, folder), tokenizer


def attach_adapter(model: Any, folder: str | Path, *, name: str = "default") -> Any:
    """Attach an adapter that PEFT or this course has written to `model`: all of it, or none.

    One on some layers only must say so by `layers_to_transform`. To what this returns a second one
    can be attached; it waits there for `set_adapter(name)`. `model` itself is changed.
    """
    from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from peft import set_peft_model_state_dict as fill
    from safetensors.torch import load_file

    folder = Path(folder)
    if "." in name or not name:  # in a ModuleDict, where PEFT keeps them, dots part a path
        raise LoRAError(f"an adapter cannot be called {name!r}; choose a name without a dot")
    if not (several := isinstance(model, PeftModel)):
        refuse_adapters(model)
    elif name in model.peft_config:
        raise LoRAError(f"there is an adapter {name!r} already; pass another name=")
    advice = "a folder with adapter_model.safetensors and adapter_config.json is wanted"
    with reading(f"the adapter in {folder}", LoRAError, advice):
        tensors = load_file(folder / "adapter_model.safetensors")
        config = PeftConfig.from_pretrained(str(folder))
        _check_adapter(config, tensors)
    layers = {tensor.partition(".lora_")[0] for tensor in tensors if ".lora_" in tensor}
    known = {("" if several else PEFT_PREFIX) + layer for layer, _ in model.named_modules()}
    if lost := sorted(layers - known):
        said = f"{lost[0]} of the adapter in {folder} is not a layer of this model"
        raise LoRAError(f"{said}; load the base that the adapter was trained on")
    # All layers of the kinds that have tensors: so a deeper base is noticed, and the regular
    # expression of a stranger, which may take for ever, is not run.
    config.target_modules = sorted({layer.rpartition(".")[2] for layer in layers})
    config.base_model_name_or_path = None  # PEFT writes down what the base is called here
    with quiet():
        adapted = model if several else get_peft_model(model, config, adapter_name=name)
        if several:
            model.add_adapter(name, config)
        try:
            own = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
            check_tensors(own, tensors)
        except LoRAError:
            adapted.delete_adapter(name) if several else adapted.unload()
            raise
        fill(adapted, tensors, adapter_name=name)
    return adapted.eval()


def _check_adapter(config: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse, before a base is touched, settings that no LoRA adapter has."""
    if not hasattr(config, "lora_alpha"):
        raise LoRAError(f"the adapter is of the kind {config.peft_type}; LoRA is wanted")
    if not any(".lora_" in name for name in tensors):
        raise LoRAError("the adapter is empty: no LoRA tensor was saved, or the file was cut")
    if isinstance(config.exclude_modules, str):  # a regular expression, which may take for ever
        raise LoRAError("the adapter has a text as exclude_modules; make it a list of names")
    for alpha in (config.lora_alpha, *(config.alpha_pattern or {}).values()):
        if type(alpha) not in (int, float) or not 0 < alpha < 1e6:
            raise LoRAError(f"the adapter's lora_alpha is {alpha!r}; a number above 0 is wanted")
    ranks = {config.r, *(config.rank_pattern or {}).values()}
    for name, tensor in tensors.items():
        if "lora_A.weight" in name and tensor.shape[0] not in ranks:
            found = f"{name} has rank {tensor.shape[0]}, and its configuration says r = {config.r}"
            raise LoRAError(f"{found}; take both files from one place")


def check_targets(model: torch.nn.Module, config: FinetuneConfig) -> None:
    """Refuse a target that matches no linear layer."""
    linear = [f".{name}" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    for target in () if config.target_modules == "all-linear" else config.targets:
        if not any(name.endswith(f".{target}") for name in linear):
            hint = did_you_mean(target, sorted({name.rpartition(".")[2] for name in linear}))
            raise ConfigError(f"target_modules: no linear layer is called {target!r}; {hint}")


def check_positions(model: Any, rows: Iterable[dict[str, list[int]]]) -> None:
    """Make sure that the model has a position for each token of each row."""
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    longest = max(len(row["input_ids"]) for row in rows)
    if longest > positions:
        said = f"a row has {longest:,} tokens, and the model knows {positions:,} positions"
        raise DataError(f"{said}; lower max_length to that")
