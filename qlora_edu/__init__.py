"""QLoRA from first principles: each chapter of the course is one module of this package.

A public name is fetched from its module when it is used, so `import qlora_edu` loads little.
"""

from importlib import import_module

_HOME = {
    "nf4_levels": "codebooks",
    "quantize": "quantized",
    "QuantizedTensor": "quantized",
    "LoRALinear": "lora",
    "QLoRALinear": "qlora",
    "PagedAdamW": "paging",
    "plan_memory": "memory",
    "FinetuneConfig": "production.config",
    "finetune": "finetuning",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _version()
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    # In a clone the file decides, whatever another installation of the package says.
    import tomllib
    from importlib.metadata import version

    from qlora_edu.files import ROOT

    project = ROOT / "pyproject.toml"
    if project.is_file():
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
    return version("qlora_edu")
