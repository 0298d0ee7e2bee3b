"""The doctor finds each fault that we inject, names it, and says what puts it right."""

import hashlib
import logging
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from qlora_edu import __main__ as command_line
from qlora_edu.course import doctor
from qlora_edu.course.doctor import GIB, Finding

HEALTHY = [Finding("OK", "all well"), Finding("INFO", "no GPU")]
SICK = [*HEALTHY, Finding("FAIL", "peft is missing", "make setup")]


def failures(findings: list[Finding] | Finding) -> list[Finding]:
    findings = [findings] if isinstance(findings, Finding) else findings
    return [finding for finding in findings if finding.status == "FAIL"]


def only_failure(findings: list[Finding] | Finding) -> Finding:
    (failure,) = failures(findings)
    assert failure.fix, f"{failure.what}: a FAIL without a fix"
    return failure


def test_this_machine_is_ready():
    assert failures(doctor.diagnose()) == []


def test_a_missing_package_is_named(monkeypatch):
    version = metadata.version

    def without_peft(name):
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_peft)
    failure = only_failure(doctor.packages())
    assert failure.what == "peft is missing"
    assert "make setup" in failure.fix


def test_a_version_outside_the_range_is_named_with_the_range(monkeypatch):
    version = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda n: "4.57.1" if n == "transformers" else version(n)
    )
    failure = only_failure(doctor.packages())
    assert "transformers 4.57.1 is outside" in failure.what
    assert "<6" in failure.what


def test_a_version_inside_the_range_but_untested_is_said(monkeypatch):
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: "4.99.0" if n == "tqdm" else version(n))
    findings = doctor.packages()
    assert failures(findings) == []
    (tqdm,) = (finding for finding in findings if "tqdm" in finding.what)
    assert f"tested with {version('tqdm')}" in tqdm.what


def test_a_package_outside_its_repository_is_told_to_clone(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    failure = only_failure(doctor.packages())
    assert "pyproject.toml" in failure.what
    assert "clone" in failure.fix


@pytest.mark.parametrize("module", ["torch", "bitsandbytes"])
def test_a_library_that_cannot_be_imported(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    question = doctor.torch_computes if module == "torch" else doctor.bitsandbytes_quantizes
    assert module in only_failure(question()).what


def test_a_bitsandbytes_that_swaps_the_nibbles_is_caught(monkeypatch):
    from bitsandbytes import functional

    quantize = functional.quantize_4bit

    def swapped(*args, **kwargs):
        packed, state = quantize(*args, **kwargs)
        return (packed >> 4) | (packed << 4), state

    monkeypatch.setattr(functional, "quantize_4bit", swapped)
    assert "0x0F" in only_failure(doctor.bitsandbytes_quantizes()).what


@pytest.fixture
def data(tmp_path):
    """A folder of two files and their checksums."""
    for name in ("model.safetensors", "train.jsonl"):
        (tmp_path / name).write_text(name)
    lines = (f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}" for p in tmp_path.iterdir())
    (tmp_path / "CHECKSUMS.txt").write_text("\n".join(list(lines)))
    assert failures(doctor.files_whole(tmp_path)) == []
    return tmp_path


def test_a_flipped_bit_in_the_model_is_found(data):
    (data / "model.safetensors").write_text("model.safetensorS")
    failure = only_failure(doctor.files_whole(data))
    assert failure.what == "data/model.safetensors is damaged or changed"
    assert "git" in failure.fix


def test_a_missing_file_and_missing_checksums_are_found(data):
    (data / "train.jsonl").unlink()
    assert only_failure(doctor.files_whole(data)).what == "data/train.jsonl is missing"
    (data / "CHECKSUMS.txt").unlink()
    assert only_failure(doctor.files_whole(data)).what == "data/CHECKSUMS.txt is missing"


def test_a_kernel_of_another_python_is_found(monkeypatch):
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

    spec = KernelSpec(argv=["/opt/other/bin/python", "-m", "ipykernel_launcher"])
    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", lambda self, name: spec)
    failure = only_failure(doctor.kernel())
    assert "/opt/other/bin/python" in failure.what
    assert "ipykernel install" in failure.fix


def test_no_kernel_at_all_is_found(monkeypatch):
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    def missing(self, name):
        raise NoSuchKernel(name)

    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", missing)
    assert "no Python 3 kernel" in only_failure(doctor.kernel()).what


def test_a_full_disk_is_found(monkeypatch):
    usage = shutil.disk_usage(Path.cwd())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=GIB // 2))
    assert only_failure(doctor.room()).what == "free disk: 0.5 GiB; the course needs 1"


def test_an_old_python_is_found():
    assert "3.10" in only_failure(doctor.python_version((3, 10))).what


def test_only_known_noise_is_silenced(caplog):
    doctor.quiet_known_noise()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "x")
    logger.warning("the weights are on fire")
    assert [record.getMessage() for record in caplog.records] == ["the weights are on fire"]


@pytest.mark.parametrize(("findings", "status"), [(HEALTHY, 0), (SICK, 1)])
def test_the_exit_status_and_the_printed_lines(monkeypatch, capsys, findings, status):
    monkeypatch.setattr(doctor, "diagnose", lambda: findings)
    assert command_line.main(["doctor"]) == status
    printed = capsys.readouterr().out
    assert "OK    all well" in printed
    assert ("FAIL  peft is missing\n      fix: make setup" in printed) == (status == 1)
    assert ("ready: make lab" in printed) == (status == 0)


def test_check_prints_one_line(capsys):
    import torch

    doctor.check()
    assert capsys.readouterr().out.startswith(
        f"qlora_edu ready: torch {torch.__version__.split('+')[0]}, "
    )


def test_check_stops_the_notebook_with_the_fault_and_its_fix(monkeypatch):
    monkeypatch.setattr(doctor, "diagnose", lambda questions: SICK)
    with pytest.raises(doctor.NotReadyError, match=r"peft is missing\n +fix: make setup"):
        doctor.check()


def test_an_unknown_command_is_refused(capsys):
    assert command_line.main(["dcotor"]) == 2
    assert "dcotor" in capsys.readouterr().err


def test_the_doctor_comes_even_where_nothing_is_installed():
    # -S -E -s: a Python without any site-packages, so no torch and no packaging.
    code = (
        f"import sys; sys.path.insert(0, {str(doctor.ROOT)!r}); "
        "from qlora_edu.__main__ import main; sys.exit(main(['doctor']))"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-E", "-s", "-c", code], capture_output=True, text=True
    )
    assert result.returncode == 1, result.stderr
    assert "torch cannot be imported" in result.stdout
    assert "make setup" in result.stdout
    assert "Traceback" not in result.stderr


def test_progress_is_told_instead_of_findings(monkeypatch, tmp_path, capsys):
    path = tmp_path / "progress.json"
    path.write_text('{"2.3": "2026-01-01"}')
    monkeypatch.setenv("QLORA_EDU_PROGRESS", str(path))
    assert doctor.main(["--progress"]) == 0
    told = capsys.readouterr().out
    assert "chapter  2  ○○✓" in told and "1 of 66 exercises solved" in told and "Python" not in told
