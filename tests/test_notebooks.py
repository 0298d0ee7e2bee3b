"""The notebooks keep the rules of `hygiene.py`; and each rule, broken on purpose, is noticed."""

import copy
from pathlib import Path

import hygiene
import nbformat
import pytest
from nbformat.v4 import (
    new_code_cell,
    new_markdown_cell,
    new_notebook,
    new_output,
)

from qlora_edu.course import run_notebooks

NOTEBOOKS = sorted((hygiene.ROOT / "notebooks").glob("[0-9]*.ipynb"))


def test_there_are_notebooks():
    assert {"00", "01", "09"} <= {path.stem[:2] for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_hygiene(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert path.stat().st_size < hygiene.MAX_BYTES, f"{path.name} is over 1 MB"
    breaches = hygiene.breaches(notebook, path.parent)
    assert not breaches, f"{path.name}:\n  " + "\n  ".join(breaches)


def test_no_two_notebooks_define_the_same_thing():
    homes: dict[str, str] = {}
    for path in NOTEBOOKS:
        for cell in hygiene.code_cells(nbformat.read(path, as_version=4)):
            for node in hygiene.definitions(cell.source):
                other = homes.setdefault(node.name, path.stem)
                assert other == path.stem or node.name in hygiene.library(), (
                    f"{node.name} is in {other} and in {path.stem}; give it a home in the library"
                )


PROSE = """\
# Can this notebook pass?
**You will be able to** see. Warm-up: [a picture](#The-big-picture), [the code](test_notebooks.py).
## The big picture
## Explore
## Exercises
{folds}
## Against the real thing
## What goes wrong
## Summary
One misconception. The ledger.
## References
[QLoRA](https://arxiv.org/abs/2305.14314)"""
FOLD = "<details><summary>{}</summary>\n\nthink\n\n</details>\n"


def exercise(n):
    return (
        new_markdown_cell("Write it.", id=f"ex-9-{n}-text"),
        new_code_cell("def mine(x):\n    raise NotImplementedError", id=f"ex-9-{n}-stub"),
        new_code_cell(f'exercises.ex_9_{n}("mine")', id=f"ex-9-{n}-check"),
        new_markdown_cell("Think.", id=f"ex-9-{n}-hints"),
    )


@pytest.fixture
def notebook():
    """The smallest notebook that keeps every rule."""
    folds = 4 * (FOLD.format("Hint 1") + FOLD.format("Hint 2") + FOLD.format("Solution"))
    cells = [
        new_markdown_cell(PROSE.format(folds=folds), id="title"),
        new_code_cell(
            "from qlora_edu.course import exercises, doctor\n\ndoctor.check()", id="set-up"
        ),
        *(cell for n in range(4) for cell in exercise(n)),
        new_code_cell("plot()", id="plot"),
        new_markdown_cell("*The figure shows a line.*", id="plot-in-words"),
        new_code_cell("print(4.127)", id="fact", metadata={"tags": ["nbval-check-output"]}),
    ]
    cells[-3].outputs = [new_output("display_data", {"image/png": "iVBORw0KGgo="})]
    cells[-1].outputs = [new_output("stream", text="4.127\n")]
    for count, cell in enumerate((cell for cell in cells if cell.cell_type == "code"), 1):
        cell.execution_count = count
    return new_notebook(cells=cells)


def breaches(notebook) -> list[str]:
    return hygiene.breaches(notebook, Path(__file__).parent)


def cell(notebook, identifier):
    return next(cell for cell in notebook.cells if cell.id == identifier)


def test_the_smallest_notebook_passes(notebook):
    assert breaches(notebook) == []


@pytest.mark.parametrize(
    ("code", "breach"),
    [
        ("!pip install peft", "not plain Python"),
        ("%pip install peft", "not plain Python"),
        ("import sys\nsys.path.append('..')", "sys.path"),
        ("open('/home/me/model')", "absolute path"),
        ("open('~/model')", "absolute path"),
        ("import warnings\nwarnings.filterwarnings('ignore')", "filterwarnings"),
        ("explorers.interact(f)", "interact()"),
        ("out = ipywidgets.Output()", "Output()"),
        ("from IPython.display import clear_output\nclear_output()", "clear_output()"),
        ("# NBVAL_SKIP\n1 + 1", "no cell is skipped"),
        ("\n".join(f"x{n} = {n}" for n in range(21)), "21 lines of code"),
        ("def use_style():\n    return 1", "use_style is not the code of"),
        ("def enough_naive(x):\n    return x", "enough_naive is never asserted"),
    ],
)
def test_bad_code_is_noticed(notebook, code, breach):
    cell(notebook, "fact").source = code
    (found,) = breaches(notebook)
    assert found.startswith("fact: ")
    assert breach in found


def set_count(notebook):
    cell(notebook, "fact").execution_count = 9


def add_error(notebook):
    cell(notebook, "fact").outputs = [new_output("error", ename="ValueError", evalue="")]


def add_stderr(notebook):
    cell(notebook, "fact").outputs = [new_output("stream", name="stderr", text="Warning: x")]


def print_a_path(notebook):
    cell(notebook, "fact").outputs = [new_output("stream", text="saved to /root/run/adapter")]


def repeat_id(notebook):
    cell(notebook, "fact").id = "plot"


def random_id(notebook):
    cell(notebook, "fact").id = "3f2a9c1b"


def widget_state(notebook):
    notebook.metadata["widgets"] = {}


def python_version(notebook):
    notebook.metadata["language_info"] = {"name": "python", "version": "3.11.7"}


def execution_times(notebook):
    cell(notebook, "fact").metadata["execution"] = {}


def skip_by_tag(notebook):
    cell(notebook, "plot").metadata["tags"] = ["nbval-skip"]


def no_fact(notebook):
    cell(notebook, "fact").metadata["tags"] = []


def no_doctor(notebook):
    cell(notebook, "set-up").source = "from qlora_edu.course import exercises"


def no_words_beside_the_figure(notebook):
    cell(notebook, "plot-in-words").source = "Next."


def stub_by_another_name(notebook):
    cell(notebook, "ex-9-2-stub").id = "stub-of-mine"


def check_in_another_cell(notebook):
    cell(notebook, "ex-9-2-check").id = "check-mine"


def cell_of_no_exercise(notebook):
    cell(notebook, "plot").id = "ex-9-8-stub"


def exercise_out_of_order(notebook):
    cells = notebook.cells
    cells.remove(text := cell(notebook, "ex-9-3-text"))
    cells.insert(-3, text)


def check_without_quotes(notebook):
    cell(notebook, "ex-9-2-check").source = "exercises.ex_9_2(mine)"


def take_the_reference(notebook):
    cell(notebook, "plot").source = "mine = exercises.ex_9_2.reference"


def replace(old, new):
    def edit(notebook):
        title = cell(notebook, "title")
        assert old in title.source
        title.source = title.source.replace(old, new, 1)

    return edit


@pytest.mark.parametrize(
    ("edit", "breach"),
    [
        (set_count, "execution count 9"),
        (add_error, "ends in ValueError"),
        (add_stderr, "writes to stderr"),
        (print_a_path, "path of one machine"),
        (repeat_id, "2 cells have this id"),
        (random_id, "a random id"),
        (widget_state, "'widgets'"),
        (python_version, "a version of Python"),
        (execution_times, "'execution'"),
        (skip_by_tag, "no cell is skipped"),
        (no_fact, "nbval-check-output"),
        (no_doctor, "set-up cell"),
        (no_words_beside_the_figure, "what the figure shows"),
        (stub_by_another_name, "ex-9-2-stub: this cell is missing"),
        (check_in_another_cell, "check-mine: the cell that checks exercise 9-2 is ex-9-2-check"),
        (cell_of_no_exercise, "ex-9-8-stub: an exercise's cell"),
        (exercise_out_of_order, "ex-9-3-check: the order is"),
        (check_without_quotes, "names its function in quotes"),
        (take_the_reference, "take .answer"),
        (replace("pass?", "pass."), "a question"),
        (replace("## Summary", "## End"), "no section: Summary"),
        (replace("</details>", ""), "not closed"),
        (replace("Hint 1", "Clue"), "7 folded hints for 4 exercises"),
        (replace("Solution", "Answer"), "3 folded solutions for 4 exercises"),
        (replace("(test_notebooks.py)", "(nowhere.md)"), "leads nowhere"),
        (replace("(test_notebooks.py)", "(/etc/hosts)"), "absolute link"),
        (replace("(#The-big-picture)", "(#The-small-one)"), "no heading"),
        (replace("[the code]", "![]"), "no alternative text"),
    ],
)
def test_each_breach_is_noticed(notebook, edit, breach):
    edit(notebook)
    found = breaches(notebook)
    assert any(breach in line for line in found), found


def test_the_same_code_with_other_words_and_types_is_the_same(notebook):
    cell(
        notebook, "fact"
    ).source = "def use_style():\n    'My own words.'\n    plt.style.use(_STYLE)"
    assert breaches(notebook) == []


def test_a_naive_version_that_is_asserted_equal_passes(notebook):
    cell(
        notebook, "fact"
    ).source = "def double_naive(x):\n    return x + x\n\n\nassert double_naive(2) == 4"
    assert breaches(notebook) == []


def test_a_cell_is_as_long_as_what_is_read():
    source = 'def f():\n    """One.\n\n    Two."""\n    # why\n\n    return 1'
    assert hygiene.code_lines(source) == 5


def write(folder: Path, *sources: str) -> Path:
    path = folder / "00_small.ipynb"
    cells = [new_code_cell(text, id=f"cell-{n}") for n, text in enumerate(sources)]
    path.write_text(nbformat.writes(new_notebook(cells=cells)))
    return path


def test_make_notebooks_writes_clean_outputs(tmp_path):
    path = write(
        tmp_path,
        "import ipywidgets\nipywidgets.IntSlider()",
        "from tqdm.auto import tqdm\nfor _ in tqdm(range(3)):\n    pass\nprint('done')",
    )
    assert run_notebooks.main(["--in-place", "--html", str(tmp_path / "html"), str(path)]) == 0
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    assert list(hygiene.outputs(notebook)) == []
    assert [line for line in hygiene.metadata(notebook) if "nbval" not in line] == []
    slider, loop = hygiene.code_cells(notebook)
    assert slider.outputs[0].data == {"text/plain": run_notebooks.STILL}
    assert [output.text for output in loop.outputs] == ["done\n"]
    assert "done" in (tmp_path / "html" / "00_small.html").read_text()


def test_a_notebook_that_fails_is_left_as_it_was(tmp_path, capsys):
    path = write(tmp_path, "print('first')", "1 / 0")
    before = path.read_bytes()
    assert run_notebooks.main(["--in-place", str(path)]) == 1
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_cleaning_twice_changes_nothing_more(notebook):
    once = run_notebooks.clean(copy.deepcopy(notebook))
    assert run_notebooks.clean(copy.deepcopy(once)) == once
