"""What is looked at before a commit: how text ends, and how a notebook is written.

    python tests/before_commit.py FILE ...     # .pre-commit-config.yaml calls it so

A notebook is valid, and written as `make notebooks` writes it, so that a change of one cell is a
change of a few lines.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat


def breaches(path: Path) -> list[str]:
    """What is wrong with a file, in words that say what to do."""
    text = path.read_text(encoding="utf-8")
    found = []
    if text and (not text.endswith("\n") or text.endswith("\n\n")):
        found.append("must end with one newline")
    if path.suffix == ".ipynb":
        try:
            notebook = json.loads(text)
            nbformat.validate(notebook)
        except (json.JSONDecodeError, nbformat.ValidationError) as error:
            return [*found, f"is no notebook ({error}); restore it, or finish the merge"]
        if text.rstrip("\n") != json.dumps(notebook, indent=1, ensure_ascii=False):
            found.append("is not written as `make notebooks` writes it; run that")
    return found


def main(names: Sequence[str]) -> int:
    """Print every breach; 1 if there was one."""
    lines = [f"{name} {breach}" for name in names for breach in breaches(Path(name))]
    print("\n".join(lines), end="\n" if lines else "")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
