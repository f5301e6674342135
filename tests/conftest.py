"""What every test may lean on: a store of its own, no analytics, and a plain word when a program is missing."""

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

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
