"""A model of random weights on the card, built layer by layer, for the steps that are measured."""

from typing import Any

from torch import Tensor, nn

from qlora_edu.adapters import find_linear_layers, replace_module
from qlora_edu.planner.fake_step import StepSettings, add_adapters, quantized_layer
from qlora_edu.production.random_weights import random_tensor, skeleton_of


def build_random(model: Any, settings: StepSettings, device: str = "cpu") -> nn.Module:
    """Build a model of random weights on `device`, ready for a training step.

    With `method="qlora"` each linear layer is made, quantised and forgotten before the next: the
    most that is ever there is the finished part and one layer in 16 bits. Model and errors: as in
    `plan_memory`; `settings.backend` says whose 4-bit layers and adapters they are.
    """
    built = skeleton_of(model, settings.dtype)
    built.config.use_cache = False

    def fill(name: str, parameter: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        value = random_tensor(name, parameter.shape, parameter.dtype, device)
        setattr(built.get_submodule(owner), leaf, nn.Parameter(value))

    adapted: list[str] = []
    if settings.method == "qlora":
        adapted = find_linear_layers(built, settings.target_modules)
        every = find_linear_layers(built) if settings.backend == "bitsandbytes" else adapted
        for name in every:
            linear: Any = built.get_submodule(name)
            fill(f"{name}.weight", linear.weight)
            replace_module(built, name, quantized_layer(linear, settings))
    for name, parameter in list(built.named_parameters()):
        if parameter.is_meta:
            fill(name, parameter)
    built.tie_weights()
    built.to(device)  # the buffers: the table of rotary angles
    return add_adapters(built, settings, adapted)
