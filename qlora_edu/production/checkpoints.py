"""Support for chapter 9: checkpoints that are whole or absent, and that know their base model.

A checkpoint is written aside, flushed and named in one move. Its *manifest* lists the SHA-256 sum
of every file and the fingerprint of the base; what does not agree with it is named, never loaded.
Trained weights, optimizer states, step and random states make a resumed run equal, to the bit, to
one that was never interrupted. Tensors are in safetensors, all else is JSON; nothing is pickled.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_edu.errors import CheckpointError, DamagedFileError, reading
from qlora_edu.files import atomic
from qlora_edu.production.config import FinetuneConfig

MANIFEST = "manifest.json"
STACK = ("torch", "bitsandbytes", "transformers", "peft", "trl", "accelerate", "datasets")
# Settings that a resumed run may change: they decide nothing, or the sums of what they name do.
CHANGEABLE = (
    "name output_dir model train_data held_out_data eval_batch_size logging_steps save_steps "
    "save_total_limit sample_steps"
).split()


def base_folder(source: str | Path) -> Path:
    """The folder of a base model: `source` itself, or where a Hub model was downloaded to."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "config.json"]
    return Path(snapshot_download(str(source), allow_patterns=patterns, local_files_only=True))


def fingerprint(source: str | Path) -> str:
    """SHA-256 over a base model's weights: names, dtypes, shapes and bytes, in order of name.

    Into how many files they are split makes no difference. Some 1 GB per second on one core.
    """
    from safetensors import safe_open

    place: dict[str, Path] = {}
    for path in sorted(base_folder(source).glob("*.safetensors")):
        with reading(path, CheckpointError, "download it again"), safe_open(path, "pt") as file:
            place |= dict.fromkeys(file.keys(), path)
    if not place:
        raise CheckpointError(
            f"{source} holds no safetensors; save the model with save_pretrained, which writes them"
        )
    digest = hashlib.sha256()
    for name in sorted(place):
        with safe_open(place[name], "pt") as file:
            tensor = file.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def run_metadata(
    config: FinetuneConfig,
    source: str,
    rows: Iterable[dict[str, list[int]]],
    held_out: Iterable[dict[str, list[int]]] = (),
) -> dict[str, Any]:
    """What a checkpoint or an adapter belongs to: settings, base, rows and versions."""
    return {
        "base_model": config.model,
        "base_sha256": fingerprint(source),
        # The same weights under another `rms_norm_eps` or `rope_theta` are another model.
        "base_config_sha256": _sum(base_folder(source) / "config.json"),
        "rows_sha256": _sum_of_rows(rows),
        "held_out_sha256": _sum_of_rows(held_out),
        "config": {k: v for k, v in asdict(config).items() if k not in ("name", "output_dir")},
        "versions": {name: version(name) for name in STACK},
    }


def check_metadata(checkpoint: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to resume from what belongs to another run; say it if only versions differ."""
    was, wanted = saved["config"], now["config"]
    names = sorted((was.keys() | wanted.keys()) - set(CHANGEABLE))
    changes = [
        f"{name} was {was.get(name)!r} and is {wanted.get(name)!r}"
        for name in names
        if was.get(name) != wanted.get(name)
    ]
    if changes:
        raise CheckpointError(
            f"{checkpoint} is of a run with other settings: {', '.join(changes)}. Resume with the "
            "same settings, or start a new run"
        )
    for key, what in (
        ("base_sha256", f"weights than the base {wanted['model']!r} has now"),
        ("base_config_sha256", f"config.json of the base {wanted['model']!r}"),
        ("rows_sha256", f"training rows than {wanted['train_data']!r} holds now"),
        ("held_out_sha256", f"held-out rows than {wanted['held_out_data']!r} holds now"),
    ):
        if saved.get(key) != now[key]:
            raise CheckpointError(
                f"{checkpoint} was made with other {what}; bring the file back as it was, or start "
                "a new run"
            )
    for name, then in saved["versions"].items():
        if then != now["versions"].get(name):
            print(
                f"warning: {name} was {then} and is {now['versions'].get(name)}: the run goes on, "
                "but perhaps not to the same bits"
            )


def write_manifest(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write `manifest.json`: `metadata`, and the SHA-256 sum of every file in `folder`."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST]
    sums = {path.relative_to(folder).as_posix(): _sum(path) for path in paths}
    text = json.dumps({**metadata, "sha256": sums}, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def verify_manifest(folder: str | Path) -> dict[str, Any]:
    """Check every file that the manifest of `folder` lists; return the metadata in it.

    Raises:
        DamagedFileError: naming the file that is missing or changed.
    """
    folder = Path(folder)
    advice = "it was not written to its end, or was changed; use an earlier or another copy"
    with reading(folder / MANIFEST, DamagedFileError, advice):
        metadata = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sums = dict(metadata.pop("sha256"))
        outside = [n for n in sums if Path(n).is_absolute() or ".." in Path(n).parts]
        if not sums or outside:
            raise ValueError("it lists no files, or files outside its folder")
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise DamagedFileError(f"{path} is missing; bring it back, or use an earlier copy")
        if _sum(path) != expected:
            raise DamagedFileError(
                f"{path} is not the file that was written: its SHA-256 sum differs from the "
                "manifest's. Copy it again from where it came, or use an earlier checkpoint"
            )
    return metadata


def save_checkpoint(
    folder: Path,
    step: int,
    write: Callable[[Path], None],
    metadata: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Let `write(part)` fill `folder/checkpoint-<step>`, and keep the newest `keep` of them.

    Raises:
        CheckpointError: if the disk is full or refuses; earlier checkpoints are as they were.
    """
    from safetensors import SafetensorError

    target = folder / f"checkpoint-{step:06d}"
    try:
        if target.exists():  # of a run that was resumed from before it, because it is damaged
            shutil.rmtree(target)
        with atomic.folder(target) as part:
            write(part)
            write_manifest(part, {"step": step, **metadata})
    except (OSError, SafetensorError) as error:
        raise cannot_write(target, error) from error
    for old in checkpoints(folder)[:-keep]:  # now that the new one is whole and on the disk
        shutil.rmtree(old)
    return target


def cannot_write(target: Path, error: Exception) -> CheckpointError:
    """The error to raise when the disk refuses `target`: what it said, and what to do."""
    return CheckpointError(
        f"cannot write {target} ({error}). Free some space, or look at the folder and its rights, "
        "then resume: what was saved before is untouched"
    )


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in `folder`, good or bad, the oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.partition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def latest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, with its metadata; damaged ones are named in passing.

    Raises:
        DamagedFileError: if there are checkpoints, and none of them is whole.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return path, verify_manifest(path)
        except DamagedFileError as error:
            print(f"warning: {path.name} is passed over: {error}")
    if found:
        raise DamagedFileError(
            f"none of the {len(found)} checkpoints in {folder} is whole. To begin again, delete "
            f"{folder}"
        )
    return None


def optimizer_state(optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimizer as tensors, named `<parameter>.<entry>`, and as JSON."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the real one
    # bitsandbytes' own state_dict hides its tensors in dictionaries; torch's shows them.
    is_theirs = hasattr(inner, "init_state")
    state = torch.optim.Optimizer.state_dict(inner) if is_theirs else inner.state_dict()
    entries = {f"{i}.{name}": v for i, own in state["state"].items() for name, v in own.items()}
    tensors = {k: v.detach().cpu().contiguous() for k, v in entries.items() if torch.is_tensor(v)}
    numbers = {key: value for key, value in entries.items() if key not in tensors}
    return tensors, {"numbers": numbers, "param_groups": state["param_groups"]}


def load_optimizer_state(
    optimizer: Any, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Put back what `optimizer_state` gave, into an optimizer of as many parameters."""
    inner = getattr(optimizer, "optimizer", optimizer)
    groups = rest["param_groups"]
    sizes = [[len(group["params"]) for group in of] for of in (inner.param_groups, groups)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"the optimizer holds groups of {sizes[0]} parameters, the checkpoint of {sizes[1]}; "
            "resume with the settings that the run began with"
        )
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *rest["numbers"].items()]:
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    if hasattr(inner, "init_state"):
        _load_into_bitsandbytes(inner, state, groups)
        return
    groups = [{k: tuple(v) if k == "betas" else v for k, v in g.items()} for g in groups]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _load_into_bitsandbytes(
    optimizer: Any, state: Mapping[int, Mapping[str, Any]], groups: list[dict[str, Any]]
) -> None:
    # Its own load_state_dict would make plain tensors of paged states (bitsandbytes 782, 1381). So
    # the states are created as at a first step, paged ones in managed memory, and then filled.
    optimizer.check_overrides()
    optimizer.to_gpu()
    optimizer.initialized = True
    index = 0
    for g, (group, saved) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        group.update({k: v for k, v in saved.items() if k != "params"})
        for p, parameter in enumerate(group["params"]):
            if index in state:
                optimizer.init_state(group, parameter, g, p)
                own = optimizer.state[parameter]
                for name, value in state[index].items():
                    if isinstance(value, Tensor) and isinstance(own.get(name), Tensor):
                        own[name].copy_(value)
                    else:
                        own[name] = value
            index += 1


def random_state() -> dict[str, Tensor]:
    """The states of the generators that training draws from: torch's, of processor and cards."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), **{f"cuda_{i}": d for i, d in enumerate(devices)}}


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Put all generators back to where `random_state` found them.

    >>> before, first = random_state(), torch.rand(1)
    >>> set_random_state(before)
    >>> torch.equal(torch.rand(1), first)
    True
    """
    torch.set_rng_state(state["torch"].byte())
    devices = [state[f"cuda_{i}"].byte() for i in range(len(state) - 1)]
    if devices and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(devices)


def _sum_of_rows(rows: Iterable[dict[str, list[int]]]) -> str:
    return hashlib.sha256(json.dumps([list(row.values()) for row in rows]).encode()).hexdigest()


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
