"""The command line on bad input: one screen, exit code 2, and what to do; nothing is lost."""

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from checkout import QUICK, ROOT, Checkout


def mendable(done: subprocess.CompletedProcess, *wanted: str) -> None:
    "The user can mend it: exit code 2, one screen, no traceback, and it says what is wanted."
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "Traceback" not in said
    assert len(done.stderr.strip().splitlines()) <= 12, done.stderr
    for part in wanted:
        assert part in done.stderr, f"{part!r} is not in:\n{done.stderr}"


# --- before anything starts


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["sed=3"], ["'sed'", "seed"]),
        (["seed=three"], ["seed", "'three'"]),
        (["seed=-1"], ["seed", "-1"]),
        (["model=logstic"], ["'logstic'", "logistic"]),
        (["cv.folds=1"], ["cv.folds", "2"]),
        (["model.candidates.logistic.hyperparameters.D=1"], [".D'", ".C'"]),
        (["seed=1,2"], ["-m"]),
        (["+new=1"], ["new"]),
        (["model.candidates={}"], ["model.candidates", "changes nothing"]),
        (["profile=gcp"], ["TITANIC_BUCKET", "profile.settings"]),
        (["profile=gpc"], ["'gpc'", "gcp"]),
        (["just words"], ["name=value"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_wrong_parameter(fresh: Checkout, overrides: list[str], wanted: list[str]):
    mendable(fresh.titanic("run", *overrides), *wanted)
    assert not fresh.store.exists(), "a store was made for a run that could not start"


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("passengers.csv", ["passengers.csv", "no such file"]),
        ("*.csv", ["*.csv", "no file fits"]),
        (".", ["folder"]),
    ],
)
def test_a_source_that_is_not_there(fresh: Checkout, source: str, wanted: list[str]):
    mendable(fresh.titanic("run", f"source={source}"), *wanted)


def test_usage(fresh: Checkout):
    for arguments in (["rum"], ["run", "--forse"], ["doctor", "now"]):
        done = fresh.titanic(*arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert fresh.titanic("--version").stdout.startswith("titanic_mlops ")
    told = fresh.titanic("--help").stdout
    for command in ("run", "report", "steps", "config", "up", "down", "doctor"):
        assert f" {command} " in told


def test_a_report_before_any_run(fresh: Checkout):
    mendable(fresh.titanic("report"), "no finished run", "titanic run")


def test_the_parameters_of_every_step_are_listed(fresh: Checkout):
    said = fresh.titanic("steps").stdout
    for wanted in ("ingest", "max_quarantined", "0.05", "share of rows", "hyperparameters"):
        assert wanted in said, wanted
    assert "seed: 7" in fresh.titanic("config", "seed=7").stdout


def test_importing_is_light():
    loads = "import sys, {}; print(sorted(m for m in sys.modules if m.count('.') == 0 and m not in before))"
    before = "import sys; before = set(sys.modules) | {'titanic_mlops'}; "
    say = lambda what: subprocess.check_output([sys.executable, "-c", before + loads.format(what)], text=True)
    assert say("titanic_mlops").strip() == "[]"
    heavy = ("pandas", "numpy", "sklearn", "mlflow", "prefect", "papermill", "hydra", "great_expectations")
    assert not [m for m in heavy if repr(m) in say("titanic_mlops.face.cli")]


# --- the machine


def test_a_store_that_is_a_file(fresh: Checkout):
    fresh.store.write_text("in the way")
    mendable(fresh.titanic("run"), str(fresh.store), "TITANIC_STORE")


def test_a_store_that_can_not_be_written(fresh: Checkout):
    mendable(fresh.titanic("run", TITANIC_STORE="/sys/titanic"), "/sys/titanic", "TITANIC_STORE")


def test_a_disk_that_is_full(fresh: Checkout):
    fresh.store.mkdir()
    small = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(fresh.store)]
    if not shutil.which("mount") or subprocess.run(small, capture_output=True, check=False).returncode:
        pytest.skip("only root can make a small disk")
    try:
        mendable(fresh.titanic("run"), "GB free", str(fresh.store))
    finally:
        subprocess.run(["umount", str(fresh.store)], check=True)


def test_a_disk_that_fills_up_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import errno

    from titanic_mlops.ground.errors import explain
    from titanic_mlops.ground.store import write_atomic

    file = tmp_path / "model.bin"
    write_atomic(file, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Exception) as caught:
        write_atomic(file, b"new")
    assert "space" in str(explain(caught.value) or caught.value)
    assert file.read_bytes() == b"old" and [f.name for f in tmp_path.iterdir()] == ["model.bin"]


def test_a_tracking_store_that_is_locked(fresh: Checkout):
    fresh.store.mkdir()
    database = sqlite3.connect(fresh.store / "mlflow.db", isolation_level=None)
    database.execute("CREATE TABLE t (x)")
    database.execute("BEGIN EXCLUSIVE")
    try:
        mendable(fresh.titanic("run"), "mlflow.db", "locked")
    finally:
        database.close()


def test_the_doctor(fresh: Checkout):
    done = fresh.titanic("doctor")
    assert done.returncode == 0, done.stdout
    for wanted in ("python", "packages", "store", "tracking", "kernel", "titanic run"):
        assert wanted in done.stdout, wanted
    fresh.store.rmdir()
    fresh.store.write_text("in the way")
    ill = fresh.titanic("doctor")
    assert ill.returncode == 2 and "✗ store" in ill.stdout and "TITANIC_STORE" in ill.stdout


# --- services


@pytest.mark.long
def test_up_and_down(fresh: Checkout):
    up = fresh.titanic("up")
    assert up.returncode == 0, up.stderr
    pages = [word for word in up.stdout.split() if word.startswith("http://127.0.0.1:")]
    assert len(pages) == 2
    for page in pages:
        with urllib.request.urlopen(page, timeout=20) as answer:
            assert answer.status == 200 and b"<html" in answer.read().lower()
    again = fresh.titanic("up")
    assert [word for word in again.stdout.split() if word.startswith("http://")] == pages
    down = fresh.titanic("down")
    assert "mlflow" in down.stdout and "prefect" in down.stdout
    for page in pages:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", int(page.rsplit(":", 1)[1]))) != 0, page
    assert fresh.titanic("down").stdout.strip() == "nothing was running"


# --- foreign data, through the whole pipeline

EMBEDDED = ROOT / "titanic_mlops" / "data" / "titanic.csv"


def edited(folder: Path, edit: Callable[[list[str]], list[str]]) -> Path:
    "The passenger list with its lines edited."
    file = folder / "mine.csv"
    file.write_text("\n".join(edit(EMBEDDED.read_text().splitlines())) + "\n")
    return file


def cell(lines: list[str], line: int, column: str, value: str) -> list[str]:
    "The lines with one cell replaced; lines count from 1, the header."
    import csv
    import io

    at = next(csv.reader([lines[0]])).index(column)
    row = next(csv.reader([lines[line - 1]]))
    row[at] = value
    out = io.StringIO()
    csv.writer(out).writerow(row)
    return [*lines[: line - 1], out.getvalue().strip(), *lines[line:]]


@pytest.mark.long
def test_a_file_that_can_not_be_used(foreign: Checkout, tmp_path: Path):
    one_outcome = lambda lines: [lines[0], *(x for x in lines[1:] if x.split(",")[1].strip('"') == "1")]
    file = edited(tmp_path, one_outcome)
    mendable(foreign.titanic("run", f"source={file}", *QUICK), "survived", "failed/validate")
    assert not (foreign.store / "steps" / "train.logistic").exists()


@pytest.mark.long
def test_bad_rows_are_set_aside_with_their_reasons_and_the_run_goes_on(foreign: Checkout, tmp_path: Path):
    import pandas as pd

    def spoil(lines: list[str]) -> list[str]:
        lines = cell(lines, 5, "age", "-3")
        lines = cell(lines, 9, "pclass", "4")
        lines = cell(lines, 12, "fare", "a lot")
        return [*lines, lines[20]]  # a passenger twice

    source = edited(tmp_path, spoil)
    done = foreign.titanic("run", f"source={source}", "model=logistic", *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "quarantine" in done.stdout and "(4 rows)" in done.stdout
    kept = pd.read_csv(foreign.outputs("validate") / "quarantine.csv", dtype=str).set_index("line")
    assert kept.loc["5", "column"] == "age" and kept.loc["5", "value"] in ("-3", "-3.0")
    assert kept.loc["9", "column"] == "pclass" and "4" in kept.loc["9", "value"]
    assert kept.loc["12", "value"] == "a lot"
    assert "once" in kept.loc["1311", "rule"]
    assert kept["record"].str.len().min() > 20 and (kept["source"] == str(source)).all()
    assert len(pd.read_csv(foreign.store / "latest" / "scored.csv")) == 1306


@pytest.mark.long
def test_too_many_bad_rows_stop_the_run_and_are_kept(foreign: Checkout, tmp_path: Path):
    def spoil(lines: list[str]) -> list[str]:
        for line in range(2, 202):
            lines = cell(lines, line, "age", "-3")
        return lines

    done = foreign.titanic("run", f"source={edited(tmp_path, spoil)}", *QUICK)
    mendable(done, "200 of 1309 rows", "age", "-3", "5.0%", "max_quarantined", "failed/validate")
    [kept] = (foreign.store / "failed" / "validate").rglob("quarantine.csv")
    assert len(kept.read_text().splitlines()) == 201


# --- what is not there


WITHOUT = (
    "import sys; sys.modules[sys.argv[1]] = None; from titanic_mlops.face.cli import main; main(sys.argv[2:])"
)


@pytest.mark.parametrize(
    ("package", "extra", "command"),
    [
        ("ray", "ray", ["score", "in.csv", "out.csv", "--engine", "ray"]),
        ("mlflow", "pipeline", ["history"]),
    ],
)
def test_a_package_that_is_not_installed_is_no_defect(
    tmp_path: Path, package: str, extra: str, command: list[str]
):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, package, *command],
        cwd=tmp_path,
        env=os.environ | {"TITANIC_STORE": str(tmp_path / "store")},
        capture_output=True,
        text=True,
    )
    mendable(done, "not installed", f"titanic-mlops[{extra}]")


def test_which_extra_brings_a_package():
    from titanic_mlops.face.cli import _not_installed

    wrapped = ImportError("Install s3fs to access S3")  # as fsspec says it
    wrapped.__cause__ = ModuleNotFoundError("No module named 's3fs'", name="s3fs")
    assert "titanic-mlops[s3]" in _not_installed(wrapped).do
    for name, extra in (("opentelemetry.sdk", "tracing"), ("onnxruntime", "serve"), ("pandas", "pipeline")):
        assert f"titanic-mlops[{extra}]" in _not_installed(ModuleNotFoundError("", name=name)).do
    assert _not_installed(ModuleNotFoundError("", name="titanic_mlops.nothing")) is None
    assert _not_installed(ImportError("cannot import name")) is None


def test_a_bucket_that_can_not_be_used_is_no_defect():
    from botocore.exceptions import EndpointConnectionError, NoCredentialsError
    from google.auth.exceptions import DefaultCredentialsError

    from titanic_mlops.ground.errors import explain

    for error, wanted in (
        (NoCredentialsError(), "AWS_ACCESS_KEY_ID"),
        (EndpointConnectionError(endpoint_url="http://127.0.0.1:1"), "AWS_ENDPOINT_URL"),
        (DefaultCredentialsError("no credentials"), "gcloud auth"),
    ):
        known = explain(error)
        assert known is not None and known.exit_code == 2 and wanted in known.do, error


def test_a_file_where_the_store_should_be(fresh: Checkout, tmp_path: Path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "store"):
        done = fresh.titanic("keys", "new", "--name", "me", "--scope", "predict", TITANIC_STORE=str(place))
        mendable(done, "TITANIC_STORE")
