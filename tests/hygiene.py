"""What a notebook must be before it is committed; each rule is a function that lists its breaches.

The rules look at a notebook without running it. `tests/test_notebooks.py` applies them to every
notebook, and breaks each of them on purpose.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
MAX_BYTES = 1_000_000
MAX_CODE_LINES = 20
MAX_SETUP_LINES = 8
MIN_EXERCISES = 4

SKIPPING = {"nbval-skip", "skip-execution", "raises-exception"}
# Exceptions inside these vanish, and they break the comparison of outputs.
BANNED_CALLS = {
    "interact": "observe a slider into an Image instead",
    "interactive": "observe a slider into an Image instead",
    "interactive_output": "observe a slider into an Image instead",
    "interact_manual": "observe a slider into an Image instead",
    "Output": "observe a slider into an Image instead",
    "clear_output": "write the picture into an Image instead",
    "simplefilter": "hiding warnings hides what a reader should know",
    "filterwarnings": "hiding warnings hides what a reader should know",
}
SECTIONS = {
    "what the reader will be able to do": r"you will be able to",
    "warm-up questions": r"warm-?up",
    "the big picture": r"^#+ .*big picture",
    "Explore": r"^#+ .*\bexplore",
    "Exercises": r"^#+ .*exercises",
    "Against the real thing": r"^#+ .*against the real thing",
    "What goes wrong": r"^#+ .*what goes wrong",
    "Summary": r"^#+ .*summary",
    "misconceptions": r"misconception",
    "the memory ledger": r"ledger",
    "References": r"^#+ .*references",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(\s*<?([^)\s>]+)>?[^)]*\)")
FOREIGN_PATH = re.compile(
    r"(?<![\w.])(/(home|root|Users|tmp|work|workspace|mnt|opt|var)/|[A-Z]:\\)"
)
RANDOM_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}|$)")


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook: NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def code_lines(source: str) -> int:
    """Count the lines that a reader reads: all but blank ones."""
    return sum(bool(line.strip()) for line in source.split("\n"))


def plain_python(notebook: NotebookNode) -> Iterator[str]:
    for cell in code_cells(notebook):
        try:
            ast.parse(cell.source)
        except SyntaxError as error:
            yield f"{cell.id}: not plain Python, line {error.lineno} (no magics, no shell, no pip)"


def outputs(notebook: NotebookNode) -> Iterator[str]:
    for expected, cell in enumerate(code_cells(notebook), 1):
        if cell.execution_count != expected:
            yield f"{cell.id}: execution count {cell.execution_count}, not {expected}"
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"{cell.id}: ends in {output.ename}"
            if output.get("name") == "stderr":
                yield f"{cell.id}: writes to stderr: {output.text.strip()[:80]!r}"
            text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            if FOREIGN_PATH.search(text):
                yield f"{cell.id}: its output holds a path of one machine"


def identifiers(notebook: NotebookNode) -> Iterator[str]:
    for identifier, times in Counter(cell.get("id") for cell in notebook.cells).items():
        if times > 1:
            yield f"{identifier}: {times} cells have this id"
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", identifier or ""):
            yield f"{identifier}: an id is words in lower case joined by -"
        elif RANDOM_ID.match(identifier):
            yield f"{identifier}: a random id; give it a name that says what the cell is for"


def metadata(notebook: NotebookNode) -> Iterator[str]:
    if (notebook.nbformat, notebook.nbformat_minor) != (4, 5):
        yield f"format {notebook.nbformat}.{notebook.nbformat_minor}, not 4.5"
    for key in notebook.metadata.keys() - {"kernelspec", "language_info"}:
        yield f"notebook metadata {key!r}: run make notebooks"
    if "version" in notebook.metadata.get("language_info", {}):
        yield "notebook metadata names a version of Python: run make notebooks"
    for cell in notebook.cells:
        for key in cell.metadata.keys() - {"tags"}:
            yield f"{cell.id}: cell metadata {key!r}: run make notebooks"
        skipped = SKIPPING & set(cell.metadata.get("tags", []))
        if skipped or re.search(r"#\s*NBVAL_(SKIP|RAISES)", cell.source):
            yield f"{cell.id}: no cell is skipped or allowed to fail"
    if not any(
        "nbval-check-output" in cell.metadata.get("tags", []) or "NBVAL_CHECK_OUTPUT" in cell.source
        for cell in code_cells(notebook)
    ):
        yield "no cell is tagged nbval-check-output: no printed fact is compared"


def code(notebook: NotebookNode) -> Iterator[str]:
    for cell in code_cells(notebook):
        if (count := code_lines(cell.source)) > MAX_CODE_LINES:
            yield f"{cell.id}: {count} lines of code, at most {MAX_CODE_LINES}"
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if FOREIGN_PATH.match(node.value) or node.value.startswith("~/"):
                    yield f"{cell.id}: the absolute path {node.value!r}"
            elif isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path":
                yield f"{cell.id}: sys.path; the package is installed"
            elif isinstance(node, ast.Call):
                name = ast.unparse(node.func).rpartition(".")[2]
                if name in BANNED_CALLS:
                    yield f"{cell.id}: {name}(): {BANNED_CALLS[name]}"
    first = code_cells(notebook)[0]
    if "doctor.check()" not in first.source or code_lines(first.source) > MAX_SETUP_LINES:
        yield f"{first.id}: the set-up cell has doctor.check() and at most {MAX_SETUP_LINES} lines"


def links(notebook: NotebookNode, folder: Path) -> Iterator[str]:
    headings = {
        re.sub(r"\s+", "-", heading.strip())
        for heading in re.findall(r"^#+ (.+)$", prose(notebook), re.MULTILINE)
    }
    headings |= set(re.findall(r"""<a (?:id|name)=["']([^"']+)""", prose(notebook)))
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            continue
        for image, text, target in LINK.findall(cell.source):
            if image and not text.strip():
                yield f"{cell.id}: the image {target} has no alternative text"
            path, _, anchor = unquote(target).partition("#")
            if re.match(r"(https?|mailto):", path):
                continue
            if path.startswith("/"):
                yield f"{cell.id}: the absolute link {target}"
            elif path and not (folder / path).exists():
                yield f"{cell.id}: the link {target} leads nowhere"
            elif not path and anchor not in headings:
                yield f"{cell.id}: no heading for the link #{anchor}"


def figures(notebook: NotebookNode) -> Iterator[str]:
    for before, cell, after in zip(
        [None, *notebook.cells], notebook.cells, [*notebook.cells[1:], None], strict=False
    ):
        if not any("image/png" in out.get("data", {}) for out in cell.get("outputs", [])):
            continue
        beside = [near.source for near in (before, after) if near and near.cell_type == "markdown"]
        if not any(re.search(r"alt text|figure|picture", text, re.IGNORECASE) for text in beside):
            yield f"{cell.id}: no markdown beside it says in words what the figure shows"


def structure(notebook: NotebookNode) -> Iterator[str]:
    title = notebook.cells[0].source.split("\n")[0]
    if not (title.startswith("# ") and title.rstrip().endswith("?")):
        yield f"{notebook.cells[0].id}: the first line is a title, and the title is a question"
    text = prose(notebook)
    for section, pattern in SECTIONS.items():
        if not re.search(pattern, text, re.IGNORECASE | re.MULTILINE):
            yield f"no section: {section}"
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (
            cell.source.count("<details") != cell.source.count("</details>")
        ):
            yield f"{cell.id}: a <details> is not closed"
    checks = exercises(notebook)
    if len(checks) < MIN_EXERCISES:
        yield f"{len(checks)} exercises with a check, at least {MIN_EXERCISES}"
    folds = [fold.lower() for fold in re.findall(r"<summary>(.*?)</summary>", text, re.DOTALL)]
    for kind, each in (("hint", 2), ("solution", 1)):
        if (count := sum(kind in fold for fold in folds)) < each * len(checks):
            yield f"{count} folded {kind}s for {len(checks)} exercises, {each} for each"


def exercises(notebook: NotebookNode) -> dict[str, str]:
    """Map each exercise that is checked, as "2-3", to the cell that calls its check."""
    calls = (
        (number.replace("_", "-"), cell.id)
        for cell in code_cells(notebook)
        for number in re.findall(r"\bexercises\.ex_(\d+_\d+)\(", cell.source)
    )
    return dict(calls)


def exercise_cells(notebook: NotebookNode) -> Iterator[str]:
    """Hold the one pattern: ex-2-3-text, -stub, -check, -hints, and -library if it is needed."""
    ids = [cell.id for cell in notebook.cells]
    checks = exercises(notebook)
    for cell in notebook.cells:
        if cell.id.startswith("ex-") and "-".join(cell.id.split("-")[1:3]) not in checks:
            yield f"{cell.id}: an exercise's cell is ex-2-3-text, -stub, -check, -hints, -library"
        if re.search(r"exercises\.ex_\d+_\d+\.reference", cell.source):
            yield f"{cell.id}: take .answer, which is the reader's own if it passed"
        if cell.id in checks.values() and not re.search(r'ex_\d+_\d+\("\w+"\)$', cell.source):
            yield f'{cell.id}: a check names its function in quotes: exercises.ex_2_3("where_is")'
    for number, check in checks.items():
        parts = [f"ex-{number}-{part}" for part in ("text", "stub", "check", "hints")]
        if check != parts[2]:
            yield f"{check}: the cell that checks exercise {number} is {parts[2]}"
        elif missing := [part for part in parts if part not in ids]:
            yield f"{missing[0]}: this cell is missing"
        elif sorted(parts, key=ids.index) != parts:
            yield f"{check}: the order is text, stub, check, hints"


def definitions(source: str) -> list[ast.FunctionDef | ast.ClassDef]:
    return [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]


@cache
def library() -> dict[str, list[tuple[str, ast.FunctionDef | ast.ClassDef]]]:
    """Map each function and class of the library to the modules that define it."""
    found: dict[str, list] = {}
    for path in sorted((ROOT / "qlora_edu").rglob("*.py")):
        for node in definitions(path.read_text(encoding="utf-8")):
            found.setdefault(node.name, []).append((str(path.relative_to(ROOT)), node))
    return found


class _Essence(ast.NodeTransformer):
    """Drop what may differ between a notebook and the library: docstrings and types."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        return self.visit_body(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        return self.visit_body(node)

    def visit_body(self, node):
        self.generic_visit(node)
        node.body = [part for part in node.body if not is_docstring(part)] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        return node if node.value is None else ast.Assign([node.target], node.value, lineno=0)


def essence(node: ast.AST) -> str:
    """Return the code of a definition without its docstrings and types, in one layout."""
    return ast.unparse(_Essence().visit(ast.parse(ast.unparse(node))))


def is_same(node: ast.FunctionDef | ast.ClassDef, home: ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether a definition is that of the library; a class may be grown, some methods at a time."""
    methods = {m.name: essence(m) for m in node.body if isinstance(m, ast.FunctionDef)}
    if isinstance(node, ast.ClassDef) and methods:
        theirs = {m.name: essence(m) for m in home.body if isinstance(m, ast.FunctionDef)}
        return methods.items() <= theirs.items()
    return essence(node) == essence(home)


def is_stub(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Say whether this is an exercise, still to be written."""
    return essence(node).rstrip().endswith("raise NotImplementedError")


def same_code(notebook: NotebookNode) -> Iterator[str]:
    source = "\n".join(cell.source for cell in code_cells(notebook))
    asserted = "\n".join(
        ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)
    )
    for cell in code_cells(notebook):
        for node in definitions(cell.source):
            if node.name.endswith("_naive"):
                if not re.search(rf"\b{node.name}\b", asserted):
                    yield f"{cell.id}: {node.name} is never asserted equal to the library's"
            elif not is_stub(node) and node.name in library():
                homes = library()[node.name]
                if not any(is_same(node, home) for _, home in homes):
                    yield (
                        f"{cell.id}: {node.name} is not the code of {homes[0][0]}; "
                        "copy it, or call it ..._naive and assert that the results are equal"
                    )


def breaches(notebook: NotebookNode, folder: Path) -> list[str]:
    """List every breach of every rule. Code that is not Python is reported by itself."""
    if broken := list(plain_python(notebook)):
        return broken
    rules = (outputs, identifiers, metadata, code, figures, structure, exercise_cells, same_code)
    return [breach for rule in rules for breach in rule(notebook)] + list(links(notebook, folder))
