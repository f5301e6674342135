"""The short way to MLflow and Prefect, over HTTP, says the same as the long one."""

import json
import signal
import sqlite3
import subprocess
import urllib.request
from pathlib import Path

import pytest
from checkout import Checkout

from titanic_mlops import cache, pipeline, records, services, steps
from titanic_mlops.ground.errors import StoreError
from titanic_mlops.ground.logs import open_log
from titanic_mlops.ground.settings import Settings
from titanic_mlops.ground.store import digest

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def own(finished) -> Settings:
    checkout: Checkout = finished[0]
    return Settings(store=checkout.store)


def test_both_books_hold_the_same(own: Settings):
    url = services.running(own)["mlflow"].url
    short, long = records.RestBooks(own, url), records.MlflowBooks(own)
    assert short.experiment() == long.experiment() and short.champion() == long.champion() != ""
    seen = []
    for books in (short, long):
        run_id = books.create("tried", {"titanic.job": "ingest"})
        assert run_id in short.open_runs() and short.open_runs() == long.open_runs()
        finished = json.loads((own.store / "latest" / "run.json").read_text())["run_id"]
        assert books.unfinished([run_id, finished, "0" * 32]) == [run_id] and books.unfinished([]) == []
        books.log(run_id, {"source": "x" * 900, "seed": 7}, {"rows": 1309}, {"mood": "good"})
        books.end(run_id, "KILLED")
        run = long.client.get_run(run_id)
        own_tags = {
            k: v for k, v in run.data.tags.items() if not k.startswith("mlflow.") or k == "mlflow.runName"
        }
        seen.append((run.info.status, run.data.params, run.data.metrics, own_tags))
        assert run.info.end_time >= run.info.start_time > 1.7e12  # milliseconds
    assert seen[0] == seen[1]
    assert short.open_runs() == {}


def test_a_model_that_is_not_registered_has_no_champion(own: Settings):
    url = services.running(own)["mlflow"].url
    other = Settings(store=own.store, mlflow_model="nobody")
    assert records.RestBooks(other, url).champion() == records.MlflowBooks(other).champion() == ""


def test_a_run_that_was_cut_off_when_its_result_was_kept_is_put_on_record_by_the_next(
    tmp_path: Path, monkeypatch
):
    alone = Settings(store=tmp_path / "store", mlflow_uri="")
    books = records.MlflowBooks(alone)
    job = steps.Job("ingest", parameters={"source": "embedded"})
    dead = records.Tracker(books, {}).start(job)
    books.end(dead, "KILLED")
    folder = tmp_path / "result"
    (folder / "outputs").mkdir(parents=True)
    (folder / "outputs" / "rows.csv").write_text("1309")
    said = {"outputs": {"rows.csv": "0"}, "metrics": {"rows": 1309}, "context": {"mlflow_run": dead}}
    (folder / "manifest.json").write_text(json.dumps(said | {"seconds": 1.0}))
    result = cache.Result(job, folder, said | {"seconds": 1.0}, hit=True)

    monkeypatch.setattr(pipeline, "_books", lambda settings: books)
    assert pipeline._record_recalled({}, alone, [result], {}) == ""  # it goes the way that can keep files
    assert books.unfinished([dead, "0" * 32]) == [dead] and books.unfinished([]) == []

    monkeypatch.setattr(pipeline, "recall", lambda *_: result)
    run = pipeline._Run(alone, records.Tracker(books, {}), lambda event: None, open_log(tmp_path / "log"))
    assert pipeline._recalled(run, job, cache.Key({})) is result
    assert books.unfinished([dead]) == []
    kept = books.client.get_run(dead)
    assert kept.info.status == "FINISHED" and kept.data.metrics == {"rows": 1309.0}
    assert kept.data.tags[records.MANIFEST_TAG] == digest(folder / "manifest.json")
    assert {f.path for f in books.client.list_artifacts(dead)} == {"manifest.json", "outputs"}
    assert pipeline._record_recalled({}, alone, [result], {})  # now there is nothing left to do


def test_a_clerk_ahead_of_time_writes_the_same_and_may_die(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))  # nobody to fork from
    alone = Settings(store=tmp_path / "store")
    assert not records.clerk_ahead(alone)  # there was no run before
    (alone.store / "latest").mkdir(parents=True)
    (alone.store / "latest" / "run.json").write_text("{}")
    assert records.clerk_ahead(alone)
    books = records.ClerkBooks(alone)
    first = books.create("tried", {"titanic.job": "ingest"})
    clerk = books._clerk
    assert isinstance(clerk, subprocess.Popen) and clerk.poll() is None
    books.log(first, {"seed": 7}, {"rows": 1309}, {"mood": "good"})
    (tmp_path / "kept.txt").write_text("here")
    books.keep(first, tmp_path / "kept.txt")
    assert first in books.open_runs() and books.champion() == ""
    clerk.kill()
    clerk.wait()
    books.end(first)  # written by this process
    long = records.MlflowBooks(alone)
    run = long.client.get_run(first)
    assert (run.info.status, run.data.params, run.data.metrics) == ("FINISHED", {"seed": "7"}, {"rows": 1309})
    assert [file.path for file in long.client.list_artifacts(first)] == ["kept.txt"]


def test_a_clerk_that_is_not_needed_leaves(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "run.json").write_text("{}")
    assert records.clerk_ahead(Settings(store=tmp_path))
    [(process, _)] = records._AHEAD
    records.dismiss_clerk()
    assert process.poll() == -9 and records._AHEAD == []


def test_prefect_shows_recalled_jobs_as_cached(own: Settings):
    url = services.running(own)["prefect"].url + "/api"
    job = steps.Job("ingest", parameters={"source": "embedded"})
    known = cache.Result(
        job, own.store, {"context": {"mlflow_run": "4711"}, "metrics": {}, "outputs": {}}, True
    )
    run = records.tell_prefect(url, "titanic tried", [known])
    asked = urllib.request.Request(
        f"{url}/task_runs/filter",
        data=json.dumps({"flow_runs": {"id": {"any_": [run]}}}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=20) as answer:
        [task] = json.load(answer)
    assert (task["name"], task["state"]["name"]) == ("ingest", "Cached") and "4711" in task["state"][
        "message"
    ]


def test_an_address_where_nobody_is(own: Settings):
    with pytest.raises(StoreError, match="does not answer"):
        records.RestBooks(own, "http://127.0.0.1:9")


def test_a_database_whose_making_was_cut_short_is_made_again(fresh: Checkout):
    makes = """
import pathlib
from titanic_mlops.ground.settings import settings
from titanic_mlops.model import registry

registry.template_of = lambda package: pathlib.Path("no/template.db")
client = registry.open_tracking(settings())
print(*sorted(e.name for e in client.search_experiments()))
"""
    killed = """
import os, signal
from alembic import command

command.upgrade = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""
    assert fresh.python(killed + makes).returncode == -signal.SIGKILL
    assert not (fresh.store / "mlflow.db").exists() and list(fresh.store.glob(".mlflow.*"))
    done = fresh.python(makes)
    assert done.stdout.split() == ["Default", "titanic"], done.stderr
    assert (fresh.store / "mlflow.db").exists() and not list(fresh.store.glob(".mlflow.*"))


def test_tables_of_a_template_are_those_that_would_be_made(fresh: Checkout):
    opens = """
from titanic_mlops.ground.settings import settings
from titanic_mlops.model.registry import open_tracking

open_tracking(settings()).create_run("1")
"""
    for store in ("one", "two"):  # the first may have to make it
        done = fresh.python(opens.replace("settings())", f"settings(store='{store}'))"))
        assert done.returncode == 0, done.stderr
    for query in ("SELECT sql FROM sqlite_master ORDER BY name", "SELECT version_num FROM alembic_version"):
        laid, made = (
            sqlite3.connect(fresh.folder / store / "mlflow.db").execute(query).fetchall()
            for store in ("one", "two")
        )
        assert laid == made
    with sqlite3.connect(fresh.folder / "two" / "mlflow.db") as books:
        places = {place for (place,) in books.execute("SELECT artifact_location FROM experiments")}
    assert len(places) == 2 and not any("/one/" in place or ".mlflow." in place for place in places)
