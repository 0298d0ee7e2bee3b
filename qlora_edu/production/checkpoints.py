"""Support for chapter 9: checkpoints that are whole or absent, and that know their base model.

Its *manifest* lists the SHA-256 sum of every file and the fingerprint of the base. A run that is
resumed on a CPU ends with the weights, to the bit, of one that was never interrupted; its logged
losses are the same if `save_steps` is a multiple of `logging_steps`. Nothing is pickled.
"""

import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_edu.errors import CheckpointError, DamagedFileError, QloraError, reading
from qlora_edu.files import atomic
from qlora_edu.production.config import FinetuneConfig

Rows = Iterable[dict[str, list[int]]]  # encoded
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
    """SHA-256 over a base model's weights, however many files they are split into."""
    from safetensors import safe_open

    place: dict[str, Path] = {}
    for path in sorted(base_folder(source).glob("*.safetensors")):
        with reading(path, CheckpointError, "download it again"), safe_open(path, "pt") as file:
            place |= dict.fromkeys(file.keys(), path)
    if not place:
        raise CheckpointError(f"{source} holds no safetensors; save_pretrained writes them")
    digest = hashlib.sha256()
    for name in sorted(place):
        with safe_open(place[name], "pt") as file:
            tensor = file.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def run_metadata(config: FinetuneConfig, source: str, rows: Rows, held_out: Rows) -> dict[str, Any]:
    """What a checkpoint or an adapter belongs to: settings, base, rows and versions."""
    versions: dict[str, Any] = {name: version(name) for name in STACK}
    versions |= {"python": platform.python_version(), "threads": torch.get_num_threads()}
    versions["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "base_model": config.model,
        "base_sha256": fingerprint(source),
        # The same weights under another `rms_norm_eps` or `rope_theta` are another model.
        "base_config_sha256": _sum(base_folder(source) / "config.json"),
        "rows_sha256": _sum_of_rows(rows),
        "held_out_sha256": _sum_of_rows(held_out),
        "config": asdict(config),
        "versions": versions,
    }


def check_metadata(checkpoint: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to resume from what belongs to another run; say it if only versions differ."""
    was, wanted = _identity(saved), _identity(now)
    for name in sorted(was.keys() | wanted.keys()):
        if (old := was.get(name)) != (new := wanted.get(name)):
            said = f"{name} was {old!r:.200} and is {new!r:.200}; bring it back, or start a new run"
            raise CheckpointError(f"{checkpoint} is of another run: {said}")
    for name, old in saved["versions"].items():
        if old != (new := now["versions"].get(name)):
            print(f"warning: {name} was {old} and is {new}; the result may differ in its last bits")


def _identity(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What must be as it was, for a run to go on: settings, and sums of what they name."""
    sums = {key: value for key, value in metadata.items() if key.endswith("_sha256")}
    return sums | {k: v for k, v in metadata["config"].items() if k not in CHANGEABLE}


def write_manifest(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write `manifest.json`: `metadata`, and the SHA-256 sum of every file in `folder`."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST]
    sums = {path.relative_to(folder).as_posix(): _sum(path) for path in paths}
    text = json.dumps({**metadata, "sha256": sums}, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def verify_manifest(folder: str | Path) -> dict[str, Any]:
    """Check every file that the manifest of `folder` lists; return the metadata in it."""
    folder = Path(folder)
    advice = "if its name is right, it was cut short or changed; use an earlier or another copy"
    with reading(folder / MANIFEST, DamagedFileError, advice):
        metadata = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sums = dict(metadata.pop("sha256"))
        if not sums:
            raise ValueError("it lists no files")
    for name, expected in sums.items():
        path = folder / name
        with reading(path, DamagedFileError, advice):
            if _sum(path) != expected:
                raise ValueError("its SHA-256 sum is not that of the manifest")
    return metadata


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Raise what the system refuses while `target` is written as a `CheckpointError`."""
    from safetensors import SafetensorError

    try:
        yield
    except QloraError:
        raise
    except (OSError, SafetensorError) as error:
        said = f"cannot write {target} ({error}), and what was saved before is untouched."
        advice = "Free some space, or look at the folder and its rights, then resume"
        raise CheckpointError(f"{said} {advice}") from error


def save_checkpoint(
    folder: Path, step: int, write: Callable[[Path], None], metadata: dict[str, Any], keep: int = 2
) -> None:
    """Let `write(part)` fill `folder/checkpoint-<step>`, and keep the newest `keep` of them."""
    target = folder / f"checkpoint-{step:06d}"
    for other in checkpoints(folder):
        if int(other.name.partition("-")[2]) >= step:  # damaged: the run goes on from before it
            shutil.rmtree(other)
    with writing(target), atomic.folder(target) as part:
        write(part)
        write_manifest(part, {"step": step, **metadata})
    for old in checkpoints(folder)[:-keep]:  # now that the new one is whole and on the disk
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in `folder`, good or bad, the oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.partition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def latest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, with its metadata; the damaged ones are named."""
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return path, verify_manifest(path)
        except DamagedFileError as error:
            print(f"warning: {path.name} is passed over: {error}")
    if found:
        said = f"none of the {len(found)} checkpoints in {folder} is whole"
        raise DamagedFileError(f"{said}; to begin again, delete it")
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


def load_optimizer_state(optimizer: Any, tensors: Mapping[str, Tensor], rest: Any) -> None:
    """Put back what `optimizer_state` gave, into an optimizer of the same parameters."""
    inner = getattr(optimizer, "optimizer", optimizer)
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *rest["numbers"].items()]:
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    if not hasattr(inner, "init_state"):
        optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
        return
    # The load_state_dict of bitsandbytes makes plain tensors of paged states (its issues 782 and
    # 1381). So the states are made as at a first step, paged ones in managed memory, and filled.
    inner.check_overrides()
    inner.to_gpu()
    inner.initialized = True
    for g, (group, saved) in enumerate(zip(inner.param_groups, rest["param_groups"], strict=True)):
        parameters = group["params"]
        group.update(saved, params=parameters)
        for p, (index, parameter) in enumerate(zip(saved["params"], parameters, strict=True)):
            if index in state:
                inner.init_state(group, parameter, g, p)
                own = inner.state[parameter]
                for name, value in state[index].items():
                    own[name] = own[name].copy_(value) if torch.is_tensor(value) else value


def random_state() -> dict[str, Tensor]:
    """The states of the generators that training draws from: the processor's and the card's."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"torch": torch.get_rng_state(), **cuda}


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Put the generators back to where `random_state` found them."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sum_of_rows(rows: Iterable[dict[str, list[int]]]) -> str:
    return hashlib.sha256(json.dumps([list(row.values()) for row in rows]).encode()).hexdigest()


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
