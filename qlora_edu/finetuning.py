"""Chapter 9. QLoRA on the stack that people really use: bitsandbytes, PEFT and TRL.

One configuration and one run: prepare, measure, train, measure, write. The preset "embedded" takes
the course's own tiny base through all of it on two CPU cores, "guanaco-7b" a real one on one GPU.
Every setting that changes the result is written out, because the defaults of these libraries are
traps (`BitsAndBytesConfig` alone would give FP4, float32, and no double quantisation).
"""

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from qlora_edu.compat import quiet
from qlora_edu.errors import DataError, PlanError, TrainingError, reading
from qlora_edu.memory import GIB, MemoryPlan, check_lengths, plan_memory
from qlora_edu.planner.fake_step import StepSettings
from qlora_edu.production.checkpoints import check_metadata, latest_checkpoint, run_metadata
from qlora_edu.production.config import FinetuneConfig
from qlora_edu.production.loading import (
    check_one_dtype,
    check_positions,
    check_processes,
    check_targets,
    fsdp,
    load_base,
    locate,
)
from qlora_edu.production.run_folder import (
    FinetuneResult,
    Run,
    Scores,
    checkpoints_of,
    choose_output_dir,
    discard_unfinished,
    unfinished,
    write_run,
)
from qlora_edu.text.conversations import encode_conversations, read_conversations
from qlora_edu.training import exact_match, generate_answers, held_out_loss, row_order

SECONDS_PER_BLOCK = 0.014  # at least, for forward, repeated and backward pass on an H100


def finetune(config: FinetuneConfig, progress: bool = True, resume: bool = False) -> FinetuneResult:
    """Fine-tune, measure before and after, and write a run folder.

    The folder holds the adapter (or the whole model, for `method="full"`), the tokenizer,
    `config.yaml`, `metrics.jsonl`, `versions.json` and a manifest of their sums. Until it is there,
    checkpoints are kept in `<folder>.checkpoints`; with `resume=True` the run goes on from the
    newest that is whole, to the same bits on a CPU.

    Raises:
        QloraError: in the kind that fits: `RunExistsError`, `ModelUnavailableError`, `DataError`,
            `ConfigError`, `DoesNotFitError`, `TrainingError`, `CheckpointError`.
    """
    # Of several processes the first talks and writes; the others compute as it does.
    writes = int(os.environ.get("RANK", 0)) == 0
    with nullcontext() if writes else redirect_stdout(StringIO()):
        if resume and writes:
            discard_unfinished(config)
        folder = choose_output_dir(config, resume)
        with unfinished(folder, writes) as part:
            run = Run(config=config, folder=folder, part=part, writes=writes, progress=progress)
            with run.saying_where():
                prepare(run, resume)
                run.before = run.before or measure(run)
                train(run)
                run.after = measure(run)
                result = write(run)
        print(result.table())
        print(f"run folder {folder}; the training time leaves out loading and both measurements")
        print(result.closing_line())
    return result


def prepare(run: Run, resume: bool) -> None:
    """Load model and rows, hold them against the checkpoint, and make the trainer."""
    from qlora_edu.production.callback import FinetuneCallback

    config, saved = run.config, checkpoints_of(run.folder)
    found = latest_checkpoint(saved) if resume else None
    model, run.tokenizer = load_base(config)
    check_targets(model, config)
    held_out = read_conversations(locate(config.held_out_data), "test")
    run.held_out = held_out[: config.held_out_rows]
    train_data = read_conversations(locate(config.train_data), "train")
    rows = f"the rows by the chat template of {config.model}"
    with reading(rows, DataError, "mend the template"):
        run.encoded = encode_conversations(run.tokenizer, run.held_out, config.max_length)
        run.rows = encode_conversations(run.tokenizer, train_data, config.max_length)
    check_positions(model, run.encoded + run.rows)
    run.metadata = run_metadata(config, locate(config.model), run.rows, run.encoded)
    limit, asked = config.max_new_tokens, run.encoded[: config.answer_rows]
    long = sum(sum(label != -100 for label in row["labels"]) > limit for row in asked)
    if long:
        print(
            f"warning: {long} held-out answers have more than max_new_tokens={limit} tokens, so "
            "generation stops before their end"
        )
    if found:
        run.checkpoint, metadata = found
        check_metadata(run.checkpoint, metadata, run.metadata)
        print(f"resumed from {run.checkpoint.name}: step {metadata['step']} of {config.max_steps}")
    elif resume:
        print(f"no checkpoint in {saved} yet: the run starts from its beginning")
    run.trainer = make_trainer(config, model, run.tokenizer, run.rows, run.part)
    run.trainer.add_callback(FinetuneCallback(run))
    if torch.cuda.is_available():  # refuse rows that would run out of memory at some later step
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        lengths = [len(row["input_ids"]) for row in run.rows]
        try:
            check_lengths(plan_run(config, run.trainer.model.config), lengths, free / GIB)
        except PlanError as error:
            print(f"memory is not planned ({error}); the longest batch is tried before step 1")
    print(f"{config.method}: {config.model}, {run.trainable_parameters:,} parameters to train")
    if run.trainer.args.world_size > 1:
        print(f"{run.trainer.args.world_size} processes share the rows of each step")


def measure(run: Run) -> Scores:
    """The held-out loss, and answers to the first `answer_rows` of the held-out rows."""
    config, model = run.config, run.trainer.model
    asked = run.held_out[: config.answer_rows]
    prompts = [conversation[:-1] for conversation in asked]
    wanted = [conversation[-1]["content"] for conversation in asked]
    limit, size = config.max_new_tokens, config.eval_batch_size
    answers = generate_answers(model, run.tokenizer, prompts, limit, size)
    loss = held_out_loss(model, run.encoded, size)
    if not math.isfinite(loss):
        raise TrainingError(f"the held-out loss is {loss}; the weights are damaged or diverged")
    return Scores(loss, exact_match(answers, wanted) if asked else None, answers)


def train(run: Run) -> None:
    """Let the trainer take its steps, from the checkpoint on if there is one."""
    with quiet():
        run.trainer.train(resume_from_checkpoint=run.checkpoint and str(run.checkpoint))


def write(run: Run) -> FinetuneResult:
    """Write the run folder, if this process is the one that writes."""
    assert run.before and run.after
    result = FinetuneResult(
        config=run.config,
        folder=run.folder,
        before=run.before,
        after=run.after,
        training_seconds=run.seconds,
        losses=run.losses,
        trainable_parameters=run.trainable_parameters,
        held_out=run.held_out,
        model=run.trainer.model.eval(),
        tokenizer=run.tokenizer,
    )
    if run.writes:
        with quiet():
            write_run(run.part, result, run.metadata)
    return result


def adapter_config(config: FinetuneConfig) -> Any:
    """The PEFT `LoraConfig`; None for full fine-tuning."""
    from peft import LoraConfig

    targets = config.targets
    if config.method == "full":
        return None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        init_lora_weights=True,
        use_rslora=False,
        bias="none",
    )


def trainer_settings(config: FinetuneConfig, folder: Path) -> Any:
    """The `SFTConfig`. Where there is no CUDA device a paged optimizer is replaced, and said."""
    from trl import SFTConfig

    processes = check_processes(config)
    cuda, optim = torch.cuda.is_available(), config.optim
    if optim.startswith("paged") and not cuda:
        print("optimizer: plain AdamW, not paged; there is no CUDA device to page its states from")
        optim = "adamw_torch"
    return SFTConfig(
        output_dir=str(folder),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps // processes,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        optim=optim,
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
        dataloader_pin_memory=cuda,
        use_cpu=not cuda,
        ddp_backend=None if cuda or processes == 1 else "gloo",
        ddp_find_unused_parameters=False,
        seed=config.seed,
        data_seed=config.seed,
        # The rows come encoded and labelled: TRL has nothing to add or to cut.
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
        trust_remote_code=False,
    )


def make_trainer(
    config: FinetuneConfig,
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, list[int]]],
    folder: Path,
) -> Any:
    """TRL's `SFTTrainer` over encoded rows in `row_order`, with an adapter in `adapter_dtype`."""
    per_step = config.batch_size * config.gradient_accumulation_steps
    lengths = [len(row["input_ids"]) for row in rows] if config.group_by_length else None
    order = row_order(len(rows), per_step * config.max_steps, config.seed, lengths, per_step)
    with quiet():
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl import SFTTrainer

        trainer: Any = SFTTrainer(
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


def plan_run(config: FinetuneConfig, model: Any = None) -> MemoryPlan:
    """The memory of one step of a run, planned (chapter 6) before anything is loaded.

    `model` is as for `plan_memory`, by default `config.model`.

    >>> plan = plan_run(FinetuneConfig.from_preset("guanaco-7b"), "llama-7b")
    >>> plan.sentence(16)
    'llama-7b, qlora: fits on a 16 GB card with ... GiB to spare; longest sequence ...'
    """
    shared = {f.name for f in fields(StepSettings)} & {f.name for f in fields(config)}
    settings = {name: getattr(config, name) for name in shared} | {
        "target_modules": config.targets,
        "dtype": config.base_dtype,
        "autocast": config.compute_dtype == "bfloat16",
        "padding": config.batch_size > 1,
        "backend": "bitsandbytes" if config.method == "qlora" else "qlora_edu",
    }
    return plan_memory(
        locate(config.model) if model is None else model,
        batch_size=config.batch_size,
        max_length=config.max_length,
        optim=config.optim,
        **settings,
    )


def expected_minutes(
    config: FinetuneConfig, weights: int, blocks: int, tflops: float, share: float = 0.3
) -> float:
    """Minutes of a run, roughly: by arithmetic, or by the time that starting the work takes.

    A token costs 2 operations per weight in each pass: forward, once more if checkpointing
    recomputes, back to the inputs, and with `method="full"` back to the weights. But a pass with
    few tokens takes no less than it takes to start its kernels.

    Args:
        config: the settings of the run; every row is taken to be `max_length` long.
        weights: of the linear layers, the output head among them.
        blocks: of the model; each takes at least `SECONDS_PER_BLOCK`.
        tflops: the card's rating in `compute_dtype`, in 10¹² operations per second.
        share: what a run reaches of it: on an H100 30 %, or 15 % with QLoRA, at 2,048 tokens per
            step of a 7B (`data/results/gpu_steps.json`).

    >>> config = FinetuneConfig.from_preset("guanaco-7b")
    >>> round(expected_minutes(config, 6_607_077_376, 32, tflops=312))  # linear layers and head
    224
    """
    passes = 2 + config.gradient_checkpointing + (config.method == "full")
    operations = 2 * weights * passes * config.batch_size * config.max_length
    seconds = max(operations / (share * tflops * 1e12), blocks * SECONDS_PER_BLOCK)
    return config.max_steps * config.gradient_accumulation_steps * seconds / 60
