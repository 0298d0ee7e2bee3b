"""The package is the table of contents: its rooms, which way they import, and how long they are."""

import ast
from pathlib import Path

import pytest

from qlora_edu.files import ROOT

PACKAGE = ROOT / "qlora_edu"
CHAPTERS = {
    "codebooks": 1,
    "blockwise": 2,
    "double_quant": 3,
    "quantized": 3,
    "lora": 4,
    "adapters": 4,
    "qlora": 5,
    "memory": 6,
    "paging": 7,
    "training": 8,
    "comparison": 8,
    "finetuning": 9,
    "evaluation": 10,
}
TOP = {*CHAPTERS, "__init__", "__main__", "kernels", "compat", "errors", "cli"}
WINGS = {
    "text": {"conversations", "generation", "perplexity"},
    "files": {"atomic", "inspector", "peft_format", "host_tier"},
    "planner": {"fake_step", "trace"},
    "production": {
        *("config", "loading", "checkpoints", "callback", "run_folder", "random_weights"),
        *("serving", "chat", "threads"),
    },
    "course": {
        *("doctor", "plots", "set_up", "run_notebooks", "progress"),
        *("exercises", "explorers"),
    },
}
# Who may import whom: a module imports modules of a lower number, or its own neighbours where the
# number is the same and no circle comes of it. Wings that serve one chapter stand beside it.
RANK = {
    "errors": 0,
    "compat": 0,
    "files": 0,
    "files.atomic": 0,
    "text": 0,
    "text.conversations": 0,
    "text.generation": 0,
    **{name: 10 * chapter for name, chapter in CHAPTERS.items()},
    "kernels": 25,  # chapter 3 runs on the twins; what they are twins of stands in TWINS
    "files.inspector": 35,
    "files.peft_format": 45,
    "text.perplexity": 45,
    "files.host_tier": 60,
    "planner.trace": 50,
    "planner": 50,
    "planner.fake_step": 55,
    "production": 85,
    "cli": 140,  # of the course it starts the doctor, and nothing starts it
    "__main__": 150,
    "course": 130,
}
TWINS = {"blockwise", "codebooks", "paging", "files.host_tier"}
LONGEST, METHOD, COURSE = 400, 6500, 6500


def modules() -> dict[str, Path]:
    """Every module of the package by its name inside it; the package itself is ``__init__``."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(path: Path) -> set[str]:
    """The modules of this package that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    inside = {name.removeprefix("qlora_edu.") for name in names if name.startswith("qlora_edu.")}
    while gone := {name for name in inside if name not in MODULES and "." in name}:
        inside = (inside - gone) | {name.rpartition(".")[0] for name in gone}
    return {name for name in inside if name in MODULES}


def rank(name: str) -> int:
    while name not in RANK:
        name = name.rpartition(".")[0]
    return RANK[name]


def test_the_rooms_are_those_of_the_design():
    assert {path.stem for path in PACKAGE.glob("*.py")} == TOP
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == WINGS.keys()
    for wing, rooms in WINGS.items():
        found = {p.stem for p in (PACKAGE / wing).iterdir() if p.suffix == ".py" or p.is_dir()}
        assert found - {"__init__", "__pycache__"} == rooms, wing


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"__init__"}))
def test_imports_run_one_way(name):
    for other in imported(MODULES[name]) - {name}:
        if name == "kernels" and other in TWINS:
            continue  # no circle comes of it: the next test
        assert rank(other) <= rank(name), f"{name} imports {other}, which comes after it"
        assert not (other.startswith("course") and not name.startswith(("course", "cli")))


def test_no_imports_run_in_a_circle():
    below = {name: imported(path) - {name} for name, path in MODULES.items()}
    while leaves := [name for name, others in below.items() if not others & below.keys()]:
        for name in leaves:
            del below[name]
    assert not below, f"these import one another: {sorted(below)}"


def test_an_import_that_runs_up_is_seen(tmp_path):
    path = tmp_path / "codebooks.py"
    path.write_text("def f():\n    from qlora_edu.production.config import FinetuneConfig\n")
    assert imported(path) == {"production.config"}
    assert rank("production.config") > rank("codebooks")


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_files_are_short_and_the_whole_is_within_its_budget():
    method = {n: lines(path) for n, path in MODULES.items() if not n.startswith("course")}
    course = {n: lines(path) for n, path in MODULES.items() if n.startswith("course")}
    assert {name: n for name, n in method.items() if n > LONGEST} == {}
    assert sum(method.values()) <= METHOD and sum(course.values()) <= COURSE


MIRRORED = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
OTHERS = {  # what tests no module of the package
    "test_layout.py",
    "test_environment.py",
    "test_package.py",
    "test_notebooks.py",
    "test_data.py",
    "test_cuda.py",
    "test_mutants.py",
    "test_before_commit.py",
}


@pytest.mark.parametrize("path", sorted(MIRRORED), ids=str)
def test_tests_mirror_the_package(path):
    if path.parts[0] == "benchmarks" or str(path) in OTHERS:
        return
    beside = PACKAGE / path.parent / path.name.removeprefix("test_")
    also = {"course/test_browser.py", "course/test_playground.py"}
    assert beside.exists() or beside.with_suffix("").is_dir() or str(path) in also, (
        f"tests/{path} tests no module {beside.relative_to(ROOT)}"
    )
