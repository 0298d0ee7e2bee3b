"""Support for chapters 9 and 10: load a base model, with everything that matters said out loud.

Weights come from safetensors only, and no code from the Hub is ever run. The 4-bit layers of
bitsandbytes are loaded so that they stay trainable, whatever is evaluated first.
"""

import os
from pathlib import Path
from typing import Any

import torch

from qlora_edu.adapters import PEFT_PREFIX, AdapterMismatchError, check_tensors
from qlora_edu.compat import forbid_cpu_repacking, quiet
from qlora_edu.errors import ConfigError, LoRAError, ModelUnavailableError
from qlora_edu.files import ROOT
from qlora_edu.files.peft_format import AdapterFileError
from qlora_edu.production.checkpoints import WrongBaseError, fingerprint, verify_manifest
from qlora_edu.production.config import FinetuneConfig
from qlora_edu.text.conversations import GUANACO_TEMPLATE


def quantization_config(config: FinetuneConfig) -> Any:
    """The ``BitsAndBytesConfig``, every field said; None unless the method is QLoRA."""
    from transformers import BitsAndBytesConfig

    if config.method != "qlora":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quant_type,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, config.compute_dtype),
        bnb_4bit_quant_storage=getattr(torch, config.quant_storage),
        load_in_8bit=False,
        llm_int8_threshold=6.0,  # the llm_int8 fields act in 8 bits only, save for the next one
        llm_int8_skip_modules=["lm_head"],
        llm_int8_enable_fp32_cpu_offload=False,
        llm_int8_has_fp16_weight=False,
    )


def load_base(config: FinetuneConfig) -> tuple[Any, Any]:
    """Model and tokenizer, from a folder or the Hub: safetensors only, and never remote code.

    Raises:
        ModelUnavailableError: naming the model and the ways out.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cuda, source = torch.cuda.is_available(), locate(config.model)
    card = int(os.environ.get("LOCAL_RANK", 0))  # each of several processes has its own
    # Full fine-tuning keeps float32 weights: bfloat16 would round its small steps away.
    dtype = "float32" if config.method == "full" else config.compute_dtype
    try:
        _check_reachable(source)
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=getattr(torch, dtype),
                quantization_config=quantization_config(config),
                device_map={"": card} if cuda and not fsdp() else None,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelUnavailableError(
            f"cannot load the base model {config.model!r} ({type(error).__name__}: {error}). It "
            "must be a folder on this machine or a name on the Hugging Face Hub, with its weights "
            "in safetensors. Without the Hub: download it on another machine ('hf download NAME "
            "--local-dir FOLDER') and set model=FOLDER, or use the preset 'embedded', which needs "
            "no network"
        ) from error
    if config.chat_template == "guanaco":
        tokenizer.chat_template = GUANACO_TEMPLATE
    if tokenizer.pad_token is None:
        # Padding is masked by position, never by its id, so sharing the end token is harmless here.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    forbid_cpu_repacking(model)
    if getattr(model.config, "random_init", False):
        print(
            f"RANDOM WEIGHTS: {config.model} was never trained; time and memory are real, no more"
        )
    return model, tokenizer


def load_run(folder: str | Path, base: str | None = None) -> tuple[Any, Any]:
    """The fine-tuned model of a run folder, ready to answer, and its tokenizer.

    Every file is held against the manifest, and the base against the fingerprint in it. ``base``
    is where the base is now, if not where the run found it.

    Raises:
        DamagedFileError: naming a file that is missing or changed.
        WrongBaseError: if the base is another, even one of the same shape.
        ModelUnavailableError: if the base cannot be had.
        LoRAError: in the kinds of ``attach_adapter``.
    """
    folder = Path(folder)
    facts = verify_manifest(folder)
    config = FinetuneConfig.from_yaml(folder / "config.yaml")
    if config.method == "full":
        return load_base(config.replace(model=str(folder)))
    config = config.replace(model=base or config.model)
    model, tokenizer = load_base(config)
    found = fingerprint(locate(config.model))
    if found != facts["base_sha256"]:
        raise WrongBaseError(
            f"the adapter in {folder} was trained on {facts['base_model']!r} (SHA-256 "
            f"{facts['base_sha256'][:12]}…), and the weights of {config.model!r} are others "
            f"({found[:12]}…). It would load, and answer badly; pass base= with the right one"
        )
    return attach_adapter(model, folder), tokenizer


def attach_adapter(
    model: Any, folder: str | Path, *, allow_partial: bool = False, name: str = "default"
) -> Any:
    """Lay an adapter that PEFT or this course has written on ``model``: all of it, or none.

    A model that has an adapter already gets another one beside it, under another ``name``.

    PEFT itself would pass over tensors that are missing (a deeper base), left over or damaged.
    Whether the *weights* of the base are the right ones only ``load_run`` can tell.
    ``allow_partial`` lets an adapter pass that was meant for some blocks only.

    Raises:
        AdapterFileError, DamagedAdapterError, AdapterMismatchError, UntrainedAdapterError: see
            ``qlora_edu.adapters``.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from peft import set_peft_model_state_dict as fill
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise AdapterFileError(f"{folder} holds no adapter to be read: {error!r}") from error
    changed = {name.removeprefix(PEFT_PREFIX).partition(".lora_")[0] for name in tensors}
    kinds = {name.rpartition(".")[2] for name in changed}
    linear = {
        name.removeprefix(PEFT_PREFIX).removesuffix(".base_layer")
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    left_out = sorted(n for n in linear if n.rpartition(".")[2] in kinds and n not in changed)
    if left_out and not allow_partial and not getattr(config, "layers_to_transform", None):
        raise AdapterMismatchError(
            f"the adapter in {folder} leaves out {len(left_out)} layers of the kinds that it "
            f"changes ({left_out[0]}, …): the base is deeper than its own. Use the base that it "
            "was trained on, or allow_partial=True if some blocks were left out on purpose",
            left_out,
        )
    several = hasattr(model, "peft_config")
    config.base_model_name_or_path = None  # PEFT writes down what the base is called here
    with quiet():
        if several:
            adapted = model
            model.add_adapter(name, config)
        else:
            adapted = get_peft_model(model, config, adapter_name=name)
        try:
            own = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
            check_tensors(own, tensors)
        except LoRAError:
            adapted.delete_adapter(name) if several else adapted.unload()
            raise
        fill(adapted, tensors, adapter_name=name)
    return adapted.eval()


def fsdp() -> bool:
    """Was this process launched to share the base out with others (accelerate's FSDP)?"""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def check_one_dtype(model: torch.nn.Module) -> None:
    """Refuse a model that FSDP of version 1 cannot flatten: all its tensors must be of one dtype.

    Packed 4-bit weights count with the dtype that they are stored as (``quant_storage``).

    Raises:
        ConfigError: naming the dtypes, a tensor of each, and what to set.
    """
    example: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        example.setdefault(parameter.dtype, name)
    if len(example) > 1 or not next(iter(example)).is_floating_point:
        found = "; ".join(f"{dtype}, as {name}" for dtype, name in example.items())
        raise ConfigError(
            f"FSDP flattens all tensors of a block into one, so they must be of one floating "
            f"dtype, and here are {found}. Set quant_storage, compute_dtype and adapter_dtype to "
            "the same, such as bfloat16"
        )


def locate(name: str) -> str:
    """A local path as it is, or under the repository's root if it is there; else a Hub name."""
    return name if Path(name).exists() or not (ROOT / name).exists() else str(ROOT / name)


def _check_reachable(source: str) -> None:
    # One quick question; otherwise transformers would ask for a minute, noisily, before giving up.
    from huggingface_hub import HfApi, try_to_load_from_cache

    if Path(source).is_dir() or try_to_load_from_cache(source, "config.json") is not None:
        return
    try:
        HfApi().model_info(source, timeout=10)
    except Exception as error:  # each of the Hub's layers has exceptions of its own
        raise OSError(f"the Hub did not answer: {error}") from error
