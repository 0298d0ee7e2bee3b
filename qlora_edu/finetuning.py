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
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qlora_edu.compat import quiet
from qlora_edu.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DoesNotFitError,
    ModelUnavailableError,
    RunExistsError,
    TrainingError,
)
from qlora_edu.files.atomic import whole_or_absent
from qlora_edu.memory import GIB, MemoryPlan, check_lengths, plan_memory
from qlora_edu.production.checkpoints import WrongBaseError, fingerprint, latest_checkpoint
from qlora_edu.production.config import PRESETS, FinetuneConfig
from qlora_edu.production.loading import check_one_dtype, fsdp, load_base, locate
from qlora_edu.production.run_folder import (
    STACK,
    FinetuneResult,
    Measured,
    checkpoints_of,
    choose_output_dir,
    write_run,
)
from qlora_edu.text.conversations import Conversation, encode_conversations, read_conversations
from qlora_edu.training import (
    Batch,
    collate,
    completion_loss,
    exact_match,
    generate_answers,
    held_out_loss,
    row_order,
)

SECONDS_A_BLOCK = 0.014
"""Least time of a block's forward, repeated and backward pass on an H100, of 7B, 33B and 65B."""
KNOWN_ERRORS = (
    CheckpointError,
    ConfigError,
    DataError,
    DoesNotFitError,
    ModelUnavailableError,
    RunExistsError,
    TrainingError,
)


def adapter_config(config: FinetuneConfig) -> Any:
    """The PEFT ``LoraConfig``; None for full fine-tuning."""
    from peft import LoraConfig

    if config.method == "full":
        return None
    target_modules = config.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=target_modules
        if target_modules == "all-linear"
        else [name.strip() for name in target_modules.split(",")],
        init_lora_weights=True,
        use_rslora=False,
        bias="none",
    )


def trainer_settings(config: FinetuneConfig, folder: Path) -> Any:
    """The ``SFTConfig``. Where there is no CUDA device a paged optimizer is replaced, and said."""
    from trl import SFTConfig

    processes = int(os.environ.get("WORLD_SIZE", 1))
    if config.gradient_accumulation_steps % processes:
        raise ConfigError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} cannot be shared by "
            f"{processes} processes; choose a multiple"
        )
    if fsdp() and (config.save_steps or not torch.cuda.is_available()):
        raise ConfigError(
            "FSDP needs CUDA (on a CPU the trainer would pass over it in silence), and this course "
            "writes no checkpoints of a base in shares: set save_steps=0"
        )
    cuda, optimizer = torch.cuda.is_available(), config.optim
    if optimizer.startswith("paged") and not cuda:
        print("optimizer: plain AdamW, not paged; there is no CUDA device to page its states from")
        optimizer = "adamw_torch"
    return SFTConfig(
        output_dir=str(folder),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps // processes,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        optim=optimizer,
        adam_beta1=0.9,
        adam_beta2=config.adam_beta2,
        adam_epsilon=1e-8,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.compute_dtype == "bfloat16",
        fp16=False,
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        train_sampling_strategy="sequential",  # of rows that are shuffled beforehand
        dataloader_num_workers=0,
        dataloader_pin_memory=cuda,
        use_cpu=not cuda,
        ddp_backend=None if cuda or processes == 1 else "gloo",
        ddp_find_unused_parameters=False,
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


def plan_run(config: FinetuneConfig, model: Any = None, length: int | None = None) -> MemoryPlan:
    """The memory of one step of a run, planned (chapter 6) before anything is loaded.

    ``model`` is as for ``plan_memory``, by default ``config.model``; ``length`` is that of the
    longest row, by default ``max_length``.

    >>> plan = plan_run(FinetuneConfig.from_preset("guanaco-7b"), "llama-7b")
    >>> plan.sentence(16)
    'llama-7b, qlora: fits on a 16 GB card with ... GiB to spare; longest sequence ...'
    """
    from transformers import AutoConfig

    source = locate(config.model)
    if model is None:
        model = source if Path(source).is_dir() else AutoConfig.from_pretrained(source)
    target_modules = config.target_modules
    bfloat16 = config.compute_dtype == "bfloat16"
    return plan_memory(
        model,
        config.method,
        batch_size=config.batch_size,
        max_length=length or config.max_length,
        optim=config.optim.replace("adamw_torch", "adamw"),
        r=config.r,
        target_modules=target_modules
        if target_modules == "all-linear"
        else tuple(target_modules.split(",")),
        lora_dropout=config.lora_dropout,
        dtype="float32" if config.method == "full" else config.compute_dtype,
        adapter_dtype=config.adapter_dtype,
        quant_type=config.quant_type,
        double_quant=config.double_quant,
        gradient_checkpointing=config.gradient_checkpointing,
        autocast=bfloat16,
        padding=config.batch_size > 1,
        backend="bitsandbytes" if config.method == "qlora" else "qlora_edu",
    )


def expected_minutes(
    config: FinetuneConfig, weights: int, blocks: int, tflops: float, share: float = 0.3
) -> float:
    """Minutes of a run, roughly: by arithmetic, or by the time that starting the work takes.

    A token costs 2 operations a weight in each pass through the linear layers: forward, once more
    if gradient checkpointing recomputes, back to the inputs, and with ``method="full"`` back to the
    weights. ``tflops`` is what the card is rated at in ``compute_dtype``, and ``share`` what a run
    reaches of it. Every row is taken to be ``max_length`` long. But a pass with few tokens takes no
    less than it takes to start its kernels: ``SECONDS_A_BLOCK`` for each of the ``blocks``.

    Held against one card: full fine-tuning of a 7B reached 30 % of an H100's rating at 2,048 tokens
    a step, QLoRA 15 %; at 512 tokens all ways only waited for kernels to start
    (``data/results/gpu_steps.json``).

    >>> config = FinetuneConfig.from_preset("guanaco-7b")
    >>> round(expected_minutes(config, 6_607_077_376, 32, tflops=312))  # linear layers and head
    224
    """
    passes = 2 + config.gradient_checkpointing + (config.method == "full")
    operations = 2 * weights * passes * config.batch_size * config.max_length
    seconds = max(operations / (share * tflops * 1e12), blocks * SECONDS_A_BLOCK)
    return config.max_steps * config.gradient_accumulation_steps * seconds / 60


def guard_memory(
    config: FinetuneConfig, lengths: Sequence[int], card_gib: float, model: Any = None
) -> None:
    """Before the first step: refuse rows that would run out of memory at some later one.

    Raises:
        DoesNotFitError: naming the rows, and what to do.
    """
    check_lengths(plan_run(config, model), lengths, card_gib)


def check_gradients(model: torch.nn.Module, batch: Batch) -> None:
    """Go forward and back once, and make sure that gradients reach every part of the first layer.

    ``B`` starts at zero, so at the first step ``A`` has a gradient of zeros; all else in the first
    layer must have one that is not. Gradients and random state are left as they were.

    Raises:
        TrainingError: naming the parameter which gradients do not reach.
        DoesNotFitError: if the batch does not fit in memory; so let it be the longest one.
    """
    model.train()
    try:
        with torch.random.fork_rng():
            loss = completion_loss(model, batch)
            if not loss.requires_grad:
                raise TrainingError("before step 1: the loss depends on no trainable parameter")
            loss.backward()
    except torch.OutOfMemoryError as error:
        rows, length = batch["input_ids"].shape
        raise DoesNotFitError(
            f"before step 1: {rows} rows of {length} tokens, the longest batch that may come, do "
            "not fit in memory. Lower batch_size (and raise gradient_accumulation_steps by as "
            "much), or max_length, or set gradient_checkpointing=true"
        ) from error
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


def finetune(config: FinetuneConfig, progress: bool = True, resume: bool = False) -> FinetuneResult:
    """Fine-tune, measure before and after, and write a run folder.

    The folder holds ``adapter_model.safetensors`` and ``adapter_config.json`` (or the whole model,
    for ``method="full"``), the tokenizer, ``config.yaml``, ``metrics.jsonl``, ``versions.json`` and
    a manifest of their sums. Until it is there, checkpoints are kept in ``<folder>.checkpoints``;
    with ``resume=True`` the run goes on from the newest that is whole, to the same bits on a CPU.

    Raises:
        RunExistsError: if ``output_dir`` exists, or holds checkpoints of a run to be resumed.
        ModelUnavailableError, DataError: if model or data cannot be had or used.
        DoesNotFitError: if the longest batch does not fit in the device's memory.
        TrainingError: if gradients do not reach the first layer, or the loss stops being finite.
        CheckpointError: if a checkpoint cannot be written, or does not belong to this run.
    """
    if int(os.environ.get("RANK", 0)):
        # One of several processes: it computes as the first does, and leaves talking to that one.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            return _finetune(config, progress=False, resume=resume, writes=False)
    return _finetune(config, progress, resume, writes=True)


def _finetune(config: FinetuneConfig, progress: bool, resume: bool, writes: bool) -> FinetuneResult:
    from qlora_edu.production.callback import FinetuneCallback

    folder = choose_output_dir(config, resume)
    saved = checkpoints_of(folder)
    if resume and writes:  # what a killed process had half-written
        for part in folder.parent.glob(f".{folder.name}.part-*"):
            shutil.rmtree(part, ignore_errors=True)
    found = latest_checkpoint(saved) if resume else None
    with whole_or_absent(folder) if writes else tempfile.TemporaryDirectory() as part:
        part = Path(part)
        model, tokenizer = load_base(config)
        held_out = read_conversations(locate(config.held_out_data), "test")[: config.held_out_rows]
        encoded = encode_conversations(tokenizer, held_out, config.max_length)
        _warn_of_long_answers(encoded[: config.answer_rows], config.max_new_tokens)
        train_data = read_conversations(locate(config.train_data), "train")
        rows = encode_conversations(tokenizer, train_data, config.max_length)
        facts = run_facts(config, rows)
        if found:
            check_facts(*found, facts)
        elif resume:
            print(f"no checkpoint in {saved} yet: the run starts from its beginning")
        trainer = make_trainer(config, model, tokenizer, rows, part)
        longest = sorted(rows, key=lambda row: -len(row["input_ids"]))[: config.batch_size]
        watch = FinetuneCallback(
            config,
            tokenizer,
            held_out,
            check=lambda model: check_gradients(model, collate(longest)),
            progress=progress,
            folder=saved if writes else None,
            facts=facts,
            resume_from=found[0] if found else None,
        )
        trainer.add_callback(watch)
        if torch.cuda.is_available():
            lengths = [len(row["input_ids"]) for row in rows]
            free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
            guard_memory(config, lengths, free / GIB, model.config)
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        print(f"{config.method}: {config.model}, {trainable:,} parameters to train")
        if trainer.args.world_size > 1:
            print(f"{trainer.args.world_size} processes share the rows of each step")
        if found:
            print(f"resumed from {found[0].name}: step {found[1]['step']} of {config.max_steps}")
        else:
            watch.before = _measure(trainer.model, tokenizer, held_out, encoded, config)
        with quiet():
            trainer.train(resume_from_checkpoint=str(found[0]) if found else None)
        after = _measure(trainer.model, tokenizer, held_out, encoded, config)
        result = FinetuneResult(
            config=config,
            folder=folder,
            before=watch.before,
            after=after,
            training_seconds=watch.seconds,
            losses=watch.losses,
            trainable_parameters=trainable,
            held_out=held_out,
            model=trainer.model,
            tokenizer=tokenizer,
        )
        if writes:
            with quiet():
                write_run(part, result, facts)
    if writes:
        shutil.rmtree(saved, ignore_errors=True)  # the run folder holds all that they were for
    print(result.table())
    print(f"run folder {folder}; the training time leaves out loading and both measurements")
    print(result.closing_line())
    return result


def run_facts(config: FinetuneConfig, rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """What a checkpoint or an adapter belongs to: settings, base model, rows and versions."""
    data = hashlib.sha256(json.dumps([*map(list, (row.values() for row in rows))]).encode())
    return {
        "base_model": config.model,
        "base_sha256": fingerprint(locate(config.model)),
        "rows_sha256": data.hexdigest(),
        "config": {k: v for k, v in asdict(config).items() if k not in ("name", "output_dir")},
        "versions": {name: version(name) for name in STACK},
    }


def check_facts(checkpoint: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to resume from what belongs to another run; say it if only versions differ.

    Raises:
        WrongBaseError: if the base model is another.
        CheckpointError: if settings or training rows are others.
    """
    if saved["base_sha256"] != now["base_sha256"]:
        raise WrongBaseError(
            f"{checkpoint} belongs to the base {saved['base_model']!r} with other weights than "
            f"{now['base_model']!r} has now; resume with the base that the run began with"
        )
    names = sorted(saved["config"].keys() | now["config"].keys())
    other = [n for n in names if saved["config"].get(n) != now["config"].get(n)]
    if other:
        was = ", ".join(
            f"{n} was {saved['config'].get(n)!r} and is {now['config'].get(n)!r}" for n in other
        )
        raise CheckpointError(
            f"{checkpoint} is of a run with other settings: {was}. Resume with the same settings, "
            "or start a new run"
        )
    if saved["rows_sha256"] != now["rows_sha256"]:
        raise CheckpointError(
            f"{checkpoint} was trained on other rows than {now['config']['train_data']!r} holds "
            "now; bring the file back as it was, or start a new run"
        )
    for name, then in saved["versions"].items():
        if then != now["versions"].get(name):
            print(
                f"warning: {name} was {then} and is {now['versions'].get(name)}: the run goes on, "
                "but perhaps not to the same bits"
            )


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
    """TRL's ``SFTTrainer`` over encoded rows, with the adapter attached in ``adapter_dtype``.

    The trainer reads the rows one after the other in the order that ``row_order`` settles.
    """
    rows_a_step = config.batch_size * config.gradient_accumulation_steps
    lengths = [len(row["input_ids"]) for row in rows] if config.group_by_length else None
    wanted = rows_a_step * config.max_steps
    order = row_order(len(rows), wanted, config.seed, lengths, rows_a_step)
    with quiet():
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl import SFTTrainer

        trainer = SFTTrainer(
            model=model,
            args=trainer_settings(config, folder),
            train_dataset=Dataset.from_list(list(rows)).select(order),
            processing_class=tokenizer,
            peft_config=adapter_config(config),
        )
    trainer.remove_callback(PrinterCallback)
    # TRL rounds the adapters of a quantised base to bfloat16, whatever was asked for.
    if config.method != "full":
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, config.adapter_dtype))
    if fsdp():
        check_one_dtype(trainer.model)
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: ``finetune --preset embedded max_steps=100 method=lora``."""
    import yaml

    parser = argparse.ArgumentParser(prog="qlora_edu finetune", description="Fine-tune a model.")
    parser.add_argument("--preset", default="embedded", help=", ".join(PRESETS))
    parser.add_argument("--config", help="a YAML file of settings; takes the place of --preset")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("settings", nargs="*", metavar="name=value", help="settings to change")
    arguments = parser.parse_intermixed_args(argv)
    try:
        pairs = [setting.partition("=") for setting in arguments.settings]
        changes = {name: yaml.safe_load(value) for name, _, value in pairs}
        if arguments.config:
            config = FinetuneConfig.from_yaml(arguments.config, **changes)
        else:
            config = FinetuneConfig.from_preset(arguments.preset, **changes)
        finetune(config, resume=arguments.resume)
    except KNOWN_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
