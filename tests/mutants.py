"""Break the code on purpose, and see whether a test notices: ``make mutants``.

    python tests/mutants.py                 # all of them, a few minutes each dozen
    python tests/mutants.py paging qlora    # those whose file has one of these words in its name

Each mutant is one change of one place. It is made in a copy of the package; the rest of the copy
are links to this repository. A mutant that no test notices is *alive*: either a test is missing, or
the change changes nothing, and then the line says nothing either.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_name("mutants.toml")


class Mutant(NamedTuple):
    """One change: `before` stands exactly once in `file`, and becomes `after`."""

    file: str
    before: str
    after: str
    tests: str
    """What to run: paths and, after ``-k``, an expression."""


def mutants() -> list[Mutant]:
    """Read the list."""
    return [
        Mutant(file, entry["before"], entry["after"], entry.get("tests", section["tests"]))
        for file, section in tomllib.loads(LIST.read_text(encoding="utf-8")).items()
        for entry in section["mutants"]
    ]


def fault(mutant: Mutant) -> str:
    """What is wrong with an entry of the list, in words; empty if nothing is."""
    count = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.before)
    if count != 1:
        return f"{mutant.file} has {mutant.before!r} {count} times, not once"
    paths, _, expression = mutant.tests.partition("-k ")
    missing = [path for path in paths.split() if not (ROOT / path).exists()]
    if missing or not paths:
        return f"{mutant.file}: no such tests: {missing}"
    files = [f for path in paths.split() for f in ((ROOT / path).rglob("*.py"), [ROOT / path])]
    text = "".join(f.read_text(encoding="utf-8") for found in files for f in found if f.is_file())
    words = [word for word in expression.strip("'").split() if word not in ("or", "and", "not")]
    lost = [word for word in words if not re.search(rf"def test_\w*{word}", text)]
    return f"{mutant.file}: no test is called {lost}" if lost else ""


def survives(mutant: Mutant) -> bool:
    """Run the mutant's tests on the changed package; whether all of them pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "qlora_edu", copy / "qlora_edu")
        for path in ROOT.iterdir():
            if path.name not in ("qlora_edu", ".git", ".venv", "build", "runs", "work"):
                (copy / path.name).symlink_to(path)
        changed = copy / mutant.file
        text = changed.read_text(encoding="utf-8")
        changed.write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
        paths, _, expression = mutant.tests.partition("-k ")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        command += ["--rootdir", folder, *paths.split()]
        command += ["-k", expression.strip("'")] if expression else []
        environment = os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run for {mutant}:\n{done.stdout[-3000:]}{done.stderr}")
    return done.returncode == 0


def main(words: list[str]) -> int:
    """Run the mutants chosen and report those that are alive."""
    chosen = [m for m in mutants() if not words or any(word in m.file for word in words)]
    alive = []
    for number, mutant in enumerate(chosen, start=1):
        if told := fault(mutant):
            raise SystemExit(told)
        found = survives(mutant)
        alive += [mutant] * found
        state = "ALIVE" if found else "dead "
        print(f"{number:3}/{len(chosen)} {state} {mutant.file}: {mutant.after!r}", flush=True)
    print(f"{len(chosen) - len(alive)} of {len(chosen)} mutants noticed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
