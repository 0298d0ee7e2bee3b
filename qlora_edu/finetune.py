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
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qlora_edu.adapters import whole_or_absent
from qlora_edu.chat_data import (
    Conversation,
    DataError,
    encode_conversations,
    read_conversations,
)
from qlora_edu.config import PRESETS, ConfigError, FinetuneConfig
from qlora_edu.loading import ModelUnavailableError, load_base, locate, quiet
from qlora_edu.run_folder import (
    FinetuneResult,
    Measured,
    RunExistsError,
    free_folder,
    write_run,
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


def adapter_config(config: FinetuneConfig) -> Any:
    """The PEFT ``LoraConfig``; None for full fine-tuning."""
    from peft import LoraConfig

    if config.method == "full":
        return None
    targets = config.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets
        if targets == "all-linear"
        else [name.strip() for name in targets.split(",")],
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
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
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


def check_gradients(model: torch.nn.Module, batch: Batch) -> None:
    """Go forward and back once, and make sure that gradients reach every part of the first layer.

    ``B`` starts at zero, so at the first step ``A`` has a gradient of zeros; all else in the first
    layer must have one that is not. Gradients and random state are left as they were.

    Raises:
        TrainingError: naming the parameter which gradients do not reach.
    """
    model.train()
    with torch.random.fork_rng():
        loss = completion_loss(model, batch)
        if not loss.requires_grad:
            raise TrainingError("before step 1: the loss depends on no trainable parameter")
        loss.backward()
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
    folder = free_folder(config)
    with whole_or_absent(folder) as part:
        model, tokenizer = load_base(config)
        held_out = read_conversations(locate(config.held_out_data), "test")[: config.held_out_rows]
        encoded = encode_conversations(tokenizer, held_out, config.max_length)
        _warn_of_long_answers(encoded[: config.answer_rows], config.max_new_tokens)
        train_data = read_conversations(locate(config.train_data), "train")
        rows = encode_conversations(tokenizer, train_data, config.max_length)
        trainer = make_trainer(config, model, tokenizer, rows, part)
        watch = _watch(trainer, collate(rows[: min(2, config.batch_size)]), config, progress)
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        print(f"{config.method}: {config.model}, {trainable:,} parameters to train")

        before = _measure(trainer.model, tokenizer, held_out, encoded, config)
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
        with quiet():
            write_run(part, result)
    print(result.table())
    print(f"run folder {folder}; the training time leaves out loading and both measurements")
    print(result.closing_line())
    return result


def _warn_of_long_answers(rows: Sequence[dict[str, list[int]]], max_new_tokens: int) -> None:
    """Say how many answers cannot be matched, since generation stops before their end."""
    long = sum(sum(label != -100 for label in row["labels"]) > max_new_tokens for row in rows)
    if long:
        print(
            f"warning: {long} held-out answer{'s have' if long > 1 else ' has'} more than "
            f"max_new_tokens={max_new_tokens} tokens, so generation stops before their end"
        )


def make_trainer(
    config: FinetuneConfig,
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, list[int]]],
    folder: Path,
) -> Any:
    """TRL's ``SFTTrainer`` over encoded rows, with the adapter attached in ``adapter_dtype``."""
    with quiet():
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl import SFTTrainer

        trainer = SFTTrainer(
            model=model,
            args=trainer_settings(config, folder),
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=tokenizer,
            peft_config=adapter_config(config),
        )
    trainer.remove_callback(PrinterCallback)
    # TRL rounds the adapters of a quantised base to bfloat16, whatever was asked for.
    if config.method != "full":
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, config.adapter_dtype))
    return trainer


def _measure(
    model: Any,
    tokenizer: Any,
    held_out: Sequence[Conversation],
    encoded: Sequence[dict[str, list[int]]],
    config: FinetuneConfig,
) -> Measured:
    asked = held_out[: config.answer_rows]
    prompts = [conversation[:-1] for conversation in asked]
    size = config.eval_batch_size
    answers = generate_answers(model, tokenizer, prompts, config.max_new_tokens, size)
    wanted = [conversation[-1]["content"] for conversation in asked]
    match = exact_match(answers, wanted) if asked else None
    return Measured(held_out_loss(model, encoded, size), match, answers)


def _watch(trainer: Any, batch: Batch, config: FinetuneConfig, progress: bool) -> Any:
    """Give the trainer one progress line, a clock, and the gradient check before step one."""
    from tqdm import tqdm
    from transformers import TrainerCallback

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
    trainer.add_callback(watch)
    return watch


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
