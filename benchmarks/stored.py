"""What every stored result says of itself, and how it is written: whole or not at all."""

import json
import os
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def command() -> str:
    """The command that is running, as one would type it in the repository.

    A package runs by its name: `python -m benchmarks.gpu a`, and not by its `__main__.py`.
    """
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    what = (
        ["-m", ".".join(script.parent.parts)] if script.stem == "__main__" else [script.as_posix()]
    )
    return " ".join(["python", *what, *sys.argv[1:]])


def stamp(packages: list[str]) -> dict[str, Any]:
    """Name the command, the date, the machine and the versions that a result was made with."""
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU"
    return {
        "command": command(),
        "date": date.today().isoformat(),
        "machine": machine,
        "versions": {name: version(name) for name in ["torch", *packages]},
    }


def write_text(text: str, path: Path) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(value: Any, path: Path) -> None:
    """Write a value as JSON, whole or not at all."""
    write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", path)


def store(report: dict, name: str, quiet: bool = False) -> None:
    """Write data/results/<name>.json."""
    path = ROOT / "data" / "results" / f"{name}.json"
    write_json(report, path)
    if not quiet:
        print(f"{path.relative_to(ROOT)} written")
