"""Make the `.venv` in which the whole course runs: the first thing every `make` target does.

Standard library only, because it runs before anything is installed. PyPI's Linux wheel of torch
brings gigabytes of CUDA libraries. Where there is no NVIDIA card the CPU build of PyTorch's own
index is asked for by its full name (`+cpu`), so that pip cannot fall back on the other one.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ROOT = Path(__file__).resolve().parents[2]


class SetUpError(RuntimeError):
    """The course cannot be set up; the message says what to do."""


def check_python(version: tuple[int, ...] = sys.version_info[:2]) -> None:
    """Refuse a Python that the course is not tested with, or one without venv."""
    found = ".".join(map(str, version))
    if not (3, 11) <= version <= (3, 14):
        raise SetUpError(
            f"Python {found} found; the course needs 3.11, 3.12, 3.13 or 3.14. "
            "Install one, or name it: make PYTHON=/path/to/python3.12 ..."
        )
    if find_spec("ensurepip") is None:
        raise SetUpError(
            f"this Python {found} cannot make a virtual environment. "
            "On Debian or Ubuntu: apt-get install python3-venv"
        )


def pinned_torch(constraints: str) -> str:
    """Read the tested version of torch out of the text of constraints.txt."""
    match = re.search(r"^torch==(\S+)$", constraints, re.MULTILINE)
    if match is None:
        raise SetUpError("constraints.txt has no line torch==...; restore it from git")
    return match.group(1)


def wants_cpu_build(system: str, has_nvidia: bool) -> bool:
    """Say whether to ask for the `+cpu` build. Only Linux has two builds on offer."""
    return system == "Linux" and not has_nvidia


def has_nvidia_card() -> bool:
    """Ask the driver whether there is an NVIDIA card."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def answers(url: str, timeout: float = 3.0) -> bool:
    """Say whether `url` answers within `timeout` seconds; pip alone would retry for minutes."""
    try:
        with urllib.request.urlopen(url, timeout=timeout):
            return True
    except OSError:
        return False


def torch_arguments(version: str, cpu_build: bool, index_answers: bool) -> list[str]:
    """Return pip's arguments for torch.

    >>> torch_arguments("2.13.0", cpu_build=False, index_answers=True)
    ['torch==2.13.0']
    >>> torch_arguments("2.13.0", cpu_build=True, index_answers=True)
    ['torch==2.13.0+cpu', '--extra-index-url', 'https://download.pytorch.org/whl/cpu']
    """
    if not cpu_build:
        return [f"torch=={version}"]
    return [f"torch=={version}+cpu"] + (["--extra-index-url", CPU_INDEX] if index_answers else [])


def has_pip(python: Path) -> bool:
    """Say whether `python` exists and has pip; an interrupted set-up leaves one that has not."""
    command = [python, "-m", "pip", "--version"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def cuda_packages(site_packages: Path) -> list[str]:
    """List the NVIDIA packages installed in a site-packages folder."""
    return sorted(path.name for path in site_packages.glob("nvidia_*.dist-info"))


def set_up(environment: Path, torch_build: str = "auto") -> None:
    """Create `environment` and install torch, then the course and its tools, at the tested pins.

    `torch_build` is "auto", "cpu" or "default" (whatever the package index serves).
    """
    check_python()
    started = time.monotonic()
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not has_pip(python):
        import venv

        print(f"1/3 virtual environment in {environment}", flush=True)
        venv.create(environment, with_pip=True, clear=environment.exists())

    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    pip += ["-c", ROOT / "constraints.txt"]
    version = pinned_torch((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    cpu_build = torch_build == "cpu"
    if torch_build == "auto":
        cpu_build = wants_cpu_build(platform.system(), has_nvidia_card())
    index_answers = cpu_build and answers(f"{CPU_INDEX}/torch/")
    if cpu_build:
        print(f"2/3 torch {version}, CPU build, about 200 MB", flush=True)
        way_out = (
            f"{CPU_INDEX} {'answered' if index_answers else 'does not answer from here'}. "
            "To take the build on your package index, with several GB of CUDA: make TORCH=default"
        )
    else:
        print(f"2/3 torch {version}, the build your package index serves", flush=True)
        way_out = "For the CPU build: make TORCH=cpu"
    if subprocess.run([*pip, *torch_arguments(version, cpu_build, index_answers)]).returncode:
        what = f"pip could not install torch {version}; its own message is above"
        raise SetUpError(f"{what}. {way_out}")

    print("3/3 the course and its tools", flush=True)
    if subprocess.run([*pip, "-e", f"{ROOT}[lab,dev]"]).returncode:
        raise SetUpError("pip could not install the course; its own message is above")
    folders = environment.glob("lib/python*/site-packages")
    found = [name for folder in folders for name in cuda_packages(folder)]
    if cpu_build and found:
        raise SetUpError(
            f"CUDA packages were installed on a machine without a card: {', '.join(found)}. "
            f"Remove {environment} and run make again."
        )
    print(f"set up in {time.monotonic() - started:.0f} s", flush=True)


def main() -> int:
    """Set up the environment named on the command line; 1 and a message if that fails."""
    parser = argparse.ArgumentParser(description=set_up.__doc__.splitlines()[0])
    parser.add_argument("environment", type=Path)
    parser.add_argument("--torch", choices=["auto", "cpu", "default"], default="auto")
    arguments = parser.parse_args()
    try:
        set_up(arguments.environment, arguments.torch)
    except SetUpError as error:
        print(f"FAIL {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
