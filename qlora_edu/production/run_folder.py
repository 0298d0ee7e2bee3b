"""Support for chapters 9 and 10: a run on its way, and what it leaves behind.

A run folder is written whole or not at all: everything goes to a hidden folder beside it, which
takes its name in one move at the end.
"""

import contextlib
import json
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qlora_edu.errors import (
    DamagedFileError,
    DoesNotFitError,
    QloraError,
    RunExistsError,
    TrainingError,
)
from qlora_edu.files import atomic
from qlora_edu.production.checkpoints import (
    STACK,
    cannot_write,
    checkpoints,
    verify_manifest,
    write_manifest,
)
from qlora_edu.production.config import FinetuneConfig
from qlora_edu.text.conversations import Conversation


@dataclass(frozen=True)
class Scores:
    """The base or the fine-tuned model on the held-out rows."""

    held_out_loss: float  # nats per token
    exact_match: float | None  # share of answers, None if no answers were asked for
    answers: list[str] = field(repr=False)


@dataclass(kw_only=True)
class Run:
    """A fine-tune on its way: what was prepared, and what has come of it so far."""

    config: FinetuneConfig
    folder: Path
    part: Path  # where it is written, until all of it takes the name `folder` in one move
    writes: bool  # false in every process but the first, if there are several
    progress: bool
    checkpoint: Path | None = None  # the one that the run goes on from
    metadata: dict[str, Any] = field(default_factory=dict)  # see `run_metadata`
    tokenizer: Any = None
    held_out: list[Conversation] = field(default_factory=list)
    encoded: list[dict[str, list[int]]] = field(default_factory=list)  # the held-out rows
    rows: list[dict[str, list[int]]] = field(default_factory=list)  # to train on, encoded
    trainer: Any = None
    before: Scores | None = None
    after: Scores | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0  # of training

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)

    @contextlib.contextmanager
    def saying_where(self) -> Iterator[None]:
        """Add to whatever ends the run how far it had come, and from where it can go on."""
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped at {self.whereabouts()}") from None
        except torch.OutOfMemoryError as error:
            raise DoesNotFitError(
                f"out of memory at {self.whereabouts()}. Training: lower batch_size, and begin "
                "again. Measuring: lower eval_batch_size, and resume"
            ) from error
        except TrainingError as error:
            raise TrainingError(f"{error} ({self.whereabouts()})") from error

    def whereabouts(self) -> str:
        """How far the run has come, and the step from which it can go on."""
        step = self.trainer.state.global_step if self.trainer else 0
        saved = checkpoints(checkpoints_of(self.folder))
        goes_on = f"its newest checkpoint is {saved[-1]}" if saved else "it has no checkpoint yet"
        return f"step {step} of {self.config.max_steps}; {goes_on}"


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What came of a run; `model` and `tokenizer` are ready to answer."""

    config: FinetuneConfig
    folder: Path
    before: Scores
    after: Scores
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

    def table(self) -> str:
        """Both measures, before and after, in three aligned lines or two."""
        before, after = self.before, self.after
        lines = [
            f"{'':24}before    after",
            f"held-out loss, nats  {before.held_out_loss:9.3f}{after.held_out_loss:9.3f}",
        ]
        if after.exact_match is not None:
            lines.append(f"exact match          {before.exact_match:9.2f}{after.exact_match:9.2f}")
        return "\n".join(lines)

    def closing_line(self) -> str:
        """One line: what was measured, before and after."""
        before, after, rows = self.before, self.after, len(self.held_out)
        said = f"held-out loss {before.held_out_loss:.3f} → {after.held_out_loss:.3f}"
        if after.exact_match is not None:
            said = f"exact match {before.exact_match:.2f} → {after.exact_match:.2f}"
            rows = len(after.answers)
        return f"{said} on {rows} held-out rows, {self.training_seconds:.0f} s of training"


# Where a run is written


def choose_output_dir(config: FinetuneConfig, resume: bool = False) -> Path:
    """Where the run will be written: `output_dir`, or the first free `runs/<name>`.

    To resume, it is `output_dir`, or the last `runs/<name>` that was interrupted.

    Raises:
        RunExistsError: if `output_dir` is there already, or checkpoints are and shall not be used.
    """
    if config.output_dir is not None:
        folder = Path(config.output_dir)
        if resume and _is_finished(folder):
            raise RunExistsError(f"{folder} is finished: there is nothing to resume")
        if folder.exists():
            raise RunExistsError(
                f"{folder} exists, and a run overwrites nothing; choose another output_dir, or "
                "delete that folder yourself"
            )
        if checkpoints_of(folder).exists() and not resume:
            raise RunExistsError(
                f"{checkpoints_of(folder)} holds checkpoints of a run that was interrupted. "
                "resume=True (on the command line --resume) goes on with it; to begin again, "
                "delete that folder yourself"
            )
        return folder
    names = [config.name, *(f"{config.name}-{n}" for n in range(2, 1000))]
    folders = [f for f in (Path("runs") / name for name in names) if not f.exists()]
    interrupted = [f for f in folders if checkpoints_of(f).exists()]
    if resume and interrupted:
        return interrupted[-1]
    free = [f for f in folders if f not in interrupted]
    if not free:
        raise RunExistsError(f"runs/{config.name} … -999 are all taken; choose another name")
    return free[0]


def checkpoints_of(folder: Path) -> Path:
    """Where the checkpoints of the run `folder` are kept until it is written."""
    return folder.with_name(f"{folder.name}.checkpoints")


def _is_finished(folder: Path) -> bool:
    try:
        return folder.is_dir() and bool(verify_manifest(folder))
    except DamagedFileError:
        return False


def discard_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a run whose folder is whole; what else is beside them stays."""
    saved = checkpoints_of(folder)
    if not saved.exists() or not _is_finished(folder):
        return
    _remove(*checkpoints(saved), *saved.glob(".checkpoint-*.part-*"))
    with contextlib.suppress(OSError):  # not empty
        saved.rmdir()


def discard_unfinished(config: FinetuneConfig) -> None:
    """Remove half-written folders, and checkpoints of a finished run, before `config` resumes."""
    if config.output_dir is not None:
        discard_checkpoints(Path(config.output_dir))
    with contextlib.suppress(RunExistsError):
        folder = choose_output_dir(config, resume=True)
        _remove(*folder.parent.glob(f".{folder.name}.part-*"))
        _remove(*checkpoints_of(folder).glob(".checkpoint-*.part-*"))


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def unfinished(folder: Path, writes: bool) -> Iterator[Path]:
    """The hidden folder that becomes `folder`, in place of its checkpoints, when all is written.

    A process that writes nothing gets a temporary one.

    Raises:
        CheckpointError: if the disk refuses; if it can be known, before an hour of training.
    """
    from safetensors import SafetensorError

    if not writes:
        with tempfile.TemporaryDirectory() as elsewhere:
            yield Path(elsewhere)
        return
    try:
        with atomic.folder(folder) as part:
            yield part
    except QloraError:
        raise
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from error
    discard_checkpoints(folder)


# What is written


def write_run(folder: Path, result: FinetuneResult, metadata: dict[str, Any]) -> None:
    """Write adapter (or whole model), tokenizer, settings, measurements, versions, manifest."""
    import yaml

    config = result.config
    save_weights(result.model, folder, config)
    result.tokenizer.save_pretrained(folder)
    metrics = [
        {"event": "before", **asdict(result.before)},
        *({"event": "step", "step": step, "loss": loss} for step, loss in result.losses),
        {"event": "after", **asdict(result.after)},
        {"event": "summary", **result.summary()},
    ]
    lines = [json.dumps(metric, ensure_ascii=False, allow_nan=False) for metric in metrics]
    versions = {
        "seed": config.seed,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        **{name: version(name) for name in STACK},
    }
    for name, text in (
        ("config.yaml", yaml.safe_dump(asdict(config), sort_keys=False)),
        ("metrics.jsonl", "\n".join(lines) + "\n"),
        ("versions.json", json.dumps(versions, indent=1) + "\n"),
    ):
        (folder / name).write_text(text, encoding="utf-8")
    write_manifest(folder, metadata)


def save_weights(model: Any, folder: Path, config: FinetuneConfig) -> None:
    """Write the adapter, as PEFT does, or for `method="full"` the whole model; if it is finite."""
    check_finite((n, p) for n, p in model.named_parameters() if p.requires_grad)
    if config.method == "full":
        model.save_pretrained(folder)
        return
    model.peft_config["default"].base_model_name_or_path = config.model
    model.save_pretrained(folder, save_embedding_layers=False)


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse tensors that hold NaN or infinity: such a file would push out one that is sound."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise TrainingError(
                f"{name} holds NaN or infinity, so the training has diverged and nothing of it is "
                "written; lower learning_rate or max_grad_norm, and start again"
            )
