"""Is this machine ready for the course? And if not, what puts it right?

Each check answers with findings: OK, FAIL with the fix, or INFO for what blocks nothing.
`python -m qlora_edu doctor` asks all; every notebook's `check()` asks the quick ones.
Only the standard library is imported at the top: a doctor must not need a healthy patient.
"""

import argparse
import hashlib
import logging
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from qlora_edu.errors import NotReadyError
from qlora_edu.files import ROOT

DATA = ROOT / "data"
REINSTALL = "make setup  (without make: pip install -c constraints.txt -e '.[lab,dev]')"
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One answer of the doctor."""

    status: str  # "OK", "FAIL" or "INFO"
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.what}" + (f"\n      fix: {self.fix}" if self.fix else "")


def python_version(version: tuple[int, ...] = sys.version_info[:2]) -> Finding:
    """Ask whether this Python is one the course is tested with."""
    text = ".".join(map(str, version))
    if (3, 11) <= version <= (3, 14):
        return Finding("OK", f"Python {text}")
    what = f"Python {text}: the course needs 3.11, 3.12, 3.13 or 3.14"
    fix = "install one, remove .venv, and: make lab PYTHON=/path/to/python3.12"
    return Finding("FAIL", what, fix)


def packages() -> list[Finding]:
    """Ask whether each package of pyproject.toml is installed, at a version inside its range."""
    try:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    except OSError as error:
        fix = "run the course from a clone of its repository, installed with `make lab`"
        return [Finding("FAIL", f"{error.filename} cannot be read", fix)]
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return [Finding("FAIL", "the package packaging is missing", REINSTALL)]
    pins = re.findall(r"^(\S+)==(\S+)", constraints, re.MULTILINE)
    tested = {name.lower(): version for name, version in pins}
    findings = [package(Requirement(line), tested) for line in project["dependencies"]]
    for line in project["optional-dependencies"]["lab"]:
        finding = package(Requirement(line), tested)
        if finding.status == "FAIL":  # only news: a hosted notebook brings its own Jupyter
            what = f"{finding.what} (for make lab and the figures: {REINSTALL})"
            finding = Finding("INFO", what)
        findings.append(finding)
    return findings


def package(requirement: "packaging.requirements.Requirement", tested: dict[str, str]) -> Finding:  # noqa: F821
    """Ask whether one package is installed at a version inside its range."""
    name = requirement.name
    pin = tested.get(name.lower(), "")
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding("FAIL", f"{name} is missing", REINSTALL)
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding("FAIL", f"{name} {found} is outside {requirement.specifier}", REINSTALL)
    public = found.split("+")[0]
    return Finding("OK", f"{name} {found}" + ("" if public == pin else f" (tested with {pin})"))


def torch_computes() -> list[Finding]:
    """Ask whether torch is there, and for which card; the embedded model needs none."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Finding("FAIL", f"torch cannot be imported: {error}", REINSTALL)]
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        seen = f"GPU: {card.name}, {card.total_memory / GIB:.0f} GiB"
    elif shutil.which("nvidia-smi") and torch.version.cuda is None:
        seen = "an NVIDIA driver, but a CPU build of torch: for the GPU, make clean, make lab"
    else:
        seen = "no GPU: everything runs on the embedded model; a 7B needs a card"
    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return [Finding("OK", f"torch {torch.__version__} ({kind})"), Finding("INFO", seen)]


def bitsandbytes_quantizes() -> Finding:
    """Ask bitsandbytes to quantise −1 and +1: codes 0 and 15, the first in the high half: 0x0F."""
    try:
        quiet_known_noise()
        import torch
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        weight = torch.tensor([[-1.0, 1.0] * 32])
        packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
        back = dequantize_4bit(packed, state)
        if packed.flatten().tolist() != [0x0F] * 32 or not torch.equal(back, weight):
            raise ArithmeticError("−1, +1 did not come back from 0x0F")
    except Exception as error:  # whatever a broken native library throws is the finding
        return Finding("FAIL", f"bitsandbytes cannot quantise: {error}", REINSTALL)
    return Finding("OK", f"bitsandbytes {metadata.version('bitsandbytes')} quantises to NF4")


def files_whole(data: Path = DATA) -> list[Finding]:
    """Ask whether the embedded model and the tasks are there, byte for byte."""
    fix = "git restore data  (or clone the repository again)"
    try:
        lines = (data / "CHECKSUMS.txt").read_text(encoding="utf-8").splitlines()
    except OSError:
        return [Finding("FAIL", "data/CHECKSUMS.txt is missing", fix)]
    faults = []
    for digest, name in (line.split(maxsplit=1) for line in lines if line.strip()):
        path = data / name
        if not path.is_file():
            faults.append(Finding("FAIL", f"data/{name} is missing", fix))
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            faults.append(Finding("FAIL", f"data/{name} is damaged or changed", fix))
    return faults or [Finding("OK", f"embedded model and tasks: {len(lines)} files, all whole")]


def kernel() -> Finding:
    """Ask whether Jupyter's Python 3 kernel is this Python, where the course is installed."""
    try:
        from jupyter_client.kernelspec import KernelSpecManager

        program = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except Exception as error:  # a missing package, or Jupyter's own NoSuchKernel
        return Finding("FAIL", f"Jupyter has no Python 3 kernel: {error}", REINSTALL)
    # Jupyter runs a bare "python" with its own Python. A path is compared as it stands, because the
    # python of a virtual environment is a link to the one outside it.
    if os.path.isabs(program) and Path(program).parent != Path(sys.executable).parent:
        what = f"Jupyter's Python 3 kernel is {program}, not {sys.executable}"
        return Finding("FAIL", what, f"{sys.executable} -m ipykernel install --sys-prefix")
    return Finding("OK", "Jupyter's Python 3 kernel is this Python")


def room(folder: Path = ROOT) -> list[Finding]:
    """Ask whether there is enough memory and disk for the embedded model."""
    found = [("free disk", shutil.disk_usage(folder).free, 1)]
    if find_spec("psutil"):  # `packages` says that it is missing
        import psutil

        found.append(("memory", psutil.virtual_memory().total, 4))
    findings = []
    for name, size, needed in found:
        if size < needed * GIB:
            what = f"{name}: {size / GIB:.1f} GiB; the course needs {needed}"
            findings.append(Finding("FAIL", what, "free some, or use a machine with more"))
        else:
            findings.append(Finding("OK", f"{name}: {size / GIB:.0f} GiB"))
    return findings


def bf16_processor() -> list[Finding]:
    """Warn of the processors on which bitsandbytes may cut gradients."""
    try:
        if "avx512_bf16" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
            return []
    except OSError:
        return []
    what = (
        "AVX512-BF16 processor: on one, bitsandbytes' CPU Linear4bit loses x.grad after an "
        "evaluation without gradients; qlora_edu.finetune guards against it, your own code "
        "should load the model again before training"
    )
    return [Finding("INFO", what)]


def quiet_known_noise() -> None:
    """Silence what two libraries log on import, where nobody can act on it; call it before.

    bitsandbytes, on a processor with AVX512-BF16, says that it found no CPU kernel in the Hub's
    `kernels-community`; torchao, that its compiled extensions are skipped. No other warning goes.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)
    logging.getLogger("torchao").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in record.msg for text in ("from kernels-community", "cpp extensions"))


QUICK: tuple[Callable[[], Finding | list[Finding]], ...] = (python_version, packages, files_whole)
ALL = (*QUICK, torch_computes, bitsandbytes_quantizes, kernel, room, bf16_processor)


def diagnose(questions: Iterable[Callable[[], Finding | list[Finding]]] = ALL) -> list[Finding]:
    """Ask every question, in order, and collect the findings."""
    findings: list[Finding] = []
    for question in questions:
        answer = question()
        findings += [answer] if isinstance(answer, Finding) else answer
    return findings


def check() -> None:
    """Print one line if this machine is ready; the first call of every notebook.

    Raises:
        NotReadyError: something is missing; the message lists each fault and its fix.
    """
    quiet_known_noise()
    failures = [finding for finding in diagnose(QUICK) if finding.status == "FAIL"]
    if failures:
        raise NotReadyError("\n" + "\n".join(map(str, failures)))
    import torch

    from qlora_edu.production.threads import choose_threads

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    version = torch.__version__.split("+")[0]
    print(f"qlora_edu ready: torch {version}, {device}, {choose_threads()}")


def main(argv: list[str] | None = None) -> int:
    """Print every finding; 0 if nothing failed, otherwise 1."""
    parser = argparse.ArgumentParser(prog="qlora_edu doctor", description=main.__doc__)
    parser.add_argument("--progress", action="store_true", help="which exercises are solved here?")
    if parser.parse_args(argv).progress:
        from qlora_edu.course import progress

        return progress() or 0
    findings = diagnose()
    print(*findings, sep="\n")
    failed = sum(finding.status == "FAIL" for finding in findings)
    print(f"\n{failed} of {len(findings)} checks failed" if failed else "\nready: make lab")
    return 1 if failed else 0
