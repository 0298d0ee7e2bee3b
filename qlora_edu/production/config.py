"""Support for chapter 9: the settings of a fine-tune, checked, with the paper's presets.

Whatever decides what a fine-tune does is one field of ``FinetuneConfig``. A wrong name, type or
value is refused when the configuration is made, not an hour into the training.

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023), appendix B.
"""

import difflib
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self, get_args, get_type_hints

from qlora_edu.errors import ConfigError

CHOICES = {
    "method": ("qlora", "lora", "full"),
    "quant_type": ("nf4", "fp4"),
    "compute_dtype": ("float32", "bfloat16"),
    "adapter_dtype": ("float32", "bfloat16"),
    "quant_storage": ("uint8", "bfloat16", "float32"),
    "optim": ("paged_adamw_32bit", "adamw_torch"),
    "lr_scheduler_type": ("constant", "constant_with_warmup", "linear", "cosine"),
    "chat_template": (None, "guanaco"),
}
AT_LEAST_ONE = (
    "r max_steps batch_size gradient_accumulation_steps max_length max_new_tokens eval_batch_size "
    "logging_steps save_total_limit"
)
NOT_NEGATIVE = "warmup_steps weight_decay lora_dropout seed save_steps sample_steps"
POSITIVE = "lora_alpha learning_rate max_grad_norm adam_beta2"


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything that decides what a fine-tune does. Checked when made; never changed afterwards.

    ``model`` and the two data sets are local paths (seen from here, or from the repository's root)
    or Hub names. ``method="lora"`` leaves the base unquantised and ``"full"`` trains all of it, for
    comparison. ``held_out_rows`` rows are measured; the first ``answer_rows`` of them also for
    exact match. ``output_dir=None`` takes the first free folder ``runs/<name>``, ``-2``, ``-3``…
    A step sees ``batch_size * gradient_accumulation`` rows, on however many processes. The packed
    weights are bytes (``quant_storage="uint8"``), or dressed as another dtype for FSDP, which
    shards only tensors of one dtype.

    Raises:
        ConfigError: naming the setting, its value, and what it should have been.

    >>> config = FinetuneConfig.from_preset("guanaco-7b", max_steps=10)
    >>> config.r, config.alpha, config.learning_rate, config.batch_size
    (64, 16.0, 0.0002, 1)
    """

    name: str
    model: str
    train_data: str
    held_out_data: str
    method: str = "qlora"
    # The 4-bit base (section 3 of the paper).
    quant_type: str = "nf4"
    double_quant: bool = True
    compute_dtype: str = "bfloat16"
    quant_storage: str = "uint8"
    # The adapter: on every linear layer but the output head, or on the layers of these names,
    # such as "q_proj,v_proj".
    target_modules: str = "all-linear"
    r: int = 64
    lora_alpha: float = 16.0
    lora_dropout: float = 0.1
    adapter_dtype: str = "bfloat16"
    # The training (appendix B of the paper).
    max_steps: int = 1875
    batch_size: int = 1
    gradient_accumulation_steps: int = 16
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "constant"
    warmup_steps: int = 0
    optim: str = "paged_adamw_32bit"
    adam_beta2: float = 0.999
    weight_decay: float = 0.0
    max_grad_norm: float = 0.3
    gradient_checkpointing: bool = True
    group_by_length: bool = True
    seed: int = 0
    # The data and the measurements.
    max_length: int = 512
    chat_template: str | None = None
    held_out_rows: int = 300
    answer_rows: int = 300
    max_new_tokens: int = 96
    eval_batch_size: int = 8
    logging_steps: int = 10
    # What a run leaves on the way: a checkpoint and two sample answers every so many steps, 0 for
    # none.
    save_steps: int = 100
    save_total_limit: int = 2
    sample_steps: int = 0
    output_dir: str | None = None

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for setting in fields(self):
            value = _typed(setting.name, getattr(self, setting.name), hints[setting.name])
            object.__setattr__(self, setting.name, value)
        limits = {
            **dict.fromkeys(AT_LEAST_ONE.split(), (lambda v: v >= 1, "at least 1")),
            **dict.fromkeys(NOT_NEGATIVE.split(), (lambda v: v >= 0, "at least 0")),
            **dict.fromkeys(POSITIVE.split(), (lambda v: 0 < v < math.inf, "above 0 and finite")),
            "lora_dropout": (lambda v: 0 <= v < 1, "in [0, 1)"),
            "adam_beta2": (lambda v: 0 < v < 1, "between 0 and 1"),
            "held_out_rows": (lambda v: v >= 1, "at least 1"),
            "target_modules": (
                lambda v: all(name.strip() for name in v.split(",")),
                "'all-linear' or names of layers with commas between them",
            ),
            "answer_rows": (lambda v: 0 <= v <= self.held_out_rows, "in 0 … held_out_rows"),
            **{name: (lambda v, c=c: v in c, f"one of {c}") for name, c in CHOICES.items()},
        }
        for name, (allowed, wanted) in limits.items():
            if not allowed(getattr(self, name)):
                raise ConfigError(f"{name} must be {wanted}, not {getattr(self, name)!r}")

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> Self:
        """The settings of a preset (see ``PRESETS``), with ``overrides`` on top."""
        if preset not in PRESETS:
            raise ConfigError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
        return cls(**_known({"name": preset, **PRESETS[preset], **overrides}))

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> Self:
        """Read a YAML mapping of settings; an entry ``preset:`` names where to start from."""
        import yaml

        try:
            settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read settings from {path}: {error}") from error
        if not isinstance(settings, dict):
            raise ConfigError(f"{path} must hold settings as `name: value`, not {settings!r}")
        settings |= overrides
        if "preset" in settings:
            return cls.from_preset(settings.pop("preset"), **settings)
        missing = [f for f in ("name", "model", "train_data", "held_out_data") if f not in settings]
        if missing:
            raise ConfigError(f"{path} lacks {', '.join(missing)}; or start from a `preset:`")
        return cls(**_known(settings))

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed, checked like any other."""
        return replace(self, **_known(changes))


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    names = [setting.name for setting in fields(FinetuneConfig)]
    for name in settings:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
            raise ConfigError(f"no setting {name!r}; {hint}")
    return settings


def _typed(name: str, value: Any, hint: Any) -> Any:
    allowed = get_args(hint) or (hint,)
    # YAML reads 2e-4 as a string; only 2.0e-4 is a number to it.
    if float in allowed and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif type(value) in allowed:
        return value
    wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed)
    raise ConfigError(f"{name} must be of type {wanted}, not {value!r}")


def _guanaco(size: str, learning_rate: float, lora_dropout: float) -> dict[str, Any]:
    """The paper's table 9: sizes differ in learning rate and dropout alone."""
    data = "timdettmers/openassistant-guanaco"
    return {
        "model": f"huggyllama/llama-{size}",
        "train_data": data,
        "held_out_data": data,
        "chat_template": "guanaco",
        "learning_rate": learning_rate,
        "lora_dropout": lora_dropout,
        "answer_rows": 0,  # free conversation has no single right answer to match
    }


PRESETS: dict[str, dict[str, Any]] = {
    "embedded": {
        "model": "data/base-model",
        "train_data": "data/tasks/train.jsonl",
        "held_out_data": "data/tasks/test.jsonl",
        "compute_dtype": "float32",
        "adapter_dtype": "float32",
        "r": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.0,
        "max_steps": 600,
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "group_by_length": False,  # here length gives the task family away
        "max_length": 256,
        "max_new_tokens": 72,
        "eval_batch_size": 100,
    },
    "guanaco-7b": _guanaco("7b", 2e-4, 0.1),
    "guanaco-13b": _guanaco("13b", 2e-4, 0.1),
    "guanaco-33b": _guanaco("30b", 1e-4, 0.05),
    "guanaco-65b": _guanaco("65b", 1e-4, 0.05),
}
