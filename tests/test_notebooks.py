"""The notebooks are run: those that export a module by nbdev-test, the pipeline's against their stored outputs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import BIN, ROOT, Checkout

pytestmark = pytest.mark.long
STEPS = sorted((ROOT / "nbs" / "pipeline").glob("*.ipynb"))


def replay(folder: Path, store: Path) -> subprocess.CompletedProcess:
    "nbval over a folder of notebooks, in fresh kernels."
    for file in folder.glob(
        "*.ipynb"
    ):  # nbval takes a cell without a number, as clean ones are, for one that was not run
        notebook = json.loads(file.read_text())
        for number, cell in enumerate((c for c in notebook["cells"] if c["cell_type"] == "code"), 1):
            cell["execution_count"] = number
        file.write_text(json.dumps(notebook))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(folder),
    ]
    command += ["--nbval", "--nbval-kernel-name=titanic-warm", "--nbval-cell-timeout=300"]
    command += [f"--nbval-sanitize-with={ROOT / 'tests' / 'nbval.cfg'}", str(folder)]
    environment = {**os.environ, "TITANIC_STORE": str(store)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_library_notebooks(tmp_path: Path):
    command = [str(BIN / "nbdev-test"), "nbs", "--n-workers", "2", "--skip-folder-re", "^([_.]|pipeline)"]
    environment = {**os.environ, "TITANIC_STORE": str(tmp_path / "store"), "IN_TEST": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "Success" in done.stdout + done.stderr


@pytest.fixture(scope="module")
def prepared(finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A store with the steps of a finished run and an empty registry, as a newcomer's notebook would leave it."
    own: Checkout = finished[0]
    store = tmp_path_factory.mktemp("replay") / "store"
    for job, outputs in own.first.items():
        shutil.copytree(outputs.parent, store / "steps" / job / outputs.parent.name)
    return store


def test_step_notebooks_give_what_they_store(prepared: Path, tmp_path: Path):
    assert len(STEPS) == 7
    folder = tmp_path / "pipeline"
    shutil.copytree(ROOT / "nbs" / "pipeline", folder)
    done = replay(folder, prepared)
    cells = sum(c["cell_type"] == "code" for f in STEPS for c in json.loads(f.read_text())["cells"])
    assert done.returncode == 0, done.stdout[-8000:]
    assert f"{cells} passed" in done.stdout


def test_the_replay_would_notice(prepared: Path, tmp_path: Path):
    "A stored figure that is not what the notebook gives is found."
    notebook = json.loads(STEPS[0].read_text())
    [table] = [c for c in notebook["cells"] if "".join(c["source"]) == "rows.frame.head()"]
    stored = table["outputs"][0]["data"]
    stored["text/plain"] = [line.replace("29.0", "28.0") for line in stored["text/plain"]]
    (tmp_path / STEPS[0].name).write_text(json.dumps(notebook))
    done = replay(tmp_path, prepared)
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout[-3000:]
