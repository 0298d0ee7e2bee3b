"""Run the notebooks from top to bottom, as a reader would, and keep what they print.

    python -m qlora_edu.course.run_notebooks --in-place          # make notebooks
    python -m qlora_edu.course.run_notebooks --html build/course # make course

Each gets a fresh kernel. What would differ on the next run though nothing has changed is removed:
execution times, versions of Python, the state of widgets, progress bars.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from tqdm import tqdm

from qlora_edu.files import ROOT, atomic
from qlora_edu.production.threads import wait_passively

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
STILL = "(sliders: run this cell to move them)"
PROGRESS = re.compile(r"\d+%\|")
SECONDS_PER_CELL = 600


def run(path: Path) -> NotebookNode:
    """Execute a notebook in a fresh kernel, in its own folder, and return it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    # disable=None: a bar on a terminal, nothing in a log file.
    with tqdm(total=len(notebook.cells), desc=path.name, disable=None, leave=False) as bar:
        client = NotebookClient(
            notebook,
            timeout=SECONDS_PER_CELL,
            kernel_name="python3",
            resources={"metadata": {"path": str(path.parent)}},
            store_widget_state=False,
            coalesce_streams=True,
            # At its usual level the kernel warns that its sockets, all on this machine, are plain.
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
            on_cell_complete=lambda cell, cell_index: bar.update(cell_index + 1 - bar.n),
        )
        return client.execute()


def clean(notebook: NotebookNode) -> NotebookNode:
    """Remove, in place, what says nothing about the course; return the notebook."""
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    language = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": language})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for cell in notebook.cells:
        kept = {key: value for key, value in cell.metadata.items() if key == "tags"}
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type == "code":
            cell.outputs = [kept for out in cell.outputs if (kept := clean_output(out))]
    return notebook


def clean_output(output: NotebookNode) -> NotebookNode | None:
    """Return an output as it should be kept, or None if it was a progress bar and nothing else.

    >>> bar = "  0%|     | 0/2\\r 50%|##   | 1/2\\r100%|#####| 2/2 [00:03]\\n"
    >>> clean_output(nbformat.v4.new_output("stream", text=bar + "loss 0.31\\n")).text
    'loss 0.31\\n'
    """
    if output.output_type == "stream":
        # As a terminal shows it: what follows a carriage return overwrites the line.
        lines = (line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n"))
        output.text = "\n".join(line for line in lines if not PROGRESS.search(line))
        return output if output.text.strip() else None
    if WIDGET_VIEW in output.get("data", {}):
        if PROGRESS.search(output.data.get("text/plain", "")):
            return None
        # The sliders live in the kernel that is now gone; their identifiers lead nowhere.
        del output.data[WIDGET_VIEW]
        output.data["text/plain"] = STILL
    return output


def html(notebook: NotebookNode, title: str) -> str:
    """Render a notebook as one HTML page, figures inside."""
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": title}})
    return page


def run_all(paths: Iterable[Path], *, in_place: bool, html_folder: Path | None) -> int:
    """Run notebooks one after another and print a line for each; return how many failed."""
    failed = 0
    for path in paths:
        started = time.monotonic()
        try:
            notebook = clean(run(path))
            nbformat.validate(notebook)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            failed += 1
            print(f"✗ {path.name} stopped and was left as it was\n{error}", flush=True)
            continue
        if in_place:
            atomic.write_text(path, nbformat.writes(notebook) + "\n")
        if html_folder is not None:
            atomic.write_text(html_folder / f"{path.stem}.html", html(notebook, path.stem))
        print(f"✓ {path.name}  {time.monotonic() - started:.0f} s", flush=True)
    return failed


def main(argv: list[str] | None = None) -> int:
    """Run the notebooks named, or all of them; 1 if any failed."""
    parser = argparse.ArgumentParser(prog="run_notebooks", description=main.__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of notebooks/")
    parser.add_argument("--in-place", action="store_true", help="keep the outputs in the notebook")
    parser.add_argument("--html", type=Path, metavar="FOLDER", help="write HTML pages there")
    arguments = parser.parse_args(argv)
    paths = arguments.notebooks or sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    if not paths:
        print("no notebooks found", file=sys.stderr)
        return 1
    wait_passively()  # the kernels start with the environment of this process
    failed = run_all(paths, in_place=arguments.in_place, html_folder=arguments.html)
    if failed:
        print(f"{failed} of {len(paths)} notebooks failed")
    elif arguments.html:
        print(f"read them at {arguments.html / (paths[0].stem + '.html')}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
