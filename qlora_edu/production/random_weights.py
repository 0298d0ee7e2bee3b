"""Support for chapter 9: a real architecture with random weights, to measure time and memory.

A step takes as long and as much memory with random weights as with trained ones. So where the Hub
is out of reach, the machine can still be measured: `write_random` writes a folder that the real
loader reads, shard by shard, and `build_random` makes a model layer by layer, each quantised before
the next is made, so that a 65B is never in memory in 16 bits. What such a model *says* is noise, so
it is labelled wherever it appears: no quality is ever measured with it.

    python -m qlora_edu.production.random_weights llama-7b runs/random-7b
"""

import argparse
import json
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_edu.errors import QloraError, RunExistsError
from qlora_edu.files import ROOT, atomic
from qlora_edu.planner import MODELS, configuration
from qlora_edu.planner.fake_step import StepSettings, add_adapters, causal_model, quantize_layers

STANDARD_DEVIATION = 0.02  # Llama's own initializer_range


def random_tensor(
    name: str, shape: Sequence[int], dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> Tensor:
    """Make the random weight called `name`: always the same on the same kind of device.

    Vectors named as norms are ones, other vectors zeros, as when training begins; matrices are
    normal with standard deviation 0.02.

    >>> random_tensor("model.norm.weight", [3], torch.float32)
    tensor([1., 1., 1.])
    >>> round(random_tensor("up_proj.weight", [64, 64], torch.float32).std().item(), 2)
    0.02
    """
    if len(shape) == 1:
        filled = torch.ones if "norm" in name and name.endswith("weight") else torch.zeros
        return filled(*shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed ^ zlib.crc32(name.encode()))
    values = torch.empty(*shape, dtype=dtype, device=device)
    return values.normal_(0, STANDARD_DEVIATION, generator=generator)


def write_random(
    folder: str | Path,
    model: Any,
    dtype: str = "bfloat16",
    shard_bytes: int = 4 * 2**30,
    seed: int = 0,
) -> Path:
    """Write a model of random weights as a Hugging Face folder, never holding more than one shard.

    The tokenizer is that of the embedded base: any text becomes ids that the model has. The folder
    is written whole or not at all; `config.json` says `"random_init": true`.

    Args:
        folder: to be made.
        model: as for `plan_memory`: a name such as "llama-7b", or a configuration.
        dtype: of the weights.
        shard_bytes: the most that a file holds.
        seed: another one gives other weights.

    Raises:
        RunExistsError: the folder is there already.
        PlanError: the model is not known.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.exists():
        raise RunExistsError(f"{folder} exists, and nothing is overwritten; choose another folder")
    skeleton = _skeleton(model, dtype)
    kept = skeleton.state_dict()
    if skeleton.config.tie_word_embeddings:
        kept.pop("lm_head.weight", None)
    index: dict[str, str] = {}
    with atomic.folder(folder) as part:
        shards = list(_shards(kept, shard_bytes))
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {
                n: random_tensor(n, kept[n].shape, kept[n].dtype, "cpu", seed) for n in names
            }
            save_file(tensors, part / file, metadata={"format": "pt"})
            index |= dict.fromkeys(names, file)
        total = sum(tensor.nbytes for tensor in kept.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
        (part / "model.safetensors.index.json").write_text(text + "\n")
        skeleton.config.random_init = True
        skeleton.config.architectures = [type(skeleton).__name__]
        skeleton.config.save_pretrained(part)
        for path in (ROOT / "data" / "base-model").iterdir():
            if "token" in path.name or path.name == "chat_template.jinja":
                shutil.copy(path, part)
    return folder


def build_random(
    model: Any, settings: StepSettings, device: str = "cpu", lora_alpha: float = 16.0, seed: int = 0
) -> nn.Module:
    """Build a model of random weights on `device`, ready for a training step.

    With `method="qlora"` each linear layer is made, quantised and forgotten before the next: the
    most that is ever there is the finished part and one layer in 16 bits.

    Args:
        model: as for `plan_memory`.
        settings: `settings.backend` says whose 4-bit layers and adapters they are.

    Raises:
        PlanError: see `plan_memory`.
    """
    built = _skeleton(model, settings.dtype)
    built.config.use_cache = False
    dtype = getattr(torch, settings.dtype)

    def make_weight(name: str, linear: nn.Linear) -> Tensor:
        return random_tensor(f"{name}.weight", linear.weight.shape, dtype, device, seed)

    adapted = quantize_layers(built, settings, make_weight=make_weight, lora_alpha=lora_alpha)
    for name, parameter in list(built.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            value = random_tensor(name, parameter.shape, parameter.dtype, device, seed)
            setattr(built.get_submodule(owner), leaf, nn.Parameter(value))
    built.tie_weights()
    built.to(device)  # the buffers: the table of rotary angles
    return add_adapters(built, settings, adapted, lora_alpha=lora_alpha)


def _skeleton(model: Any, dtype: str) -> Any:
    """The model without its weights: they are on the device `meta`, buffers are real."""
    from accelerate import init_empty_weights

    _, config = configuration(model)
    with init_empty_weights(include_buffers=False):
        return causal_model(config, dtype)


def _shards(tensors: dict[str, Tensor], limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: a model's name and the folder to make."""
    parser = argparse.ArgumentParser(
        prog="python -m qlora_edu.production.random_weights",
        description="Write a real architecture with random weights, to measure time and memory.",
    )
    parser.add_argument("model", help=f"{', '.join(MODELS)}, or a folder with a config.json")
    parser.add_argument("folder", help="to be made; 2 bytes per parameter")
    arguments = parser.parse_args(argv)
    try:
        folder = write_random(arguments.folder, arguments.model)
    except (QloraError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{folder} written. RANDOM WEIGHTS: time and memory are real, its answers are noise")
    return 0


if __name__ == "__main__":
    sys.exit(main())
