"""Every exercise can be solved in any form, left alone and got wrong, and its check tells which.

The stub and the folded solution are taken out of the notebook itself, so that the check, the text
and the solution cannot drift apart. What every check has in common is tried once, on a toy.
"""

import ast
import inspect
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import answer_forms
import nbformat
import numpy as np
import pytest
import torch

from qlora_edu import course
from qlora_edu.course import exercises
from qlora_edu.course.exercises.core import (
    Exercise,
    Seen,
    alike,
    faults_left,
    same,
    show,
    unlike,
)
from qlora_edu.files import ROOT

NAMES = list(exercises.ALL)

# Arguments that a right answer may take for each other: it multiplies or adds them, or one will do.
COMMUTE = {
    ("ex_0_1", "parameters and bits_per_weight"),
    ("ex_2_3", "row and columns"),
    ("ex_5_3", "detached and reentrant"),
    ("ex_6_1", "trained_bytes and state_bytes"),
    ("ex_7_5", "compute and copy"),
    ("ex_9_1", "batch_size and gradient_accumulation_steps"),
}


@pytest.fixture(autouse=True)
def progress_file(tmp_path, monkeypatch) -> Path:
    """Keep what the tests pass out of the reader's own record."""
    path = tmp_path / "kept" / "progress.json"
    monkeypatch.setenv("QLORA_EDU_PROGRESS", str(path))
    return path


# --- Each exercise, with its notebook ---


@cache
def notebook(name: str) -> nbformat.NotebookNode:
    """Read the notebook of the chapter that an exercise belongs to."""
    (path,) = (ROOT / "notebooks").glob(f"{int(name.split('_')[1]):02d}_*.ipynb")
    return nbformat.read(path, as_version=4)


@cache
def place_of_check(name: str) -> tuple[int, str]:
    """Find the cell that calls the check, and the name of the function it checks."""
    found = [
        (i, match[1])
        for i, cell in enumerate(notebook(name).cells)
        if cell.cell_type == "code"
        and (match := re.search(rf'exercises\.{name}\("?(\w+)"?\)', cell.source))
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


def wrong_answers(name: str) -> dict:
    return {
        because: wrong.wrong if isinstance(wrong, Seen) else wrong
        for because, wrong in exercises.ALL[name].because.items()
    }


def test_the_notebooks_hold_exactly_the_exercises_that_have_checks():
    called = set()
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                called |= set(re.findall(r"exercises\.(ex_\d+_\d+)\(", cell.source))
    assert called == set(NAMES)


@pytest.mark.parametrize("number", exercises.CHAPTERS)
def test_a_chapter_lists_its_exercises_in_order(number):
    listed = exercises.chapter(number)
    assert [one.number for one in listed] == [f"{number}.{n + 1}" for n in range(len(listed))]
    for one in listed:
        assert getattr(exercises, f"ex_{one.number.replace('.', '_')}") is one


@pytest.mark.parametrize("name", NAMES)
def test_the_folded_solution_is_accepted(name):
    verdict = exercises.ALL[name].judge(run(name, solution(name)))
    assert verdict.mark == "✓", verdict


@pytest.mark.parametrize("name", NAMES)
def test_the_stub_is_not_attempted_and_has_the_arguments_of_the_reference(name):
    function, exercise = run(name, stub(name)), exercises.ALL[name]
    assert exercise.judge(function).mark == "○"
    assert function.__doc__, "a stub says in its docstring what to return"
    wanted = inspect.signature(exercise.reference).parameters
    assert list(inspect.signature(function).parameters) == list(wanted)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_answer_is_rejected_with_its_own_reason(name):
    exercise, wrong = exercises.ALL[name], wrong_answers(name)
    assert len(wrong) >= 3
    for because, answer in wrong.items():
        verdict = exercise.judge(answer)
        assert (verdict.mark, verdict.because) == ("✗", because), verdict
        assert verdict.yours
        assert bool(verdict.expected) != exercise.open


@pytest.mark.parametrize("name", NAMES)
def test_a_right_answer_passes_in_every_form(name):
    exercise = exercises.ALL[name]
    assert exercise.judge(exercise.reference).mark == "✓"
    for form, answer in answer_forms.forms(exercise.reference, exercise.exact_dtype):
        assert exercise.judge(answer).mark == "✓", f"{form}: {exercise.judge(answer)}"


@pytest.mark.parametrize("name", NAMES)
def test_no_argument_can_be_ignored_or_taken_for_another(name):
    exercise = exercises.ALL[name]
    for left_out, answer in answer_forms.ignoring(exercise.reference, exercise.cases()):
        assert exercise.judge(answer).mark == "✗", f"{left_out} passes"
    for pair, answer in answer_forms.swapping(exercise.reference, exercise.cases()):
        mark = "✓" if (name, pair) in COMMUTE else "✗"
        assert exercise.judge(answer).mark == mark, f"{pair}, swapped: {exercise.judge(answer)}"


def cells_that_use(name: str) -> list[str]:
    """The code cells after an exercise's check that name its function."""
    end, function = place_of_check(name)
    later = [c.source for c in notebook(name).cells[end + 1 :] if c.cell_type == "code"]
    return [source for source in later if re.search(rf"\b{function}\b", source)]


@pytest.mark.parametrize("name", [name for name in NAMES if cells_that_use(name)])
def test_later_cells_that_need_an_answer_take_the_readers_own_or_the_right_one(name):
    (_, function), later = place_of_check(name), cells_that_use(name)
    assert any(
        re.search(rf"^{function} = exercises\.{name}\.answer\b", source, re.MULTILINE)
        or re.search(rf"^from qlora_edu\S* import .*\b{function}\b", source, re.MULTILINE)
        for source in later
    ), f"no line gives {function} an answer that is right"


def test_the_rule_for_a_budget_is_what_measuring_every_choice_gives():
    from qlora_edu.course.explorers import FLOAT32, bits_with_constants, nf4_rms_error

    choices = [
        (blocksize, nested) for blocksize in (32, 64, 128, 256, 4096) for nested in (FLOAT32, 256)
    ]
    for (budget,) in exercises.ex_3_5.cases():
        within = [choice for choice in choices if bits_with_constants(*choice) <= budget]
        size, nested = min(within, key=lambda choice: nf4_rms_error(*choice))
        if exercises.ex_3_5.reference(budget)[0] in (32, 64, 128, 256, 4096):
            assert exercises.ex_3_5.reference(budget) == (size, nested == 256)


def test_a_chapter_loads_alone_without_widgets_and_figures():
    code = (
        "import sys, torch, numpy; before = set(sys.modules)\n"
        "from qlora_edu.course import exercises; exercises.ex_3_1\n"
        "new = set(sys.modules) - before\n"
        "print({'ipywidgets', 'matplotlib', 'transformers'} & new,\n"
        "      [name for name in new if 'exercises.chapter' in name])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set() ['qlora_edu.course.exercises.chapter_03']\n"


# --- What all checks have in common, tried on a toy ---


def scaled(x, y, factor):
    return factor * x + y


TOY = Exercise(
    "9.9 scaled",
    scaled,
    lambda random: [(torch.arange(9.0), torch.rand(9, generator=random), f) for f in (2.0, 3.0)],
    because={"the factor is lost": lambda x, y, factor: x + y},
    atol=1e-6,
)


def raises(x, y, factor):
    raise ValueError("boom")


def leaves(x, y, factor):
    raise SystemExit


class Strange:
    """Compares with nothing, converts to nothing, and cannot even be printed."""

    def __eq__(self, other):
        raise RuntimeError("never equal")

    def __repr__(self):
        raise RuntimeError("never shown")

    __hash__ = None


def always(value):
    return lambda *arguments: value


@pytest.mark.parametrize("exercise", [TOY, "open"])
@pytest.mark.parametrize(
    "answer",
    [raises, leaves, always(None), always("text"), always(float("nan")), always(Strange()),
     always(torch.full((9,), torch.nan)), always([[1], [1, 2]]), always({"a": None}),
     lambda: {}, lambda x: x, None, 3, [1.0], Strange(), dict, "scaled"],
)  # fmt: skip
def test_no_answer_makes_a_check_raise(exercise, answer, capsys):
    if exercise == "open":
        signs = {"it is not above 1": Seen(scaled, lambda yours: not (yours > 1).all())}
        exercise = Exercise("9.9 open", scaled, TOY.inputs, signs, open=True, score=str)
    if not isinstance(answer, str):
        assert exercise.judge(answer).mark == "✗"
    exercise(answer)
    assert capsys.readouterr().out.startswith("○" if isinstance(answer, str) else "✗")


def test_an_answer_cannot_spoil_the_inputs_or_the_random_state():
    def spoils(x, y, factor):
        result = scaled(x, y, factor)
        x.zero_()
        y.fill_(torch.rand(()))
        return result

    torch.manual_seed(3)
    before = torch.get_rng_state()
    TOY.cases()[0][0].zero_()
    assert TOY.judge(spoils).mark == TOY.judge(spoils).mark == "✓"
    assert torch.equal(torch.get_rng_state(), before)


def test_inputs_are_the_same_in_every_session_and_others_for_every_exercise():
    def first(title):
        return Exercise(title, abs, lambda random: [(torch.rand(3, generator=random),)]).cases()

    assert torch.equal(first("9.1 a")[0][0], first("9.1 a")[0][0])
    assert not torch.equal(first("9.1 a")[0][0], first("9.2 b")[0][0])


def test_an_exception_shows_the_line_of_the_readers_own_code():
    def answer(x, y, factor):
        missing = {}
        return torch.tensor(missing["x"])

    verdict = TOY.judge(answer)
    assert re.search(r"raised KeyError: 'x', in line \d+: return torch.tensor\(miss", verdict.yours)
    assert "Hint 1" in verdict.because

    def deeper(x, y, factor):
        return torch.cat([x, y[None]])  # raised inside torch, written here

    assert re.search(r"in line \d+: return torch.cat", TOY.judge(deeper).yours)


def test_torchs_own_not_implemented_is_no_stub():
    def answer(x, y, factor):
        raise NotImplementedError("'add' is not implemented for 'Strange'")

    assert TOY.judge(answer).mark == "✗"


def test_other_arguments_than_the_stubs_are_told_as_such():
    verdict = TOY.judge(lambda x, y: x)
    assert verdict.because == (
        "it takes (x, y), not (x, y, factor): keep the argument names of the stub"
    )
    assert TOY.judge(lambda a, b, c: c * a + b).mark == "✓"
    assert TOY.judge(lambda y, x, factor: factor * x + y).mark == "✓"
    assert "keep the argument names" in TOY.judge(lambda x, y, factor, more: x).because


def test_a_function_is_found_by_the_name_of_the_stub(capsys):
    namespace = {"toy": TOY, "scale": lambda x, y, factor: factor * x + y}
    exec("toy('scale'); toy('quantise'); toy('toy')", namespace)
    out = capsys.readouterr().out.replace("\n            ", " ")
    assert out.startswith("✓ 9.9 scaled (2 cases)\n✗ 9.9 scaled\n")
    assert "there is no function `quantise` here; run the cell above" in out


def test_later_cells_get_a_passed_answer_in_the_form_of_the_reference():
    exercise = Exercise("9.9 two", lambda x, n=2: (x * n, n > 1), [(torch.ones(3), 2)])
    assert exercise.answer is exercise.reference
    exercise(lambda values, times: [(values * times).tolist(), 1])
    numbers, flag = exercise.answer(x=torch.ones(2))
    assert torch.equal(numbers, torch.full((2,), 2.0)) and flag is True
    exercise(lambda values, times: 3)
    assert exercise.answer is exercise.reference
    exercise(lambda values, times: (values * times, True))
    exercise(lambda values, times: (_ for _ in ()).throw(NotImplementedError))
    assert exercise.answer is exercise.reference


def test_an_open_exercise_prints_its_score_either_way(capsys):
    exercise = Exercise(
        "9.9 large",
        lambda: torch.ones(3),
        because={"too small": Seen(lambda: torch.zeros(3), lambda x: x.sum() < 3)},
        open=True,
        score=lambda x: f"{x.sum():.1f} in all",
    )
    exercise(lambda: [1, 1.5, 1])
    exercise(lambda: np.array([0.5, 0.5, 0]))
    exercise(lambda: None)
    exercise(lambda: torch.tensor([torch.nan, 9, 9]))
    out = capsys.readouterr().out
    assert "✓ 9.9 large\n  score     3.5 in all\n✗ 9.9 large\n  yours     [0.5, 0.5, 0]\n" in out
    assert "score     1.0 in all\n  because   too small\n" in out
    assert "because   your function returned nothing: is there a `return`?\n" in out
    assert out.endswith("because   there is a NaN or an infinity in it\n")


def test_numbers_of_another_type_are_told_where_the_type_is_asked_for():
    exercise = Exercise("9.9 byte", lambda: torch.ones(2, dtype=torch.uint8), exact_dtype=True)
    assert exercise.judge(lambda: np.ones(2, dtype=np.uint8)).mark == "✓"
    for answer, kind in ((lambda: torch.ones(2), "float32"), (lambda: [1, 1], "list")):
        verdict = exercise.judge(answer)
        assert verdict.because == "the values are right, their type is not: uint8 is asked for"
        assert (verdict.yours, verdict.expected) == (kind, "uint8")


def test_every_part_of_a_repair_that_is_left_is_told():
    def broken(x, shifted=False, doubled=False, short=False):
        return (x + shifted) * (1 + doubled) + (torch.ones(len(x) - 2) if short else 0)

    told = faults_left(broken, shifted="it is shifted", doubled="it is doubled", short="short")
    told["a wrong answer that never returns"] = lambda x: x.missing
    exercise = Exercise("9.9 repair", broken, [(torch.arange(3.0),), (torch.arange(5.0),)], told)
    assert exercise.judge(lambda x: (x + 1) * 2).because == "it is shifted; and it is doubled"
    # It stops in the second case, where the fault makes the shapes differ; so does this answer.
    assert exercise.judge(lambda x: x * 2 + torch.ones(len(x) - 2)).because == (
        "it is doubled; and short"
    )
    stops = exercise.judge(lambda x: x.missing).because
    assert stops == "your function stopped before it returned; Hint 1 may help"


@pytest.mark.parametrize(
    ("yours", "expected", "atol", "equal"),
    [
        ([1, 2], torch.tensor([1.0, 2.0]), 0, True),
        ([torch.tensor([1.0]), np.array([2.0])], [[1], [2]], 0, True),
        (np.arange(3)[::-1], [2, 1, 0], 0, True),
        (torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0]]), 0, False),
        (torch.tensor(1.0), torch.ones(3), 0, False),
        (1.001, 1.0, 0.01, True),
        (1.02, 1.0, 0.01, False),
        (0.1 + 0.2, 0.3, 0, False),
        (np.float32(0.1), 0.1, 0, True),
        (float(np.float32(12345.678)), 12345.678, 1e-9, True),
        (12345.69, 12345.678, 1e-9, False),
        (np.float32(2**24 + 4), 2**24 + 5, 0, True),  # the float32 next to it
        (2**24 + 4, 2**24 + 5, 1e-9, False),
        (float("nan"), float("nan"), 1, False),
        (float("inf"), float("inf"), 0, True),
        (1.0, float("inf"), 1, False),
        (True, 1, 0, False),
        (1, True, 0, True),
        (2, True, 0, False),
        (np.bool_(False), False, 0, True),
        (torch.tensor(True), True, 0, True),
        ([True], True, 0, False),
        (" NF4", "nf4", 0, True),
        (np.array("nf4"), "nf4", 0, True),
        ("nf", "nf4", 0, False),
        (None, None, 0, True),
        (0, None, 0, False),
        ({"a": [1.0]}, {"a": torch.ones(1)}, 0, True),
        ({"a": 1, "b": 2}, {"a": 1}, 0, False),
        (("x", 1), ["X", 1], 0, True),
        (np.array(["x", "y"]), ["x", "y"], 0, True),
        (["x"], ["x", 1], 0, False),
        (torch.tensor(1e-9, requires_grad=True), 0.0, 1e-6, True),
    ],
)
def test_what_counts_as_the_same_answer(yours, expected, atol, equal):
    assert same(yours, expected, atol) is equal


def test_an_answer_takes_the_form_of_the_reference_where_nothing_is_lost():
    assert alike(np.float32(64), 1) == 64 and type(alike(np.float32(64), 1)) is int
    assert alike(64.5, 1) == 64.5 and alike(True, 0.5) is True and alike("17", 1) == "17"
    assert alike(1, False) is True and alike(" High", "low") == "high"
    assert alike([0.5, 1], torch.ones(2)).dtype == torch.float32
    assert alike([0.5], torch.ones(1, dtype=torch.uint8)) == [0.5]


@pytest.mark.parametrize(
    ("yours", "expected", "words"),
    [
        (torch.ones(3), torch.ones(2), "the shape is (3,), it should be (2,)"),
        (torch.tensor([1.0, torch.nan]), torch.ones(2), "there is a NaN or an infinity in it"),
        ("ones", torch.ones(2), "yours is of type str, not Tensor"),
        ([1, 2, 9, 9], [1, 2, 3, 4], "2 of 4 are wrong, the first at index [2]"),
        (torch.eye(6), torch.eye(6) * torch.tensor([1, 1, 1, 2, 1, 2.0])[:, None],
         "2 of 36 are wrong, the first at index [3, 3]"),
        ((1, "b", 3), (1, "a", 3), "1 of 3 are wrong, the first at index [1]"),
        (("a", "b"), ("a", "b", "c"), "there are 2 items, it should be 3"),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, "wrong under 'b'"),
        ({"a": 1, "c": 2}, {"a": 1, "b": 2}, "the keys differ: 'b', 'c'"),
        (1.5, 2.5, ""),
    ],
)  # fmt: skip
def test_what_is_known_of_a_difference_is_said(yours, expected, words):
    assert unlike(yours, expected) == words


def test_a_long_answer_is_shown_from_its_first_difference_and_to_six_digits():
    def answer(n):
        return torch.arange(n) + (torch.arange(n) == 70)

    verdict = Exercise("9.9 count", lambda n: torch.arange(n), [(99,)]).judge(answer)
    assert (verdict.given, verdict.yours) == ("n = 99", "99 numbers, [70:74] = [71, 71, 72, 73]")
    assert verdict.expected == "99 numbers, [70:74] = [70, 71, 72, 73]"
    assert show(torch.tensor([0.9, -0.4])) == "[0.9, -0.4]"
    assert show([(640, 256), (1e9, 6738415616)]) == "[(640, 256), (1e+09, 6738415616)]"
    close = Exercise("9.9 close", lambda: 1.0).judge(lambda: 1.0000001)
    assert (close.yours, close.expected) == ("1.0000001", "1")
    assert len(show("x" * 10_000)) <= 400


# --- What was solved is kept ---


def test_a_passed_check_is_recorded_once_and_only_the_readers_own(progress_file, capsys):
    exercises.ex_0_1(exercises.ex_0_1.reference)
    exercises.ex_0_1(lambda n, bits: n)
    assert not progress_file.exists()
    exercises.ex_0_1(lambda n, bits: n * bits / 8e9)
    assert list(json.loads(progress_file.read_text())) == ["0.1"]
    progress_file.write_text('{"0.1": "2026-01-01"}')
    exercises.ex_0_1(lambda n, bits: n * bits / 8e9)
    assert json.loads(progress_file.read_text()) == {"0.1": "2026-01-01"}
    assert [path.name for path in progress_file.parent.iterdir()] == ["progress.json"]
    capsys.readouterr()
    course.progress()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "chapter  0  ✓○○○○    1 of 5" and len(lines) == 12
    assert lines[-1] == f"1 of {len(NAMES)} exercises solved, recorded in {progress_file}"


@pytest.mark.parametrize("content", ["", "[1]", "{", '"2.3"'])
def test_a_damaged_record_stops_nothing(progress_file, content, capsys):
    progress_file.parent.mkdir()
    progress_file.write_text(content)
    exercises.ex_0_1(lambda n, bits: n * bits / 8e9)
    assert list(json.loads(progress_file.read_text())) == ["0.1"]


def test_a_record_that_cannot_be_written_is_said(progress_file, capsys):
    progress_file.parent.write_text("a file where the folder should be")
    exercises.ex_0_1(lambda n, bits: n * bits / 8e9)
    assert "✓ 0.1" in (out := capsys.readouterr().out) and "not recorded" in out
