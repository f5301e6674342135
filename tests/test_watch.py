"""The watcher against a real prediction log: killed at random, two at once, ids twice, models that are not here."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from titanic_mlops.ground.errors import AlertError
from titanic_mlops.serve.predictions import OutcomeLog, PredictionLog
from titanic_mlops.watch.drift import Reference
from titanic_mlops.watch.monitor import Memory, References, alerts_of, look

START = 1_772_323_200  # an hour begins
MODEL = SimpleNamespace(version="1", digest="a" * 64, override="", contract_version="1.0.0")
OTHER = SimpleNamespace(version="2", digest="b" * 64, override="", contract_version="1.0.0")


def passengers(count: int, seed: int = 0) -> list[dict]:
    draws = np.random.default_rng(seed)
    return [
        {
            "name": f"Doe, {draws.choice(['Mr', 'Mrs', 'Miss'])}. X",
            "pclass": int(draws.integers(1, 4)),
            "sex": str(draws.choice(["female", "male"])),
            "age": float(draws.integers(1, 70)) if draws.random() > 0.2 else None,
            "sibsp": int(draws.integers(0, 3)),
            "parch": int(draws.integers(0, 3)),
            "fare": round(float(draws.exponential(30)), 2),
            "embarked": str(draws.choice(["C", "Q", "S"])),
        }
        for _ in range(count)
    ]


def known() -> References:
    rows = passengers(800)
    chance = np.random.default_rng(1).random(len(rows))
    table = pa.table(
        {k: pa.array([row[k] for row in rows]) for k in rows[0]} | {"probability": pa.array(chance)}
    )
    return References(Path("nowhere"), {MODEL.digest: Reference.of(table)})


def write(folder: Path, rows: list[dict], model=MODEL, start: float = START, name: str = "r", **more) -> None:
    log = PredictionLog(folder, say=lambda *_, **__: None)
    draws = np.random.default_rng(2)
    for number, row in enumerate(rows):
        log.append(f"{name}-{number}", int((start + number) * 1e9), model, row, float(draws.random()), **more)
    log.close()


def test_every_answer_counts_once(tmp_path: Path):
    references, memory = known(), Memory(tmp_path / "watch")
    log = tmp_path / "predictions"
    empty = look(log, memory, references, now=START)
    assert (empty.bundle, empty.drift.enough, alerts_of(empty)) == ("", False, [])
    write(log, passengers(300, 5))
    write(log, passengers(10, 6), name="shadow", kind="shadow")
    write(log, passengers(20, 7), model=OTHER, name="other")
    write(log, passengers(5, 5))  # the same ids again
    seen = look(log, memory, references, MODEL.digest, now=START + 600)
    told = {k: v for k, v in seen.rows.items() if v}
    assert told == {"counted": 300, "repeated": 5, "unknown_model": 20, "not_champion": 10}
    again = look(log, memory, references, MODEL.digest, now=START + 600)
    assert again.drift == seen.drift and again.rows["counted"] == 0


def test_nobody_but_a_shadow_has_answered(tmp_path: Path):
    references, memory = known(), Memory(tmp_path / "watch")
    write(tmp_path / "predictions", passengers(20), name="shadow", kind="shadow")
    seen = look(tmp_path / "predictions", memory, references, MODEL.digest, now=START + 600)
    assert (seen.rows["not_champion"], seen.rows["counted"], seen.drift.rows) == (20, 0, 0)


def test_programs_read_flags_and_numbers_not_words(tmp_path: Path):
    pence = [row | {"fare": row["fare"] * 240} for row in passengers(300, 5)]
    write(tmp_path / "predictions", pence)
    memory = Memory(tmp_path / "watch")
    seen = look(tmp_path / "predictions", memory, known(), MODEL.digest, now=START + 600)
    read = json.loads(json.dumps(seen.facts))
    kinds = {(type(f["moved"]), type(f["large"]), type(f["size"]), type(f["p"])) for f in read["findings"]}
    assert kinds == {(bool, bool, float, float)}
    assert "fare" in {f["column"] for f in read["findings"] if f["moved"]}


def test_outcomes_judge_the_model_and_no_disorder_stops_it(tmp_path: Path):
    references, memory = known(), Memory(tmp_path / "watch")
    promised = {"log_loss": {"value": 0.45, "low": 0.4, "high": 0.5}}
    references = References(
        Path("nowhere"), {MODEL.digest: replace(references.of(MODEL.digest), figures=promised)}
    )
    folder = tmp_path / "predictions"
    write(folder, passengers(300, 5))
    write(folder, passengers(40, 6), model=OTHER, name="other")
    write(folder, passengers(200, 7), name="old", start=START - 30 * 86_400)
    look_now = lambda: look(folder, memory, references, MODEL.digest, now=START + 600)
    before = look_now()
    assert (before.judged, before.performance.worse) == (dict.fromkeys(before.judged, 0), False)
    assert before.looked_for == ("predictions_lost", "drift") and before.expected["log_loss"].value > 0
    outcomes = OutcomeLog(folder)
    outcomes.record([(f"r-{i}", i % 2) for i in range(50)] + [("nobody", 1), ("other-1", 1)], START * 10**9)
    outcomes.keep(end=True)
    few = look_now()
    told = {name: count for name, count in few.judged.items() if count}
    assert told == {"judged": 50, "unknown": 1, "other_model": 1}
    assert not few.performance.enough and "performance" not in few.looked_for
    outcomes = OutcomeLog(folder)
    outcomes.record([(f"r-{i}", i % 2) for i in range(300)], (START + 1) * 10**9)
    outcomes.record([("r-0", 1), ("old-1", 1)], (START + 2) * 10**9)
    outcomes.keep(end=True)
    seen = look_now()
    told = {name: count for name, count in seen.judged.items() if count}
    assert told == {"judged": 300, "unknown": 2, "repeated": 50, "contradicted": 1, "other_model": 1}
    assert (
        seen.performance.worse and "performance" in seen.looked_for
    )  # the outcomes know nothing of the answers
    [alert] = [one for one in alerts_of(seen) if one.name == "performance"]
    assert alert.severity == "critical" and "300 outcomes" in alert.summary
    assert json.loads(json.dumps(seen.facts))["performance"]["worse"] is True


def test_a_small_window_and_a_clock_that_is_ahead(tmp_path: Path):
    references, memory = known(), Memory(tmp_path / "watch")
    write(tmp_path / "predictions", passengers(50))
    write(tmp_path / "predictions", passengers(30), start=START + 86_400, name="ahead")
    seen = look(tmp_path / "predictions", memory, references, MODEL.digest, now=START + 600)
    assert seen.rows["ahead"] == 30 and seen.drift.rows == 50 and not seen.drift.enough
    assert alerts_of(seen) == []


def test_many_looks_are_joined_and_a_damaged_file_is_named(tmp_path: Path):
    references, memory = known(), Memory(tmp_path / "watch")
    for number in range(60):
        write(tmp_path / "predictions", passengers(4, number), name=f"n{number}")
        seen = look(tmp_path / "predictions", memory, references, MODEL.digest, now=START + 600)
    assert seen.drift.rows == 240 and len(list(memory.folder.glob("*.npz"))) < 50
    last = sorted(memory.folder.glob("look-*.npz"))[-1]
    whole = last.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(b ^ 0xFF for b in whole[middle : middle + 8]) + whole[middle + 8 :]
    for damaged in (b"no archive", b"", whole[:middle], flipped):
        last.write_bytes(damaged)
        with pytest.raises(AlertError, match="can't be read") as error:
            look(tmp_path / "predictions", memory, references, now=START + 600)
        assert error.value.where == str(last)


def test_old_hours_become_days_and_old_days_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("titanic_mlops.watch.monitor._MANY", 3)  # files until they are joined
    references, memory, folder = known(), Memory(tmp_path / "watch"), tmp_path / "predictions"
    for day in range(0, 20, 2):
        write(folder, passengers(4, day), start=START + day * 86_400 + 7 * 3600, name=f"d{day}")
        write(folder, passengers(4, day), start=START + day * 86_400 + 9 * 3600, name=f"e{day}")
        now = START + day * 86_400 + 10 * 3600
        seen = look(folder, memory, references, MODEL.digest, hours=24 * 40, now=now)
    assert seen.drift.rows == 10 * 8
    kept = memory.read().hours
    assert len(kept) < 20 and sum(sketch.rows for sketch in kept.values()) == 10 * 8
    late = now + 400 * 86_400
    for number in range(5):
        write(folder, passengers(4, number), start=late, name=f"late{number}")
        look(folder, memory, references, MODEL.digest, now=late + 60)
    assert min(hour for _, hour in memory.read().hours) > now / 3600


@pytest.mark.parametrize(
    "rule, unseen", [("name=drop", {"title"}), ("name=title, sex=drop", {"sex"}), ("name=hash", {"title"})]
)
def test_what_is_not_on_record_has_not_moved(tmp_path: Path, rule: str, unseen: set[str]):
    folder, memory = tmp_path / "predictions", Memory(tmp_path / "watch")
    log = PredictionLog(folder, say=lambda *_, **__: None, redact=rule, salt="x" * 16)
    draws = np.random.default_rng(2)
    for number, row in enumerate(passengers(500, 5)):
        log.append(f"r-{number}", int((START + number) * 1e9), MODEL, row, float(draws.random()))
    log.close()
    for _ in range(2):  # from the log, and from what was kept
        seen = look(folder, memory, known(), MODEL.digest, now=START + 600)
        assert alerts_of(seen) == [] and set(seen.drift.unseen) == unseen == set(seen.facts["unseen"])
        assert not unseen & {found.column for found in seen.drift.findings}
    fares = [row | {"fare": row["fare"] * 240} for row in passengers(500, 5)]
    write(folder, fares, name="pence", start=START + 3600)
    later = look(folder, memory, known(), MODEL.digest, hours=1, now=START + 5000)
    assert {"drift:fare"} <= {alert.key for alert in alerts_of(later)}


def gaps(folder: Path, part: bytes = b"TLR1") -> None:
    "Damage a frame in the middle of the live segment."
    [file] = (folder / "answers" / "_live").glob("*.open")
    content = bytearray(file.read_bytes())
    content[content.find(part, len(content) // 2) + 40] ^= 0xFF
    with file.open("r+b") as handle:
        handle.write(content)


def test_a_gap_is_lost_once(tmp_path: Path):
    references, memory = known(), Memory(tmp_path / "watch")
    log = PredictionLog(tmp_path / "predictions", say=lambda *_, **__: None, tidies=False)
    for number, row in enumerate(passengers(960)):
        log.append(f"r-{number}", int((START + number) * 1e9), MODEL, row, 0.5)
    log.flush()
    gaps(tmp_path / "predictions")
    lost = [
        look(tmp_path / "predictions", memory, references, MODEL.digest, now=START + 600).rows["lost"]
        for _ in range(3)
    ]
    log.close()
    assert lost[0] > 0 and lost[1:] == [0, 0]


def test_a_loss_is_told_once_and_never_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from titanic_mlops.ground.settings import Settings
    from titanic_mlops.watch import monitor

    own = Settings(store=tmp_path)
    log = PredictionLog(tmp_path / "predictions", say=lambda *_, **__: None, tidies=False)
    for number, row in enumerate(passengers(960)):
        log.append(f"r-{number}", int((time.time() - number) * 1e9), MODEL, row, 0.5)
    log.flush()
    gaps(tmp_path / "predictions")
    with monkeypatch.context() as patch:  # killed after reading
        patch.setattr(monitor, "open_desk", lambda own: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            monitor.watch_once(own)
    for _ in range(3):
        monitor.watch_once(own)
    log.close()
    said = [json.loads(line) for line in (tmp_path / "logs" / "alerts.jsonl").read_text().splitlines()]
    told = [(one["state"], one["alert"]) for one in said if "lost" in one["alert"]]
    assert told == [("firing", "predictions_lost:log")], said


def test_a_file_that_can_not_be_read_is_told_and_read_when_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import pyarrow.parquet as pq

    from titanic_mlops.serve.record import tidy

    references, memory, folder = known(), Memory(tmp_path / "watch"), tmp_path / "predictions"
    write(folder, passengers(300, 5))
    tidy(folder)

    def denied(*_, **__) -> None:
        raise PermissionError(13, "Permission denied")

    see = lambda: look(folder, memory, references, MODEL.digest, now=START + 600)
    with monkeypatch.context() as patch:
        patch.setattr(pq, "ParquetFile", denied)
        seen = see()
    assert (seen.rows["counted"], seen.rows["unreadable"]) == (0, 1)
    assert "1 files can't be read" in {a.name: a.summary for a in alerts_of(seen)}["predictions_lost"]
    assert see().rows["counted"] == 300
    write(folder, passengers(300, 6), name="more")
    tidy(folder)
    file = max(folder.glob("answers/date=*/*.parquet"), key=lambda path: path.stat().st_mtime_ns)
    content = bytearray(file.read_bytes())
    content[1000:1400] = bytes(400)
    file.write_bytes(content)
    assert "predictions_lost" in {a.name for a in alerts_of(see())}, "what is damaged is said"
    assert see().rows["unreadable"] == 0, "and left behind"


WATCHER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_watch import MODEL, START, known
from titanic_mlops.watch.monitor import Memory, look

folder, references = Path(sys.argv[1]), known()
print("ready", flush=True)
while True:
    seen = look(folder / "predictions", Memory(folder / "watch"), references, MODEL.digest, now=START + 3000)
    print(seen.drift.rows, flush=True)
"""


@pytest.mark.long
def test_watchers_that_are_killed_count_every_answer_once(tmp_path: Path):
    rng, rows = random.Random(4), 0
    for turn in range(6):
        command = [sys.executable, "-c", WATCHER, str(tmp_path), str(Path(__file__).parent)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        write(tmp_path / "predictions", passengers(200, turn), name=f"turn{turn}")
        rows += 200
        time.sleep(rng.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    seen = look(tmp_path / "predictions", Memory(tmp_path / "watch"), known(), MODEL.digest, now=START + 3000)
    assert seen.drift.rows == rows


def test_of_two_watchers_one_is_told(tmp_path: Path):
    memory = Memory(tmp_path / "watch")
    with memory.mine(), pytest.raises(AlertError, match="another watcher"):
        look(tmp_path / "predictions", Memory(tmp_path / "watch"), known(), now=START)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A store whose passengers pay in pence."
    from explained import make_bundle
    from watching import answered
    from watching import passengers as some

    store = tmp_path_factory.mktemp("moved")
    make_bundle(store / "made" / "bundle")
    answered(store, store / "made" / "bundle", some(300, fare=240.0), wrong=False)
    return store


def watched(monkeypatch: pytest.MonkeyPatch, store: Path, *arguments: str):
    "`titanic watch` in this process."
    from typer.testing import CliRunner

    from titanic_mlops.face.cli import app

    monkeypatch.setenv("TITANIC_STORE", str(store))
    return CliRunner().invoke(app, ["watch", *arguments])


@pytest.mark.long
def test_a_look_is_drawn_and_recorded(moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import mlflow

    page = tmp_path / "drift.html"
    done = watched(monkeypatch, moved, "--report", str(page), "--record")
    assert done.exit_code == 1, done.output
    text = page.read_text()
    assert "Moved: fare" in text and "<script" not in text and text.count("<svg") >= 2
    assert "://" not in text.replace("http://www.w3.org", "")
    client = mlflow.MlflowClient(f"sqlite:///{moved / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("titanic").experiment_id
    [run] = client.search_runs([experiment])
    assert run.info.status == "FINISHED" and run.data.tags["titanic.job"] == "watch"
    assert "drift:fare" in run.data.tags["titanic.alerts"] and run.data.params["hours"] == "24"
    assert run.data.metrics["rows"] == 300 and run.data.metrics["size.fare.ks"] > 1
    assert run.data.metrics["outcomes"] == 300 and "performance.log_loss" in run.data.metrics
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert kept == {"latest.json", "latest.html"}


@pytest.mark.long
def test_a_tracking_server_that_is_away_is_said(moved: Path, monkeypatch: pytest.MonkeyPatch):
    from titanic_mlops.face import watch_commands

    class Away:
        def __init__(self, own) -> None:
            raise ConnectionError("nobody is there")

    class Enough(Exception):
        pass

    def stop(seconds: float) -> None:
        raise Enough

    monkeypatch.setattr("titanic_mlops.flow.records.MlflowBooks", Away)
    once = watched(monkeypatch, moved, "--record")
    assert isinstance(once.exception, ConnectionError), "a scheduler must know"
    monkeypatch.setattr(watch_commands.time, "sleep", stop)
    again = watched(monkeypatch, moved, "--record", "--every", "60")
    assert isinstance(again.exception, Enough), "it went on to wait for the next look"
    assert "not kept" in again.output and "nobody is there" in again.output


def test_a_look_that_fails_is_not_the_last(moved: Path, monkeypatch: pytest.MonkeyPatch):
    from titanic_mlops.face import watch_commands
    from titanic_mlops.ground.errors import BundleError
    from titanic_mlops.watch import alerts, monitor

    class Enough(Exception):
        pass

    failures: list[Exception] = [
        OSError(28, "No space left", "x"),
        BundleError("not a bundle"),
        ValueError("odd"),
    ]
    sent: list[object] = []

    def failing(*_) -> None:
        raise failures.pop(0)

    def wait(seconds: float) -> None:
        if not failures:
            raise Enough

    monkeypatch.setattr(watch_commands.time, "sleep", wait)
    monkeypatch.setattr(monitor, "watch_once", failing)
    monkeypatch.setattr(alerts, "deliver", lambda desk: sent.append(desk))
    again = watched(monkeypatch, moved, "--every", "60")
    assert isinstance(again.exception, Enough)
    assert all(said in again.output for said in ("the disk is full", "not a bundle", "ValueError: odd"))
    assert len(sent) == 3, "what waits is sent nevertheless"
    failures[:] = [BundleError("not a bundle")]
    assert isinstance(watched(monkeypatch, moved).exception, BundleError), "a scheduler must know"


@pytest.mark.long
def test_the_step_notebook_draws_what_moved(moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import json

    import papermill

    monkeypatch.setenv("TITANIC_STORE", str(moved))
    notebook = Path(__file__).parent.parent / "nbs" / "pipeline" / "09_watch.ipynb"
    out = tmp_path / "out.ipynb"
    papermill.execute_notebook(notebook, out, {"hours": 48}, kernel_name="python3", progress_bar=False)
    cells = json.loads(out.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert "300 answers in 48 h" in str(outputs) and "critical: fare" in str(outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
