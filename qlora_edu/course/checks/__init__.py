"""The exercise checker: `checks.ex_1_2(my_function)` says ✓, ✗ with a reason, or ○ not attempted.

`core` runs a check; each `chapter_NN` module holds the exercises of one notebook.
"""

from importlib import import_module
from pkgutil import iter_modules

from qlora_edu.course.checks.core import Check

ALL: dict[str, Check] = {
    name: check
    for module in iter_modules(__path__, f"{__name__}.")
    if ".chapter_" in module.name
    for name, check in vars(import_module(module.name)).items()
    if isinstance(check, Check)
}
globals().update(ALL)

__all__ = ["ALL", "Check", *ALL]
