"""Support for chapters 9 and 10: what a fine-tune leaves behind, in memory and on disk.

A run folder is written whole or not at all: everything goes to a hidden folder beside it, which
takes its name in one move at the end. A fine-tune killed half-way leaves no folder that looks done.
"""

import json
import platform
import shutil
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qlora_edu.errors import RunExistsError
from qlora_edu.production.checkpoints import write_manifest
from qlora_edu.production.config import FinetuneConfig
from qlora_edu.text.conversations import Conversation

STACK = ("torch", "bitsandbytes", "transformers", "peft", "trl", "accelerate", "datasets")


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

    def table(self) -> str:
        """Both measures, before and after, in four aligned lines or fewer."""
        lines = [
            f"{'':24}before    after",
            f"held-out loss, nats  {self.before.held_out_loss:9.3f}{self.after.held_out_loss:9.3f}",
        ]
        if self.after.exact_match is not None:
            match = f"{self.before.exact_match:9.2f}{self.after.exact_match:9.2f}"
            lines.append(f"exact match          {match}")
        return "\n".join(lines)

    def closing_line(self) -> str:
        """One line: what was measured, before and after."""
        ending = f"{self.training_seconds:.0f} s of training"
        if self.after.exact_match is None:
            losses = f"{self.before.held_out_loss:.3f} → {self.after.held_out_loss:.3f}"
            return f"held-out loss {losses} on {len(self.held_out)} held-out rows, {ending}"
        matches = f"{self.before.exact_match:.2f} → {self.after.exact_match:.2f}"
        return f"exact match {matches} on {len(self.after.answers)} held-out rows, {ending}"


def choose_output_dir(config: FinetuneConfig, resume: bool = False) -> Path:
    """Where the run will be written: ``output_dir``, or the first free ``runs/<name>``.

    To resume, it is ``output_dir``, or the last ``runs/<name>`` that was interrupted.

    Raises:
        RunExistsError: if ``output_dir`` is there already, or checkpoints of an interrupted run are
            and they are not to be resumed.
    """
    if config.output_dir is not None:
        folder = Path(config.output_dir)
        if folder.exists() and checkpoints_of(folder).exists() and resume:
            # Killed after the run was written whole, and before its checkpoints were tidied away.
            shutil.rmtree(checkpoints_of(folder), ignore_errors=True)
            raise RunExistsError(f"{folder} is whole: that run had come to its end, and is kept")
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
    folders = [Path("runs") / f"{config.name}{n}" for n in ("", *(f"-{n}" for n in range(2, 1000)))]
    interrupted = [f for f in folders if checkpoints_of(f).exists() and not f.exists()]
    if resume and interrupted:
        return interrupted[-1]
    return next(f for f in folders if not f.exists() and f not in interrupted)


def checkpoints_of(folder: Path) -> Path:
    """Where the checkpoints of the run ``folder`` are kept until it is written."""
    return folder.with_name(f"{folder.name}.checkpoints")


def write_run(folder: Path, result: FinetuneResult, facts: dict[str, Any]) -> None:
    """Write adapter (or whole model), tokenizer, settings, measurements, versions, manifest."""
    import yaml

    config = result.config
    save_weights(result.model, folder, config)
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
    write_manifest(folder, facts)


def save_weights(model: Any, folder: Path, config: FinetuneConfig) -> None:
    """Write the adapter, as PEFT does, or for ``method="full"`` the whole model."""
    if config.method == "full":
        model.save_pretrained(folder)
        return
    model.peft_config["default"].base_model_name_or_path = config.model
    model.save_pretrained(folder, save_embedding_layers=False)
