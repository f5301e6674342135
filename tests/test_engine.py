"""The engine under load and under fire: what runs again and why, what runs once, and what happens when something is killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from checkout import QUICK, ROOT, Checkout, checkout

from titanic_mlops.flow import cache, execution, pipeline, reporting, steps
from titanic_mlops.flow.kernels import parents
from titanic_mlops.ground.errors import ParameterError, StepError, explain
from titanic_mlops.ground.logs import open_log
from titanic_mlops.ground.settings import Settings
from titanic_mlops.ground.store import digest_folder

pytestmark = pytest.mark.long


# --- what runs again, and why


@pytest.fixture(scope="module")
def forked(finished, tmp_path_factory: pytest.TempPathFactory):
    "A copy of the checkout that may be edited, on a store in which everything was run; what a dry run says of each job, and a run."
    own: Checkout = finished[0]
    place = tmp_path_factory.mktemp("forked")
    for name in ("titanic_mlops", "nbs", "requirements"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "settings.ini", place)

    def said(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", "from titanic_mlops.face.cli import main; main()", "run", *arguments],
            env=own.environment(PYTHONPATH=str(place)),
            cwd=own.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def dry_run(*arguments: str) -> dict[str, str]:
        lines = said("--dry-run", *arguments).splitlines()
        return {line.split()[1]: line for line in lines if line.strip()}

    return place, dry_run, said


def fates(said: dict[str, str]) -> dict[str, str]:
    return {job: line.split()[0] for job, line in said.items()}


def edited(file: Path, old: str, new: str):
    "A file in which `old` is `new`, until the block ends."
    from contextlib import contextmanager

    @contextmanager
    def edit():
        before = file.read_text()
        assert old in before, old
        file.write_text(before.replace(old, new, 1))
        try:
            yield
        finally:
            file.write_text(before)

    return edit()


def test_nothing_runs_for_prose_a_comment_or_an_unrelated_module(forked):
    place, dry_run, _ = forked
    package, notebook = place / "titanic_mlops", place / "nbs" / "pipeline" / "04_train.ipynb"
    with (
        edited(package / "model" / "train.py", "import ", "# a comment\nimport "),
        edited(package / "model" / "train.py", '"""', '"""Another docstring. '),
        edited(package / "flow" / "services.py", "MIN_FREE = 200e6", "MIN_FREE = 201e6"),
        edited(notebook, "# Train", "# How to train"),
    ):
        assert set(fates(dry_run()).values()) == {"="}


def test_an_edited_helper_runs_what_uses_it_and_says_so(forked):
    place, dry_run, _ = forked
    with edited(place / "titanic_mlops" / "model" / "train.py", "def fit(", "X = 1\n\n\ndef fit("):
        said = dry_run()
    assert fates(said)["ingest"] == fates(said)["validate"] == "="
    for job in ("train.logistic", "train.boosting"):
        assert fates(said)[job] == "▸" and "module model.train changed" in said[job]
    assert fates(said)["score"] == "?"  # it hangs on whether the champion comes out the same


def test_an_edited_cell_a_parameter_and_a_step_that_is_asked_for(forked):
    place, dry_run, _ = forked
    with edited(place / "nbs" / "pipeline" / "07_score.ipynb", ".round(6)", ".round(5)"):
        said = dry_run()
    assert "the notebook's code changed" in said["score"] and fates(said)["promote"] == "="
    said = dry_run("seed=5")
    assert "seed 1912 → 5" in said["train.boosting"] and fates(said)["validate"] == "="
    said = dry_run("--from", "evaluate")
    assert (
        fates(said)["train.boosting"] == "="
        and "as asked" in said["evaluate"]
        and "as asked" in said["report"]
    )


def test_a_second_checker_that_disagrees_bars_the_promotion(forked, finished):
    place, _, run = forked
    told = 'step.write_json(\\"expectations.json\\", docs'
    with edited(
        place / "nbs" / "pipeline" / "03_document.ipynb",
        told,
        told + ' | {\\"failed\\": [\\"expect_no_ghosts\\"]}',
    ):
        run()
    decision = json.loads((finished[0].outputs("promote") / "decision.json").read_text())
    [gate] = [one for one in decision["conditions"] if one["name"] == "data gate"]
    assert not decision["promote"] and not gate["passed"] and "expect_no_ghosts broken" in gate["observed"]
    assert "9 of 9 steps recalled" in run()  # and it was not for ever


def kept(store: Path) -> tuple[steps.Job, cache.Key, Path]:
    "A result as a step leaves it, made by hand."
    job, key = steps.Job("score"), cache.Key({"code": "1"})
    folder = cache.folder_of(job, key, store)
    (folder / "outputs").mkdir(parents=True)
    (folder / "outputs" / "scored.csv").write_text("0.5")
    metrics = {"scored": 1, "predicted_survivors": 1, "mean_probability": 0.5, "roc_auc": float("nan")}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    manifest = {"key": key.parts, "outputs": digest_folder(folder / "outputs"), "metrics": metrics}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"context": {}, "seconds": 1.5}))
    return job, key, folder


@pytest.mark.parametrize("what", ["metrics.json", "gone", "seconds", "metrics", "context", "outputs"])
def test_a_result_that_does_not_say_all_that_it_should_is_made_again(tmp_path: Path, what: str):
    job, key, folder = kept(tmp_path)
    assert cache.recall(job, key, tmp_path) and cache.why_unknown(job, key, tmp_path) == ""
    file = folder / "metrics.json"
    if what == "metrics.json":
        file.write_bytes(file.read_bytes()[:9])
    elif what == "gone":
        file.unlink()
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest[what]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    assert cache.recall(job, key, tmp_path) is None
    why = cache.why_unknown(job, key, tmp_path)
    assert "the kept result is damaged" in why and ("metrics.json" in why) == (
        what in ("metrics.json", "gone")
    )


@pytest.mark.parametrize("edit", ["nothing", "prose", "code", "source"])
def test_what_was_edited_while_it_waited_is_not_kept(tmp_path: Path, monkeypatch, edit: str):
    notebook, source = tmp_path / "01_ingest.ipynb", tmp_path / "rows.csv"
    shutil.copy(steps.notebook_of("ingest"), notebook)
    source.write_text("a,b")
    for module in (cache, execution):
        monkeypatch.setattr(module, "notebook_of", lambda step: notebook)

    def run(given, output, *more):  # the notebook as it is by now
        if edit in ("prose", "code"):
            cells = json.loads(notebook.read_text())
            kind = {"prose": "markdown", "code": "code"}[edit]
            [*_, last] = [cell for cell in cells["cells"] if cell["cell_type"] == kind]
            last["source"] = ["1 + 1"]
            notebook.write_text(json.dumps(cells))
        if edit == "source":
            source.write_text("a,b,c")
        shutil.copy(notebook, output)

    monkeypatch.setattr(execution, "run_notebook", run)
    job = steps.Job("ingest", parameters={"source": str(source)})
    own = Settings(store=tmp_path / "store")
    key = cache.key_of(job, cache.extra_inputs(job, own))
    if edit in ("nothing", "prose"):
        execution.execute(job, key, {}, own)
        assert cache.recall(job, key, own.store)
        return
    with pytest.raises(StepError, match="was edited while step ingest waited") as caught:
        execution.execute(job, key, {}, own)
    assert "run again" in caught.value.do and "kept:" in str(caught.value)
    assert not cache.folder_of(job, key, own.store).exists()


def test_a_key_holds_templates_that_a_template_includes():
    found = cache.module_digests(["import titanic_mlops.model.report"])
    assert {f"titanic_mlops.model.report {kind}.html.j2" for kind in ("report", "style")} <= set(found)
    found = cache.module_digests(["import titanic_mlops.watch.report"])  # whose style is another folder's
    assert {f"titanic_mlops.watch.report {kind}.html.j2" for kind in ("report", "style")} <= set(found)


def test_a_key_holds_a_kernel_and_a_place_of_snapshots_that_are_not_the_usual_ones(tmp_path: Path):
    ingest, score = steps.Job("ingest", parameters={"source": "embedded"}), steps.Job("score")
    usual, *others = [
        [cache.extra_inputs(job, Settings(store=tmp_path / name, **more)) for job in (ingest, score)]
        for name, more in [
            ("one", {}),
            ("two", {}),
            ("one", {"kernel": "python3"}),
            ("one", {"artifacts": "s3://bucket/a"}),
            ("one", {"kernel": "julia"}),
        ]
    ]
    assert others[0] == others[1] == usual and set(usual[0]) == {"source"} and usual[1] == {}
    assert set(others[2][0]) == {"source", "artifacts"} and others[2][1] == {}
    assert set(others[3][0]) == {"source", "kernel"} and set(others[3][1]) == {"kernel"}


def test_the_report_reads_figures_where_they_have_a_digest(tmp_path: Path):
    _, _, folder = kept(tmp_path)
    (folder / "metrics.json").write_text("{")
    assert reporting._scored(folder).mean_probability == 0.5


def test_a_parameter_that_nothing_reads_is_reported(forked, finished):
    place, *_ = forked
    own: Checkout = finished[0]
    notebook = place / "nbs" / "pipeline" / "07_score.ipynb"
    with edited(notebook, "threshold: Annotated", "idle: int = 3\\nthreshold: Annotated"):
        done = subprocess.run(
            [sys.executable, "-c", "from titanic_mlops.face.cli import main; main()", "steps"],
            env=own.environment(PYTHONPATH=str(place)),
            cwd=own.folder,
            capture_output=True,
            text=True,
            check=True,
        )
    [line] = [line for line in done.stdout.splitlines() if line.split()[:1] == ["idle"]]
    assert "read nowhere" in line
    assert done.stdout.count("read nowhere") == 1


def test_a_parameters_cell_that_cannot_be_parsed(forked, finished):
    place, *_ = forked
    own: Checkout = finished[0]
    notebook = place / "nbs" / "pipeline" / "07_score.ipynb"
    with edited(notebook, "= 0.5  # at and above", "= = 0.5  # at and above"):
        done = subprocess.run(
            [sys.executable, "-c", "from titanic_mlops.face.cli import main; main()", "run"],
            env=own.environment(PYTHONPATH=str(place)),
            cwd=own.folder,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert "07_score.ipynb, cell 4, line 1" in done.stderr, done.stderr


UNREADABLE = {
    "(\n": 2,  # not closed
    "a: str = 'x": 2,
    "a: int = = 3": 2,
    "_seed: int = 3": 2,  # pydantic takes no names like it
    "a: Annotated[int, Field(ge='x')] = 3": 2,
    "a: Field = 3": 2,
    "a: Literal.nothing = 3": 2,
    "a: nothing = 3": 2,
    "model_config: int = 3": 2,  # pydantic would take it for itself
    "b: int = 2": 2,  # is there already
}


@pytest.mark.parametrize("source", UNREADABLE)
def test_whatever_is_wrong_with_a_parameters_cell_is_said_with_its_line(tmp_path: Path, source: str):
    cell = {
        "cell_type": "code",
        "metadata": {"tags": ["parameters"]},
        "source": f"b: int = 1  # fine\n{source}",
    }
    notebook = tmp_path / "04_train.ipynb"
    notebook.write_text(json.dumps({"cells": [cell]}))
    with pytest.raises(ParameterError) as caught:
        steps.parameters_model(notebook)
    assert caught.value.where == f"04_train.ipynb, cell 1, line {UNREADABLE[source]}"
    assert caught.value.do and "\n" not in caught.value.what


def test_a_bound_that_does_not_go_with_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = "a: Annotated[str, Field(gt=0)] = 'x'"
    notebook = tmp_path / "04_train.ipynb"
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source}
    notebook.write_text(json.dumps({"cells": [cell]}))
    monkeypatch.setattr(steps, "notebook_of", lambda step: notebook)
    with pytest.raises(ParameterError, match="constraint 'gt'"):
        steps.check_parameters("train", {})


def test_a_notebook_with_the_marks_of_a_merge(tmp_path: Path):
    notebook = tmp_path / "04_train.ipynb"
    for text, line in (('{"cells": [\n<<<<<<< HEAD\n]}', ", line 2"), ("[]", ""), ('{"cells": [{}]}', "")):
        notebook.write_text(text)
        with pytest.raises(StepError, match="can't be read") as caught:
            steps.parameters_model(notebook)
        assert caught.value.where == f"{notebook}{line}"


def test_from_a_step_that_there_is_not(fresh: Checkout):
    done = fresh.titanic("run", "--from", "trian")
    assert done.returncode == 2 and "did you mean 'train'?" in done.stderr


# --- what is killed


def wait_for(own: Checkout, what: str, job: str, seen: int = 0, seconds: float = 200) -> float:
    "Return when the log says so, from its line `seen` on."
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for event in own.events()[seen:]:
            if event.get("message", event.get("event")) == what and event.get("job") == job:
                return time.monotonic()
        time.sleep(0.05)
    raise AssertionError(f"{what} of {job} did not come within {seconds} s")


def stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def kernels_of(own: Checkout) -> list[int]:
    "Kernels that work in the folder of this store's runs; unlike the clerk, they have threads for their sockets."
    found, homes = [], {parent.pid for parent in parents()}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            facts = stat(int(folder.name))
            ours = int(facts[1]) in homes and os.readlink(folder / "cwd") == str(own.folder)
            if ours and int(facts[17]) > 4:
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def servers_of(own: Checkout) -> list[int]:
    "Temporary Prefect servers of this store."
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
            if (
                b"prefect\0server\0start" in line
                and str(own.store).encode() in (folder / "environ").read_bytes()
            ):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    "A store in which the steps before training were run, and nothing else."
    own = checkout(tmp_path_factory.mktemp("validated"))
    run = own.start("run", *QUICK)
    wait_for(own, "job started", "train.boosting")
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=60)
    return own


@pytest.mark.parametrize("whom", ["kernel", "parent"])
def test_a_dead_kernel_fails_its_step_at_once(validated: Checkout, whom: str):
    own, seen = validated, len(validated.events())
    run = own.start("run", "model=boosting", "cv.repeats=20", "seed=77")
    wait_for(own, "job cell", "train.boosting", seen)
    deadline = time.monotonic() + 20
    while (
        not any(e.get("text", "").startswith("oof") for e in own.events()[seen:])
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    time.sleep(1)
    [kernel] = kernels_of(own)
    os.kill(kernel if whom == "kernel" else int(stat(kernel)[1]), signal.SIGKILL)
    killed = time.monotonic()
    # five seconds are promised, but a machine may stand still; the cell would run for longer
    assert wait_for(own, "job failed", "train.boosting", seen) - killed < 30
    _, said = run.communicate(timeout=60)
    assert run.returncode == 2, said
    assert "the kernel died: killed (signal 9)" in said and "cell" in said and "titanic run again" in said
    kept = Path(next(line for line in said.splitlines() if "kept:" in line).split("kept:")[1].strip())
    marked = [
        out["evalue"]
        for cell in json.loads((kept / "notebook.ipynb").read_text())["cells"]
        for out in cell.get("outputs", [])
        if out["output_type"] == "error"
    ]
    assert len(marked) == 1 and "the kernel died" in marked[0]


def test_a_cell_may_not_run_for_ever(validated: Checkout):
    done = validated.titanic("run", "model=boosting", "cv.repeats=20", "seed=78", TITANIC_CELL_TIMEOUT="2")
    assert done.returncode == 2
    assert "ran for more than 2 s" in done.stderr and "TITANIC_CELL_TIMEOUT" in done.stderr


def test_outputs_that_do_not_arrive_are_not_a_cell_that_runs_too_long(monkeypatch: pytest.MonkeyPatch):
    from types import SimpleNamespace

    from nbclient.exceptions import CellTimeoutError
    from nbformat.v4 import new_code_cell, new_notebook

    notebook, clients = new_notebook(cells=[new_code_cell("fit()")]), []
    manager = SimpleNamespace(nb=notebook, cell_start=lambda *_: None)
    monkeypatch.setattr(execution, "_execute", lambda manager, client, *more: clients.append(client))
    engine = execution._engine(None, {}, execution.Stop())
    engine.execute_managed_notebook(manager, "python3", execution_timeout=3600)
    monkeypatch.undo()
    [client] = clients
    assert (client.timeout, client.iopub_timeout) == (3600, 60)
    for text, said in (("Timeout waiting for IOPub output", "its outputs did not"), ("timed out", "3600 s")):
        error = CellTimeoutError.error_from_timeout_and_cell(text, 60, notebook.cells[0])
        client.execute = lambda env, error=error: (_ for _ in ()).throw(error)
        with pytest.raises(StepError, match=said):
            execution._execute(manager, client, {}, None, execution.Stop())


@pytest.mark.parametrize("long", [False, True], ids=["usual", "a-temporary-folder-with-a-long-path"])
def test_a_steps_kernel_is_reached_through_sockets_of_its_own(tmp_path: Path, monkeypatch, long: bool):
    import logging

    import nbformat

    quieted = [(one, one.level) for one in map(logging.getLogger, ("papermill", "traitlets"))]
    asked = "from ipykernel.connect import get_connection_info\nget_connection_info(unpack=True)['transport']"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(asked)])
    nbformat.write(notebook, tmp_path / "in.ipynb")
    with tempfile.TemporaryDirectory() as usual:  # pytest's own is rather long
        temporary = Path(usual, "x" * 100 if long else "x")
        temporary.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        execution.run_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", {}, Settings(), {})
        left = list(temporary.glob("titanic-kernel-*"))
    [cell] = [cell for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells if cell.source == asked]
    assert cell.outputs[0].data["text/plain"] == repr("tcp" if long else "ipc")
    assert not left
    for log, level in quieted:  # for the tests after this one
        log.setLevel(level)


def test_a_prefect_server_that_goes_away_does_not_take_the_run_along(validated: Checkout):
    own, seen = validated, len(validated.events())
    run = own.start("run", *QUICK)
    wait_for(own, "job cell", "train.boosting", seen)
    servers = servers_of(own)
    assert servers
    for pid in servers:
        os.kill(pid, signal.SIGKILL)
    out, said = run.communicate(timeout=300)
    assert run.returncode == 0, out + said
    assert "the run goes on without it" in out
    assert "EventsWorker" not in out + said  # one line is enough
    again = own.titanic("run", *QUICK)
    assert "9 of 9 steps recalled" in again.stdout


def test_a_disk_that_fills_up_in_the_middle_of_a_run(tmp_path: Path):
    own = checkout(tmp_path)
    own.store.mkdir()
    small = ["mount", "-t", "tmpfs", "-o", "size=300m", "none", str(own.store)]
    if not shutil.which("mount") or subprocess.run(small, capture_output=True, check=False).returncode:
        pytest.skip("only root can make a small disk")
    try:
        run = own.start("run", *QUICK)
        wait_for(own, "job started", "train.boosting")
        filler = own.store / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(b"x" * 65536)
        _, said = run.communicate(timeout=200)
        assert run.returncode == 2 and "defect" not in said, said
        assert "space" in said or "full" in said, said
        filler.unlink()
        again = own.titanic("run", *QUICK)
        assert again.returncode == 0, again.stdout + again.stderr
        assert not list((own.store / "steps").glob("*/.*"))
    finally:
        own.titanic("down")
        subprocess.run(["umount", "-l", str(own.store)], check=True)


def test_a_database_on_a_full_disk_is_not_a_prefect_that_is_gone(tmp_path: Path, monkeypatch):
    import sqlalchemy
    from sqlalchemy.exc import OperationalError

    def full(run, jobs, done):
        with sqlalchemy.create_engine("sqlite://").connect() as database:
            database.exec_driver_sql("pragma max_page_count = 2")
            database.exec_driver_sql("create table runs as select zeroblob(100000) as row")

    told = []
    monkeypatch.setattr(pipeline, "_with_prefect", full)
    run = pipeline._Run(Settings(store=tmp_path), None, told.append, open_log(tmp_path / "log"))
    with pytest.raises(OperationalError) as caught:
        pipeline._all_jobs(run, [])
    assert told == [] and explain(caught.value).what == "the disk is full (database or disk is full)"


@pytest.mark.parametrize("how", ["KeyboardInterrupt", "TerminationSignal"])  # what Prefect makes of SIGTERM
def test_who_is_asked_to_end_does_not_wait_for_jobs_under_way(tmp_path: Path, how: str):
    from prefect.exceptions import TerminationSignal

    kind = {"KeyboardInterrupt": KeyboardInterrupt, "TerminationSignal": TerminationSignal}[how]

    def asked_to_end(*_):  # while the next job is submitted
        raise kind(signal.SIGTERM)

    run = pipeline._Run(Settings(store=tmp_path), None, lambda _: None, open_log(tmp_path / "log"))
    with pytest.raises(kind):
        pipeline._as_ready(run, [steps.Job("report")], {}, asked_to_end)
    assert run.stop.pressed  # which ends their kernels


def test_a_job_that_gets_its_seat_too_late_says_what_failed_before_it(tmp_path: Path):
    told: list[pipeline.Event] = []
    run = pipeline._Run(Settings(store=tmp_path), None, told.append, open_log(tmp_path / "log"))
    run.failure = StepError("the first one", where="train.logistic")
    with pytest.raises(StepError, match="the first one"):
        pipeline._do(run, steps.Job("report"), cache.Key({"code": "1"}), {})
    assert told == []  # it was not started


# --- what runs once


def test_two_runs_at_once_share_the_work(fresh: Checkout):
    first, second = fresh.start("run", *QUICK), fresh.start("run", *QUICK)
    for run in (first, second):
        out, said = run.communicate(timeout=400)
        assert run.returncode == 0, out + said
    told = Counter((e.get("message", e.get("event")), e.get("job")) for e in fresh.events())
    jobs = {job for _, job in told if job}
    assert len(jobs) == 9
    assert {job: told["job started", job] for job in jobs} == dict.fromkeys(jobs, 1)
    assert {job: told["job hit", job] for job in jobs} == dict.fromkeys(jobs, 1)


# --- fifty kills


def digests(own: Checkout) -> dict[str, dict[str, str]]:
    "What the latest run's jobs gave. The registry's version and address differ from store to store."
    facts = json.loads((own.store / "latest" / "run.json").read_text())["results"]
    found = {
        job: json.loads((Path(folder) / "manifest.json").read_text())["outputs"]
        for job, folder in facts.items()
    }
    return {
        job: {
            f: d
            for f, d in files.items()
            if "lineage" not in f and "manifest" not in f and "registered" not in f
        }
        for job, files in found.items()
        if job != "report"
    }


def test_what_killed_runs_have_left_goes_with_the_next_run_unless_somebody_is_at_it(finished):
    own: Checkout = finished[0]
    steps = own.store / "steps"
    left, old, busy = (steps / name for name in ("train.x/.a1.b_c", "promote/.a2.old.d", "train.x/.a3.e"))
    for folder in (left, old, busy):
        folder.joinpath("inside").mkdir(parents=True)
    try:
        with execution._lock(steps / "train.x" / "a3"):
            done = own.titanic("run")
            assert done.returncode == 0, done.stdout + done.stderr
            assert (left.exists(), old.exists(), busy.exists()) == (False, False, True)
    finally:
        shutil.rmtree(steps / "train.x")


def test_runs_that_are_killed_at_random_come_to_the_same(tmp_path: Path):
    "ENGINE_KILLS=50 for the long version; what is killed is drawn as well as when."
    import mlflow

    kills, draw = (
        int(os.environ.get("ENGINE_KILLS", "3")),
        random.Random(int(os.environ.get("ENGINE_SEED", "1912"))),
    )
    calm, begin = checkout(tmp_path / "calm"), time.monotonic()
    assert calm.titanic("run", *QUICK).returncode == 0
    whole = time.monotonic() - begin  # a moment after the end of a run would kill nothing
    wanted, done, own = digests(calm), 0, checkout(tmp_path / "0")
    while done < kills:
        run, start = own.start("run", *QUICK), time.monotonic()
        moment = draw.uniform(0, whole)
        while run.poll() is None and time.monotonic() < start + moment:
            time.sleep(0.02)
        victims = {"run": [run.pid], "kernel": kernels_of(own), "server": servers_of(own)}
        victims["parent"] = [parent.pid for parent in parents()]
        if struck := run.poll() is None:
            name = draw.choice([name for name, pids in victims.items() if pids])
            done += 1
            for pid in victims[name]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        out, said = run.communicate(timeout=400)
        assert run.returncode in (0, 2, -signal.SIGKILL) and "defect" not in said, out + said
        assert struck or run.returncode == 0, out + said  # what was killed before did not spoil the store
        if run.returncode == 0 or done == kills:  # it came through: compare, and begin again elsewhere
            last = own.titanic("run", *QUICK)
            assert last.returncode == 0, last.stdout + last.stderr
            assert digests(own) == wanted
            client = mlflow.MlflowClient(f"sqlite:///{own.store / 'mlflow.db'}")
            assert len(client.search_model_versions("name='titanic'")) == 1
            statuses = {r.info.status for r in client.search_runs(["1"], max_results=1000)}
            assert statuses <= {"FINISHED", "FAILED", "KILLED"}
            half_made = list((own.store / "steps").glob("*/.*"))
            shutil.rmtree(own.store)
            own = checkout(tmp_path / str(done) / str(time.monotonic_ns()))
            assert not half_made
