"""The real JupyterLab, in a real browser: open a notebook, run all of it from the menu, see no error."""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
START, RUN = 120, 300  # seconds that JupyterLab may take to start, and a notebook to run
BROWSER = [
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--disable-sync",
]
SETTINGS = {  # the committed notebooks are only looked at: nothing is saved, no dialog is in the way
    "docmanager-extension/plugin": {"autosave": False},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
STATE = """() => {
    const panel = window.jupyterapp.shell.currentWidget;
    const kernel = panel?.sessionContext?.session?.kernel;
    const notebook = panel?.content?.model?.toJSON?.();
    return {kernel: kernel?.status ?? "none", cells: (notebook?.cells ?? []).filter(c => c.cell_type === "code")};
}"""


def free_port() -> int:
    "A port that nobody listens on."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def jupyterlab(root: Path, folder: Path) -> Iterator[str]:
    "JupyterLab on `root`, its settings and log in `folder`; gives the address to open notebooks at."
    for plugin, values in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    port, token = free_port(), secrets.token_hex(16)
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": root,
        "ServerApp.allow_root": True,
        "IdentityProvider.token": token,
        "LabApp.expose_app_in_browser": True,
        "LabApp.user_settings_dir": folder / "settings",
        "LabApp.workspaces_dir": folder / "workspaces",
    }
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--no-browser",
        *(f"--{k}={v}" for k, v in options.items()),
    ]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "JUPYTER_CONFIG_DIR": str(folder / "config"),  # not the user's own
    }
    log = folder / "jupyterlab.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START
        while True:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=5),
            ):
                break
            assert server.poll() is None and time.monotonic() < deadline, (
                f"no JupyterLab:\n{log.read_text()[-3000:]}"
            )
            time.sleep(0.3)
        yield f"{address}/lab/tree/{{}}?token={token}"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def run_all(address: str, chromium: str, picture: Path) -> list[dict]:
    "Open the notebook, choose Run > Run All Cells, wait until the kernel has done all: its code cells."
    from playwright.sync_api import sync_playwright

    arguments = [*BROWSER, "--no-sandbox"] if os.getuid() == 0 else BROWSER
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        state: dict = {}
        try:
            page.goto(address, timeout=START * 1000)
            page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=START * 1000)
            page.wait_for_function(f"({STATE})().kernel === 'idle'", timeout=START * 1000)
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            deadline = time.monotonic() + RUN
            while time.monotonic() < deadline:
                page.wait_for_timeout(500)
                state = page.evaluate(STATE)
                stopped = any(
                    out["output_type"] == "error" for cell in state["cells"] for out in cell["outputs"]
                )
                done = all(
                    cell["execution_count"] for cell in state["cells"] if "".join(cell["source"]).strip()
                )
                if state["kernel"] == "idle" and (done or stopped):
                    return state["cells"]
            raise AssertionError(
                f"after {RUN} s the kernel is {state['kernel']} and not every cell has run; see {picture}"
            )
        except Exception:
            page.screenshot(path=picture)
            raise
        finally:
            browser.close()


def check(root: Path, notebook: str, chromium: str, folder: Path) -> list[dict]:
    "Run `notebook` in JupyterLab and see that each cell ran without an error."
    with jupyterlab(root, folder) as address:
        cells = run_all(address.format(notebook), chromium, folder / "jupyterlab.png")
    errors = [
        f"{out['ename']}: {out['evalue']}"
        for cell in cells
        for out in cell["outputs"]
        if out["output_type"] == "error"
    ]
    assert not errors, f"{notebook} in JupyterLab: {errors[0]}"
    assert cells[-1]["execution_count"], f"{notebook}: the last cell did not run"
    return cells


@pytest.mark.long
@pytest.mark.parametrize("notebook", ["pipeline/01_ingest.ipynb"])
def test_a_notebook_runs_in_jupyterlab(notebook: str, tmp_path: Path, store: Path, program):
    chromium = program("chromium", "chromium-browser", "google-chrome")
    before = (NBS / notebook).read_bytes()
    check(NBS, notebook, chromium, tmp_path)
    assert (NBS / notebook).read_bytes() == before, "the test must not save the notebook"


@pytest.mark.long
def test_an_error_in_jupyterlab_is_seen(tmp_path: Path, program):
    import nbformat

    chromium = program("chromium", "chromium-browser", "google-chrome")
    (tmp_path / "nbs").mkdir()
    sources = ["answer = 42\nanswer", "raise ValueError('seen')", "answer + 1"]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "nbs" / "fails.ipynb")
    with pytest.raises(AssertionError, match="ValueError: seen"):
        check(tmp_path / "nbs", "fails.ipynb", chromium, tmp_path)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")
def test_jupyterlab_lists_the_warm_kernel_and_a_notebook_opens_on_it(tmp_path: Path, program):
    import nbformat

    chromium = program("chromium", "chromium-browser", "google-chrome")
    (tmp_path / "nbs").mkdir()
    kernel = {"kernelspec": {"name": "titanic-warm", "display_name": "Titanic (warm)", "language": "python"}}
    cells = [nbformat.v4.new_code_cell("import sys\n'mlflow' in sys.modules")]  # before anybody imports it
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "nbs" / "warm.ipynb")
    with jupyterlab(tmp_path / "nbs", tmp_path) as address:
        listed = address.replace("/lab/tree/{}", "/api/kernelspecs")
        with urllib.request.urlopen(listed, timeout=30) as answer:
            assert "titanic-warm" in json.load(answer)["kernelspecs"]
        [ran] = run_all(address.format("warm.ipynb"), chromium, tmp_path / "jupyterlab.png")
    assert [out["data"]["text/plain"] for out in ran["outputs"]] == ["True"], ran["outputs"]
