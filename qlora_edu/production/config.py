"""Support for chapter 9: the settings of a fine-tune, checked, with the paper's presets.

A wrong name, type or value is refused when the configuration is made, not an hour into a run.
`python -m qlora_edu finetune --help` prints all settings and what they mean.

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023), appendix B.
"""

import contextlib
import math
import re
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from qlora_edu.errors import ConfigError, did_you_mean, reading

LARGEST = 2**31 - 1  # a larger number NumPy or the trainer would not take, or overflow later
MAY_BE_ZERO = ("warmup_steps", "seed", "answer_rows", "save_steps", "sample_steps")
Dtype = Literal["float32", "bfloat16"]


def _setting(meaning: str, default: Any = MISSING) -> Any:
    """A field with its meaning, which the command line prints."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything that decides what a fine-tune does. Checked when made; never changed afterwards.

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
    compute_dtype: Dtype = _setting("dtype of computation and of weights not in 4 bits", "bfloat16")
    # The adapter.
    target_modules: str = _setting("with adapters: all-linear, or q_proj,v_proj", "all-linear")
    r: int = _setting("rank of the adapters", 64)
    lora_alpha: float = _setting("the adapters' product is multiplied by lora_alpha / r", 16.0)
    lora_dropout: float = _setting("share of an adapter's inputs that is switched off", 0.1)
    adapter_dtype: Dtype = _setting("dtype of the adapters", "bfloat16")
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
    gradient_checkpointing: bool = _setting("compute activations anew on the way back", True)
    group_by_length: bool = _setting("put rows of similar length into one step", True)
    seed: int = _setting("of the adapters, the order of the rows and dropout", 0)
    # The data and the measurements.
    max_length: int = _setting("tokens of a row; what is longer is cut", 512)
    chat_template: Literal["guanaco", None] = _setting("None: the one of the tokenizer", None)
    held_out_rows: int = _setting("held-out rows whose loss is measured", 300)
    answer_rows: int = _setting("the first of them that are also answered, for exact match", 300)
    max_new_tokens: int = _setting("tokens of an answer", 96)
    eval_batch_size: int = _setting("rows measured or answered together", 8)
    logging_steps: int = _setting("steps between two entries of the training loss", 10)
    # What a run leaves on the way.
    save_steps: int = _setting("steps between two checkpoints; 0 for none", 100)
    save_total_limit: int = _setting("checkpoints that are kept", 2)
    sample_steps: int = _setting("steps between two sample answers; 0 for none", 0)
    output_dir: str | None = _setting("a new folder; None: runs/NAME, or runs/NAME-2, ...", None)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for setting in fields(self):
            value = _checked(setting.name, getattr(self, setting.name), hints[setting.name])
            object.__setattr__(self, setting.name, value)
        is_name = re.fullmatch(r"\w[\w.+=-]{0,99}", self.name)
        warms = self.warmup_steps and self.lr_scheduler_type == "constant"
        for name, is_right, wanted in (
            ("name", is_name, "a folder's name: 1-100 letters, digits or _ (then . + = - too)"),
            ("target_modules", all(self.targets), "'all-linear' or names with commas"),
            ("lora_alpha", 0 < self.lora_alpha < math.inf, "above 0 and finite"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "above 0 and finite"),
            ("adam_beta2", 0 < self.adam_beta2 < 1, "between 0 and 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0 and finite"),
            ("max_grad_norm", 0 < self.max_grad_norm < math.inf, "above 0 and finite"),
            ("answer_rows", self.answer_rows <= self.held_out_rows, "in 0 … held_out_rows"),
            ("warmup_steps", not warms, "0 with schedule 'constant' (take 'constant_with_warmup')"),
        ):
            if not is_right:
                raise ConfigError(f"{name} must be {wanted}, not {getattr(self, name)!r}")

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
        if preset not in list(PRESETS):
            raise ConfigError(f"no preset {preset!r}; {did_you_mean(preset, PRESETS)}")
        return cls(**_known({"name": preset, **PRESETS[preset], **overrides}))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read settings from YAML; an entry `preset:` names where to start from."""
        import yaml

        advice = "write a `name: value` per line, of every setting or beside a `preset: name`"
        with reading(path, ConfigError, advice):
            settings = _known(dict(yaml.safe_load(Path(path).read_text("utf-8"))), "preset")
            if "preset" in settings:
                return cls.from_preset(settings.pop("preset"), **settings)
            return cls(**settings)

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed, checked like any other."""
        return replace(self, **_known(changes))


def _known(settings: dict[str, Any], *others: str) -> dict[str, Any]:
    names = [*(setting.name for setting in fields(FinetuneConfig)), *others]
    for name in settings:
        if name not in names:
            raise ConfigError(f"no setting {name!r}; {did_you_mean(name, names)}")
    return settings


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value of a setting, if it is of its type and in the range that all of this type have."""
    choices = get_args(hint) or (hint,)
    if hint is float and type(value) in (int, str):
        # YAML reads 2e-4 as a string; only 2.0e-4 is a number to it.
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    if get_origin(hint) is Literal:
        is_right, wanted = value in choices, f"one of {choices}"
    else:
        kinds = " or ".join(kind.__name__ for kind in choices)
        is_right, wanted = type(value) in choices, f"of type {kinds}"
    if is_right and type(value) is int:
        least = 0 if name in MAY_BE_ZERO else 1
        is_right = least <= value <= LARGEST
        wanted = f"at least {least}" if value < least else f"at most {LARGEST:,}"
    if is_right and type(value) is str:
        is_right, wanted = bool(value.strip()) and value.isprintable(), "text that can be printed"
    if not is_right:
        raise ConfigError(f"{name} must be {wanted}, not {value!r}")
    return value


_GUANACO = {  # the defaults of FinetuneConfig are those of the paper's table 9 for 7B and 13B
    "train_data": "timdettmers/openassistant-guanaco",
    "held_out_data": "timdettmers/openassistant-guanaco",
    "chat_template": "guanaco",
    "answer_rows": 0,  # free conversation has no single right answer to match
}
_LARGE = {**_GUANACO, "learning_rate": 1e-4, "lora_dropout": 0.05}  # 33B and 65B
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
    "guanaco-7b": {**_GUANACO, "model": "huggyllama/llama-7b"},
    "guanaco-13b": {**_GUANACO, "model": "huggyllama/llama-13b"},
    "guanaco-33b": {**_LARGE, "model": "huggyllama/llama-30b"},
    "guanaco-65b": {**_LARGE, "model": "huggyllama/llama-65b"},
}
