"""Every exercise can be solved, left alone and got wrong, and its check tells which.

The stub and the folded solution are taken out of the notebook itself, so that the check, the text
and the solution cannot drift apart.
"""

import ast
import re
from functools import cache
from pathlib import Path

import nbformat
import pytest
import torch

from qlora_edu.course import exercises
from qlora_edu.course.exercises.core import Check, Mistake, OpenCheck, same, show

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = sorted(exercises.ALL)
MISTAKES = [
    pytest.param(name, mistake, id=f"{name}-{mistake.name.replace(' ', '-')}")
    for name in NAMES
    for mistake in exercises.ALL[name].mistakes
]


@cache
def notebook(name: str) -> nbformat.NotebookNode:
    """Read the notebook of the chapter that an exercise belongs to."""
    (path,) = NOTEBOOKS.glob(f"{int(name.split('_')[1]):02d}_*.ipynb")
    return nbformat.read(path, as_version=4)


def code_of(name: str) -> list[str]:
    return [cell.source for cell in notebook(name).cells if cell.cell_type == "code"]


def place_of_check(name: str) -> tuple[int, str]:
    """Find the cell that calls the check, and the name of the function it checks."""
    found = [
        (i, match[1])
        for i, cell in enumerate(notebook(name).cells)
        if cell.cell_type == "code"
        and (match := re.search(rf"exercises\.{name}\((\w+)\)", cell.source))
    ]
    assert len(found) == 1, f"{name} is checked in {len(found)} cells"
    return found[0]


def parts_of(tree: ast.Module, kinds: tuple) -> list[ast.stmt]:
    return [node for node in tree.body if isinstance(node, kinds)]


@cache
def namespace_source(name: str) -> str:
    """Collect what a reader has when reaching the exercise: imports and functions, not stubs."""
    end, _ = place_of_check(name)
    kept = []
    for cell in notebook(name).cells[:end]:
        if cell.cell_type == "code":
            kept += parts_of(ast.parse(cell.source), (ast.Import, ast.ImportFrom, ast.FunctionDef))
    return ast.unparse(ast.Module(kept, []))


def run(name: str, source: str) -> object:
    """Define the exercise's function from source and return it."""
    _, function = place_of_check(name)
    namespace: dict = {}
    exec(namespace_source(name), namespace)
    exec(source, namespace)
    return namespace[function]


def stub(name: str) -> str:
    end, function = place_of_check(name)
    for cell in reversed(notebook(name).cells[:end]):
        if cell.cell_type == "code":
            for node in parts_of(ast.parse(cell.source), (ast.FunctionDef,)):
                if node.name == function:
                    return ast.unparse(node)
    raise AssertionError(f"{name}: no stub named {function} before the check")


def solution(name: str) -> str:
    end, function = place_of_check(name)
    for cell in notebook(name).cells[end:]:
        if cell.cell_type == "markdown":
            for fold in re.findall(r"<summary>Solution.*?</details>", cell.source, re.DOTALL):
                for block in re.findall(r"```python\n(.*?)```", fold, re.DOTALL):
                    if re.search(rf"def {function}\(", block):
                        return block
    raise AssertionError(f"{name}: no folded solution that defines {function}")


def test_the_notebooks_hold_exactly_the_exercises_that_have_checks():
    called = set()
    for path in NOTEBOOKS.glob("[0-9]*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                called |= set(re.findall(r"exercises\.(ex_\d+_\d+)\(", cell.source))
    assert called == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_accepted(name, capsys):
    check = exercises.ALL[name]
    assert check(check.reference) is None
    assert capsys.readouterr().out == f"✓ {check.title}\n"


@pytest.mark.parametrize("name", NAMES)
def test_the_title_has_the_number_of_the_exercise(name):
    assert exercises.ALL[name].title.startswith(name.removeprefix("ex_").replace("_", ".") + " ")


@pytest.mark.parametrize("name", NAMES)
def test_the_folded_solution_is_accepted(name):
    verdict = exercises.ALL[name].judge(run(name, solution(name)))
    assert verdict.mark == "✓", verdict


@pytest.mark.parametrize("name", NAMES)
def test_the_stub_is_not_attempted_and_says_what_to_return(name):
    source = stub(name)
    function = run(name, source)
    assert exercises.ALL[name].judge(function).mark == "○"
    assert function.__doc__, "a stub says in its docstring what to return"


@pytest.mark.parametrize("name", NAMES)
def test_later_cells_that_need_an_answer_take_the_right_one(name):
    end, function = place_of_check(name)
    later = [c.source for c in notebook(name).cells[end + 1 :] if c.cell_type == "code"]
    if not any(re.search(rf"\b{function}\b", source) for source in later):
        return  # an exercise at the end of the road: nothing later needs it
    assert any(
        re.search(rf"^{function} = exercises\.{name}\.reference\b", source, re.MULTILINE)
        or re.search(rf"^from qlora_edu\S* import .*\b{function}\b", source, re.MULTILINE)
        for source in later
    ), f"no line gives {function} the library's version"


@pytest.mark.parametrize("name", NAMES)
def test_there_are_three_mistakes_with_a_name_and_a_reason_of_their_own(name):
    mistakes = exercises.ALL[name].mistakes
    assert len(mistakes) >= 3
    assert len({mistake.name for mistake in mistakes}) == len(mistakes)
    assert len({mistake.because for mistake in mistakes}) == len(mistakes)


@pytest.mark.parametrize(("name", "mistake"), MISTAKES)
def test_a_mistake_is_rejected_with_its_own_reason(name, mistake):
    verdict = exercises.ALL[name].judge(mistake.wrong)
    assert verdict.mark == "✗", "this mistake passes for an answer"
    assert verdict.because == mistake.because
    assert "yours" in str(verdict) and "because" in str(verdict)
    if not isinstance(exercises.ALL[name], OpenCheck):
        assert "expected" in str(verdict)


def raises(*arguments, **keywords):
    raise ValueError("boom")


def leaves(*arguments, **keywords):
    raise SystemExit


def nothing(*arguments, **keywords):
    return None


class Strange:
    """Compares with nothing, converts to nothing, and cannot even be printed."""

    def __eq__(self, other):
        raise RuntimeError("never equal")

    def __repr__(self):
        raise RuntimeError("never shown")

    __hash__ = None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "answer",
    [raises, leaves, nothing, lambda *a, **k: "text", lambda *a, **k: float("nan"),
     lambda *a, **k: torch.full((3,), torch.nan), lambda *a, **k: Strange(), lambda: {}, None, 3,
     [1.0], Strange()],
    ids=["raises", "exits", "nothing", "text", "nan", "nan-tensor", "strange", "no-arguments",
         "none", "number", "list", "strange-itself"],
)  # fmt: skip
def test_no_answer_makes_a_check_raise(name, answer, capsys):
    exercises.ALL[name](answer)
    assert capsys.readouterr().out.startswith("✗")


def overwrite(reference):
    """Answer rightly, and then spoil every tensor that was handed in."""

    def answer(**case):
        result = reference(**case)
        result = result.clone() if isinstance(result, torch.Tensor) else result
        for value in case.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
        return result

    return answer


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_cannot_spoil_the_inputs(name):
    check = exercises.ALL[name]
    assert check.judge(overwrite(check.reference)).mark == "✓"


@pytest.mark.parametrize("name", NAMES)
def test_a_check_leaves_the_readers_random_numbers_alone(name):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    exercises.ALL[name].judge(exercises.ALL[name].mistakes[0].wrong)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("yours", "expected", "atol", "equal"),
    [
        (torch.tensor([1.0, 2.0]), [1, 2], 0, True),
        ([1, 2], torch.tensor([1.0, 2.0]), 0, True),
        (torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0]]), 0, False),
        (torch.tensor(1.0), torch.ones(3), 0, False),
        (1.001, 1.0, 0.01, True),
        (1.02, 1.0, 0.01, False),
        (0.1 + 0.2, 0.3, 0, False),
        (float("nan"), float("nan"), 1, False),
        (float("inf"), float("inf"), 0, True),
        (1.0, float("inf"), 1, False),
        (True, 1, 0, False),
        (1, True, 0, False),
        ("a", "a", 0, True),
        (None, None, 0, True),
        ({"a": [1.0]}, {"a": torch.ones(1)}, 0, True),
        ({"a": 1, "b": 2}, {"a": 1}, 0, False),
        (["x", 1], ["x", 1], 0, True),
        (["x"], ["x", 1], 0, False),
        (torch.tensor(1e-9, requires_grad=True), 0.0, 1e-6, True),
    ],
)
def test_what_counts_as_the_same_answer(yours, expected, atol, equal):
    assert same(yours, expected, atol) is equal


def test_a_long_answer_is_shown_from_its_first_difference():
    def answer(n):
        return torch.arange(n) + (torch.arange(n) == 70)

    check = Check("9.9 count", lambda n: torch.arange(n), (), cases=lambda random: [{"n": 99}])
    text = str(check.judge(answer))
    assert "given     n = 99" in text
    assert "yours     99 numbers, [70:74] = [71, 71, 72, 73]" in text
    assert "expected  99 numbers, [70:74] = [70, 71, 72, 73]" in text
    assert len(show("x" * 10_000)) < 400


def test_the_reason_says_what_is_wrong_in_kind_when_no_mistake_is_recognised():
    check = Check("9.9 ones", lambda: torch.ones(2), ())
    reasons = {
        "shape is (3,), it should be (2,)": lambda: torch.ones(3),
        "a NaN or an infinity": lambda: torch.tensor([1.0, torch.nan]),
        "of type str, not Tensor": lambda: "ones",
        "is there a `return`?": lambda: None,
        "the numbers differ": lambda: torch.zeros(2),
    }
    for reason, answer in reasons.items():
        assert reason in check.judge(answer).because


def test_inputs_are_the_same_in_every_session_and_others_for_every_exercise():
    def cases(random):
        return [{"x": torch.rand(3, generator=random)}]

    seen = []

    def look(x):
        seen.append(x)
        return x

    for title in ("9.1 a", "9.1 a", "9.2 b"):
        Check(title, lambda x: x, (), cases=cases).judge(look)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_a_mistake_whose_question_fails_is_passed_over():
    broken = Mistake("broken", lambda: 0, "never", lambda case, yours, expected: yours.missing)
    check = Check("9.9 one", lambda: 1, (broken, Mistake("two", lambda: 2, "that is two")))
    assert check.judge(lambda: 2).because == "that is two"
