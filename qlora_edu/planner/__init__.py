"""Which model a plan is for: by the name of a known shape, a folder, the Hub or a configuration."""

from pathlib import Path
from typing import Any

from torch import nn

from qlora_edu.errors import ModelUnavailableError, PlanError, did_you_mean

LLAMA_SHAPES = {
    "7B": (4096, 32, 11008),
    "13B": (5120, 40, 13824),
    "33B": (6656, 60, 17920),
    "65B": (8192, 80, 22016),
}
"""Width, number of blocks, inner width of the MLP; Touvron et al., "LLaMA" (2023), table 2."""
LLAMA_VOCABULARY = 32_000


def _llama(width: int, blocks: int, inner: int, **others: Any) -> dict[str, Any]:
    shape = {"hidden_size": width, "num_hidden_layers": blocks, "intermediate_size": inner}
    shape |= {"num_attention_heads": width // 128, "vocab_size": LLAMA_VOCABULARY}
    return {"model_type": "llama", **shape, "tie_word_embeddings": False, **others}


_QWEN = {"model_type": "qwen2", "num_attention_heads": 14, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    **{f"llama-{size.lower()}": _llama(*shape) for size, shape in LLAMA_SHAPES.items()},
    "llama-2-70b": _llama(8192, 80, 28672, num_key_value_heads=8),
    "llama-3-8b": _llama(4096, 32, 14336, num_key_value_heads=8, vocab_size=128256),
    "gpt2": {"model_type": "gpt2"},
    "qwen2.5-0.5b": _llama(896, 24, 4864, vocab_size=151936, tie_word_embeddings=True, **_QWEN),
}


def configuration(model: Any) -> tuple[str, Any]:
    """The name and the Hugging Face configuration of whatever `plan_memory` was given."""
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(model, nn.Module):
        model = getattr(model, "config", model)
    if isinstance(model, PreTrainedConfig):
        return model.model_type, model
    name = str(model) if isinstance(model, str | Path) else ""
    if name and name.lower() not in MODELS:
        return name, _read_configuration(name)
    try:
        shape = dict(MODELS[name.lower()] if name else model)
        kind = shape.pop("model_type")
        return name.lower() or kind, AutoConfig.for_model(kind, **shape)
    except Exception as error:  # the configuration of each kind has checks of its own
        raise PlanError(f"this describes no model ({error}): {model!r}") from error


def _read_configuration(name: str) -> Any:
    """The configuration in a folder or on the Hub."""
    from transformers import AutoConfig

    local = Path(name).exists()
    if not local and name.count("/") != 1:  # on the Hub a name has an owner
        raise PlanError(
            f"{name!r} is neither a folder with a config.json, nor a model on the Hub "
            f"(owner/name), nor a known shape: {did_you_mean(name.lower(), MODELS)}"
        )
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        if local:
            raise PlanError(f"{name} has no config.json that describes a model: {error}") from error
        raise ModelUnavailableError(
            f"no folder {name}, and the Hub does not give its configuration "
            f"({str(error).splitlines()[0]}): check name and network, log in if the model asks for "
            f"it, or plan for one of {', '.join(MODELS)}"
        ) from error
