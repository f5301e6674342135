"""Models that come and go in real servers: swaps under load, bad bundles, registries that misbehave, workers that are killed."""

import contextlib
import errno
import http.client
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from checkout import BIN, NOT_FOR_SERVERS, ROOT

from titanic_mlops.data.features import CATEGORICAL, NUMERIC
from titanic_mlops.ground.errors import RegistryError, SettingsError
from titanic_mlops.ground.settings import settings
from titanic_mlops.ground.store import canonical_json, digest
from titanic_mlops.model.bundle import BundleInfo, Lineage, new_key, sign, write_bundle
from titanic_mlops.model.ledger import Ledger
from titanic_mlops.serve.models import Models, Watch, admit, open_models
from titanic_mlops.serve.origins import FolderOrigin, RegistryOrigin, StoreOrigin
from titanic_mlops.serve.server import bind

PASSENGER = {
    "pclass": 3, "name": "Dean, Miss. Millvina", "sex": "female", "age": 0.17, "sibsp": 1, "parch": 2,
    "ticket": "C.A. 2315", "fare": 20.575, "embarked": "S",
}  # fmt: skip


LINGER = 0.5  # seconds in which a server that leaves says goodbye


# --- bundles whose answer says which one it is


def constant_graph(probability: float) -> bytes:
    "A graph that answers the same for everybody; it has all inputs, and looks at one."
    from onnx import TensorProto, checker, helper

    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 1]) for name in NUMERIC]
    inputs += [helper.make_tensor_value_info(name, TensorProto.STRING, [None, 1]) for name in CATEGORICAL]
    outputs = [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [None, 2])]
    weights = [
        helper.make_tensor("nothing", TensorProto.FLOAT, [1, 2], [0.0, 0.0]),
        helper.make_tensor("answer", TensorProto.FLOAT, [2], [1 - probability, probability]),
    ]
    nodes = [
        helper.make_node("MatMul", ["family_size", "nothing"], ["zeros"]),
        helper.make_node("Add", ["zeros", "answer"], ["probabilities"]),
    ]
    graph = helper.make_graph(nodes, "constant", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    checker.check_model(model)
    return model.SerializeToString()


def constant(folder: Path, probability: float) -> Path:
    "A bundle that answers the same for everybody."
    info = BundleInfo(
        candidate=f"constant-{probability}",
        hyperparameters={},
        calibration="none",
        inputs=[*NUMERIC, *CATEGORICAL],
        split={},
        figures={},
        reference={},
    )
    write_bundle(
        folder, constant_graph(probability), info, Lineage(git_commit="", snapshot="", data_sha256="", seed=0)
    )
    return folder


def digest_of(folder: Path) -> str:
    return json.loads((folder / "manifest.json").read_bytes())["digest"]


def put(bundle: Path, drop: Path) -> None:
    "Put a bundle in place of what is in a folder: its files first, the manifest last."
    drop.mkdir(exist_ok=True)
    for file in sorted(bundle.iterdir(), key=lambda file: file.name == "manifest.json"):
        (drop / f".{file.name}").write_bytes(file.read_bytes())
        os.replace(drop / f".{file.name}", drop / file.name)


def sealed(bundle: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    "Change a file of a bundle, and have the manifest agree."
    (bundle / name).write_bytes(change((bundle / name).read_bytes()))
    files = {file.name: digest(file) for file in bundle.iterdir() if file.name != "manifest.json"}
    both = digest(canonical_json({one: files[one] for one in ("bundle.json", "model.onnx")}))
    (bundle / "manifest.json").write_text(json.dumps({"digest": both, "files": files}))
    return bundle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    made = {name: constant(folder / name, p) for name, p in {"low": 0.25, "high": 0.75, "mid": 0.5}.items()}
    made["nan"] = constant(folder / "nan", float("nan"))
    made["certain"] = constant(folder / "certain", 1.5)
    return made


# --- a server, and those who ask it


@dataclass
class Serving:
    "A `titanic serve` in a session of its own."

    process: subprocess.Popen
    port: int
    said: list[dict[str, Any]] = field(default_factory=list)  # lines of its log

    def ask(
        self, path: str = "/v1/predict", body: dict | None = PASSENGER, **headers: str
    ) -> tuple[int, dict, dict]:
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(line):
            what = ("GET", path) if body is None else ("POST", path, json.dumps(body))
            line.request(*what, headers={"content-type": "application/json", **headers})
            answer = line.getresponse()
            return answer.status, json.loads(answer.read() or b"{}"), dict(answer.headers)

    def state(self) -> dict[str, Any]:
        return self.ask("/readyz", None)[1]

    def until(self, holds: Callable[[], Any], seconds: float = 30) -> Any:
        "Wait until something holds, whatever the machine's other business."
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if found := holds():
                    return found
            assert self.process.poll() is None, "\n".join(map(str, self.said))
            assert time.monotonic() < end, (self.state(), self.said)
            time.sleep(0.02)

    def workers(self) -> list[int]:
        pid = self.process.pid
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def events(self, message: str) -> list[dict[str, Any]]:
        return [event for event in self.said if event.get("message") == message]


def listen(serving: Serving) -> None:
    for line in serving.process.stderr:
        with contextlib.suppress(ValueError):
            serving.said.append(json.loads(line))
            continue
        serving.said.append({"message": line})


@contextlib.contextmanager
def titanic_serve(store: Path, *arguments: str, **environment: str) -> Iterator[Serving]:
    process = subprocess.Popen(
        [str(BIN / "titanic"), "serve", "--no-auth", "--port", "0", "--every", "0.05", *arguments],
        env={
            **os.environ,
            "TITANIC_STORE": str(store),
            "TITANIC_ACCESS_LOG": "",
            "TITANIC_RATE_LIMIT": "0",
            "NO_COLOR": "1",
            **environment,
        },
        cwd=store.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        serving = Serving(process, 0)
        threading.Thread(target=listen, args=(serving,), daemon=True).start()
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, (line, serving.said)
        serving.port = int(found[1])
        yield serving
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass
class Load:
    "Threads that ask without a pause, and what they were answered."

    port: int
    known: dict[str, float]  # digest -> probability
    keep: bool = True  # standing connections
    answers: int = 0
    versions: set[str] = field(default_factory=set)
    wrong: list[Any] = field(default_factory=list)  # answers that contradict themselves, or are no answers
    lost: list[str] = field(default_factory=list)  # sent, and never answered
    cut: int = 0  # not sent: nobody there to take it
    stale: int = 0  # sent on a connection that we left idle for longer than a server that leaves waits for us

    def run(self) -> None:
        line, idle_since = None, 0.0
        body = json.dumps(PASSENGER)
        while not self._stop.is_set():
            if line is None:
                line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
                try:
                    line.connect()
                except OSError:
                    self.cut, line = self.cut + 1, None
                    time.sleep(0.01)
                    continue
                idle_since = time.monotonic()
            idle = time.monotonic() - idle_since
            try:
                line.request("POST", "/v1/predict", body, {"content-type": "application/json"})
                answer = line.getresponse()
                content = answer.read()
            except (OSError, http.client.HTTPException) as error:
                if idle < LINGER:
                    self.lost.append(repr(error))
                else:  # RFC 9112, 9.3.1: who finds an idle connection closed asks again
                    self.stale += 1
                line = None
                continue
            idle_since = time.monotonic()
            self.judge(answer, content)
            if answer.will_close or not self.keep:
                line.close()
                line = None

    def judge(self, answer: Any, content: bytes) -> None:
        self.answers += 1
        try:
            said, seen = json.loads(content), answer.headers["x-bundle-digest"]
            fits = (
                answer.status == 200
                and said["bundle_digest"] == seen
                and said["model_version"] == answer.headers["x-model-version"] == seen[:12]
                and abs(said["probability"] - self.known[seen]) < 1e-6
            )
        except (ValueError, KeyError, TypeError):
            fits = False
        if fits:
            self.versions.add(seen)
        else:
            self.wrong.append((answer.status, dict(answer.headers), content[:200]))

    @contextlib.contextmanager
    def running(self, threads: int = 4) -> Iterator["Load"]:
        self._stop = threading.Event()
        crowd = [threading.Thread(target=self.run, daemon=True) for _ in range(threads)]
        for one in crowd:
            one.start()
        try:
            yield self
        finally:
            self._stop.set()
            for one in crowd:
                one.join(30)


def known(bundles: dict[str, Path]) -> dict[str, float]:
    return {digest_of(bundles[name]): p for name, p in {"low": 0.25, "high": 0.75, "mid": 0.5}.items()}


# --- swaps


@pytest.mark.parametrize("workers", [1, 3])
def test_swaps_under_load_fail_nobody_and_mix_nothing(tmp_path: Path, bundles: dict[str, Path], workers: int):
    drop, order = tmp_path / "drop", ["low", "high", "mid"] * 4
    put(bundles["mid"], drop)
    with titanic_serve(tmp_path / "store", "--bundle", str(drop), "--workers", str(workers)) as serving:
        with Load(serving.port, known(bundles)).running() as load:
            for number, name in enumerate(order, 2):
                put(bundles[name], drop)
                swapped = lambda number=number: len(serving.events("model swapped")) >= number * workers
                serving.until(swapped)
                before = load.answers
                serving.until(lambda before=before: load.answers > before + 20)
        assert (load.wrong, load.lost, load.cut) == ([], [], 0)
        assert load.versions == set(known(bundles))
        assert {event["pid"] for event in serving.events("model swapped")} == set(
            serving.workers() if workers > 1 else [serving.process.pid]
        )
        status, said, _ = serving.ask("/v1/predict")
        assert (status, round(said["probability"], 6)) == (200, 0.5)


def test_going_back_moves_all_workers_once(tmp_path: Path, bundles: dict[str, Path]):
    drop = tmp_path / "drop"
    put(bundles["low"], drop)
    with titanic_serve(tmp_path / "store", "--bundle", str(drop), "--workers", "2") as serving:
        put(bundles["high"], drop)
        serving.until(lambda: len(serving.events("model swapped")) == 4)
        status, said, _ = serving.ask("/v1/model/rollback", {})
        assert (status, said["digest"]) == (200, digest_of(bundles["low"]))
        # the other worker is told at the same time, and does it a moment later
        serving.until(lambda: {serving.ask()[1]["bundle_digest"] for _ in range(30)} == {said["digest"]})
        assert serving.ask("/v1/model/rollback", {})[0] == 409
        time.sleep(0.5)  # the folder still offers what was taken back
        assert serving.ask()[1]["probability"] == pytest.approx(0.25)
        assert "taken back by hand" in serving.state()["degraded"][0]
        put(bundles["mid"], drop)  # something else is listened to
        serving.until(lambda: {serving.ask()[1]["probability"] for _ in range(8)} == {0.5})


# --- bad bundles


def test_a_bad_bundle_never_replaces_a_good_one(tmp_path: Path, bundles: dict[str, Path]):
    drop, copy = tmp_path / "drop", lambda name: shutil.copytree(bundles["high"], tmp_path / name)
    tampered = copy("tampered")
    (tampered / "model.onnx").write_bytes(
        (tampered / "model.onnx").read_bytes().replace(b"constant", b"konstant")
    )
    truncated = copy("truncated")
    (truncated / "model.onnx").write_bytes((truncated / "model.onnx").read_bytes()[:99])
    garbage = copy("garbage")
    (garbage / "manifest.json").write_bytes(b"\xff\x00 garbage")
    climbs = copy("climbs")
    files = {"../../../../etc/passwd": digest(Path("/etc/passwd"))}
    (climbs / "manifest.json").write_text(json.dumps({"digest": "c" * 64, "files": files}))
    older = sealed(copy("older"), "contract.json", lambda text: text.replace(b'"high": 110', b'"high": 100'))
    noise = sealed(copy("noise"), "model.onnx", lambda _: b"\x08\x0a\x12\x07garbage")
    bad = {
        tampered: "model.onnx was changed or cut off",
        truncated: "model.onnx was changed or cut off",
        garbage: "the manifest can't be read",
        climbs: "none of a bundle",
        older: "can't be served under",
        noise: "the model can't be loaded",
        bundles["nan"]: "the model answers nan",
        bundles["certain"]: "the model answers 1.5",
    }
    put(bundles["low"], drop)
    with titanic_serve(tmp_path / "store", "--bundle", str(drop), "--workers", "2") as serving:
        for folder, reason in bad.items():
            put(folder, drop)
            degraded = serving.until(
                lambda reason=reason: [w for w in serving.state()["degraded"] if reason in w]
            )
            assert "was refused" in degraded[0]
            state = serving.state()
            assert state["ready"] and state["origins"][0]["refused"]
            assert {serving.ask()[1]["bundle_digest"] for _ in range(8)} == {digest_of(bundles["low"])}
        refusals = len(serving.events("model refused"))
        time.sleep(0.5)
        assert len(serving.events("model refused")) == refusals  # not tried again until it changes
        put(bundles["high"], drop)
        serving.until(lambda: not serving.state()["degraded"])
        assert {serving.ask()[1]["bundle_digest"] for _ in range(8)} == {digest_of(bundles["high"])}
        assert len(serving.workers()) == 2 and not serving.events("worker lost, and replaced")


def test_where_a_signature_is_asked_for_one_is_needed(tmp_path: Path, bundles: dict[str, Path]):
    keys = {name: new_key(tmp_path / f"{name}.pem") for name in ("ours", "theirs")}
    copies = {name: shutil.copytree(bundles[name], tmp_path / name) for name in ("low", "high", "mid")}
    sign(copies["low"], tmp_path / "ours.pem")
    sign(copies["mid"], tmp_path / "theirs.pem")
    drop, trusted = tmp_path / "drop", {"TITANIC_TRUSTED_KEYS": keys["ours"]}
    put(copies["low"], drop)
    with titanic_serve(tmp_path / "store", "--bundle", str(drop), **trusted) as serving:
        put(copies["mid"], drop)
        serving.until(lambda: "not trusted" in str(serving.state()["degraded"]))
        (drop / "manifest.sig").unlink()
        put(copies["high"], drop)
        serving.until(lambda: "not signed" in str(serving.state()["degraded"]))
        assert serving.ask()[1]["probability"] == pytest.approx(0.25)
        sign(drop, tmp_path / "ours.pem")  # signed later, which changes no other file
        serving.until(lambda: serving.ask()[1]["probability"] == pytest.approx(0.75))
        assert serving.state()["degraded"] == []


def test_a_server_does_not_start_without_a_model(tmp_path: Path, bundles: dict[str, Path]):
    for workers in ("1", "2"):
        done = subprocess.run(
            [
                str(BIN / "titanic"),
                "serve",
                "--no-auth",
                "--port",
                "0",
                "--bundle",
                str(bundles["nan"]),
                "--workers",
                workers,
            ],
            env={**os.environ, "TITANIC_STORE": str(tmp_path / "store")},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2 and "the model answers nan" in done.stderr, done.stderr


# --- registries


class Registry:
    "As much of an MLflow server as is asked, and as little as one likes."

    def __init__(self, model: Path):
        self.model, self.mood, self.asked = model, "well", 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                with contextlib.suppress(OSError):
                    outer.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, to: BaseHTTPRequestHandler) -> None:
        if self.mood == "slow":
            for _ in range(100):  # a letter at a time, for longer than anybody waits
                to.wfile.write(b"H")
                to.wfile.flush()
                time.sleep(0.05)
            return
        if self.mood == "garbage":
            to.wfile.write(b"\x16\x03\x01\x02\x00\x01\x00 what?\r\n\r\n")
            return
        if self.mood == "dribbling":
            to.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
            for letter in b"{}" + b" " * 100:
                to.wfile.write(bytes([letter]))
                to.wfile.flush()
                time.sleep(0.05)
            return
        path, content = to.path.split("?")[0], None
        if self.mood == "odd":
            content = b'{"model_version": [1, 2, 3]}'
        elif self.mood == "html":
            content = b"<html>Sign in</html>"
        elif self.mood == "header":
            content = json.dumps({"model_version": {"version": "1\r\nx-evil: 1"}}).encode()
        elif path.endswith("/registered-models/alias"):
            tags = [{"key": "bundle_digest", "value": digest_of(self.model)}]
            content = json.dumps({"model_version": {"version": self.model.name, "tags": tags}}).encode()
        elif path.endswith("/get-download-uri"):
            content = json.dumps({"artifact_uri": f"mlflow-artifacts:/1/run/{self.model.name}"}).encode()
        elif path.endswith("/mlflow-artifacts/artifacts"):
            files = [
                {"path": file.name, "file_size": file.stat().st_size} for file in sorted(self.model.iterdir())
            ]
            content = json.dumps({"files": files}).encode()
        else:
            file = self.model / path.rsplit("/", 1)[-1]
            content = (
                file.read_bytes()
                if f"/1/run/{self.model.name}/data/bundle/" in path and file.is_file()
                else None
            )
        status = {"failing": 500, "forbidden": 403}.get(self.mood, 404 if content is None else 200)
        to.send_response(status)
        to.end_headers()
        to.wfile.write(content or b"{}")

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


MOODS = {
    "slow": "gave no answer within",
    "dribbling": "gave no answer within",
    "garbage": "is away: BadStatusLine",
    "odd": "names no version",
    "html": "not JSON",
    "header": "the name of a version",
    "failing": "answers 500",
    "forbidden": "answers 403",
}


@pytest.mark.parametrize("mood", MOODS)
def test_whatever_a_registry_answers_the_model_stays_and_the_reason_is_told(
    tmp_path: Path, bundles: dict, mood: str
):
    registry = Registry(bundles["low"])
    origin = RegistryOrigin(registry.url, "titanic")
    models = open_models({"champion": origin}, tmp_path, trusted=[], every=0.02)
    try:
        registry.mood, origin.rest.patience = mood, 0.4
        end = time.monotonic() + 20
        while not models.state()["degraded"]:
            assert time.monotonic() < end
            time.sleep(0.01)
        state = models.state()
        assert MOODS[mood] in state["degraded"][0] and state["ready"]
        assert models.champion.version == "low" and state["swaps"] == 1
        registry.model, registry.mood = bundles["high"], "well"
        origin.rest.patience = 10  # a machine may stand still for a moment
        while models.champion.version != "high":
            assert time.monotonic() < end, models.state()
            time.sleep(0.01)
        assert models.state()["degraded"] == []
    finally:
        models.close()
        registry.close()


def test_a_registry_that_is_away_is_asked_less_and_less(tmp_path: Path, bundles: dict[str, Path]):
    registry = Registry(bundles["low"])
    origin = RegistryOrigin(registry.url, "titanic")
    models = Models()
    watch = Watch("champion", origin, tmp_path, lambda k, o, f: models.install(admit(f, o, k, [])), every=1)
    assert watch.step() == 1 and models.champion.version == "low"
    registry.close()
    assert [watch.step() for _ in range(7)] == [2, 4, 8, 16, 30, 30, 30]
    watch.failures = 100_000  # a month
    assert watch.step() == 30
    assert "is away: ConnectionRefusedError" in watch.told()["away"]


def test_a_server_follows_a_registry_over_http(tmp_path: Path, bundles: dict[str, Path]):
    registry = Registry(bundles["low"])
    try:
        with titanic_serve(tmp_path / "store", "--workers", "2", TITANIC_MLFLOW_URI=registry.url) as serving:
            with Load(serving.port, known(bundles)).running(2) as load:
                assert serving.ask()[2]["x-model-version"] == "low"
                registry.model = bundles["high"]
                serving.until(lambda: {serving.ask()[1]["probability"] for _ in range(8)} == {0.75})
                registry.close()
                serving.until(lambda: "is away" in str(serving.state()["degraded"]))
                assert serving.state()["ready"]
            assert not load.lost and load.cut == 0 and {answer[0] for answer in load.wrong} <= {200}
    finally:
        with contextlib.suppress(OSError):
            registry.close()


def test_a_server_that_starts_while_the_registry_is_away_serves_what_served_last(
    tmp_path: Path, bundles: dict[str, Path]
):
    registry, memory = Registry(bundles["low"]), tmp_path / "memory"
    origin = RegistryOrigin(registry.url, "titanic")
    open_models({"champion": origin}, tmp_path / "first", trusted=[], memory=memory).close()
    registry.close()
    models = open_models({"champion": origin}, tmp_path / "second", trusted=[], memory=memory)
    models.close()
    assert models.champion.version == "low" and "is away" in models.state()["degraded"][0]
    (memory / "bundle" / "model.onnx").write_bytes(b"meddled with")
    with pytest.raises(RegistryError, match="no model to serve"):
        open_models({"champion": origin}, tmp_path / "third", trusted=[], memory=memory)


def test_a_replica_on_ray_follows_says_so_and_never_goes_back_alone(
    tmp_path: Path, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    from titanic_mlops.serve.ray_app import Arguments
    from titanic_mlops.serve.ray_app import Server as Replica

    registry = Registry(bundles["low"])
    monkeypatch.setenv("TITANIC_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("TITANIC_MLFLOW_URI", registry.url)
    try:
        replica = Replica(Arguments(every=0.05, no_auth=True))
        registry.model = bundles["high"]
        end = time.monotonic() + 20
        while replica.models.champion.version != "high" and time.monotonic() < end:
            time.sleep(0.05)
        assert replica.models.previous.version == "low"
        with pytest.raises(RegistryError, match="titanic rollback"):
            replica.models.rollback()
        assert replica.models.champion.version == "high"
        assert capfd.readouterr().err.count("model swapped") == 2
        registry.close()
        later = Replica(Arguments(no_auth=True))  # on this node, while the registry is away
        assert later.models.champion.version == "high"
        for one in (replica, later):
            one.models.close()
    finally:
        with contextlib.suppress(OSError):
            registry.close()


def test_what_served_long_ago_or_was_refused_is_not_kept(tmp_path: Path, bundles: dict[str, Path]):
    models = Models()
    deliver = lambda kind, offer, folder: models.install(admit(folder, offer, kind, []))
    watch = Watch("champion", FolderOrigin(tmp_path / "drop"), tmp_path / "kept", deliver)
    seen = set()
    for number in range(8):
        put(constant(tmp_path / f"b{number}", number / 10), tmp_path / "drop")
        watch.step()
        seen.add(models.champion.version)
    assert len(seen) == 8 and len(list((tmp_path / "kept" / "champion").iterdir())) == 4
    put(bundles["nan"], tmp_path / "drop")
    watch.step()
    assert watch.told()["refused"] and len(list((tmp_path / "kept" / "champion").iterdir())) == 4


def made_store(store: Path, bundles: dict[str, Path]) -> Ledger:
    "A store as `titanic run` leaves it, as far as a server looks at it."
    store.mkdir()
    with contextlib.closing(sqlite3.connect(store / "mlflow.db")) as database:
        database.executescript(
            """
            create table registered_model_tags (name, key, value);
            create table model_versions (name, version, source);
            create table model_version_tags (name, version, key, value);
            create table registered_model_aliases (name, alias, version);
            insert into registered_model_tags values ('titanic', 'ledger', 'titanic-test');
            """
        )
        database.commit()
    for name in ("low", "high"):
        shutil.copytree(bundles[name], store / "bundles" / digest_of(bundles[name]))
    return Ledger(settings(store=store).artifacts_url, "titanic-test")


def test_a_server_follows_the_ledger_of_the_store(tmp_path: Path, bundles: dict[str, Path]):
    ledger = made_store(tmp_path / "store", bundles)
    facts = {
        "by": "smith",
        "from_version": None,
        "from_digest": "",
        "verdict": "better",
        "gate_version": "1",
        "reason": "it is",
    }
    entry = ledger.append(None, action="promote", to_version=1, to_digest=digest_of(bundles["low"]), **facts)
    with titanic_serve(tmp_path / "store") as serving:
        assert serving.ask()[2]["x-model-version"] == "1"
        more = {**facts, "override": True}
        entry = ledger.append(
            entry, action="promote", to_version=2, to_digest=digest_of(bundles["high"]), **more
        )
        serving.until(lambda: serving.ask()[2]["x-model-version"] == "2")
        assert "against or without the gate" in serving.state()["champion"]["override"]
        ledger.append(entry, action="rollback", to_version=1, to_digest=digest_of(bundles["low"]), **facts)
        serving.until(lambda: serving.ask()[2]["x-model-version"] == "1")
        [last] = (tmp_path / "store").glob("artifacts/ledger/titanic-test/00000003.json")
        last.write_bytes(last.read_bytes().replace(b"smith", b"smyth"))  # meddled with, and known already
        [second] = (tmp_path / "store").glob("artifacts/ledger/titanic-test/00000002.json")
        shutil.copy(second, last.with_name("00000004.json"))
        serving.until(lambda: "of the ledger was changed" in str(serving.state()["degraded"]))
        assert serving.state()["ready"] and serving.ask()[2]["x-model-version"] == "1"


def test_a_ledger_that_lost_its_end_moves_no_server_and_a_rollback_keeps_the_mark(
    tmp_path: Path, bundles: dict[str, Path]
):
    "The registry knows the last entry that was carried out; who came by an override is marked when it comes back."
    store = tmp_path / "store"
    ledger = made_store(store, bundles)
    low, high = (digest_of(bundles[name]) for name in ("low", "high"))
    facts = {"from_version": None, "from_digest": "", "verdict": "", "gate_version": "", "reason": "faster"}
    moves = [("promote", 1, low, True), ("promote", 2, high, False), ("rollback", 1, low, False)]
    entry = None
    for action, number, bundle, override in moves:
        to = {"to_version": number, "to_digest": bundle, "override": override}
        entry = ledger.append(entry, by="ismay", action=action, **to, **facts)
    with contextlib.closing(sqlite3.connect(store / "mlflow.db")) as database:
        database.execute(
            "insert into registered_model_tags values ('titanic', 'ledger_head', ?)", (entry.mark,)
        )
        database.commit()
    origin = StoreOrigin(settings(store=store))
    assert (origin.look().version, "ismay" in origin.look().override) == ("1", True)
    with titanic_serve(store) as serving:
        assert serving.ask()[2]["x-model-version"] == "1"
        next(store.glob("artifacts/ledger/titanic-test/00000003.json")).unlink()
        serving.until(lambda: "not the one that was carried out" in str(serving.state()["degraded"]))
        assert serving.state()["ready"] and serving.ask()[2]["x-model-version"] == "1"
    for looks in (origin, StoreOrigin(settings(store=store))):
        with pytest.raises(RegistryError, match="not the one that was carried out"):
            looks.look()


# --- time


def test_a_clock_that_is_set_back_does_not_stop_the_watch(
    tmp_path: Path, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    drop = tmp_path / "drop"
    put(bundles["low"], drop)
    models = open_models({"champion": FolderOrigin(drop)}, tmp_path, trusted=[], every=0.02)
    try:
        hours = iter(range(1, 10**9))
        monkeypatch.setattr(time, "time", lambda: 1e9 - 3600 * next(hours))
        for name in ("high", "mid", "low"):
            put(bundles[name], drop)
            for file in drop.iterdir():
                os.utime(file, (1e9 - 3600 * next(hours),) * 2)  # files from before the last ones
            end = time.monotonic() + 20
            while models.champion.digest != digest_of(bundles[name]):
                assert time.monotonic() < end
                time.sleep(0.01)
    finally:
        models.close()


# --- processes


def test_a_worker_that_is_killed_is_replaced_and_the_others_go_on(tmp_path: Path, bundles: dict[str, Path]):
    drop = tmp_path / "drop"
    put(bundles["low"], drop)
    with titanic_serve(tmp_path / "store", "--bundle", str(drop), "--workers", "3") as serving:
        first = serving.until(lambda: (found := serving.workers()) and len(found) == 3 and found)
        put(bundles["high"], drop)
        serving.until(lambda: len(serving.events("model swapped")) == 6)
        with Load(serving.port, known(bundles)).running() as load:
            for number, victim in enumerate(first[:2], 1):
                before = load.answers
                os.kill(victim, signal.SIGKILL)
                serving.until(lambda n=number: len(serving.events("worker lost, and replaced")) == n)
                serving.until(lambda before=before: load.answers > before + 50)
            serving.until(
                lambda: len(serving.events("model swapped")) == 10
            )  # low and high, in each of the new
        assert load.wrong == [] and load.cut == 0
        assert len(load.lost) <= 2 * 4  # what was with the victims when they died
        assert load.versions == {digest_of(bundles["high"])}
        assert len(serving.workers()) == 3 and len(set(serving.workers()) & set(first)) == 1
        assert serving.ask("/v1/model/rollback", {})[0] == 200  # the new ones know what served before
        assert {serving.ask()[1]["probability"] for _ in range(12)} == {0.25}


LEAVE = [  # told to the process alone, or as Ctrl-C, `timeout` and systemd do it: to all of them
    (1, True, signal.SIGTERM, os.kill),
    (2, False, signal.SIGINT, os.killpg),
    (2, False, signal.SIGTERM, os.killpg),
    pytest.param(1, False, signal.SIGINT, os.killpg, marks=pytest.mark.long),
    pytest.param(2, True, signal.SIGTERM, os.kill, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("workers", "keep", "sig", "tell"), LEAVE)
def test_who_is_told_to_leave_loses_no_request(
    tmp_path: Path, bundles: dict[str, Path], workers: int, keep: bool, sig: signal.Signals, tell: Any
):
    with titanic_serve(
        tmp_path / "store", "--bundle", str(bundles["low"]), "--workers", str(workers)
    ) as serving:
        idle = socket.create_connection(("127.0.0.1", serving.port))  # is not waited for forever
        with Load(serving.port, known(bundles), keep).running() as load:
            serving.until(lambda: load.answers > 200)
            tell(serving.process.pid, sig)
            assert serving.process.wait(20) == 0
            assert (load.wrong, load.lost) == ([], [])
        idle.close()
        assert not (tmp_path / "store" / "serving").exists() or not list(
            (tmp_path / "store" / "serving").iterdir()
        )


def test_workers_whose_parent_is_killed_leave(tmp_path: Path, bundles: dict[str, Path]):
    with titanic_serve(tmp_path / "store", "--bundle", str(bundles["low"]), "--workers", "2") as serving:
        workers = serving.until(lambda: (found := serving.workers()) and len(found) == 2 and found)
        serving.process.kill()
        serving.process.wait()
        end = time.monotonic() + 20
        while any(
            Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()
            for pid in workers
        ):
            assert time.monotonic() < end
            time.sleep(0.05)


def test_a_port_that_is_taken_is_said_at_once(tmp_path: Path, bundles: dict[str, Path]):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = subprocess.run(
            [str(BIN / "titanic"), "serve", "--no-auth", "--port", port, "--bundle", str(bundles["low"])],
            env={**os.environ, "TITANIC_STORE": str(tmp_path / "store")},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2 and "the port is taken" in done.stderr and "ss -ltnp" in done.stderr


def test_a_kind_of_address_that_the_machine_does_not_speak_is_said(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(SettingsError, match="can't listen here: Address family not supported"):
        bind("::1", 0)


def test_a_server_imports_nothing_of_the_pipeline(tmp_path: Path, bundles: dict[str, Path]):
    program = (
        "import sys, threading\n"
        "from titanic_mlops.face import cli\n"
        "from titanic_mlops.serve import server, models\n"
        "import titanic_mlops.serve.app, titanic_mlops.model.ledger\n"
        "from titanic_mlops.serve.origins import FolderOrigin, Offer\n"
        f"origin = FolderOrigin({str(bundles['low'])!r})\n"
        "from pathlib import Path\n"
        f"models.admit(origin.fetch(origin.look(), Path({str(tmp_path)!r})), origin.look(), trusted=[])\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )
    assert not NOT_FOR_SERVERS & set(done.stdout.split())


# --- shadow and canary


def loaded(bundle: Path, kind: str = "champion") -> Any:
    return admit(bundle, FolderOrigin(bundle).look(), kind, [])


def with_failing_canary(bundles: dict[str, Path], method: str) -> tuple[Models, Any]:
    "Models of which the canary answers all, and raises where it is asked by this method."

    def fail(asked: Any) -> Any:
        raise ValueError("no")

    models, canary = Models(share=1.0), loaded(bundles["high"], "canary")
    setattr(canary.model, method, fail)
    models.install(loaded(bundles["low"]))
    models.install(canary)
    return models, canary


def test_a_canary_that_errs_fails_no_table(bundles: dict[str, Path]):
    from starlette.testclient import TestClient

    from titanic_mlops.serve.app import create_app

    models, canary = with_failing_canary(bundles, "many")
    client, digest = TestClient(create_app(models)), digest_of(bundles["low"])
    for path, body in (
        ("/v1/predict/batch", [PASSENGER] * 300),
        ("/invocations", {"dataframe_records": [PASSENGER] * 300}),
    ):
        models.install(canary)
        answer = client.post(path, json=body)
        assert answer.status_code == 200 and len(answer.json()["predictions"]) == 300
        assert answer.headers["x-bundle-digest"] == digest
    lines = "\n".join([json.dumps(PASSENGER)] * 3)
    kind = {"content-type": "application/x-ndjson"}
    models.install(canary)  # whom the answer's headers will have promised
    answer = client.post("/v1/predict/batch", content=lines, headers=kind)
    assert "failed; ask for the rest again" in answer.text
    models.close()


def test_a_canary_that_errs_never_fails_a_client(bundles: dict[str, Path]):
    models, _ = with_failing_canary(bundles, "one")
    answers = set()
    for number in range(10):
        served = models.pick(b"%d" % number)
        try:
            probability = served.model.one(PASSENGER)
        except ValueError:
            served = models.failed(served)
            probability = served.model.one(PASSENGER)
        answers.add((served.digest, probability))
    models.close()
    assert answers == {(digest_of(bundles["low"]), 0.25)}
    assert models.canary is None and "failed on" in models.abandoned["why"]


def test_a_canary_that_disagrees_is_abandoned_by_all_workers(tmp_path: Path, bundles: dict[str, Path]):
    canary = ("--canary", str(bundles["high"]), "--share", "0.5")
    low, high = digest_of(bundles["low"]), digest_of(bundles["high"])
    with titanic_serve(
        tmp_path / "store", "--bundle", str(bundles["low"]), "--workers", "2", *canary
    ) as serving:
        serving.until(lambda: len(serving.events("model swapped")) == 4)
        same = {serving.ask(**{"x-request-key": "me"})[1]["bundle_digest"] for _ in range(2)}
        assert len(same) == 1  # whichever worker answers
        seen: set[str] = set()
        for number in range(400):
            status, said, _ = serving.ask(**{"x-request-key": f"customer-{number}"})
            assert status == 200
            seen.add(said["bundle_digest"])
            if len(serving.events("canary abandoned")) == 2:
                break
        assert seen == {low, high}
        assert "disagreed with the champion" in serving.events("canary abandoned")[0]["why"]
        assert "was abandoned" in str(serving.state()["degraded"])
        answers = {serving.ask(**{"x-request-key": f"customer-{n}"})[1]["bundle_digest"] for n in range(40)}
        assert answers == {low}
        os.kill(serving.workers()[0], signal.SIGKILL)  # who comes new does not bring it back
        serving.until(lambda: len(serving.events("model swapped")) == 5)
        assert {serving.ask(**{"x-request-key": f"customer-{n}"})[1]["bundle_digest"] for n in range(40)} == {
            low
        }


def test_the_champion_s_errors_are_the_champion_s(bundles: dict[str, Path]):
    models = Models()
    models.install(loaded(bundles["low"]))
    with pytest.raises(ZeroDivisionError):
        try:
            _ = 1 / 0
        except ZeroDivisionError:
            models.failed(models.champion)


def test_who_asks_the_shadow_never_waits(bundles: dict[str, Path]):
    models = Models()
    models.install(loaded(bundles["low"]))
    shadow = loaded(bundles["high"], "shadow")
    gate = threading.Event()
    shadow.model.one = lambda passenger: gate.wait(30) and 0.0  # a shadow that hangs
    models.install(shadow)
    for _ in range(1500):
        models.after(models.champion, PASSENGER, 0.25)
    assert 0 < models._aside.overflowed < 1000
    gate.set()
    models.close()


# --- a real MLflow server


def mlflow_says(url: str, what: str, body: dict[str, Any], method: str = "POST") -> dict[str, Any]:
    "One request to MLflow's REST API, for what its client does when a model is registered."
    line = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    with contextlib.closing(line):
        headers = {"content-type": "application/json"}
        line.request(method, f"/api/2.0/mlflow/{what}", json.dumps(body), headers)
        answer = line.getresponse()
        said = answer.read()
        assert answer.status == 200, said
        return json.loads(said)


def mlflow_keeps(url: str, place: str, bundle: Path) -> None:
    "Have an MLflow server keep a bundle's files."
    for file in bundle.iterdir():
        line = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        with contextlib.closing(line):
            path = f"/api/2.0/mlflow-artifacts/artifacts/{place}/data/bundle/{file.name}"
            line.request("PUT", path, file.read_bytes())
            assert line.getresponse().status == 200


@pytest.mark.long
def test_a_server_follows_a_real_mlflow_server(tmp_path: Path, bundles: dict[str, Path]):
    from test_sources import free_port, process

    port = free_port()
    command = [str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path / 'db.sqlite'}"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    point = lambda number: {"name": "titanic", "alias": "champion", "version": number}
    with process(command, port) as url:
        mlflow_says(url, "registered-models/create", {"name": "titanic"})
        for name in ("low", "high"):
            run = mlflow_says(url, "runs/create", {"experiment_id": "0"})["run"]["info"]
            source = f"{run['artifact_uri']}/model"
            mlflow_keeps(url, source.removeprefix("mlflow-artifacts:/"), bundles[name])
            tags = [{"key": "bundle_digest", "value": digest_of(bundles[name])}]
            tags += [{"key": "override", "value": "by ismay: faster"}] if name == "high" else []
            version = {"name": "titanic", "source": source, "run_id": run["run_id"], "tags": tags}
            mlflow_says(url, "model-versions/create", version)
        mlflow_says(url, "registered-models/alias", point("1"))
        with titanic_serve(tmp_path / "store", TITANIC_MLFLOW_URI=url) as serving:
            assert serving.ask()[2]["x-model-version"] == "1"
            mlflow_says(url, "registered-models/alias", point("2"))
            serving.until(lambda: serving.ask()[2]["x-model-version"] == "2")
            assert serving.state()["champion"]["override"] == "by ismay: faster"
            mlflow_says(url, "registered-models/alias", point("1"))
            serving.until(lambda: serving.ask()[2]["x-model-version"] == "1")
            assert serving.ask()[1]["probability"] == pytest.approx(0.25)
            mlflow_says(url, "registered-models/alias", {"name": "titanic", "alias": "champion"}, "DELETE")
            serving.until(lambda: "no version with the alias champion" in str(serving.state()["degraded"]))


def test_registry_errors_name_what_to_do():
    with pytest.raises(RegistryError, match="is away"):
        RegistryOrigin("http://127.0.0.1:9", "titanic").look()


def test_the_counts_of_all_workers_stand_on_one_page(tmp_path: Path, bundles: dict[str, Path]):
    with titanic_serve(tmp_path / "store", "--bundle", str(bundles["low"]), "--workers", "2") as serving:
        asked = {serving.ask()[0] for _ in range(40)}  # a connection each: both workers take some
        with urllib.request.urlopen(f"http://127.0.0.1:{serving.port}/metrics", timeout=20) as answer:
            page = answer.read().decode()
        lines = [line for line in page.splitlines() if line.startswith("titanic_requests_total{")]
        mine = [float(line.split()[-1]) for line in lines if "/v1/predict" in line]
        assert asked == {200} and sum(mine) == 40, lines


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_end_of_a_terminal_is_an_orderly_end(tmp_path: Path, bundles: dict[str, Path], workers: str):
    with titanic_serve(tmp_path / "store", "--bundle", str(bundles["low"]), "--workers", workers) as serving:
        assert serving.ask()[0] == 200
        os.killpg(serving.process.pid, signal.SIGHUP)
        assert serving.process.wait(30) == 0, serving.said
    assert not list((tmp_path / "store" / "serving").glob("server-*"))
