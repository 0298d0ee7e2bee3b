"""A real browser opens a notebook in JupyterLab, moves a slider, and the picture changes.

Skipped, with the reason, where there is no Chromium: on Debian `apt-get install chromium`.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CHROMIUM = shutil.which("chromium")
LAUNCH = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
RUN_ALL = 300_000  # ms; the notebook takes a quarter of it on two cores
# A notebook, and how many of its sliders are moved.
EXPLORED = [("01_nf4_quantile_bins", 2)]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium on the PATH; on Debian: apt-get install chromium"
    ),
]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Serve copies of the notebooks from JupyterLab, on this machine alone; yields its address."""
    folder = tmp_path_factory.mktemp("lab")
    for path in NOTEBOOKS.glob("[0-9]*.ipynb"):
        shutil.copy(path, folder)
    port = free_port()
    log = (folder / "lab.log").open("w")
    settings = folder / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    # By itself JupyterLab takes cells that are out of sight out of the page, the widget among them.
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    private = {
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    server = subprocess.Popen(
        [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1",
            f"--port={port}", "--ServerApp.port_retries=0", "--allow-root",
            "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}",
            "--LabApp.extension_manager=readonly", "--LabApp.news_url=None",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        ],
        env=os.environ | private,
        stdout=log,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "lab.log").read_text()
                time.sleep(0.5)
        else:
            pytest.fail("JupyterLab did not answer\n" + (folder / "lab.log").read_text())
        yield address
    finally:
        server.terminate()
        server.wait(30)
        log.close()


@pytest.fixture
def page():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=LAUNCH)
        yield browser.new_page(viewport={"width": 1400, "height": 1000})
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


@pytest.mark.parametrize(("name", "sliders"), EXPLORED, ids=[name for name, _ in EXPLORED])
def test_a_slider_moved_with_the_keyboard_changes_the_picture(lab, page, name, sliders):
    page.goto(f"{lab}/lab/tree/{name}.ipynb?reset", timeout=120_000)
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=120_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()

    handles = page.locator(".jp-OutputArea .widget-slider [role=slider]")
    handles.first.wait_for(timeout=RUN_ALL)
    page.locator(".widget-image").first.wait_for(timeout=60_000)
    assert handles.count() >= sliders
    for n in range(sliders):
        before = picture(page)
        assert before.startswith("\x89PNG"), "the widget shows no picture"
        handle = handles.nth(n)
        handle.scroll_into_view_if_needed()
        value = handle.get_attribute("aria-valuenow")
        handle.focus()
        page.keyboard.press("ArrowRight")
        deadline = time.monotonic() + 120  # the kernel may still be running the cells below
        while picture(page) == before and time.monotonic() < deadline:
            page.wait_for_timeout(250)
        assert handle.get_attribute("aria-valuenow") != value, "the slider did not move"
        assert picture(page) != before, "the slider moved and the picture stayed as it was"
        assert page.locator(".widget-image").first.evaluate("image => image.naturalWidth") > 300
