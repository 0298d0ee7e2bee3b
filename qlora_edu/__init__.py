"""QLoRA from first principles: each chapter of the course is one module of this package.

`import qlora_edu` loads next to nothing. A public name is fetched from its chapter's module when it
is first used, and the heavy libraries load only with the functions that need them.
"""

import sys
from importlib import import_module
from types import ModuleType

_HOME = {
    "nf4_levels": "codebooks",
    "quantize": "double_quant",
    "QuantizedTensor": "double_quant",
    "LoRALinear": "lora",
    "QLoRALinear": "qlora",
    "plan_memory": "memory",
    "PagedAdamW": "paging",
    "FinetuneConfig": "finetune",
    "finetune": "finetune",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `qlora_edu.finetune` the function: importing the module of that name would hide it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
