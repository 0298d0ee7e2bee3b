"""Support for chapter 9: what happens between the steps of a run.

The trainer calls a *callback* at each event. This one keeps a progress line and the losses, looks
at the gradients before the first step, stops at a loss that is not finite, lets the model answer
now and then, and writes a checkpoint every ``save_steps`` steps. It writes at the *beginning* of a
step: then the rows, the learning rate and the dice of the coming step are settled, and nothing of
it has happened. A resumed run begins at that very point.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import TrainerCallback

from qlora_edu.errors import CheckpointError, TrainingError
from qlora_edu.production.checkpoints import (
    load_optimizer_state,
    optimizer_state,
    random_state,
    save_checkpoint,
    set_random_state,
)
from qlora_edu.production.config import FinetuneConfig
from qlora_edu.production.run_folder import Measured, save_weights
from qlora_edu.text.conversations import Conversation
from qlora_edu.training import generate_answers

PROGRESS = "progress.json"


class FinetuneCallback(TrainerCallback):
    """Progress, samples, checkpoints, and an end to runs that go wrong.

    ``folder`` is where checkpoints go, None for none; ``facts`` go into each manifest.
    ``resume_from`` is the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        tokenizer: Any,
        held_out: Sequence[Conversation],
        check: Callable[[Any], None],
        progress: bool,
        folder: Path | None,
        facts: dict[str, Any],
        resume_from: Path | None,
    ) -> None:
        self.config, self.tokenizer, self.held_out = config, tokenizer, held_out
        self.check, self.progress = check, progress
        self.folder, self.facts, self.resume_from = folder, facts, resume_from
        self.losses: list[tuple[int, float]] = []
        self.seconds = 0.0
        self.before: Measured | None = None
        if resume_from is not None:
            kept = json.loads((resume_from / PROGRESS).read_text(encoding="utf-8"))
            self.losses = [(step, loss) for step, loss in kept["losses"]]
            self.seconds = kept["seconds"]
            self.before = Measured(**kept["before"])

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any, **others: Any
    ) -> None:
        """Look at the gradients, put the optimizer back, start the clock."""
        self.check(model)
        if self.resume_from is not None:
            kept = json.loads((self.resume_from / PROGRESS).read_text(encoding="utf-8"))
            tensors = load_file(self.resume_from / "optimizer.safetensors")
            load_optimizer_state(others["optimizer"], tensors, kept["optimizer"])
            others["lr_scheduler"].load_state_dict(kept["scheduler"])
        self.bar = tqdm(
            total=self.config.max_steps,
            initial=state.global_step,
            desc=self.config.method,
            unit="step",
            file=sys.stdout,
            ncols=80,
            disable=not self.progress,
        )
        self.started = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Put the dice back, after resuming; or write a checkpoint, when its turn has come."""
        if self.resume_from is not None:
            self._set_dice(args.world_size)
            self.resume_from = None
        elif self._due(state.global_step, self.config.save_steps) and self.folder is not None:
            self._save(state, **others)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Move the bar; let the model answer, when its turn has come."""
        self.bar.update()
        if self._due(state.global_step, self.config.sample_steps):
            prompts = [messages[:-1] for messages in self.held_out[:2]]
            answers = generate_answers(model, self.tokenizer, prompts, self.config.max_new_tokens)
            for prompt, answer in zip(prompts, answers, strict=True):
                question = prompt[-1]["content"].splitlines()[-1]
                self.bar.write(f"step {state.global_step}: {question[:60]!r} -> {answer[:70]!r}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict, **_: Any) -> None:
        """Keep the loss; stop if it is not finite."""
        if "loss" not in logs:
            return
        self.losses.append((state.global_step, logs["loss"]))
        self.bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)
        if not math.isfinite(logs["loss"]):
            raise TrainingError(
                f"the loss is {logs['loss']} at step {state.global_step}; lower learning_rate "
                f"({self.config.learning_rate}) or look for damaged weights"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock."""
        self.seconds += time.perf_counter() - self.started
        self.bar.close()

    @staticmethod
    def _due(step: int, every: int) -> bool:
        return step > 0 and every > 0 and step % every == 0

    def _save(self, state: Any, model: Any, optimizer: Any, lr_scheduler: Any, **_: Any) -> None:
        tensors, rest = optimizer_state(optimizer)
        seconds = self.seconds + time.perf_counter() - self.started
        progress = {
            "before": asdict(self.before) if self.before else None,
            "losses": self.losses,
            "seconds": seconds,
            "optimizer": rest,
            "scheduler": lr_scheduler.state_dict(),
        }

        def write(part: Path) -> None:
            save_weights(model, part, self.config)
            save_file(tensors, part / "optimizer.safetensors")
            save_file(random_state(), part / "random_state.safetensors")
            state.save_to_json(str(part / "trainer_state.json"))
            text = json.dumps(progress, ensure_ascii=False)
            (part / PROGRESS).write_text(text + "\n", encoding="utf-8")

        keep = self.config.save_total_limit
        save_checkpoint(self.folder, state.global_step, write, self.facts, keep)

    def _set_dice(self, processes: int) -> None:
        if processes > 1:
            # Each process has dice of its own, and only those of the first are kept.
            print(f"resumed over {processes} processes: dropout is drawn anew from here")
            return
        try:
            set_random_state(load_file(self.resume_from / "random_state.safetensors"))
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{self.resume_from / 'random_state.safetensors'} is of another version of Python, "
                f"NumPy or PyTorch ({error}); resume with the versions that the run began with"
            ) from error
