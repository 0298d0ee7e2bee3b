"""One base of all errors, and a family that a person can keep in mind."""

import ast
import inspect

import pytest

from qlora_edu import errors
from qlora_edu.errors import DamagedFileError, DataError, QloraError, reading
from qlora_edu.files import ROOT

FAMILY = [e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, QloraError)]


def test_the_family_is_short_and_each_member_is_described():
    assert len(FAMILY) <= 16
    for error in FAMILY:
        assert error.__doc__


@pytest.mark.parametrize("error", [e for e in FAMILY if e not in (QloraError, DamagedFileError)])
def test_code_that_knows_nothing_of_the_course_catches_a_built_in_error(error):
    first, second = error.__bases__
    assert first is QloraError and second.__module__ == "builtins"
    assert second is not Exception


def test_every_error_of_the_method_is_of_the_family():
    """Looked up in the source: no class that an `except QloraError` would miss."""
    known = {error.__name__ for error in FAMILY}
    for path in (ROOT / "qlora_edu").rglob("*.py"):
        if "course" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                assert bases & known or node.name == "QloraError", f"{path}: {node.name}"
                known.add(node.name)


def _read():
    return reading("a.json", DataError, "mend it")


def test_what_a_parser_raises_names_the_file():
    with pytest.raises(DataError, match=r"cannot read a\.json \(1\); mend it") as caught, _read():
        raise KeyError(1)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_of_the_course_says_more_and_passes():
    with pytest.raises(DamagedFileError, match="^line 3$"), _read():
        raise DamagedFileError("line 3")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_who_wants_to_stop_is_not_held_up(stop):
    with pytest.raises(stop), _read():
        raise stop
