"""What every test may lean on: a store of its own, no analytics, and a plain word when a program is missing."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from browsing import chromium
from checkout import Checkout, checkout

# Libraries that report home, or that draw on a screen, are told not to before anything imports them.
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "GX_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MPLBACKEND": "agg",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
}
os.environ.update(QUIET)
LONGEST = (
    "test_engine",
    "test_pipeline",
    "test_notebooks",
    "test_incident",
    "test_wheel",
    "test_gate",
    "test_ray",
)
# Kernels, and the processes that they are forked from, are those of this test process alone.
os.environ["JUPYTER_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="titanic-runtime-")
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a job in the background ignores it, and its children would


@pytest.fixture
def fresh(tmp_path: Path) -> Checkout:
    "The command line on an empty store."
    return checkout(tmp_path)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory):
    "The command line on a store whose MLflow and Prefect pages are up."
    own = checkout(tmp_path_factory.mktemp("served"))
    up = own.titanic("up")
    assert up.returncode == 0, up.stdout + up.stderr
    yield own
    own.titanic("down")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    "The command line on another store, for foreign data."
    return checkout(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="session")
def finished(served: Checkout) -> tuple[Checkout, subprocess.CompletedProcess]:
    "The same store after one `titanic run` on the defaults, and what that said."
    done = served.titanic("run")
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((served.store / "latest" / "run.json").read_text())
    served.first = {job: Path(folder) / "outputs" for job, folder in facts["results"].items()}
    return served, done


def pytest_sessionfinish() -> None:
    from titanic_mlops.flow.kernels import shutdown_parents

    shutdown_parents()
    shutil.rmtree(os.environ["JUPYTER_RUNTIME_DIR"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "The longest files first, so that no process is left waiting for the other at the end."
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "An empty store that TITANIC_STORE points to, for this test only."
    folder = tmp_path / "store"
    monkeypatch.setenv("TITANIC_STORE", str(folder))
    return folder


@pytest.fixture
def program():
    "Find a program that a test can't do without: `program('chromium')`. Skips without it, fails in CI."

    def find(*names: str) -> str:
        for name in names:
            if found := shutil.which(name):
                return found
        message = f"{' or '.join(names)} is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{message}, and in CI no test is skipped for want of a program")
        pytest.skip(message)

    return find


@pytest.fixture(scope="module")
def browser():
    "Chromium."
    with chromium() as made:
        yield made
