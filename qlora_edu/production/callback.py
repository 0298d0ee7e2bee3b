"""Support for chapter 9: what happens between the steps of a run.

A checkpoint is written at the *beginning* of a step: then its rows, learning rate and random state
are settled, and nothing of it has happened. A resumed run begins at that very point.
"""

import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import TrainerCallback

from qlora_edu.errors import CheckpointError, TrainingError, reading
from qlora_edu.production.checkpoints import (
    load_optimizer_state,
    optimizer_state,
    random_state,
    save_checkpoint,
    set_random_state,
)
from qlora_edu.production.run_folder import Run, Scores, check_finite, checkpoints_of, save_weights
from qlora_edu.training import Batch, collate, completion_loss, generate_answers

ADVICE = "resume with the libraries that the run began with"


class FinetuneCallback(TrainerCallback):
    """Progress, samples, checkpoints, and an end to a run that goes wrong."""

    def __init__(self, run: Run) -> None:
        self.run, self.resume_from, self.kept = run, run.checkpoint, {}
        if run.checkpoint is not None:
            self.kept = json.loads((run.checkpoint / "progress.json").read_text(encoding="utf-8"))
            run.losses = [(step, loss) for step, loss in self.kept["losses"]]
            run.training_seconds = self.kept["seconds"]
            run.before = Scores(**self.kept["before"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Try the longest batch, put the optimizer's state back, start the clock."""
        config, model = self.run.config, others["model"]
        longest = sorted(self.run.rows, key=lambda row: -len(row["input_ids"]))
        trained = [p for p in model.parameters() if p.requires_grad]
        # Beside the batch there must be room for the optimizer's two states, if they are not paged.
        states = [] if args.optim.startswith("paged") else list(map(torch.empty_like, 2 * trained))
        check_gradients(model, collate(longest[: config.batch_size]))
        del states
        if self.resume_from is not None:
            path = self.resume_from / "optimizer.safetensors"
            with reading(path, CheckpointError, ADVICE):
                load_optimizer_state(others["optimizer"], load_file(path), self.kept["optimizer"])
            others["lr_scheduler"].load_state_dict(self.kept["scheduler"])
        look = {"desc": config.method, "unit": "step", "file": sys.stdout, "ncols": 80}
        done, hidden = state.global_step, not self.run.progress
        self.bar = tqdm(total=config.max_steps, initial=done, disable=hidden, **look)
        self.started = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Put the random state back, after resuming; or write a checkpoint, when one is due."""
        if self.resume_from is not None:
            path = self.resume_from / "random_state.safetensors"
            with reading(path, CheckpointError, ADVICE):
                set_random_state(load_file(path))
            self.resume_from = None
        elif is_due(state.global_step, self.run.config.save_steps):
            self._save(state, **others)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Move the bar; let the model answer, when a sample is due."""
        run = self.run
        self.bar.update()
        if is_due(state.global_step, run.config.sample_steps):
            prompts = [messages[:-1] for messages in run.held_out[:2]]
            answers = generate_answers(run.model, run.tokenizer, prompts, run.config.max_new_tokens)
            for prompt, answer in zip(prompts, answers, strict=True):
                question = (prompt[-1]["content"].splitlines() or [""])[-1]
                self.bar.write(f"step {state.global_step}: {question[:60]!r} -> {answer[:70]!r}")

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Keep the loss; stop if it is not finite."""
        loss = others["logs"].get("loss")
        if loss is None:
            return
        self.run.losses.append((state.global_step, loss))
        self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss}; lower learning_rate, or check the weights")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock."""
        self.run.training_seconds += time.monotonic() - self.started
        self.bar.close()

    def _save(self, state: Any, model: Any, optimizer: Any, lr_scheduler: Any, **_: Any) -> None:
        run = self.run
        tensors, rest = optimizer_state(optimizer)
        check_finite(tensors.items())
        progress = {
            "before": asdict(run.before),
            "losses": run.losses,
            "seconds": run.training_seconds + time.monotonic() - self.started,
            "optimizer": rest,
            "scheduler": lr_scheduler.state_dict(),
        }

        def write(part: Path) -> None:
            save_weights(model, part, run.config)
            save_file(tensors, part / "optimizer.safetensors")
            save_file(random_state(), part / "random_state.safetensors")
            state.save_to_json(str(part / "trainer_state.json"))
            text = json.dumps(progress, ensure_ascii=False, allow_nan=False)
            (part / "progress.json").write_text(text + "\n", encoding="utf-8")

        folder, keep = checkpoints_of(run.folder), run.config.save_total_limit
        save_checkpoint(folder, state.global_step, write, run.metadata, keep)


def is_due(step: int, every: int) -> bool:
    """Is it time for what happens every so many steps, or never for 0?"""
    return step > 0 and every > 0 and step % every == 0


def check_gradients(model: torch.nn.Module, batch: Batch) -> None:
    """Go forward and back once, and refuse a trained parameter that gradients do not reach.

    The gradients are cleared; the random state is left as it was.
    """
    model.train()
    with torch.random.fork_rng():
        loss = completion_loss(model, batch)
        if loss.requires_grad:
            loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in trained.items():
        if gradient is None:
            fault = "missing" * (".experts." not in name)  # one batch may pass an expert by
        elif gradient.isfinite().all():
            fault = "zero" * ("lora_A" not in name and not gradient.any())  # B is 0, so A's is, too
        else:
            fault = "not finite"
        if fault:
            said = f"before step 1: the gradient of {name} is {fault}. A layer above it cuts the"
            raise TrainingError(f"{said} backward pass, or weights are damaged: reload the base")
    model.zero_grad(set_to_none=True)
