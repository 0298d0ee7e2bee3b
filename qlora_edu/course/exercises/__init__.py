"""The exercises: `exercises.ex_1_2(my_function)` says ✓, ✗ with a reason, or ○ not attempted.

`core` judges an answer; each `chapter_NN` module holds the exercises of one notebook, and is loaded
when the first of them is asked for.
"""

import re
from importlib import import_module

CHAPTERS = range(11)


def __getattr__(name: str) -> object:
    if match := re.fullmatch(r"ex_(\d+)_\d+", name):
        module = import_module(f"{__name__}.chapter_{int(match[1]):02}")
        if hasattr(module, name):
            return getattr(module, name)
    if name == "ALL":
        modules = (import_module(f"{__name__}.chapter_{n:02}") for n in CHAPTERS)
        return {k: v for m in modules for k, v in vars(m).items() if re.match(r"ex_\d+_\d+$", k)}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
