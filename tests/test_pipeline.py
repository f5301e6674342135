"""`titanic run` for real: what it leaves behind, what it does not do twice, and what it survives; and its notebooks."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from checkout import QUICK, ROOT, Checkout

pytestmark = pytest.mark.long
JOBS = [
    "ingest",
    "validate",
    "document",
    "train.logistic",
    "train.boosting",
    "evaluate",
    "promote",
    "score",
    "report",
]


def mlflow_client(own: Checkout):
    "A client of the store's tracking database."
    import mlflow

    return mlflow.MlflowClient(f"sqlite:///{own.store / 'mlflow.db'}")


def runs(own: Checkout, condition: str = "") -> list:
    "Runs on record, newest first."
    client = mlflow_client(own)
    experiment = client.get_experiment_by_name("titanic").experiment_id
    return client.search_runs([experiment], condition, max_results=1000)


def children(own: Checkout, parent: str) -> dict:
    "The jobs of a pipeline run: name -> MLflow run."
    return {run.info.run_name: run for run in runs(own, f"tags.`mlflow.parentRunId` = '{parent}'")}


def latest_run(own: Checkout) -> str:
    return json.loads((own.store / "latest" / "run.json").read_text())["run_id"]


# --- one run


def test_the_summary_says_what_a_person_wants(finished):
    _, done = finished
    for wanted in (
        "champion: titanic version",
        "accuracy",
        "95 %",
        "report.html",
        "scored.csv",
        "data_docs/index.html",
        "MLflow",
        "Prefect",
    ):
        assert wanted in done.stdout, wanted
    assert "Next:" in done.stdout.splitlines()[-1]
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr


def test_every_job_is_on_record(finished):
    own, _ = finished
    client, parent = mlflow_client(own), latest_run(own)
    assert client.get_run(parent).info.status == "FINISHED"
    assert client.get_run(parent).data.params["seed"] == "1912"
    found = children(own, parent)
    assert sorted(found) == sorted(JOBS)
    for name, run in found.items():
        files = {f.path for f in client.list_artifacts(run.info.run_id)}
        assert {"notebook.ipynb", "notebook.html", "manifest.json"} <= files, name
        assert run.info.status == "FINISHED" and run.data.metrics, name
        said = json.loads(Path(client.download_artifacts(run.info.run_id, "manifest.json")).read_text())
        for source in said["inputs"].values():
            assert re.fullmatch(r"[0-9a-f]{64}", source["sha256"]) and source["uri"], name
        assert all(re.fullmatch(r"[0-9a-f]{64}", d) for d in said["outputs"].values()), name
    assert found["train.logistic"].data.params["seed"] == "1912"
    figures = {f.path for f in client.list_artifacts(found["evaluate"].info.run_id, "figures")}
    assert "figures/roc.png" in figures and "figures/calibration.png" in figures


def test_the_champion_is_in_the_registry_and_answers(finished):
    import mlflow
    import pandas as pd

    own, _ = finished
    mlflow.set_tracking_uri(f"sqlite:///{own.store / 'mlflow.db'}")
    model = mlflow.pyfunc.load_model("models:/titanic@champion")
    person = {"pclass": 3, "name": "Dooley, Mr. Patrick", "sex": "male", "age": 32.0, "sibsp": 0, "parch": 0}
    person |= {"ticket": "370376", "fare": 7.75, "cabin": None, "embarked": "Q"}
    [p] = model.predict(pd.DataFrame([person]))
    assert 0 < p < 0.3


@pytest.mark.parametrize("candidate", ["logistic", "boosting"])
def test_a_model_gives_the_same_graph_in_every_process(finished, candidate: str):
    own, _ = finished
    code = """
import json, sys
from pathlib import Path
from titanic_mlops import bundle, store, train
folder = Path(sys.argv[1])
with_deck = json.loads((folder / "candidate.json").read_text())["with_deck"]
print(store.digest(bundle.to_onnx(train.load_model(folder / "model.skops"), with_deck)))
"""
    folder = own.first[f"train.{candidate}"]
    said = {
        subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "123"
    }
    assert len(said) == 1


def test_prefect_knows_the_run_by_name(finished):
    own, _ = finished
    address = json.loads((own.store / "services" / "prefect.json").read_text())["url"]
    asked = urllib.request.Request(
        f"{address}/api/flow_runs/filter", data=b"{}", headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=20) as answer:
        found = {run["name"]: run["state_type"] for run in json.load(answer)}
    assert found[f"titanic {latest_run(own)[:8]}"] == "COMPLETED"


def test_every_passenger_is_scored_in_the_order_of_the_source(finished):
    import pandas as pd

    own, _ = finished
    scored = pd.read_csv(own.store / "latest" / "scored.csv")
    assert len(scored) == 1309 and scored["line"].is_monotonic_increasing
    assert scored["probability"].between(0, 1).all() and scored["probability"].nunique() > 100
    assert (scored["survives"] == (scored["probability"] >= 0.5)).all()


def test_the_report_needs_nothing_but_a_browser(finished):
    own, _ = finished
    page = (own.store / "latest" / "report.html").read_text()
    assert "<script" not in page and page.count("<svg") == 11
    assert not re.search(r'(?:src|href)="https?://', page)
    evaluation = json.loads((own.outputs("evaluate") / "evaluation.json").read_text())
    for name, figure in evaluation["holdout"].items():
        assert f"{figure['value']:.3f}" in page, name
    again = own.titanic("report", "-o", "mine.html")
    assert again.returncode == 0 and (own.folder / "mine.html").read_text().count("<svg") == 11


# --- another one


def test_an_unchanged_run_does_nothing_twice(finished):
    own, _ = finished
    before = {f: f.stat().st_mtime_ns for f in (own.store / "steps").rglob("*") if f.is_file()}
    again = own.titanic("run")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "9 of 9 steps recalled" in again.stdout
    assert {f: f.stat().st_mtime_ns for f in (own.store / "steps").rglob("*") if f.is_file()} == before
    assert len(mlflow_client(own).search_model_versions("name='titanic'")) == 1
    for name, run in children(own, latest_run(own)).items():
        assert run.data.tags["titanic.cached"] == "true", name
        assert mlflow_client(own).get_run(run.data.tags["titanic.cached_from"]).info.run_name == name


def test_another_model_and_seed(finished):
    own, _ = finished
    done = own.titanic("run", "model=logistic", "seed=7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 8 steps recalled" in done.stdout
    parent = mlflow_client(own).get_run(latest_run(own))
    assert parent.data.params["seed"] == "7" and "model.candidates.boosting.kind" not in parent.data.params
    found = children(own, parent.info.run_id)
    assert "train.boosting" not in found and found["train.logistic"].data.params["seed"] == "7"


def test_a_sweep(finished):
    own, _ = finished
    known = {run.info.run_id for run in runs(own)}
    done = own.titanic("run", "-m", "seed=1,2,3", "model=logistic", *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"run {n}  seed={n}\n" in done.stdout for n in (1, 2, 3)), done.stdout
    new = [run for run in runs(own) if run.info.run_id not in known and run.info.run_name == "pipeline"]
    assert sorted(run.data.params["seed"] for run in new) == ["1", "2", "3"]
    assert {run.info.status for run in new} == {"FINISHED"}


# --- interrupted


def wait_for(own: Checkout, what: str, job: str, seconds: float = 400) -> None:
    "Return when the log says so."
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(e.get("message", e.get("event")) == what and e.get("job") == job for e in own.events()):
            return
        time.sleep(0.2)
    raise AssertionError(f"{what} of {job} did not come within {seconds} s")


def processes_of(own: Checkout) -> list[str]:
    "Command lines of living processes that have the store in their environment."
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(own.store).encode() in (folder / "environ").read_bytes():
                state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
                if state != "Z":
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def test_a_killed_run_goes_on_and_comes_to_the_same(finished, fresh: Checkout):
    cut = fresh.start("run")
    wait_for(fresh, "job cell", "evaluate")
    cut.kill()
    cut.communicate()
    assert not list((fresh.store / "steps").glob("evaluate/[0-9a-f]*/manifest.json"))

    deadline = time.monotonic() + 30  # kernels and the temporary server end with the run
    while processes_of(fresh) and time.monotonic() < deadline:
        time.sleep(0.5)
    left = [
        line for line in processes_of(fresh) if "titanic_mlops.flow.kernels" not in line
    ]  # the idle parent
    assert not left, left

    again = fresh.titanic("run")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "5 of 9 steps recalled" in again.stdout
    assert {run.info.status for run in runs(fresh)} <= {"FINISHED", "KILLED", "FAILED"}  # none runs for ever
    assert len(mlflow_client(fresh).search_model_versions("name='titanic'")) == 1

    other, _ = finished  # the same seed, elsewhere and in one go: equal to the last digit
    pairs = (("evaluate", "evaluation.json"), ("score", "scored.csv"), ("train.boosting", "candidate.json"))
    for job, file in pairs:
        assert (fresh.outputs(job) / file).read_bytes() == (other.first[job] / file).read_bytes(), file


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_ctrl_c_is_not_an_error(finished, how: str):
    served, _ = finished
    seen = len(served.events())
    run = served.start("run", f"seed={getattr(signal, how) + 90}", *QUICK)
    deadline = time.monotonic() + 120
    while not any(e.get("message", e.get("event")) == "job cell" for e in served.events()[seen:]):
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.2)
    run.send_signal(getattr(signal, how))
    _, said = run.communicate(timeout=30)
    assert run.returncode == 130
    assert "titanic run" in said and "Traceback" not in said
    newest = runs(served, "tags.`mlflow.parentRunId` IS NULL")[0]  # of the pipelines
    assert newest.info.status == "KILLED"


# --- damaged


def test_a_damaged_result_is_made_again(finished):
    own, _ = finished
    table = own.first["score"] / "scored.csv"
    good = table.read_bytes()
    table.write_bytes(good.replace(b"0.", b"1.", 1))
    done = own.titanic("run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert table.read_bytes() == good
    assert "8 of 9 steps recalled" in done.stdout


def test_a_verdict_that_was_not_written_down_comes_out_again(finished):
    "Killed after the champion was moved and before the step was kept: the next run does not compare the model with itself."
    import mlflow

    own, _ = finished
    decision = own.first["promote"] / "decision.json"
    good = decision.read_bytes()
    assert json.loads(good)["outcome"] == "first"
    client = mlflow.MlflowClient(f"sqlite:///{own.store / 'mlflow.db'}")
    asked = client.get_model_version_by_alias("titanic", "champion").tags["gate_run"]
    assert client.get_run(asked).info.status == "FINISHED"
    client.set_terminated(asked, "KILLED")
    shutil.rmtree(decision.parent)
    ledger = sorted(own.store.glob("artifacts/ledger/**/*.json"))
    done = own.titanic("run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 of 9 steps recalled" in done.stdout
    assert decision.read_bytes() == good
    assert sorted(own.store.glob("artifacts/ledger/**/*.json")) == ledger and len(ledger) == 1


# --- the step notebooks, against their stored outputs

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


@pytest.fixture(scope="module")
def prepared(finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A store with the steps of a finished run and an empty registry, as a newcomer's notebook would leave it."
    own: Checkout = finished[0]
    store = tmp_path_factory.mktemp("replay") / "store"
    for job, outputs in own.first.items():
        shutil.copytree(outputs.parent, store / "steps" / job / outputs.parent.name)
    return store


def test_step_notebooks_give_what_they_store(prepared: Path, tmp_path: Path):
    assert len(STEPS) == 9
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
