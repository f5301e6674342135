"""The notebooks that export a module, and the index, are run: their examples and asserts are the tests nearest to the code."""

import os
import subprocess
from pathlib import Path

import pytest
from checkout import BIN, ROOT

pytestmark = pytest.mark.long


def test_library_notebooks(tmp_path: Path):
    command = [str(BIN / "nbdev-test"), "nbs", "--n-workers", "1", "--skip-folder-re", "^([_.]|pipeline)"]
    environment = {**os.environ, "TITANIC_STORE": str(tmp_path / "store"), "IN_TEST": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "Success" in done.stdout + done.stderr
