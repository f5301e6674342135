"""The wheel, in another folder and a new environment, with no checkout in sight."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from checkout import BIN, QUICK, ROOT

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The built wheel."
    place = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [file] = place.glob("*.whl")
    return file


def test_the_wheel_holds_what_a_run_needs_and_nothing_of_the_checkout(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    notebooks = {f"titanic_mlops/notebooks/{f.name}" for f in (ROOT / "nbs" / "pipeline").glob("*.ipynb")}
    wanted = {
        "titanic_mlops/data/titanic.csv",
        "titanic_mlops/conf/config.yaml",
        "titanic_mlops/model/report.html.j2",
    }
    assert notebooks | wanted | {"titanic_mlops/requirements/pipeline.lock"} <= names
    assert not [
        n for n in names if n.split("/")[0] in ("tests", "nbs", "bench", "scripts") or "__pycache__" in n
    ]


def test_a_run_far_from_any_checkout(wheel: Path, tmp_path: Path):
    here = tmp_path / "here"
    here.mkdir()
    python = here / "env" / "bin" / "python"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TITANIC_", "VIRTUAL_ENV", "PYTHON"))}
    # uv, as of the checkout, is much quicker than pip here; `titanic run` takes it when it is on the PATH
    path = tmp_path / "bin"
    path.mkdir()
    shutil.copy(BIN / "uv", path)
    clean["PATH"] = f"{here / 'env' / 'bin'}{os.pathsep}{path}{os.pathsep}{clean['PATH']}"
    say = lambda *command: subprocess.run(
        command, cwd=here, env=clean, capture_output=True, text=True, check=False, timeout=900
    )
    assert say("uv", "venv", "--python", sys.executable, "env").returncode == 0
    installed = say("uv", "pip", "install", "--python", str(python), str(wheel))
    assert installed.returncode == 0, installed.stderr
    where = say(str(python), "-c", "import titanic_mlops; print(titanic_mlops.__file__)").stdout
    assert str(here) in where, where
    assert say(str(python), "-c", "import pandas").returncode == 1, "the plain install is light"

    refused = subprocess.run(
        ["titanic", "run"],
        cwd=here,
        env=clean | {"TITANIC_AUTO_INSTALL": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2 and "titanic-mlops[pipeline]" in refused.stderr, refused.stderr

    done = say("titanic", "run", "model=logistic", *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pinned and hash-checked" in done.stdout and "champion: titanic version 1" in done.stdout
    assert (here / ".titanic" / "latest" / "report.html").exists()
    assert str(ROOT) not in done.stdout + done.stderr
    say("titanic", "down")
