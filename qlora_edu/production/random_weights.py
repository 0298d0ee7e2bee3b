"""Support for chapter 9: a real architecture with random weights, to measure time and memory.

A step takes as long and as much memory with random weights as with trained ones. What such a model
*says* is noise, so it is labelled wherever it appears: no quality is ever measured with it.
"""

import json
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_edu.files import ROOT, atomic
from qlora_edu.planner import configuration
from qlora_edu.planner.fake_step import causal_model


def random_tensor(
    name: str, shape: Sequence[int], dtype: torch.dtype, device: str = "cpu"
) -> Tensor:
    """Make the random weight called `name`: always the same on the same kind of device.

    Norms are ones, other vectors zeros; matrices are normal with standard deviation 0.02.

    >>> random_tensor("model.norm.weight", [3], torch.float32)
    tensor([1., 1., 1.])
    """
    if len(shape) == 1:
        is_norm = name.endswith("weight") and ("norm" in name.lower() or ".ln_" in name)
        return (torch.ones if is_norm else torch.zeros)(*shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    values = torch.empty(*shape, dtype=dtype, device=device)
    return values.normal_(0, 0.02, generator=generator)  # Llama's own initializer_range


def write_random(
    folder: str | Path, model: Any, dtype: str = "bfloat16", shard_bytes: int = 4 * 2**30
) -> Path:
    """Write a model of random weights as a Hugging Face folder, never holding more than one shard.

    `model` is as for `plan_memory`; the tokenizer is that of the embedded base, and `config.json`
    says `"random_init": true`. A folder that is there already is a `RunExistsError`.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    skeleton = skeleton_of(model, dtype)
    kept = skeleton.state_dict()
    if skeleton.config.tie_word_embeddings:
        kept.pop("lm_head.weight", None)
    shards = split_torch_state_dict_into_shards(kept, max_shard_size=shard_bytes)
    with atomic.folder(folder) as part:
        for file, names in shards.filename_to_tensors.items():
            tensors = {n: random_tensor(n, kept[n].shape, kept[n].dtype) for n in names}
            save_file(tensors, part / file, metadata={"format": "pt"})
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
        skeleton.config.random_init = True
        skeleton.config.architectures = [type(skeleton).__name__]
        skeleton.config.save_pretrained(part)
        for path in (ROOT / "data" / "base-model").iterdir():
            if "token" in path.name or path.name == "chat_template.jinja":
                shutil.copy(path, part)
    return Path(folder)


def skeleton_of(model: Any, dtype: str) -> Any:
    """The model without its weights: they are on the device `meta`, buffers are real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return causal_model(configuration(model)[1], dtype)
