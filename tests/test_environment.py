"""pyproject.toml, constraints.txt, environment.yml and the Makefile tell one story."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from qlora_edu.course import doctor, set_up

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
RANGES = {
    requirement.name: requirement.specifier
    for requirement in map(
        Requirement, [*PROJECT["dependencies"], *EXTRAS["lab"], *EXTRAS["dev"], *EXTRAS["bench"]]
    )
}
ONLY_BENCH = {Requirement(line).name for line in EXTRAS["bench"]}
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
PINS = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in CONSTRAINTS}


def comments(text: str, pattern: str) -> dict[str, str]:
    """Map each package named on a line to the comment at the end of that line."""
    return dict(re.findall(pattern, text, re.MULTILINE))


PYPROJECT_COMMENTS = comments(
    (ROOT / "pyproject.toml").read_text(), r'^    "([\w-]+)[^"]*", +# (.+)$'
)
CONDA_COMMENTS = comments(
    (ROOT / "environment.yml").read_text(), r"^      - ([\w-]+)==\S+ +# (.+)$"
)


def conda_pins() -> dict[str, str]:
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    lines = next(entry["pip"] for entry in dependencies if isinstance(entry, dict))
    return dict(line.split("==") for line in lines if "==" in line)


def test_every_range_has_a_lower_and_an_upper_bound():
    for name, specifier in RANGES.items():
        operators = {part.operator for part in specifier}
        assert operators == {">=", "<"}, f"{name}{specifier}: wants >= and <"


def test_every_pin_is_exact_and_good_for_any_machine():
    for pin in CONSTRAINTS:
        assert re.fullmatch(r"==[^+*@]+", str(pin.specifier)), f"{pin}: an exact public version"
        assert pin.url is None, f"{pin} names a file or a host"


@pytest.mark.parametrize("name", RANGES)
def test_the_tested_version_is_inside_the_range(name):
    assert RANGES[name].contains(PINS[canonicalize_name(name)])


def test_conda_installs_the_same_packages_at_the_tested_versions():
    assert conda_pins() == {
        name: PINS[canonicalize_name(name)] for name in RANGES.keys() - ONLY_BENCH
    }


def test_each_dependency_says_who_needs_it_in_the_same_words():
    assert PYPROJECT_COMMENTS.keys() == RANGES.keys()
    conda = PYPROJECT_COMMENTS.keys() - ONLY_BENCH
    assert {name: PYPROJECT_COMMENTS[name] for name in conda} == CONDA_COMMENTS
    for name, comment in PYPROJECT_COMMENTS.items():
        assert re.match(r"(chapters? \d|make )", comment), f"{name}: which chapter needs it?"


def test_what_the_packages_need_in_their_turn_is_pinned_too():
    queue, needed = [*RANGES.keys() - ONLY_BENCH], set()
    while queue:
        name = canonicalize_name(queue.pop())
        if name in needed:
            continue
        needed.add(name)
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(requirement.name)
    # pip and setuptools belong to the environment itself, not to the course.
    unpinned = needed - PINS.keys() - {"pip", "setuptools"}
    if sys.platform == "linux" and "cpu" in metadata.version("torch"):
        assert not unpinned
    else:  # Other systems and CUDA builds add packages that the tested set does not have.
        assert not {name for name in unpinned if name in {canonicalize_name(x) for x in RANGES}}


def test_the_three_statements_of_the_python_versions_agree():
    wanted = SpecifierSet(PROJECT["requires-python"])
    for minor in range(9, 16):
        accepted = wanted.contains(f"3.{minor}.1")
        assert (doctor.python_version((3, minor)).status == "OK") == accepted
        try:
            set_up.check_python((3, minor))
        except set_up.SetUpError:
            assert not accepted
        else:
            assert accepted


def test_pip_is_never_left_to_choose_a_cuda_build_on_a_machine_without_a_card():
    for answers in (True, False):
        arguments = set_up.torch_arguments("2.13.0", cpu_build=True, index_answers=answers)
        # "torch==2.13.0" would match the CUDA build too; the full name matches one build only.
        assert arguments[0] == "torch==2.13.0+cpu"
    assert set_up.wants_cpu_build("Linux", has_nvidia=False)
    assert not set_up.wants_cpu_build("Linux", has_nvidia=True)


def test_the_pin_of_torch_is_read_or_its_absence_is_said():
    text = (ROOT / "constraints.txt").read_text()
    assert set_up.pinned_torch(text) == PINS["torch"]
    with pytest.raises(set_up.SetUpError, match="no line torch=="):
        set_up.pinned_torch(text.replace("\ntorch==", "\ntorchvision=="))
    with pytest.raises(set_up.SetUpError, match="no line torch=="):
        set_up.pinned_torch("")


def test_cuda_packages_are_found(tmp_path):
    assert set_up.cuda_packages(tmp_path) == []
    (tmp_path / "nvidia_cublas-13.1.dist-info").mkdir()
    (tmp_path / "numpy-2.4.6.dist-info").mkdir()
    assert set_up.cuda_packages(tmp_path) == ["nvidia_cublas-13.1.dist-info"]


def test_a_python_without_venv_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(set_up, "find_spec", lambda name: None)
    with pytest.raises(set_up.SetUpError, match="apt-get install python3-venv"):
        set_up.check_python((3, 12))


def test_an_index_that_does_not_answer_is_passed_over():
    # The reserved port 1 refuses at once.
    assert set_up.answers("http://127.0.0.1:1/") is False


@pytest.mark.skipif(os.name == "nt", reason="the Makefile is for systems with make and sh")
def test_make_says_so_when_there_is_no_python(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    script = tmp_path / "qlora_edu" / "course" / "set_up.py"
    script.parent.mkdir(parents=True)
    script.touch()
    result = subprocess.run(
        ["make", "-C", tmp_path, "lint", "PYTHON="], capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "no Python 3.11, 3.12, 3.13 or 3.14" in result.stderr
