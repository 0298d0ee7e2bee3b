"""The check before a commit passes the notebooks, and stops each thing that it is for."""

import json

import pytest
from before_commit import breaches, main

from qlora_edu.files import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebooks_pass(path):
    assert breaches(path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.rstrip("\n"), "one newline"),
        (lambda text: text + "\n", "one newline"),
        (lambda text: "<<<<<<< HEAD\n" + text, "finish the merge"),
        (lambda text: text.replace('"cell_type": "code"', '"cell_type": "cod"'), "is no notebook"),
        (lambda text: json.dumps(json.loads(text)) + "\n", "make notebooks"),
    ],
)
def test_each_breach_is_found(change, message, tmp_path, capsys):
    path = tmp_path / "changed.ipynb"
    path.write_text(change(NOTEBOOKS[0].read_text(encoding="utf-8")), encoding="utf-8")
    assert main([str(path)]) == 1
    assert message in capsys.readouterr().out


def test_an_empty_file_passes(tmp_path):
    empty = tmp_path / "__init__.py"
    empty.touch()
    assert main([str(empty)]) == 0
