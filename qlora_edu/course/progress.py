"""Which exercises the reader has solved: kept on the reader's own machine, and nowhere else.

A check that passes writes the number of its exercise and the day into one small file. It lies in
the reader's own folder, `work/` beside the notebooks, or in the user's data folder where the course
is installed read-only; `QLORA_EDU_PROGRESS` names another file.
"""

import datetime
import json
import os
from pathlib import Path

from qlora_edu.files import ROOT

VARIABLE = "QLORA_EDU_PROGRESS"


def path() -> Path:
    """The file in which passed checks are recorded.

    >>> path().suffix
    '.json'
    """
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    if (ROOT / "pyproject.toml").exists() and os.access(ROOT, os.W_OK):
        return ROOT / "work" / "progress.json"
    data = os.environ.get("XDG_DATA_HOME") or os.environ.get("LOCALAPPDATA")
    return Path(data or Path.home() / ".local" / "share") / "qlora_edu" / "progress.json"


def read() -> dict[str, str]:
    """The passed exercises by number, each with the day of its first pass; empty if none is."""
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def record(number: str) -> None:
    """Write down that an exercise is solved; a file that cannot be written stops no notebook."""
    found = read()
    if number in found:
        return
    found[number] = datetime.date.today().isoformat()
    part = path().with_name(f".{path().name}.part-{os.getpid()}")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path())
    except OSError as error:
        print(f"  (not recorded in {path()}: {error.strerror})")


def progress() -> None:
    """Print which exercises are solved, chapter by chapter; recorded on this machine alone."""
    from qlora_edu.course import exercises

    found, everything = read(), 0
    for number in exercises.CHAPTERS:
        chapter = exercises.chapter(number)
        everything += len(chapter)
        marks = "".join("✓" if exercise.number in found else "○" for exercise in chapter)
        print(f"chapter {number:>2}  {marks:<8} {marks.count('✓')} of {len(chapter)}")
    print(f"{len(found)} of {everything} exercises solved, recorded in {path()}")
