"""QLoRA from first principles: each chapter of the course is one module of this package.

`import qlora_edu` loads next to nothing. A public name is fetched from its chapter's module when it
is first used, and the heavy libraries load only with the functions that need them.
"""

import sys
from importlib import import_module

_HOME = {
    "nf4_levels": "codebooks",
    "quantize": "quantized",
    "QuantizedTensor": "quantized",
    "LoRALinear": "lora",
    "QLoRALinear": "qlora",
    "plan_memory": "memory",
    "PagedAdamW": "paging",
    "FinetuneConfig": "production.config",
    "finetune": "finetuning",
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
