"""Support for chapter 9: a real architecture with random weights, to measure time and memory.

A step takes as long and as much memory with random weights as with trained ones. So where the Hub
is out of reach, the machine can still be measured: ``write_random`` writes a folder that the real
loader reads, shard by shard, and ``build_random`` makes a model layer by layer, each quantised
before the next is made, so that a 65B never stands in 16 bits anywhere. What such a model *says* is
noise, so it is labelled wherever it appears: no quality is ever measured with it.
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

from qlora_edu.adapters import add_houlsby, add_lora, find_linear_layers, replace_module
from qlora_edu.errors import PlanError
from qlora_edu.memory import MODELS, configuration
from qlora_edu.planner.fake_step import StepSettings
from qlora_edu.qlora import FusedQLoRALinear

STANDARD_DEVIATION = 0.02  # Llama's own initializer_range


def random_tensor(
    name: str, shape: Sequence[int], dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> Tensor:
    """The random weight called ``name``: always the same on the same kind of device.

    Vectors named as norms are ones, other vectors zeros, as when training begins.

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

    ``model`` is as for ``plan_memory``: a name such as "llama-7b", or a configuration. The
    tokenizer is that of the embedded base: any text becomes ids that the model has. The folder is
    written whole or not at all; ``config.json`` says ``"random_init": true``.

    Raises:
        FileExistsError: if the folder is there already.
        PlanError: if the model is not known, or has fewer tokens than the tokenizer.
    """
    from safetensors.torch import save_file

    from qlora_edu.files.atomic import whole_or_absent
    from qlora_edu.production.loading import ROOT

    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists, and nothing is overwritten; choose another folder")
    skeleton = _skeleton(model, dtype)
    kept = skeleton.state_dict()
    if skeleton.config.tie_word_embeddings:
        kept.pop("lm_head.weight", None)
    index: dict[str, str] = {}
    with whole_or_absent(folder) as part:
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
        for path in (ROOT / "data" / "base-model").glob("*token*"):
            shutil.copy(path, part)
        template = ROOT / "data" / "base-model" / "chat_template.jinja"
        if template.exists():
            shutil.copy(template, part)
    return folder


def build_random(
    model: Any, settings: StepSettings, device: str = "cpu", lora_alpha: float = 16.0, seed: int = 0
) -> nn.Module:
    """A model of random weights on ``device``, ready for a training step.

    With ``method="qlora"`` each linear layer is made, quantised and forgotten before the next: the
    most that ever lives is the finished part and one layer in 16 bits. ``settings.stack`` says
    whose 4-bit layers and adapters they are.

    Raises:
        PlanError: see ``plan_memory``.
    """
    built = _skeleton(model, settings.dtype)
    built.config.use_cache = False
    if settings.method == "qlora":
        for name in find_linear_layers(built, settings.target_modules):
            replace_module(built, name, _in_4_bits(built, name, settings, device, lora_alpha, seed))
    for name, parameter in list(built.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            value = random_tensor(name, parameter.shape, parameter.dtype, device, seed)
            setattr(built.get_submodule(owner), leaf, nn.Parameter(value))
    built.tie_weights()
    built.to(device)  # the buffers: the table of rotary angles
    return _with_adapters(built, settings, lora_alpha).train()


def _in_4_bits(
    built: nn.Module, name: str, settings: StepSettings, device: str, lora_alpha: float, seed: int
) -> nn.Module:
    """Make the weight of one linear layer, quantise it, and forget it."""
    empty = built.get_submodule(name)
    dtype = getattr(torch, settings.dtype)
    weight = random_tensor(f"{name}.weight", empty.weight.shape, dtype, device, seed)
    if settings.backend == "qlora_edu":
        empty.weight = nn.Parameter(weight, requires_grad=False)
        return FusedQLoRALinear(
            empty,
            settings.r,
            lora_alpha,
            settings.lora_dropout,
            levels=settings.quant_type,
            blocksize=settings.blocksize,
            double_quant=settings.double_quant,
        )
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(
        empty.in_features,
        empty.out_features,
        bias=False,
        compute_dtype=weight.dtype,
        compress_statistics=settings.double_quant,
        quant_type=settings.quant_type,
        device="meta",
    )
    layer.weight = Params4bit(
        weight,
        requires_grad=False,
        blocksize=settings.blocksize,
        compress_statistics=settings.double_quant,
        quant_type=settings.quant_type,
        module=layer,
    ).to(weight.device)
    layer.support_avx512bf16_for_cpu = False
    return layer


def _with_adapters(model: nn.Module, settings: StepSettings, lora_alpha: float) -> nn.Module:
    if settings.method == "lora":
        add_lora(
            model,
            settings.r,
            lora_alpha,
            target_modules=settings.target_modules,
            lora_dropout=settings.lora_dropout,
        )
    elif settings.method == "houlsby":
        add_houlsby(model, settings.bottleneck)
    elif settings.method == "qlora":
        if settings.backend == "bitsandbytes":
            from peft import LoraConfig, get_peft_model

            target_modules = (
                settings.target_modules
                if isinstance(settings.target_modules, str)
                else [*settings.target_modules]
            )
            lora = LoraConfig(
                task_type="CAUSAL_LM",
                r=settings.r,
                lora_alpha=lora_alpha,
                lora_dropout=settings.lora_dropout,
                target_modules=target_modules,
                bias="none",
            )
            model.is_loaded_in_4bit = True
            model = get_peft_model(model, lora)
        else:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lora_" in name)
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if settings.method != "full":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, settings.adapter_dtype))
    return model


def _skeleton(model: Any, dtype: str) -> nn.Module:
    """The model without its weights: they are on the device `meta`, buffers are real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    _, config = configuration(model)
    with init_empty_weights(include_buffers=False):
        try:
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        except ValueError as error:
            raise PlanError(f"no causal language model can be made of this: {error}") from error


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
    """The command line: ``random-init llama-7b runs/random-7b``."""
    parser = argparse.ArgumentParser(
        prog="qlora_edu random-init",
        description="Write a real architecture with random weights, to measure time and memory.",
    )
    parser.add_argument("model", help=f"{', '.join(MODELS)}, or a folder with a config.json")
    parser.add_argument("folder", help="to be made; 2 bytes a parameter")
    arguments = parser.parse_args(argv)
    try:
        folder = write_random(arguments.folder, arguments.model)
    except (PlanError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{folder} written. RANDOM WEIGHTS: time and memory are real, its answers are noise")
    return 0
