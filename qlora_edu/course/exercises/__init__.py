"""The exercises: `exercises.ex_1_2("my_function")` says ✓, ✗ with a reason, or ○ not attempted.

`core` judges an answer; each `chapter_NN` module lists the exercises of one notebook in
`EXERCISES`, and is loaded when the first of them is asked for.
"""

import re
from importlib import import_module
from typing import Any

CHAPTERS = range(11)


def chapter(number: int) -> tuple[Any, ...]:
    """The exercises of a chapter, in order.

    >>> [exercise.number for exercise in chapter(0)]
    ['0.1', '0.2', '0.3', '0.4', '0.5']
    """
    return import_module(f"{__name__}.chapter_{number:02}").EXERCISES


def __getattr__(name: str) -> Any:
    if name == "ALL":
        every = [exercise for number in CHAPTERS for exercise in chapter(number)]
        return {f"ex_{exercise.number.replace('.', '_')}": exercise for exercise in every}
    if match := re.fullmatch(r"ex_((\d+)_\d+)", name):
        for exercise in chapter(int(match[2])) if int(match[2]) in CHAPTERS else ():
            if exercise.number == match[1].replace("_", "."):
                return exercise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
