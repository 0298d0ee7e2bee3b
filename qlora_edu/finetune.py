"""Chapter 9. QLoRA on the stack that people really use: bitsandbytes, PEFT and TRL.

One configuration class and one function. ``finetune(FinetuneConfig.from_preset("embedded"))`` takes
the course's own tiny base model through the whole job on two CPU cores; ``"guanaco-7b"`` and its
larger siblings are the paper's recipe on one GPU, along the same path. Every setting that changes
the result is written out, because the defaults of these libraries are traps (``BitsAndBytesConfig``
alone would give FP4, float32, and no double quantisation).

What a run leaves behind is a folder, written whole or not at all: the adapter, the configuration,
the measurements as JSON lines, the seed and the versions.
"""

import argparse
import difflib
import json
import logging
import math
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, get_args, get_type_hints

import torch

from qlora_edu.chat_data import (
    GUANACO_TEMPLATE,
    Conversation,
    DataError,
    encode_conversations,
    read_conversations,
)
from qlora_edu.training import (
    Batch,
    TrainingError,
    collate,
    completion_loss,
    exact_match,
    generate_answers,
    held_out_loss,
)

ROOT = Path(__file__).resolve().parents[1]
STACK = ("torch", "bitsandbytes", "transformers", "peft", "trl", "accelerate", "datasets")
CHOICES = {
    "method": ("qlora", "lora", "full"),
    "levels": ("nf4", "fp4"),
    "compute_dtype": ("float32", "bfloat16"),
    "adapter_dtype": ("float32", "bfloat16"),
    "optimizer": ("paged_adamw_32bit", "adamw_torch"),
    "lr_schedule": ("constant", "constant_with_warmup", "linear", "cosine"),
    "chat_template": (None, "guanaco"),
}
AT_LEAST_ONE = (
    "r max_steps batch_size gradient_accumulation max_length max_new_tokens logging_steps"
)
NOT_NEGATIVE = "warmup_steps weight_decay dropout seed"
POSITIVE = "alpha learning_rate max_grad_norm beta2"


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class ModelUnavailableError(OSError):
    """The base model is neither in a local folder nor to be had from the Hub."""


class RunExistsError(FileExistsError):
    """The run folder is already there, and nothing overwrites it."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything that decides what a fine-tune does. Checked when made; never changed afterwards.

    ``model`` and the two data sets are local paths (seen from here, or from the repository's root)
    or Hub names. ``method="lora"`` leaves the base unquantised and ``"full"`` trains all of it, for
    comparison. ``held_out_rows`` rows are measured; the first ``answer_rows`` of them also for
    exact match. ``output_dir=None`` takes the first free folder ``runs/<name>``, ``-2``, ``-3``…

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
    levels: str = "nf4"
    double_quant: bool = True
    compute_dtype: str = "bfloat16"
    # The adapter, on every linear layer but the output head.
    r: int = 64
    alpha: float = 16.0
    dropout: float = 0.1
    adapter_dtype: str = "bfloat16"
    # The training (appendix B of the paper).
    max_steps: int = 1875
    batch_size: int = 1
    gradient_accumulation: int = 16
    learning_rate: float = 2e-4
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    optimizer: str = "paged_adamw_32bit"
    beta2: float = 0.999
    weight_decay: float = 0.0
    max_grad_norm: float = 0.3
    gradient_checkpointing: bool = True
    seed: int = 0
    # The data and the measurements.
    max_length: int = 512
    chat_template: str | None = None
    held_out_rows: int = 300
    answer_rows: int = 300
    max_new_tokens: int = 96
    logging_steps: int = 10
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
            "dropout": (lambda v: 0 <= v < 1, "in [0, 1)"),
            "beta2": (lambda v: 0 < v < 1, "between 0 and 1"),
            "held_out_rows": (lambda v: v >= 1, "at least 1"),
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


def _guanaco(size: str, learning_rate: float, dropout: float) -> dict[str, Any]:
    """The paper's table 9: sizes differ in learning rate and dropout alone."""
    data = "timdettmers/openassistant-guanaco"
    return {
        "model": f"huggyllama/llama-{size}",
        "train_data": data,
        "held_out_data": data,
        "chat_template": "guanaco",
        "learning_rate": learning_rate,
        "dropout": dropout,
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
        "alpha": 32.0,
        "dropout": 0.0,
        "max_steps": 250,
        "batch_size": 32,
        "gradient_accumulation": 1,
        "learning_rate": 3e-3,
        "lr_schedule": "cosine",
        "warmup_steps": 10,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "max_length": 256,
        "max_new_tokens": 64,
    },
    "guanaco-7b": _guanaco("7b", 2e-4, 0.1),
    "guanaco-13b": _guanaco("13b", 2e-4, 0.1),
    "guanaco-33b": _guanaco("30b", 1e-4, 0.05),
    "guanaco-65b": _guanaco("65b", 1e-4, 0.05),
}


@dataclass(frozen=True)
class Measured:
    """The base or the fine-tuned model on the held-out rows."""

    held_out_loss: float  # nats a token
    exact_match: float | None  # share of answers, None if no answers were asked for
    answers: list[str] = field(repr=False)


@dataclass(frozen=True)
class FinetuneResult:
    """What came of a run; ``model`` and ``tokenizer`` are ready to answer."""

    config: FinetuneConfig
    folder: Path
    before: Measured
    after: Measured
    training_seconds: float  # without loading and without the two measurements
    losses: list[tuple[int, float]] = field(repr=False)  # (step, mean loss since the entry before)
    trainable_parameters: int
    held_out: list[Conversation] = field(repr=False)
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)

    def summary(self) -> dict[str, float | int | None]:
        """The figures of the run, ready for JSON."""
        return {
            "exact_match_before": self.before.exact_match,
            "exact_match_after": self.after.exact_match,
            "held_out_loss_before": self.before.held_out_loss,
            "held_out_loss_after": self.after.held_out_loss,
            "held_out_rows": len(self.held_out),
            "training_seconds": round(self.training_seconds, 1),
            "steps": self.config.max_steps,
            "trainable_parameters": self.trainable_parameters,
        }

    def closing_line(self) -> str:
        """One line: what was measured, before and after."""
        ending = f"{self.training_seconds:.0f} s of training"
        if self.after.exact_match is None:
            losses = f"{self.before.held_out_loss:.3f} → {self.after.held_out_loss:.3f}"
            return f"held-out loss {losses} on {len(self.held_out)} held-out rows, {ending}"
        matches = f"{self.before.exact_match:.2f} → {self.after.exact_match:.2f}"
        return f"exact match {matches} on {len(self.after.answers)} held-out rows, {ending}"


def quantization_config(config: FinetuneConfig) -> Any:
    """The ``BitsAndBytesConfig``, every field said; None unless the method is QLoRA."""
    from transformers import BitsAndBytesConfig

    if config.method != "qlora":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.levels,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, config.compute_dtype),
        bnb_4bit_quant_storage=torch.uint8,
        load_in_8bit=False,
        llm_int8_threshold=6.0,  # the llm_int8 fields act in 8 bits only, save for the next one
        llm_int8_skip_modules=["lm_head"],
        llm_int8_enable_fp32_cpu_offload=False,
        llm_int8_has_fp16_weight=False,
    )


def adapter_config(config: FinetuneConfig) -> Any:
    """The PEFT ``LoraConfig``; None for full fine-tuning."""
    from peft import LoraConfig

    if config.method == "full":
        return None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear",
        init_lora_weights=True,
        use_rslora=False,
        bias="none",
    )


def trainer_settings(config: FinetuneConfig, folder: Path) -> Any:
    """The ``SFTConfig``. Where there is no CUDA device a paged optimizer is replaced, and said."""
    from trl import SFTConfig

    cuda, optimizer = torch.cuda.is_available(), config.optimizer
    if optimizer.startswith("paged") and not cuda:
        print("optimizer: plain AdamW, not paged; there is no CUDA device to page its states from")
        optimizer = "adamw_torch"
    return SFTConfig(
        output_dir=str(folder),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_schedule,
        warmup_steps=config.warmup_steps,
        optim=optimizer,
        adam_beta1=0.9,
        adam_beta2=config.beta2,
        adam_epsilon=1e-8,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.compute_dtype == "bfloat16",
        fp16=False,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        train_sampling_strategy="group_by_length",
        dataloader_num_workers=0,
        dataloader_pin_memory=cuda,
        use_cpu=not cuda,
        seed=config.seed,
        data_seed=config.seed,
        # The rows come encoded and labelled from chat_data: TRL has nothing to add or to cut.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        completion_only_loss=True,
        loss_type="nll",
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
        trust_remote_code=False,
    )


def load_base(config: FinetuneConfig) -> tuple[Any, Any]:
    """Model and tokenizer, from a folder or the Hub: safetensors only, and never remote code.

    Raises:
        ModelUnavailableError: naming the model and the ways out.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cuda, source = torch.cuda.is_available(), locate(config.model)
    # Full fine-tuning keeps float32 weights: bfloat16 ones would lose their small steps to rounding.
    dtype = "float32" if config.method == "full" else config.compute_dtype
    try:
        _check_reachable(source)
        with _quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=getattr(torch, dtype),
                quantization_config=quantization_config(config),
                device_map={"": 0} if cuda else None,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
            )
    except Exception as error:
        raise ModelUnavailableError(
            f"cannot load the base model {config.model!r} ({type(error).__name__}: {error}). It "
            "must be a folder on this machine or a name on the Hugging Face Hub, with its weights "
            "in safetensors. Without the Hub: download it on another machine ('hf download NAME "
            "--local-dir FOLDER') and set model=FOLDER, or use the preset 'embedded', which needs "
            "no network"
        ) from error
    if config.chat_template == "guanaco":
        tokenizer.chat_template = GUANACO_TEMPLATE
    if tokenizer.pad_token is None:
        # Padding is masked by position, never by its id, so sharing the end token is harmless here.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    forbid_cpu_repacking(model)
    return model, tokenizer


def forbid_cpu_repacking(model: torch.nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers trainable on processors with AVX512-BF16.

    bitsandbytes 0.50 repacks its weights at the first evaluation there, for a faster kernel that
    has no backward pass; later training would go on without those gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_gradients(model: torch.nn.Module, batch: Batch) -> None:
    """Go forward and back once, and make sure that gradients reach every part of the first layer.

    ``B`` starts at zero, so at the first step ``A`` has a gradient of zeros; all else in the first
    layer must have one that is not. Gradients and random state are left as they were.

    Raises:
        TrainingError: naming the parameter which gradients do not reach.
    """
    model.train()
    with torch.random.fork_rng():
        completion_loss(model, batch).backward()
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    numbered = [match[0] for name, _ in trainable if (match := re.match(r".*?\.\d+\.", name))]
    first = numbered[0] if numbered else ""
    for name, parameter in trainable:
        gradient = parameter.grad
        if not name.startswith(first):
            continue
        if gradient is None or not gradient.isfinite().all():
            raise TrainingError(f"before step 1: the gradient of {name} is missing or not finite")
        if not gradient.any() and "lora_A" not in name:
            raise TrainingError(
                f"before step 1: no gradient reaches {name}. A layer above it cuts the backward "
                "pass; load the model again, call forbid_cpu_repacking, and only then evaluate it"
            )
    model.zero_grad(set_to_none=True)


def finetune(config: FinetuneConfig, progress: bool = True) -> FinetuneResult:
    """Fine-tune, measure before and after, and write a run folder.

    The folder holds ``adapter_model.safetensors`` and ``adapter_config.json`` (or the whole model,
    for ``method="full"``), the tokenizer, ``config.yaml``, ``metrics.jsonl`` and ``versions.json``.

    Raises:
        RunExistsError: if ``output_dir`` exists.
        ModelUnavailableError, DataError: if model or data cannot be had or used.
        TrainingError: if gradients do not reach the first layer, or the loss stops being finite.
    """
    from datasets import Dataset
    from trl import SFTTrainer

    folder = _free_folder(config)
    with _whole_or_absent(folder) as part:
        model, tokenizer = load_base(config)
        rows = encode_conversations(
            tokenizer, read_conversations(locate(config.train_data), "train"), config.max_length
        )
        held_out = read_conversations(locate(config.held_out_data), "test")[: config.held_out_rows]
        encoded = encode_conversations(tokenizer, held_out, config.max_length)
        trainer = SFTTrainer(
            model=model,
            args=trainer_settings(config, part),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=adapter_config(config),
        )
        _set_adapter_dtype(trainer.model, config)
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        print(f"{config.method}: {config.model}, {trainable:,} parameters to train")

        before = _measure(trainer.model, tokenizer, held_out, encoded, config)
        watch = _watch(trainer, collate(rows[:2], tokenizer.pad_token_id), config, progress)
        trainer.train()
        after = _measure(trainer.model, tokenizer, held_out, encoded, config)

        result = FinetuneResult(
            config=config,
            folder=folder,
            before=before,
            after=after,
            training_seconds=watch.seconds,
            losses=watch.losses,
            trainable_parameters=trainable,
            held_out=held_out,
            model=trainer.model,
            tokenizer=tokenizer,
        )
        _write_run(part, result)
    print(f"{'':16}before    after")
    print(f"held-out loss  {before.held_out_loss:7.3f}  {after.held_out_loss:7.3f}  nats a token")
    if after.exact_match is not None:
        print(f"exact match    {before.exact_match:7.2f}  {after.exact_match:7.2f}")
    print(f"run folder {folder}; the training time leaves out loading and both measurements")
    print(result.closing_line())
    return result


def locate(name: str) -> str:
    """A local path as it is, or under the repository's root if it is there; else a Hub name."""
    return name if Path(name).exists() or not (ROOT / name).exists() else str(ROOT / name)


def _check_reachable(source: str) -> None:
    # One quick question; otherwise transformers would ask for a minute, noisily, before giving up.
    from huggingface_hub import HfApi, try_to_load_from_cache

    if not Path(source).is_dir() and try_to_load_from_cache(source, "config.json") is None:
        HfApi().model_info(source, timeout=10)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    from transformers.utils import logging as bars

    # On a CPU bitsandbytes advises a package from the Hub which the course does without.
    advice = logging.getLogger("bitsandbytes.backends.cpu.ops")
    had_bars, level = bars.is_progress_bar_enabled(), advice.level
    bars.disable_progress_bar()
    advice.setLevel(logging.ERROR)
    try:
        yield
    finally:
        advice.setLevel(level)
        if had_bars:
            bars.enable_progress_bar()


def _set_adapter_dtype(model: torch.nn.Module, config: FinetuneConfig) -> None:
    # TRL rounds the adapters of a quantised base to bfloat16, whatever was asked for.
    if config.method != "full":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, config.adapter_dtype))


def _measure(
    model: Any,
    tokenizer: Any,
    held_out: Sequence[Conversation],
    encoded: Sequence[dict[str, list[int]]],
    config: FinetuneConfig,
) -> Measured:
    asked = held_out[: config.answer_rows]
    prompts = [conversation[:-1] for conversation in asked]
    answers = generate_answers(model, tokenizer, prompts, config.max_new_tokens)
    wanted = [conversation[-1]["content"] for conversation in asked]
    match = exact_match(answers, wanted) if asked else None
    return Measured(held_out_loss(model, encoded), match, answers)


def _watch(trainer: Any, batch: Batch, config: FinetuneConfig, progress: bool) -> Any:
    """Replace the trainer's printing by one progress line, a clock, and the gradient check."""
    from tqdm import tqdm
    from transformers import PrinterCallback, TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.losses: list[tuple[int, float]] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            check_gradients(model, batch)
            self.bar = tqdm(
                total=config.max_steps,
                desc=config.method,
                unit="step",
                file=sys.stdout,
                ncols=80,
                disable=not progress,
            )
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.update()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict, **_: Any) -> None:
            if "loss" not in logs:
                return
            self.losses.append((state.global_step, logs["loss"]))
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)
            if not math.isfinite(logs["loss"]):
                raise TrainingError(
                    f"the loss is {logs['loss']} at step {state.global_step}; lower learning_rate "
                    f"({config.learning_rate}) or look for damaged weights"
                )

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds = time.perf_counter() - self.started
            self.bar.close()

    watch = Watch()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    return watch


def _free_folder(config: FinetuneConfig) -> Path:
    if config.output_dir is not None:
        if Path(config.output_dir).exists():
            raise RunExistsError(
                f"{config.output_dir} exists, and a run overwrites nothing; choose another "
                "output_dir, or delete that folder yourself"
            )
        return Path(config.output_dir)
    numbers = ("", *(f"-{n}" for n in range(2, 10_000)))
    return next(p for n in numbers if not (p := Path("runs") / f"{config.name}{n}").exists())


@contextmanager
def _whole_or_absent(folder: Path) -> Iterator[Path]:
    """A folder beside the one wanted, which becomes it in one move when all is written."""
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        yield part
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_run(folder: Path, result: FinetuneResult) -> None:
    import yaml

    config = result.config
    if config.method == "full":
        result.model.save_pretrained(folder)
    else:
        result.model.peft_config["default"].base_model_name_or_path = config.model
        result.model.save_pretrained(folder, save_embedding_layers=False)
    result.tokenizer.save_pretrained(folder)
    settings = yaml.safe_dump(asdict(config), sort_keys=False)
    (folder / "config.yaml").write_text(settings, encoding="utf-8")
    metrics = [
        {"event": "before", **asdict(result.before)},
        *({"event": "step", "step": step, "loss": loss} for step, loss in result.losses),
        {"event": "after", **asdict(result.after)},
        {"event": "summary", **result.summary()},
    ]
    lines = "".join(json.dumps(metric, ensure_ascii=False) + "\n" for metric in metrics)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    versions = {
        "seed": config.seed,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        **{name: version(name) for name in STACK},
    }
    (folder / "versions.json").write_text(json.dumps(versions, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: ``finetune --preset embedded max_steps=100 method=lora``."""
    import yaml

    parser = argparse.ArgumentParser(prog="qlora_edu finetune", description="Fine-tune a model.")
    parser.add_argument("--preset", default="embedded", help=", ".join(PRESETS))
    parser.add_argument("--config", help="a YAML file of settings; takes the place of --preset")
    parser.add_argument("settings", nargs="*", metavar="name=value", help="settings to change")
    arguments = parser.parse_args(argv)
    try:
        pairs = [setting.partition("=") for setting in arguments.settings]
        changes = {name: yaml.safe_load(value) for name, _, value in pairs}
        if arguments.config:
            config = FinetuneConfig.from_yaml(arguments.config, **changes)
        else:
            config = FinetuneConfig.from_preset(arguments.preset, **changes)
        finetune(config)
    except (ConfigError, DataError, ModelUnavailableError, RunExistsError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
