"""What is done about it: storms, budgets, two watchers, watchers that are killed between any two stages, champions that are taken back; and the drill."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkout import BIN, ROOT, Checkout
from test_ledger import weak_bundle

from titanic_mlops.ground.errors import AlertError
from titanic_mlops.ground.settings import Settings, settings
from titanic_mlops.ground.store import Artifacts
from titanic_mlops.watch.alerts import Alert
from titanic_mlops.watch.incident import REFUSED, Casebook, Incident, guard, respond

OLDER = Alert(name="drift", subject="age", summary="age: median 28 -> 40", since="2026-01-01T00:00:00+00:00")
POLICY = {
    "incident_policy": "promote",
    "incident_cooldown": 3600,
    "incident_budget": 2,
    "incident_rows": 100,
}


def own_of(store: Path, **more: Any) -> Settings:
    return settings(store=store, **(POLICY | more))


def bundle_of(folder: Path, C: float) -> Any:
    return weak_bundle(folder, C)


def registered(own: Settings, folder: Path, C: float, snapshot: str = "", artifact: str = "") -> Any:
    "A version in the registry."
    from titanic_mlops.model.registry import Registry

    registry = Registry(own)
    experiment = registry.client.get_experiment_by_name(own.mlflow_experiment).experiment_id
    run = registry.client.create_run(experiment).info.run_id
    tags = {"snapshot": snapshot, "snapshot_artifact": artifact} if snapshot else {}
    return registry, registry.register(bundle_of(folder, C), run, tags)


def people(count: int) -> list[dict[str, Any]]:
    "Passengers of the list, as requests."
    from titanic_mlops.data.sources import EMBEDDED, canonical, read

    rows = canonical(read(EMBEDDED).frame).head(count)
    names = ["name", "pclass", "sex", "age", "sibsp", "parch", "ticket", "fare", "embarked", "survived"]
    return rows[names].astype(object).where(rows[names].notna(), None).to_dict("records")


def answers(own: Settings, version: Any, count: int, start: float, says: Any = None, name: str = "r") -> None:
    "Answers of a version in the log, and what became of each."
    from titanic_mlops.serve.predictions import PredictionLog, prediction_folder

    served = SimpleNamespace(
        version=str(version.number), digest=version.digest, override="", contract_version="1.0.0"
    )
    log = PredictionLog(prediction_folder(own), tidies=False, say=lambda *_, **__: None)
    rows = people(count)
    for number, row in enumerate(rows):
        asked = {key: value for key, value in row.items() if key != "survived"}
        p = 0.5 if says is None else says(row)
        log.append(f"{name}-{number}", int((start + number / 1000) * 1e9), served, asked, p)
    log.flush()
    log.outcomes.record([(f"{name}-{i}", int(row["survived"])) for i, row in enumerate(rows)])
    log.close()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A store with a champion that stands on the embedded list, and 150 outcomes."
    from titanic_mlops.data.sources import EMBEDDED, canonical, read, snapshot

    folder = tmp_path_factory.mktemp("template")
    own = own_of(folder / "store")
    frozen = snapshot(canonical(read(EMBEDDED).frame), Artifacts(own.artifacts_url))
    registry, first = registered(own, folder / "first", 1.0, frozen.id, frozen.artifact)
    registry.promote(first, None, "first", "there was none", by="ismay")
    answers(own, first, 150, time.time())
    return own.store


@pytest.fixture
def own(template: Path) -> Iterator[Settings]:
    "The template's store, with its incidents, alerts and promotions taken back afterwards."
    import shutil

    yield own_of(template)
    for folder in ("watch", "alerts"):
        shutil.rmtree(template / folder, ignore_errors=True)


class Runs:
    "What `titanic run` would do: register a model that was trained on the rows, and let it be promoted or not."

    def __init__(self, folder: Path, promote: bool = True, C: float = 3.0, code: int = 0, said: str = ""):
        self.folder, self.promote, self.C, self.code, self.said = folder, promote, C, code, said
        self.asked: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, overrides: Any, own: Settings, lock: Any) -> tuple[int, str]:
        from titanic_mlops.data.sources import canonical, read, snapshot

        self.asked.append(list(overrides))
        assert self.gate.wait(30)
        if self.code:
            return self.code, self.said
        address = overrides[0].removeprefix("source='").removesuffix("'")
        frozen = snapshot(canonical(read(address).frame), Artifacts(own.artifacts_url))
        registry, made = registered(own, self.folder / f"m{self.C}", self.C, frozen.id, frozen.artifact)
        if self.promote:
            by = own.model_copy(update={"actor": "watcher"})
            registry = type(registry)(by, registry.client)
            registry.promote(made, registry.alias("champion"), "better", "better by 0.1", override=False)
        else:
            registry.client.set_model_version_tag(
                own.mlflow_model, str(made.number), "gate_reason", "it stays"
            )
        return 0, ""


class Clock:
    def __init__(self, now: float):
        self.now = now

    def __call__(self) -> float:
        return self.now


# --- the policy


def test_a_storm_is_one_retraining(own: Settings, tmp_path: Path):
    runs, clock = Runs(tmp_path, promote=False), Clock(time.time())
    ended = respond(own, [OLDER], "d", runs, clock)
    assert (ended.outcome, ended.added, ended.attempts) == ("kept", 150, 1), ended
    assert "it stays" in ended.says
    for _ in range(50):
        clock.now += 60
        assert respond(own, [OLDER, OLDER.model_copy(update={"subject": "fare"})], "d", runs, clock) is None
    clock.now += 3600
    assert respond(own, [OLDER], "d", runs, clock).outcome == "kept"
    clock.now += 24 * 3600
    assert respond(own, [OLDER], "d", runs, clock) is None  # the week's budget is spent
    assert len(runs.asked) == 2 and runs.asked[0] == runs.asked[1]  # the same rows, under the same name
    clock.now += 7 * 24 * 3600
    assert respond(own, [OLDER], "d", runs, clock).outcome == "kept"


def test_what_no_policy_acts_on(own: Settings, tmp_path: Path):
    runs = Runs(tmp_path)
    lost = Alert(name="predictions_lost", subject="log", summary="3 were lost", since="now")
    report = own.model_copy(update={"incident_policy": "report"})
    assert respond(report, [OLDER], "d", runs) is None
    assert respond(own, [], "d", runs) is None
    assert respond(own, [lost], "d", runs) is None
    assert not runs.asked and not Casebook(own).read().incidents


def test_too_few_outcomes_are_waited_for(own: Settings, tmp_path: Path):
    runs, more = Runs(tmp_path, promote=False), own.model_copy(update={"incident_rows": 500})
    for _ in range(3):
        waiting = respond(more, [OLDER], "d", runs)
        assert waiting.stage == "noticed" and "waits for outcomes" in waiting.timeline[-1][1]
    assert len(waiting.timeline) == 2 and not runs.asked
    assert respond(own, [OLDER], "d", runs).id == waiting.id  # enough by now
    assert len(runs.asked) == 1


def test_a_log_without_names_is_not_waited_for(own: Settings, tmp_path: Path):
    silent = {"incident_rows": 500, "predictions_redact": "name=drop"}
    ended = respond(own.model_copy(update=silent), [OLDER], "d", Runs(tmp_path))
    assert ended.outcome == "refused" and "name is not on record (predictions_redact)" in ended.says


def test_what_moves_back_by_itself_costs_nothing(own: Settings, tmp_path: Path):
    runs, more = Runs(tmp_path), own.model_copy(update={"incident_rows": 500})
    respond(more, [OLDER], "d", runs)
    assert respond(more, [], "d", runs).outcome == "passed"
    assert respond(more, [OLDER], "d", runs).stage == "noticed"  # no cooldown after nothing
    assert not runs.asked


def test_broken_records_are_not_learnt_from(own: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import titanic_mlops.watch.incident as module

    runs, known = Runs(tmp_path), module.known_outcomes
    monkeypatch.setattr(module, "known_outcomes", lambda folder: known(folder).assign(age=float("nan")))
    ended = respond(own, [OLDER], "d", runs)
    assert ended.outcome == "refused" and "data gate" in ended.says and "age" in ended.says
    assert not runs.asked


def test_refused_requests_are_no_reason_to_learn_from_the_rest(own: Settings, tmp_path: Path):
    runs, said = Runs(tmp_path), "190 of the last 200 requests break the contract"
    ended = respond(
        own, [OLDER, Alert(name=REFUSED, subject="requests", summary=said, since="now")], "d", runs
    )
    assert ended.outcome == "refused" and said in ended.says and not runs.asked


@pytest.mark.parametrize(
    "said, outcome",
    [("ContractError: the table breaks ages_known", "refused"), ("StoreError: the disk is full", "failed")],
)
def test_a_run_that_ends_badly_is_told(own: Settings, tmp_path: Path, said: str, outcome: str):
    runs = Runs(tmp_path, code=2, said=f"  ingest\n{said}\n  do: ...\n")
    ended = respond(own, [OLDER], "d", runs)
    assert (ended.outcome, said in ended.says, ended.told) == (outcome, True, True)
    log = (
        (own.store / "logs" / "alerts.jsonl").read_text()
        if (own.store / "logs" / "alerts.jsonl").exists()
        else ""
    )
    from titanic_mlops.watch.monitor import open_desk

    letters = [letter.notice.title for letter in open_desk(own).read().outbox]
    assert any(said in title for title in letters) or said in log


def test_a_challenger_is_not_promoted(own: Settings, tmp_path: Path):
    runs = Runs(tmp_path, promote=False, C=7.0)
    ended = respond(own.model_copy(update={"incident_policy": "retrain"}), [OLDER], "d", runs)
    assert ended.outcome == "challenger" and "titanic run source=" in ended.says
    assert "gate.better=keep" in runs.asked[0] and "gate.better" not in ended.says


def test_what_was_promoted_and_taken_back_before_is_not_promoted_now(own: Settings, tmp_path: Path):
    from titanic_mlops.model.registry import Registry

    runs, clock = Runs(tmp_path, promote=True, C=5.0), Clock(time.time())
    first = respond(own, [OLDER], "d", runs, clock)
    assert first.outcome == "promoted"
    Registry(own).rollback(None, "worse at sea", "lightoller")
    time.sleep(1.1)  # the ledger's clock counts seconds
    runs.promote, clock.now = False, time.time()
    again = respond(own.model_copy(update={"incident_cooldown": 0.0}), [OLDER], "d", runs, clock)
    assert (again.outcome, again.version) == ("kept", first.version)
    assert "withdrawn by lightoller (worse at sea)" in again.says


# --- two at once, and killed ones


def test_of_two_watchers_one_acts(own: Settings, tmp_path: Path):
    runs, other = Runs(tmp_path, promote=False), Runs(tmp_path)
    runs.gate.clear()
    first = threading.Thread(target=respond, args=(own, [OLDER], "d", runs))
    first.start()
    end = time.monotonic() + 60
    while not runs.asked and time.monotonic() < end:
        time.sleep(0.05)
    assert respond(own, [OLDER], "d", other) is None
    runs.gate.set()
    first.join(60)
    assert len(runs.asked) == 1 and not other.asked and len(Casebook(own).read().incidents) == 1


def test_a_run_that_outlives_its_watcher_keeps_others_from_starting(own: Settings):
    "The process that trains inherits the lock."
    with Casebook(own).mine() as lock:
        orphan = subprocess.Popen(["sleep", "60"], pass_fds=[lock.fileno()])
    with Casebook(own).mine() as lock:
        assert lock is None
    orphan.kill()
    orphan.wait()
    with Casebook(own).mine() as lock:
        assert lock is not None


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import mlflow  # once for all of them
import titanic_mlops.watch.incident as module
from test_incident import OLDER, Runs, own_of

place, keep, count = Path(sys.argv[1]), module.Casebook.keep, 0


def act(point):
    "Be killed before or after so many changes of the book."
    def kept(self, incident):
        global count
        if point == f"before {count}":
            os.kill(os.getpid(), signal.SIGKILL)
        keep(self, incident)
        if point == f"after {count}":
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    module.Casebook.keep = kept
    module.respond(own_of(place), [OLDER], "d", Runs(place / "killed", promote=False))


for point in sys.argv[3:]:
    child = os.fork()
    if not child:
        act(point)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.long
def test_a_watcher_that_is_killed_anywhere_goes_on(own: Settings):
    "Five moments, one after the other in the same store: one incident, one letter, one key."
    from titanic_mlops.watch.monitor import open_desk

    (own.store / "killed").mkdir(exist_ok=True)
    moments = ["after 0", "before 0", "after 1", "before 1", "after 0"]
    command = [sys.executable, "-c", KILLED, str(own.store), str(ROOT / "tests"), *moments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    codes = [int(code) for code in done.stdout.split()]
    assert len(codes) == len(moments) and codes.count(-signal.SIGKILL) >= 3, done.stdout + done.stderr
    respond(own, [OLDER], "d", Runs(own.store / "killed", promote=False))
    book = Casebook(own).read()
    assert [(one.stage, one.told) for one in book.incidents] == [("ended", True)], book
    letters = open_desk(own).read().outbox
    assert len({letter.key for letter in letters}) == len(letters) <= 1


def test_an_incident_that_kills_its_watcher_is_given_up(own: Settings, tmp_path: Path):
    casebook = Casebook(own)
    casebook.keep(
        Incident(id="x", opened=time.time(), cause=["drift:age"], champion="d", stage="training",
                 overrides=["source='nowhere'"], snapshot="s", attempts=3)
    )  # fmt: skip
    runs = Runs(tmp_path)
    assert respond(own, [OLDER], "d", runs).outcome == "failed" and not runs.asked


def test_a_damaged_book_is_named(own: Settings, tmp_path: Path):
    Casebook(own).file.write_text("{")
    with pytest.raises(Exception, match="book of incidents can't be read"):
        respond(own, [OLDER], "d", Runs(tmp_path))


# --- a champion on trial


def truth(row: dict[str, Any]) -> float:
    return 0.9 if row["survived"] else 0.1


class Pages(http.server.BaseHTTPRequestHandler):
    "A server's /readyz and /metrics."

    digest, requests, failed, slow = "", 0, 0, 0  # slow: above 0.25 s
    slower = 0  # above 0.5 s
    locked = False

    def do_GET(self) -> None:
        of = type(self)
        if of.locked and self.headers["authorization"] != "Bearer right" and self.path == "/metrics":
            return self.send_error(403)
        good, quick = of.requests - of.failed, of.requests - of.slow
        fair = of.requests - min(of.slow, of.slower)
        metrics = (
            "# TYPE titanic_requests counter\n"
            f'titanic_requests_total{{route="/v1/predict",method="POST",status="200"}} {good}\n'
            f'titanic_requests_total{{route="/v1/predict",method="POST",status="500"}} {of.failed}\n'
            "# TYPE titanic_request_seconds histogram\n"
            f'titanic_request_seconds_bucket{{route="/v1/predict",le="0.25"}} {quick}\n'
            f'titanic_request_seconds_bucket{{route="/v1/predict",le="0.5"}} {fair}\n'
            f'titanic_request_seconds_bucket{{route="/v1/predict",le="+Inf"}} {of.requests}\n'
            f'titanic_request_seconds_count{{route="/v1/predict"}} {of.requests}\n'
            f'titanic_request_seconds_sum{{route="/v1/predict"}} 1\n'
        )
        body = json.dumps({"champion": {"digest": of.digest}}) if self.path == "/readyz" else metrics
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def pages() -> Iterator[type[Pages]]:
    class Own(Pages):
        pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own)
    Own.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Own
    server.shutdown()
    server.server_close()


@pytest.fixture
def trial(own: Settings, tmp_path: Path) -> Any:
    "A new champion, forced in by somebody; taken back afterwards if nobody has."
    registry, made = registered(own, tmp_path / "new", 0.001)
    before = registry.alias("champion")
    entry = registry.promote(made, before, "", "for a test of the guard", by="saboteur", override=True)
    yield SimpleNamespace(registry=registry, made=made, before=before, entry=entry)
    if registry.alias("champion").number == made.number:
        registry.rollback(before.number, "the test is over", "test")


def test_a_champion_that_does_well_stays(own: Settings, trial: Any, pages: type[Pages]):
    own = own.model_copy(update={"guard_server": pages.url})
    pages.digest = trial.made.digest
    answers(own, trial.made, 150, time.time(), truth, "well")
    for pages.requests in (100, 200, 400):
        assert guard(own) == (None, [])
    assert trial.registry.alias("champion").number == trial.made.number


@pytest.mark.parametrize("what", ["wrong", "failing", "slow"])
def test_a_champion_that_does_harm_is_taken_back(own: Settings, trial: Any, pages: type[Pages], what: str):
    own = own.model_copy(update={"guard_server": pages.url})
    pages.digest, pages.requests = trial.made.digest, 50
    assert guard(own) == (None, [])
    if what == "wrong":
        answers(own, trial.made, 60, time.time(), lambda row: 1 - truth(row), "wrong")
    pages.requests = 250
    pages.failed, pages.slow = 40 * (what == "failing"), 40 * (what == "slow")
    taken, _ = guard(own)
    assert taken is not None and taken.outcome == "rolled back" and taken.told
    last = trial.registry.entries()[-1]
    assert (last.action, last.by, last.to_version) == ("rollback", "watcher", trial.before.number)
    assert {"wrong": "log loss", "failing": "failed", "slow": "longer"}[what] in last.reason
    assert guard(own) == (None, []) and trial.registry.entries()[-1] == last  # once


def test_a_model_that_a_person_brings_back_is_on_trial_anew(own: Settings, trial: Any, pages: type[Pages]):
    own = own.model_copy(update={"guard_server": pages.url})
    pages.digest, pages.requests = trial.made.digest, 50
    assert guard(own) == (None, [])
    pages.requests, pages.failed = 250, 40
    assert guard(own)[0].outcome == "rolled back"
    registry, why = trial.registry, "it was the disk, not the model"
    registry.promote(trial.made, trial.before, "", why, by="lightoller", override=True)
    pages.requests = 260
    assert guard(own) == (None, [])
    assert registry.alias("champion").number == trial.made.number


def test_another_bound_for_slow_is_no_harm(own: Settings, trial: Any, pages: type[Pages]):
    own = own.model_copy(update={"guard_server": pages.url, "guard_p99": 0.5})
    pages.digest, pages.requests, pages.slow = trial.made.digest, 10_000, 3000  # above 0.25 s
    assert guard(own) == (None, [])
    pages.requests = 10_100
    assert guard(own) == (None, [])
    lower = own.model_copy(update={"guard_p99": 0.25})
    for pages.requests in (10_200, 10_300):
        assert guard(lower) == (None, [])


def test_a_harm_of_long_ago_or_of_another_is_left_to_people(own: Settings, trial: Any):
    answers(own, trial.made, 60, time.time(), lambda row: 1 - truth(row), "late")
    assert guard(own, lambda: time.time() + 48 * 3600) == (None, [])  # no trial any more
    off = own.model_copy(update={"guard_hours": 0.0})
    assert guard(off) == (None, [])


def test_a_rollback_whose_watcher_was_killed_is_told(own: Settings, trial: Any):
    trial.registry.rollback(trial.before.number, "a reason", "watcher")
    taken, _ = guard(own)
    assert taken is not None and taken.told and "a reason" in taken.says
    assert guard(own) == (None, [])


def test_a_person_was_faster(own: Settings, trial: Any, monkeypatch: pytest.MonkeyPatch):
    import titanic_mlops.watch.incident as module

    def slow(*_: Any) -> str:
        trial.registry.rollback(trial.before.number, "I saw it first", "lightoller")
        return "it is wrong"

    monkeypatch.setattr(module, "wrongness", slow)
    assert guard(own) == (None, [])
    assert trial.registry.entries()[-1].by == "lightoller"
    assert trial.registry.alias("champion").number == trial.before.number


def test_a_model_that_was_promoted_meanwhile_stays(
    own: Settings, trial: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import titanic_mlops.watch.incident as module

    _, newest = registered(own, tmp_path / "newest", 3.0)

    def slow(*_: Any) -> str:
        trial.registry.promote(newest, trial.made, "better", "the gate said so", by="ismay")
        return "it is wrong"

    monkeypatch.setattr(module, "wrongness", slow)
    try:
        assert guard(own) == (None, [])
        assert trial.registry.entries()[-1].to_version == newest.number
    finally:
        trial.registry.rollback(trial.before.number, "the test is over", "test")


def test_a_server_that_is_away_is_no_trouble(own: Settings, trial: Any):
    assert guard(own.model_copy(update={"guard_server": "http://127.0.0.1:9"})) == (None, [])


def test_a_guard_that_sees_nothing_says_so(own: Settings, trial: Any, pages: type[Pages]):
    locked = own.model_copy(update={"guard_server": pages.url, "guard_key": "wrong"})
    pages.locked, pages.digest = True, trial.made.digest
    with pytest.raises(AlertError, match=r"answers the guard with 403[\s\S]*scope admin"):
        guard(locked)
    assert guard(locked.model_copy(update={"guard_key": "right"})) == (None, [])
    for address in (pages.url.removeprefix("http://"), "http://[::1", "ftp://x"):
        with pytest.raises(AlertError, match="no address to ask"):
            guard(own.model_copy(update={"guard_server": address}))
    answers(own, trial.made, 60, time.time(), lambda row: 1 - truth(row), "unseen")
    with pytest.raises(AlertError, match="answers the guard"):  # outcomes count nevertheless
        guard(locked)
    assert trial.registry.alias("champion").number == trial.before.number


def test_who_could_not_act_does_not_say_that_all_is_well(own: Settings, monkeypatch: pytest.MonkeyPatch):
    from typer.testing import CliRunner

    from titanic_mlops.face.cli import app

    monkeypatch.setenv("TITANIC_STORE", str(own.store))
    watch = lambda: CliRunner().invoke(app, ["watch", "--act", "--hours", "1"])
    calm = watch()
    assert calm.exit_code < 2, calm.output
    Casebook(own).file.write_text("{")
    done = watch()
    assert done.exit_code == 2 and "book of incidents can't be read" in done.output, done.output
    monkeypatch.setenv("TITANIC_GUARD_SERVER", "127.0.0.1:9")
    done = watch()
    assert done.exit_code == 2 and "could not look after the champion" in done.output, done.output


# --- the drill


@pytest.mark.long
def test_the_short_drill(tmp_path: Path):
    "From an empty store to a rollback: every stage is reached, and no request fails."
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TITANIC_STORE")}
    done = subprocess.run(
        [str(BIN / "titanic"), "drill", "--short", "--store", str(tmp_path / "store"), "--json"],
        cwd=tmp_path, env=environment | {"NO_COLOR": "1"}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    story = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = [event["stage"] for event in story["events"] if event["stage"] != "watcher"]
    end = {"promoted": ["gate", "recovered"], "kept": ["kept"]}[story["outcome"]]
    wanted = ["trained", "calm", "moved", "detected", "alerted", *end, "sabotage", "rollback", "restored"]
    assert stages == wanted, done.stdout
    counts = story["counts"]
    assert counts["failed"] == 0 and 0 < counts["harmed"] < counts["answered"] / 4, counts
    assert counts["outcomes"] > 0.9 * counts["answered"]
    page = (tmp_path / "drill.html").read_text()
    assert "<svg" in page and "<script" not in page and "rollback" in page


def test_a_player_takes_along_what_it_has_started(tmp_path: Path):
    from titanic_mlops.face.drill_commands import Player

    with (tmp_path / "log").open("wb") as out:
        parent = subprocess.Popen(
            ["sh", "-c", "sleep 60 & echo $!; wait"], stdout=out, start_new_session=True
        )
    player, end = Player("watcher", parent, tmp_path / "log"), time.monotonic() + 20
    while not player.said.strip() and time.monotonic() < end:
        time.sleep(0.05)
    child = Path(f"/proc/{int(player.said)}/stat")
    player.end()
    gone = lambda: not child.exists() or child.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    while not gone() and time.monotonic() < end:
        time.sleep(0.05)
    assert gone()
    player.end()  # again does no harm


def test_a_drill_keeps_out_of_the_store_that_serves(fresh: Checkout):
    done = fresh.titanic("drill", "--store", str(fresh.store))
    assert done.returncode == 2 and "the store that serves" in done.stderr
    assert fresh.titanic("drill", "--shift", "odler").returncode == 2
