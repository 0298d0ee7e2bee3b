"""Support for chapter 9: the settings of a fine-tune, checked, with the paper's presets.

Each field says what it means, and `python -m qlora_edu finetune --help` prints them all. A wrong
name, type or value is refused when the configuration is made, not an hour into the training.

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023), appendix B.
"""

import contextlib
import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from qlora_edu.errors import ConfigError, reading

LARGEST = 2**31 - 1  # a larger number NumPy or the trainer would not take, or overflow later
AT_LEAST_ONE = (
    "r max_steps batch_size gradient_accumulation_steps max_length held_out_rows max_new_tokens "
    "eval_batch_size logging_steps save_total_limit"
)
NOT_NEGATIVE = "warmup_steps weight_decay seed save_steps sample_steps"
POSITIVE = "lora_alpha learning_rate max_grad_norm"
TEXTS = "model train_data held_out_data output_dir"


def _setting(meaning: str, default: Any = MISSING) -> Any:
    """A field with its meaning, which the command line prints as its help."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything that decides what a fine-tune does. Checked when made; never changed afterwards.

    A step sees `batch_size * gradient_accumulation_steps` rows, on however many processes.

    Raises:
        ConfigError: naming the setting, its value, and what it should have been.

    >>> config = FinetuneConfig.from_preset("guanaco-7b", max_steps=10)
    >>> config.r, config.lora_alpha, config.learning_rate, config.batch_size
    (64, 16.0, 0.0002, 1)
    """

    name: str = _setting("what the run is called; it becomes a folder's name")
    model: str = _setting("the base: a folder, from here or from the repository, or a Hub name")
    train_data: str = _setting("rows to train on: a JSONL file, or a data set of the Hub")
    held_out_data: str = _setting("rows to measure on: a JSONL file, or a data set of the Hub")
    method: Literal["qlora", "lora", "full"] = _setting(
        "qlora: adapters on a 4-bit base; lora: on the base as it is; full: all weights", "qlora"
    )
    # The 4-bit base (section 3 of the paper).
    quant_type: Literal["nf4", "fp4"] = _setting("the sixteen levels of the 4-bit weights", "nf4")
    double_quant: bool = _setting("quantise the constants of the blocks, too", True)
    compute_dtype: Literal["float32", "bfloat16"] = _setting(
        "dtype of the computation, and of weights that are not quantised", "bfloat16"
    )
    quant_storage: Literal["uint8", "bfloat16", "float32"] = _setting(
        "dtype that packed weights are stored as; FSDP wants that of all other tensors", "uint8"
    )
    # The adapter.
    target_modules: str = _setting(
        "layers with adapters: all-linear (all but the output head), or q_proj,v_proj", "all-linear"
    )
    r: int = _setting("rank of the adapters", 64)
    lora_alpha: float = _setting("the adapters' product is multiplied by lora_alpha / r", 16.0)
    lora_dropout: float = _setting("share of an adapter's inputs that is switched off", 0.1)
    adapter_dtype: Literal["float32", "bfloat16"] = _setting("dtype of the adapters", "bfloat16")
    # The training (appendix B of the paper).
    max_steps: int = _setting("optimizer steps", 1875)
    batch_size: int = _setting("rows that go through the model together", 1)
    gradient_accumulation_steps: int = _setting("batches per optimizer step", 16)
    learning_rate: float = _setting("the largest learning rate of the schedule", 2e-4)
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = _setting(
        "how the learning rate goes on after its warm-up", "constant"
    )
    warmup_steps: int = _setting("steps in which the learning rate rises from 0", 0)
    optim: Literal["paged_adamw_32bit", "adamw_torch"] = _setting(
        "optimizer; without CUDA the paged one is replaced by adamw_torch", "paged_adamw_32bit"
    )
    adam_beta2: float = _setting("decay of AdamW's mean of squared gradients", 0.999)
    weight_decay: float = _setting("AdamW's weight decay", 0.0)
    max_grad_norm: float = _setting("longer gradients are shortened to this norm", 0.3)
    gradient_checkpointing: bool = _setting(
        "recompute activations on the way back, instead of keeping them", True
    )
    group_by_length: bool = _setting("put rows of similar length into one step", True)
    seed: int = _setting("of the adapters, the order of the rows and dropout", 0)
    # The data and the measurements.
    max_length: int = _setting("tokens of a row; what is longer is cut", 512)
    chat_template: Literal["guanaco", None] = _setting(
        "guanaco: that of the paper; None: the template that the tokenizer brings", None
    )
    held_out_rows: int = _setting("held-out rows whose loss is measured", 300)
    answer_rows: int = _setting("the first of them that are also answered, for exact match", 300)
    max_new_tokens: int = _setting("tokens of an answer", 96)
    eval_batch_size: int = _setting("rows measured or answered together", 8)
    logging_steps: int = _setting("steps between two entries of the training loss", 10)
    # What a run leaves on the way.
    save_steps: int = _setting("steps between two checkpoints; 0 for none", 100)
    save_total_limit: int = _setting("checkpoints that are kept", 2)
    sample_steps: int = _setting("steps between two sample answers; 0 for none", 0)
    output_dir: str | None = _setting(
        "folder to be made; None takes the first free one of runs/NAME, runs/NAME-2, ...", None
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for setting in fields(self):
            value = _typed(setting.name, getattr(self, setting.name), hints[setting.name])
            object.__setattr__(self, setting.name, value)
        limits = {
            **dict.fromkeys(AT_LEAST_ONE.split(), (lambda v: v >= 1, "at least 1")),
            **dict.fromkeys(NOT_NEGATIVE.split(), (lambda v: 0 <= v < math.inf, "at least 0")),
            **dict.fromkeys(POSITIVE.split(), (lambda v: 0 < v < math.inf, "above 0 and finite")),
            **dict.fromkeys(TEXTS.split(), (_is_text, "a name or a path, in printable characters")),
            "name": (_is_name, "a folder's name: letters, digits, and .+=_- after the first"),
            "lora_dropout": (lambda v: 0 <= v < 1, "in [0, 1)"),
            "adam_beta2": (lambda v: 0 < v < 1, "between 0 and 1"),
            "target_modules": (lambda v: all(self.targets), "'all-linear' or names with commas"),
            "answer_rows": (lambda v: 0 <= v <= self.held_out_rows, "in 0 … held_out_rows"),
        }
        for name, (allowed, wanted) in limits.items():
            value = getattr(self, name)
            if type(value) is int and value > LARGEST:
                raise ConfigError(f"{name} must be at most {LARGEST:,}, not {value!r}")
            if not allowed(value):
                raise ConfigError(f"{name} must be {wanted}, not {value!r}")

    @property
    def targets(self) -> str | tuple[str, ...]:
        """The layers that get an adapter: "all-linear", or their names."""
        if self.target_modules == "all-linear":
            return self.target_modules
        return tuple(name.strip() for name in self.target_modules.split(","))

    @property
    def base_dtype(self) -> str:
        """The dtype of weights that are not quantised."""
        # Full fine-tuning keeps float32: bfloat16 would round its small steps away.
        return "float32" if self.method == "full" else self.compute_dtype

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> Self:
        """The settings of a preset (see `PRESETS`), with `overrides` on top."""
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ConfigError(f"no preset {preset!r}; {did_you_mean(preset, PRESETS)}")
        return cls(**_known({"name": preset, **PRESETS[preset], **overrides}))

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> Self:
        """Read a YAML mapping of settings; an entry `preset:` names where to start from."""
        import yaml

        with reading(path, ConfigError, "write the settings as YAML, a `name: value` per line"):
            settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            if not isinstance(settings, dict):
                raise ConfigError(f"{path} must hold settings as `name: value`, not {settings!r}")
        settings |= overrides
        if "preset" in settings:
            return cls.from_preset(settings.pop("preset"), **_known(settings))
        required = [setting.name for setting in fields(cls) if setting.default is MISSING]
        missing = [name for name in required if name not in settings]
        if missing:
            raise ConfigError(f"{path} lacks {', '.join(missing)}; or start from a `preset:`")
        return cls(**_known(settings))

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed, checked like any other."""
        return replace(self, **_known(changes))


def did_you_mean(name: Any, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest that there is, or all of them.

    >>> did_you_mean("lerning_rate", ["learning_rate", "r"]), did_you_mean("x", ["a", "b"])
    ("did you mean 'learning_rate'?", 'there are a, b')
    """
    names = list(names)
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    names = [setting.name for setting in fields(FinetuneConfig)]
    for name in settings:
        if name not in names:
            raise ConfigError(f"no setting {name!r}; {did_you_mean(name, names)}")
    return settings


def _typed(name: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) is Literal:
        if type(value) in (str, NoneType) and value in get_args(hint):
            return value
        raise ConfigError(f"{name} must be one of {get_args(hint)}, not {value!r}")
    allowed = get_args(hint) or (hint,)
    # YAML reads 2e-4 as a string; only 2.0e-4 is a number to it.
    if float in allowed and type(value) in (int, str):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    elif type(value) in allowed:
        return value
    wanted = " or ".join(kind.__name__ for kind in allowed)
    raise ConfigError(f"{name} must be of type {wanted}, not {value!r}")


def _is_text(value: str | None) -> bool:
    return value is None or bool(value.strip() and value.isprintable())


def _is_name(value: str) -> bool:
    return re.fullmatch(r"\w[\w.+=-]{0,99}", value) is not None


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
