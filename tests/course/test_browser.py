"""A real browser opens a notebook in JupyterLab, moves a slider, and the picture changes.

Skipped, with the reason, where there is no Chromium: on Debian `apt-get install chromium`.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from jupyter_client import BlockingKernelClient

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
CHROMIUM = shutil.which("chromium")
LAUNCH = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
# Seconds until a wait is given up. Nothing is judged by it: it only ends a test that hangs, and is
# long because other programs may keep the machine busy.
PATIENCE = 900
# A notebook, and how many of its sliders are moved. The first is run from top to bottom; of the
# others only the cells that a slider needs, for they are run whole by nbval.
WHOLE = "01_nf4_quantile_bins"
CHATTY = "10_evaluate_merge_serve"  # it has a chat besides: a copy holds nothing else
EXPLORED = [
    (WHOLE, 2),
    ("00_start_here", 1),
    ("02_blockwise_quantisation", 2),
    ("03_double_quantisation", 2),
    ("04_lora_math", 3),
    ("05_qlora_linear", 2),
    ("06_memory_budget", 3),
    ("07_paged_optimizers", 2),
    ("08_three_ways_to_finetune", 2),
    ("09_finetune_7b", 1),
    (CHATTY, 1),
]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(4 * PATIENCE),
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium on the PATH; on Debian: apt-get install chromium"
    ),
]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def needed_by_a_slider(cell: nbformat.NotebookNode) -> bool:
    return cell.cell_type == "markdown" or cell.id == "set-up" or "_explorer()" in cell.source


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Serve copies of the notebooks from JupyterLab, on this machine alone.

    Yields its address, and the folder with the connection files of its kernels.
    """
    folder = tmp_path_factory.mktemp("lab")
    for name, _ in EXPLORED:
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        if name != WHOLE:
            notebook.cells = [cell for cell in notebook.cells if needed_by_a_slider(cell)]
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / f"{name}.ipynb")
    notebook = nbformat.read(folder / f"{CHATTY}.ipynb", as_version=4)
    playground = nbformat.v4.new_code_cell("explorers.playground()", id="playground")
    notebook.cells = [cell for cell in notebook.cells if cell.id == "set-up"] + [playground]
    nbformat.write(notebook, folder / "chat.ipynb")
    port = free_port()
    log = (folder / "lab.log").open("w")
    settings = folder / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    # By itself JupyterLab takes cells that are out of sight out of the page, the widget among them.
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    private = {
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    server = subprocess.Popen(
        [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1",
            f"--port={port}", "--ServerApp.port_retries=0", "--allow-root",
            "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True",
            f"--ServerApp.root_dir={folder}",
            "--LabApp.extension_manager=readonly", "--LabApp.news_url=None",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        ],
        env=os.environ | private,
        stdout=log,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(2 * PATIENCE):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "lab.log").read_text()
                time.sleep(0.5)
        else:
            pytest.fail("JupyterLab did not answer\n" + (folder / "lab.log").read_text())
        yield address, folder / "runtime"
    finally:
        server.terminate()
        server.wait(PATIENCE)
        log.close()


@pytest.fixture
def page():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=LAUNCH)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(1000 * PATIENCE)
        yield page
        browser.close()


def picture(page) -> str:
    """Read the bytes of the widget's picture, as text."""
    return page.locator(".widget-image").first.evaluate(
        """async image => {
            const blob = await (await fetch(image.src)).blob();
            const bytes = new Uint8Array(await blob.arrayBuffer());
            return Array.from(bytes, b => String.fromCharCode(b)).join('');
        }"""
    )


def start_kernel(lab: str, runtime: Path, name: str) -> None:
    """Start the notebook's kernel and wait until it answers.

    JupyterLab would start it too, but what it is asked to run before the kernel is ready is lost.
    """
    kernel = {
        "path": f"{name}.ipynb",
        "name": name,
        "type": "notebook",
        "kernel": {"name": "python3"},
    }
    request = urllib.request.Request(f"{lab}/api/sessions", json.dumps(kernel).encode())
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        identity = json.load(answer)["kernel"]["id"]
    client = BlockingKernelClient(connection_file=str(runtime / f"kernel-{identity}.json"))
    client.load_connection_file()
    client.start_channels(hb=False)  # on a busy machine a heart may skip a beat
    try:
        client.wait_for_ready(timeout=PATIENCE)
    finally:
        client.stop_channels()


def run_all_cells(page, until) -> None:
    """Choose it from the menu; again, if JupyterLab on a busy machine drops cells on the way.

    That every cell runs is what nbval tests. Here one is wanted, and what it needs.
    """
    waiting = page.locator(".jp-InputPrompt", has_text="[*]")
    dialog = page.locator(".jp-Dialog")
    # It may ask at any moment, on a busy machine late, which kernel to take: the one it offers.
    page.add_locator_handler(dialog, lambda: page.keyboard.press("Enter"))
    for _ in range(6):
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.wait_for_timeout(2000)
        deadline = time.monotonic() + PATIENCE
        while until.count() == 0 and time.monotonic() < deadline:
            if dialog.count():
                page.keyboard.press("Enter")
            elif not waiting.count():
                break
            page.wait_for_timeout(500)
        if until.count():
            return
    said = page.locator(".jp-OutputArea-output").all_inner_texts()
    pytest.fail(
        "the cell with the sliders was not run; the last outputs are\n" + "\n".join(said[-3:])
    )


def open_notebook(lab, page, name: str) -> None:
    """Open it with its kernel running, and wait until both are idle."""
    address, runtime = lab
    start_kernel(address, runtime, name)
    page.goto(f"{address}/lab/tree/{name}.ipynb?reset", timeout=1000 * PATIENCE)
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=1000 * PATIENCE)
    idle = page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
    idle.first.wait_for(timeout=1000 * PATIENCE)


def test_a_message_is_answered_and_an_empty_one_refused(lab, page):
    open_notebook(lab, page, "chat")
    send = page.get_by_role("button", name="Send")
    run_all_cells(page, until=send)
    message = page.locator(".jp-OutputArea textarea")
    answer = page.locator(".jp-OutputArea .widget-html").filter(has_text="all")
    message.fill(
        "Celia repaired a green saddle for Ralf. Ralf paid 36 coins for the work. They met at the "
        "well.\nAt which place was this?"
    )
    message.blur()
    send.click()
    answer.filter(has_text="the well").first.wait_for(timeout=1000 * PATIENCE)
    message.fill("  ")
    message.blur()
    send.click()
    page.get_by_text("the message is empty").wait_for(timeout=1000 * PATIENCE)
    page.get_by_role("button", name="Stop").wait_for(timeout=1000 * PATIENCE)


@pytest.mark.parametrize(("name", "sliders"), EXPLORED, ids=[name for name, _ in EXPLORED])
def test_a_slider_moved_with_the_keyboard_changes_the_picture(lab, page, name, sliders):
    open_notebook(lab, page, name)
    handles = page.locator(".jp-OutputArea .widget-slider [role=slider]")
    run_all_cells(page, until=handles)
    page.locator(".widget-image").first.wait_for(timeout=1000 * PATIENCE)
    assert handles.count() >= sliders
    for n in range(sliders):
        before = picture(page)
        assert before.startswith("\x89PNG"), "the widget shows no picture"
        handle = handles.nth(n)
        handle.scroll_into_view_if_needed()
        value = handle.get_attribute("aria-valuenow")
        handle.focus()
        page.keyboard.press("ArrowRight")
        deadline = time.monotonic() + PATIENCE  # the kernel may still be running the cells below
        while picture(page) == before and time.monotonic() < deadline:
            page.wait_for_timeout(250)
        assert handle.get_attribute("aria-valuenow") != value, "the slider did not move"
        assert picture(page) != before, "the slider moved and the picture stayed as it was"
        assert page.locator(".widget-image").first.evaluate("image => image.naturalWidth") > 300
