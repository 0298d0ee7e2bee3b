"""Support for chapters 9 and 10: a run on its way, and what it leaves behind.

A run folder is written whole or not at all: it gets its name in one move, at the end.
"""

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora_edu.compat import quiet
from qlora_edu.errors import DoesNotFitError, RunExistsError, TrainingError
from qlora_edu.files import atomic
from qlora_edu.production.checkpoints import checkpoints, write_manifest, writing
from qlora_edu.production.config import FinetuneConfig
from qlora_edu.text.conversations import Conversation


@dataclass(frozen=True)
class Scores:
    """The base or the fine-tuned model on the held-out rows."""

    held_out_loss: float  # nats per token
    exact_match: float | None  # share of answers, None if no answers were asked for
    answers: list[str] = field(repr=False)


@dataclass(kw_only=True, repr=False)
class Run:
    """A fine-tune: what was prepared for it, and what has come of it so far."""

    config: FinetuneConfig
    folder: Path
    progress: bool
    checkpoint: Path | None = None  # the one that the run goes on from
    metadata: dict[str, Any] = field(default_factory=dict)  # see `run_metadata`
    model: Any = None
    tokenizer: Any = None
    trainer: Any = None
    held_out: list[Conversation] = field(default_factory=list)
    encoded: list[dict[str, list[int]]] = field(default_factory=list)  # the held-out rows
    rows: list[dict[str, list[int]]] = field(default_factory=list)  # to train on, encoded
    before: Any = None  # Scores
    after: Any = None  # Scores
    losses: list[tuple[int, float]] = field(default_factory=list)  # (step, mean since the last)
    training_seconds: float = 0.0  # without loading and without the two measurements

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def summary(self) -> dict[str, float | int | None]:
        """The figures of the run, ready for JSON."""
        return {
            "exact_match_before": self.before.exact_match,
            "exact_match_after": self.after.exact_match,
            "held_out_loss_before": self.before.held_out_loss,
            "held_out_loss_after": self.after.held_out_loss,
            "held_out_rows": len(self.encoded),
            "training_seconds": round(self.training_seconds, 1),
            "steps": self.config.max_steps,
            "trainable_parameters": self.trainable_parameters,
        }

    def closing_line(self) -> str:
        """One line: what was measured, before and after."""
        losses = f"{self.before.held_out_loss:.3f} → {self.after.held_out_loss:.3f}"
        said = f"held-out loss {losses} nats on {len(self.encoded)} rows"
        if self.after.exact_match is not None:
            matches = f"{self.before.exact_match:.2f} → {self.after.exact_match:.2f}"
            said += f", exact match {matches} on {len(self.after.answers)}"
        return f"{said}; {self.training_seconds:.0f} s of training"

    @contextlib.contextmanager
    def saying_where(self) -> Iterator[None]:
        """Say how far the run had come when Ctrl-C, full memory or a `TrainingError` ends it."""
        try:
            yield
        except (KeyboardInterrupt, torch.OutOfMemoryError, TrainingError) as error:
            step = self.trainer.state.global_step if self.trainer else 0
            saved = checkpoints(checkpoints_of(self.folder))
            goes_on = f"its newest checkpoint is {saved[-1]}" if saved else "it has no checkpoint"
            where = f"stopped at step {step} of {self.config.max_steps}; {goes_on}"
            if isinstance(error, torch.OutOfMemoryError):
                raise DoesNotFitError(
                    f"{where}. Out of memory: lower batch_size or max_length or set "
                    "gradient_checkpointing, and begin again; or lower eval_batch_size and resume"
                ) from error
            raise type(error)(f"{where}: {error}" if str(error) else where) from error


def choose_output_dir(config: FinetuneConfig, resume: bool = False) -> Path:
    """Where the run will be written: `output_dir`, or the first free `runs/<name>`.

    To resume, it is `output_dir`, or the last `runs/<name>` that was interrupted.
    """
    if config.output_dir is None:
        names = [config.name, *(f"{config.name}-{n}" for n in range(2, 1000))]
        folders = [f for f in (Path("runs") / name for name in names) if not f.exists()]
        interrupted = [f for f in folders if checkpoints_of(f).exists()]
        free = [f for f in folders if f not in interrupted]
        return interrupted[-1] if resume and interrupted else free[0]
    folder = Path(config.output_dir)
    left = checkpoints_of(folder)
    if folder.exists():
        more = f". {left} is no longer needed if that run is finished" if left.exists() else ""
        said = f"{folder} exists: a run that is finished, or a folder of yours"
        advice = "A run overwrites nothing; choose another output_dir, or delete it yourself"
        raise RunExistsError(f"{said}. {advice}{more}")
    if left.exists() and not resume:
        said = f"{left} is of a run that still goes on, or was interrupted: go on by"
        raise RunExistsError(f"{said} resume=True (or --resume), or delete it to begin again")
    return folder


def checkpoints_of(folder: Path) -> Path:
    """Where the checkpoints of the run `folder` are kept until it is written."""
    return folder.parent / f"{folder.name}.checkpoints"


@contextlib.contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Keep the run `folder` for this process; `RunExistsError` while another one works on it."""
    saved = checkpoints_of(folder)
    with writing(folder):
        saved.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            stack.callback(os.close, lock := os.open(saved, os.O_RDONLY))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it ends with the process, at least
        except BlockingIOError:
            said = f"another process is working on the run {folder}"
            raise RunExistsError(f"{said}; let it end, or choose another output_dir") from None
        except (ImportError, OSError):  # Windows, or a disk that locks nothing
            pass
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # it holds checkpoints
                saved.rmdir()


def remove_parts(folder: Path) -> None:
    """Remove what the run `folder` had half written when it was killed."""
    parts = folder.parent.glob(f".{glob.escape(folder.name)}.part-*")
    for part in (*parts, *checkpoints_of(folder).glob(".checkpoint-*.part-*")):
        shutil.rmtree(part, ignore_errors=True)


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a run whose `folder` is whole; what else is beside them stays."""
    saved = checkpoints_of(folder)
    for checkpoint in checkpoints(saved):
        shutil.rmtree(checkpoint, ignore_errors=True)
    with contextlib.suppress(OSError):  # absent, or not empty
        saved.rmdir()


def write_run(run: Run) -> None:
    """Write adapter (or whole model), tokenizer, settings, measurements and manifest."""
    import yaml

    metrics = [
        {"event": "before", **asdict(run.before)},
        *({"event": "step", "step": step, "loss": loss} for step, loss in run.losses),
        {"event": "after", **asdict(run.after)},
        {"event": "summary", **run.summary()},
    ]
    lines = [json.dumps(metric, ensure_ascii=False, allow_nan=False) for metric in metrics]
    settings = yaml.safe_dump(asdict(run.config), sort_keys=False)
    with quiet(), writing(run.folder), atomic.folder(run.folder) as part:
        save_weights(run.model, part, run.config)
        run.tokenizer.save_pretrained(part)
        (part / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (part / "config.yaml").write_text(settings, encoding="utf-8")
        write_manifest(part, run.metadata)


def save_weights(model: Any, folder: Path, config: FinetuneConfig) -> None:
    """Write the adapter, as PEFT does, or for `method="full"` the whole model; if it is finite."""
    check_finite((n, p) for n, p in model.named_parameters() if p.requires_grad)
    if config.method == "full":
        model.save_pretrained(folder)
        return
    model.peft_config["default"].base_model_name_or_path = config.model
    model.save_pretrained(folder, save_embedding_layers=False)


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse NaN and infinity: save_total_limit would then delete a good checkpoint for it."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            said = f"{name} holds NaN or infinity: training has diverged. Nothing of it is written"
            raise TrainingError(f"{said}; lower learning_rate or max_grad_norm, and start again")
