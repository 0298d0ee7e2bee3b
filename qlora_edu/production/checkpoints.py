"""Support for chapter 9: checkpoints that are whole or absent, and that know their base model.

A run may be killed at any moment, between any two bytes. So a checkpoint is written aside, flushed
to the disk and then given its name in one move; and it ends with a *manifest*, which lists every
file with its SHA-256 sum, and the fingerprint of the base model that the adapter belongs to. What
is read back is checked against it first: a file that is missing, cut or changed is named, and never
loaded. Nothing is pickled: tensors are in safetensors, all else is JSON.

Four things make a resumed run equal, to the bit, to one that was never interrupted: the trained
weights, the optimizer's states, the step (it decides learning rate and rows), and the states of
the random number generators (they decide dropout).
"""

import errno
import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_edu.errors import CheckpointError, DamagedFileError, reading
from qlora_edu.files import atomic
from qlora_edu.production.config import FinetuneConfig

MANIFEST = "manifest.json"
STACK = ("torch", "bitsandbytes", "transformers", "peft", "trl", "accelerate", "datasets")
CHANGEABLE = (
    "name output_dir model train_data held_out_data eval_batch_size logging_steps save_steps "
    "save_total_limit sample_steps"
).split()
"""Settings that a resumed run may change: they decide nothing, or the sums of what they name do."""
NAME = re.compile(r"checkpoint-(\d+)")


def fingerprint(source: str | Path) -> str:
    """SHA-256 over the base model's weights: names, dtypes, shapes and bytes, in order of name.

    `source` is a folder, or the name of a Hub model that has been downloaded. Into how many files
    the weights are split makes no difference. Some 1 GB per second on one core.

    Raises:
        CheckpointError: if there are no safetensors, or they cannot be read.
    """
    from safetensors import safe_open

    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors"]
        folder = Path(
            snapshot_download(str(source), allow_patterns=patterns, local_files_only=True)
        )
    place: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with reading(path, CheckpointError, "download it again"), safe_open(path, "pt") as file:
            place |= dict.fromkeys(file.keys(), path)
    if not place:
        raise CheckpointError(
            f"{source} holds no safetensors to take a fingerprint of; save the model with "
            "save_pretrained, which writes them"
        )
    digest = hashlib.sha256()
    for name in sorted(place):
        with safe_open(place[name], "pt") as file:
            tensor = file.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def config_fingerprint(source: str | Path) -> str:
    """SHA-256 over what the base's `config.json` says; by which version it was written is left out.

    The same weights under another `rms_norm_eps` or `rope_theta` are another model.
    """
    path = Path(source) / "config.json"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache

        path = Path(try_to_load_from_cache(str(source), "config.json") or path)
    with reading(path, CheckpointError, "download it again"):
        said = json.loads(path.read_text(encoding="utf-8"))
        said = {k: v for k, v in said.items() if k not in ("transformers_version", "_name_or_path")}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


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
        "base_config_sha256": config_fingerprint(source),
        "rows_sha256": _sum_of_rows(rows),
        "held_out_sha256": _sum_of_rows(held_out),
        "config": {k: v for k, v in asdict(config).items() if k not in ("name", "output_dir")},
        "versions": {name: version(name) for name in STACK},
    }


def _sum_of_rows(rows: Iterable[dict[str, list[int]]]) -> str:
    return hashlib.sha256(json.dumps([list(row.values()) for row in rows]).encode()).hexdigest()


def check_metadata(checkpoint: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to resume from what belongs to another run; say it if only versions differ.

    Settings that change neither weights nor measurements (`CHANGEABLE`) may be others.

    Raises:
        CheckpointError: if base model, settings, training rows or held-out rows are others.
    """
    if saved["base_sha256"] != now["base_sha256"]:
        raise CheckpointError(
            f"{checkpoint} belongs to the base {saved['base_model']!r} with other weights than "
            f"{now['base_model']!r} has now; resume with the base that the run began with"
        )
    names = sorted((saved["config"].keys() | now["config"].keys()) - set(CHANGEABLE))
    other = [n for n in names if saved["config"].get(n) != now["config"].get(n)]
    if other:
        was = ", ".join(
            f"{n} was {saved['config'].get(n)!r} and is {now['config'].get(n)!r}" for n in other
        )
        raise CheckpointError(
            f"{checkpoint} is of a run with other settings: {was}. Resume with the same settings, "
            "or start a new run"
        )
    for key, what in (
        ("base_config_sha256", f"config.json of the base {now['base_model']!r}"),
        ("rows_sha256", f"training rows than {now['config']['train_data']!r} holds now"),
        ("held_out_sha256", f"held-out rows than {now['config']['held_out_data']!r} holds now"),
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
    sums = {name: _sum(folder / name) for name in _files(folder)}
    text = json.dumps({**metadata, "sha256": sums}, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def verify_manifest(folder: str | Path) -> dict[str, Any]:
    """Check every file of `folder` against its manifest.

    Files that the manifest does not list are nobody's concern: a user may add notes.

    Returns:
        The metadata in the manifest.

    Raises:
        DamagedFileError: naming the file that is missing or changed.
    """
    folder = Path(folder)
    try:
        metadata = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sums = dict(metadata.pop("sha256"))
        outside = [n for n in sums if Path(n).is_absolute() or ".." in Path(n).parts]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedFileError(
            f"{folder / MANIFEST} is missing or unreadable, so nothing in {folder} can be trusted; "
            "it was not written to the end, or not by this course"
        ) from error
    if not sums or outside:
        raise DamagedFileError(
            f"{folder / MANIFEST} lists {'files outside its folder' if outside else 'no files'}; "
            "it was changed after it was written: copy it again from where it came"
        )
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise DamagedFileError(
                f"{path} is missing; bring it back, or use an earlier checkpoint"
            )
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

    Older ones are removed only when the new one is whole and on the disk.

    Raises:
        CheckpointError: if the disk is full or refuses; earlier checkpoints are as they were.
    """
    from safetensors import SafetensorError

    target = folder / f"checkpoint-{step:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if target.exists():  # of a run that was resumed from before it, because it is damaged
            shutil.rmtree(target)
        with atomic.folder(target) as part:
            write(part)
            write_manifest(part, {"step": step, **metadata})
    except (OSError, SafetensorError) as error:
        raise cannot_write(target, error) from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def cannot_write(target: Path, error: Exception) -> CheckpointError:
    """The error to raise when the disk refuses `target`: what it said, and what to do."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    full = full or "space left" in str(error) or "too large" in str(error)
    return CheckpointError(
        f"cannot write {target} ({error}). "
        + ("Free some space" if full else "Look at the folder and its rights")
        + ", then resume: what was saved before is untouched"
    )


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in `folder`, good or bad, the oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def latest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, with its metadata; None if there is none.

    One that is not is passed over, and named.

    Raises:
        DamagedFileError: if there are checkpoints, and none of them is whole.
    """
    found = checkpoints(folder)
    faults = []
    for path in reversed(found):
        try:
            return path, verify_manifest(path)
        except DamagedFileError as error:
            faults.append(str(error))
            print(f"warning: {path.name} is passed over: {error}")
    if faults:
        raise DamagedFileError(
            f"none of the {len(found)} checkpoints in {folder} is whole: {'; '.join(faults)}. "
            f"To begin again, delete {folder}"
        )
    return None


def optimizer_state(optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimizer as tensors, named `<parameter>.<entry>`, and as JSON."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the real one
    # bitsandbytes' own state_dict hides its tensors in a dictionary of dictionaries; torch's shows
    # them.
    bare = (
        torch.optim.Optimizer.state_dict if hasattr(inner, "init_state") else type(inner).state_dict
    )
    state = bare(inner)
    tensors, numbers = {}, {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                numbers[f"{index}.{name}"] = value
    return tensors, {"numbers": numbers, "param_groups": state["param_groups"]}


def load_optimizer_state(
    optimizer: Any, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Put back what `optimizer_state` gave.

    Raises:
        CheckpointError: if the optimizer has other parameters than the one that was saved.
    """
    own = optimizer.state_dict()["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (own, rest["param_groups"])]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"the optimizer holds groups of {sizes[0]} parameters, the checkpoint of {sizes[1]}; "
            "resume with the settings that the run began with"
        )
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *rest["numbers"].items()]:
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the real one
    if hasattr(inner, "init_state"):
        _load_into_bitsandbytes(inner, state, rest["param_groups"])
        return
    groups = [
        {k: tuple(v) if k == "betas" else v for k, v in g.items()} for g in rest["param_groups"]
    ]
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
            entries = state.get(index, {})
            index += 1
            if not entries:
                continue
            optimizer.init_state(group, parameter, g, p)
            own = optimizer.state[parameter]
            for name, value in entries.items():
                if isinstance(value, Tensor) and isinstance(own.get(name), Tensor):
                    own[name].copy_(value)
                else:
                    own[name] = value


def random_state() -> dict[str, Tensor]:
    """The states of all random number generators that training draws from, as tensors."""
    _, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    _, keys, position, has_gauss, cached = numpy_state
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss]),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        for i, device in enumerate(torch.cuda.get_rng_state_all()):
            state[f"cuda_{i}"] = device
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Put all generators back to where `random_state` found them.

    >>> before = random_state()
    >>> first = torch.rand(1), random.random(), np.random.rand()
    >>> set_random_state(before)
    >>> (torch.rand(1), random.random(), np.random.rand()) == first
    True
    """
    torch.set_rng_state(state["torch"].byte())
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy_gauss"].item()))
    devices = [state[name] for name in sorted(state) if name.startswith("cuda_")]
    if devices and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([device.byte() for device in devices])


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            yield path.relative_to(folder).as_posix()


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
