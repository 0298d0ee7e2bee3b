"""The list of mutants names places that are there, in every module of the method."""

import pytest
from mutants import Mutant, fault, mutants

from qlora_edu.files import ROOT

PLAIN = {"__init__", "__main__", "errors"}  # nothing in them to break


@pytest.mark.parametrize("mutant", mutants(), ids=lambda m: f"{m.file}-{m.after[:30]}")
def test_each_mutant_can_be_made(mutant):
    assert fault(mutant) == ""


def test_every_module_has_one_and_there_are_sixty():
    files = {mutant.file for mutant in mutants()}
    package = ROOT / "qlora_edu"
    method = [p for p in package.rglob("*.py") if "course" not in p.parts and p.stem not in PLAIN]
    assert {str(path.relative_to(ROOT)) for path in method} <= files
    assert len(mutants()) >= 60


def test_a_place_that_is_gone_is_named():
    gone = Mutant("qlora_edu/blockwise.py", "no such line", "x", "tests/test_blockwise.py")
    assert "0 times, not once" in fault(gone)
    here = gone._replace(before='"""Chapter 2')
    assert fault(here) == ""
    assert "no such tests" in fault(here._replace(tests="tests/test_x.py"))
    assert "no test is called ['gone']" in fault(here._replace(tests=f"{gone.tests} -k gone"))
