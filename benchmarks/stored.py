"""What every stored result says of itself, and how it is written: whole or not at all."""

import json
import os
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def stamp(packages: list[str]) -> dict:
    """Name the command, the date, the machine and the versions that a result was made with."""
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU"
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    return {
        "command": " ".join(["python", str(script), *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": machine,
        "versions": {name: version(name) for name in ["torch", *packages]},
    }


def store(report: dict, name: str, quiet: bool = False) -> None:
    """Write data/results/<name>.json."""
    path = ROOT / "data" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(part, path)
    if not quiet:
        print(f"{path.relative_to(ROOT)} written")
