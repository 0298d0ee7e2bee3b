"""Chapter 9. QLoRA on the stack that people really use: bitsandbytes, PEFT and TRL.

One configuration and one run: prepare, measure, train, measure, write. The preset "embedded" takes
the course's own tiny base through all of it on two CPU cores, "guanaco-7b" a real one on one GPU.
Every setting that changes the result is written out, because the defaults of these libraries are
traps (`BitsAndBytesConfig` alone would give FP4, float32, and no double quantisation).
"""

import math
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from qlora_edu.compat import quiet
from qlora_edu.errors import ConfigError, TrainingError
from qlora_edu.memory import MemoryPlan, plan_memory
from qlora_edu.planner.fake_step import StepSettings
from qlora_edu.production.checkpoints import check_metadata, latest_checkpoint, run_metadata
from qlora_edu.production.config import FinetuneConfig
from qlora_edu.production.loading import check_positions, check_targets, load_base, locate
from qlora_edu.production.run_folder import (
    Run,
    Scores,
    checkpoints_of,
    choose_output_dir,
    remove_checkpoints,
    remove_parts,
    reserved,
    write_run,
)
from qlora_edu.text.conversations import encode_conversations, read_conversations
from qlora_edu.training import exact_match, generate_answers, held_out_loss, row_order


def finetune(config: FinetuneConfig, progress: bool = True, resume: bool = False) -> Run:
    """Fine-tune, measure before and after, and write a run folder.

    The folder holds the adapter (or the whole model), the tokenizer, `config.yaml`,
    `metrics.jsonl` and a manifest. Until it is there, checkpoints are in `<folder>.checkpoints`;
    with `resume=True` the run goes on from the newest that is whole, to the same bits on a CPU.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        advice = "start `python -m qlora_edu finetune` by itself, without accelerate or torchrun"
        raise ConfigError(f"this course fine-tunes in one process, on one GPU: {advice}")
    folder = choose_output_dir(config, resume)
    run = Run(config=config, folder=folder, progress=progress)
    with reserved(folder):
        if resume:
            remove_parts(folder)
        with run.saying_where():
            prepare(run, resume)
            run.before = run.before or measure(run)
            with quiet():
                run.trainer.train(resume_from_checkpoint=run.checkpoint and str(run.checkpoint))
            run.model.eval()
            run.after = measure(run)
            write_run(run)
        remove_checkpoints(folder)
    run.trainer = None  # and with it the optimizer's states
    print(f"run folder: {folder}\nthe training time leaves out loading and both measurements")
    print(run.closing_line())
    return run


def prepare(run: Run, resume: bool) -> None:
    """Load model and rows, compare them with the checkpoint, and make the trainer."""
    from qlora_edu.production.callback import FinetuneCallback

    config, saved = run.config, checkpoints_of(run.folder)
    found = latest_checkpoint(saved) if resume else None
    model, run.tokenizer = load_base(config)
    check_targets(model, config)
    run.held_out = read_conversations(locate(config.held_out_data), "test")[: config.held_out_rows]
    run.encoded = encode_conversations(run.tokenizer, run.held_out, config.max_length)
    train_data = read_conversations(locate(config.train_data), "train")
    run.rows = encode_conversations(run.tokenizer, train_data, config.max_length)
    check_positions(model, run.encoded + run.rows)
    run.metadata = run_metadata(config, locate(config.model), run.rows, run.encoded)
    limit, asked = config.max_new_tokens, run.held_out[: config.answer_rows]
    plain = {"add_special_tokens": False, "verbose": False}
    answers = [run.tokenizer(row[-1]["content"], **plain)["input_ids"] for row in asked]
    if long := sum(len(ids) + 1 > limit for ids in answers):  # with the end token
        print(f"warning: {long} held-out answers have more than max_new_tokens={limit} tokens")
    if found:
        run.checkpoint, metadata = found
        check_metadata(run.checkpoint, metadata, run.metadata)
        print(f"resumed from {run.checkpoint.name}: step {metadata['step']} of {config.max_steps}")
    elif resume:
        print(f"no checkpoint in {saved} yet: the run starts from its beginning")
    run.trainer = make_trainer(config, model, run.tokenizer, run.rows, saved)
    run.trainer.add_callback(FinetuneCallback(run))
    run.model = run.trainer.model
    print(f"{config.method}: {config.model}, {run.trainable_parameters:,} parameters to train")


def measure(run: Run) -> Scores:
    """The held-out loss, and answers to the first `answer_rows` of the held-out rows."""
    asked, size = run.held_out[: run.config.answer_rows], run.config.eval_batch_size
    prompts = [conversation[:-1] for conversation in asked]
    wanted = [conversation[-1]["content"] for conversation in asked]
    answers = generate_answers(run.model, run.tokenizer, prompts, run.config.max_new_tokens, size)
    loss = held_out_loss(run.model, run.encoded, size)
    if not math.isfinite(loss):
        raise TrainingError(f"the held-out loss is {loss}; the weights are damaged or diverged")
    return Scores(loss, exact_match(answers, wanted) if asked else None, answers)


def adapter_config(config: FinetuneConfig) -> Any:
    """The PEFT `LoraConfig`; None for full fine-tuning."""
    from peft import LoraConfig

    if config.method == "full":
        return None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=config.lora_dropout,
        target_modules=config.targets if isinstance(config.targets, str) else [*config.targets],
        init_lora_weights=True,
        use_rslora=False,
        bias="none",
    )


def trainer_settings(config: FinetuneConfig, folder: Path) -> Any:
    """The `SFTConfig`. Where there is no CUDA device a paged optimizer is replaced, and said."""
    from trl import SFTConfig

    cuda, optim = torch.cuda.is_available(), config.optim
    if optim.startswith("paged") and not cuda:
        print("optimizer: plain AdamW, not paged; there is no CUDA device to page its states from")
        optim = "adamw_torch"
    settings = SFTConfig(
        output_dir=str(folder),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
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
        seed=config.seed,
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
    )
    settings._n_gpu = min(settings.n_gpu, 1)  # or a step would see the rows of every card
    return settings


def make_trainer(
    config: FinetuneConfig, model: Any, tokenizer: Any, rows: list[dict[str, Any]], folder: Path
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
            train_dataset=Dataset.from_list(rows).select(order),
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


def plan_run(config: FinetuneConfig, model: Any = None) -> MemoryPlan:
    """The memory of one step of a run, planned (chapter 6); `model` as for `plan_memory`.

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
