"""The promotion ledger under races, kills and meddling; and `titanic verify`, with every link of the chain broken once."""

import http.server
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from threading import Barrier
from typing import ClassVar
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from checkout import BIN, QUICK, ROOT, Checkout, checkout
from test_sources import free_port, process

from titanic_mlops.ground.errors import BundleError, RegistryError
from titanic_mlops.ground.settings import Settings, settings
from titanic_mlops.ground.store import digest
from titanic_mlops.model.ledger import UNSETTLED, Ledger

FACTS = {
    "by": "smith",
    "action": "promote",
    "from_version": None,
    "from_digest": "",
    "to_version": 1,
    "to_digest": "a" * 64,
    "verdict": "first",
    "gate_version": "",
    "reason": "first model",
}


# --- two at the same moment

RACE = """
import json, sys
from titanic_mlops.ground.errors import RegistryError
from titanic_mlops.model.ledger import Ledger
root, facts, name = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
ledger = Ledger(root, "titanic-race")
[first] = ledger.entries()
print("ready", flush=True)
sys.stdin.readline()
try:
    print(ledger.append(first, **facts | {"by": name}).by)
except RegistryError as error:
    print(error.what)
"""


def race(root: str) -> list[str]:
    "What four processes say that have all seen the first entry, and all want to write the second."
    Ledger(root, "titanic-race").append(None, **FACTS)
    command = [sys.executable, "-c", RACE, root, json.dumps(FACTS)]
    racers = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in "abcd"
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    return [racer.communicate(timeout=60)[0].strip() for racer in racers]


def require_one_winner(root: str, said: list[str]) -> None:
    entries = Ledger(root, "titanic-race").entries()
    assert [entry.by for entry in entries] == ["smith", *(name for name in said if name in "abcd")]
    assert len(entries) == 2
    assert said.count("somebody else moved the champion at the same moment") == 3


def test_of_two_promotions_at_the_same_moment_one_wins_on_a_disk(tmp_path: Path):
    require_one_winner(str(tmp_path), race(str(tmp_path)))


@pytest.mark.long
def test_of_two_promotions_at_the_same_moment_one_wins_in_a_bucket(monkeypatch: pytest.MonkeyPatch):
    import s3fs

    port = free_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    with process([str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(port)], port) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("ship")
        require_one_winner("s3://ship/artifacts", race("s3://ship/artifacts"))
        s3fs.S3FileSystem().pipe("ship/artifacts/ledger/titanic-race/00000001.json", b"{}")
        with pytest.raises(RegistryError, match="entry 1 of the ledger was changed"):
            Ledger("s3://ship/artifacts", "titanic-race").entries()


class _CloudStorage(http.server.BaseHTTPRequestHandler):
    "The emulator of Cloud Storage, and the rule that it lacks: an object that is there is not created once more."

    emulator = ""  # its address
    turn = threading.Lock()
    seen: ClassVar[list[tuple[str, int]]] = []  # precondition of each upload, and the answer
    lose_next = False  # the next upload is carried out, and its answer lost

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked = parse_qs(urlsplit(self.path).query)
        if not (self.command == "POST" and "uploadType" in asked):
            return self._answer(*self._ask(self.command, self.path, body))
        [only_if] = asked.get("ifGenerationMatch", [""])
        name = json.loads(body.split(b"\n\n")[1].split(b"\n--")[0])["name"]
        bucket = urlsplit(self.path).path.split("/b/")[1].split("/")[0]
        with self.turn:
            there, _ = self._ask("GET", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}")
            if only_if == "0" and there == 200:
                found = 412, b'{"error": {"code": 412, "message": "conditionNotMet"}}'
            else:
                found = self._ask("POST", self.path, body)
            lost, type(self).lose_next = self.lose_next, False
            self.seen.append((only_if, 503 if lost else found[0]))
        self._answer(*((503, b"") if lost else found))

    def _ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        headers = {"Content-Type": self.headers.get("Content-Type", "")} if body else {}
        asked = urllib.request.Request(self.emulator + path, body or None, headers, method=method)
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = _forward

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def cloud_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_CloudStorage]]:
    import gcsfs

    port = free_port()
    emulator = [str(BIN / "gcp-storage-emulator"), "-d", str(tmp_path / "gcs"), "start", "--host=127.0.0.1"]
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    with (
        process([*emulator, f"--port={port}", "--default-bucket=ship"], port) as url,
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), _CloudStorage) as server,
    ):
        _CloudStorage.emulator = url
        _CloudStorage.seen.clear()
        serving = threading.Thread(target=server.serve_forever, daemon=True)
        serving.start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_address[1]}")
        gcsfs.GCSFileSystem.clear_instance_cache()
        try:
            yield _CloudStorage
        finally:
            server.shutdown()
            serving.join()
            gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.mark.long
def test_of_two_promotions_at_the_same_moment_one_wins_in_cloud_storage(cloud_storage):
    root = "gs://ship/artifacts"
    require_one_winner(root, race(root))
    assert sorted(cloud_storage.seen) == [("0", 200)] * 2 + [("0", 412)] * 3, "all of them ask to create"
    # the answer to a request is lost on its way: it is sent again, and finds what it wrote itself
    ledger = Ledger(root, "titanic-race")
    cloud_storage.lose_next = True
    third = ledger.append(ledger.entries()[-1], **FACTS)
    assert cloud_storage.seen[-2:] == [("0", 503), ("0", 412)]
    assert ledger.entries()[-1] == third


# --- one quick run, after a model that it betters


def weak_bundle(folder: Path, C: float = 100.0):
    "A real model, fitted on too few passengers."
    import pandas as pd

    from titanic_mlops.data.features import CATEGORICAL, NUMERIC, feature_frame
    from titanic_mlops.data.sources import EMBEDDED, canonical, read
    from titanic_mlops.model.background import background_json
    from titanic_mlops.model.bundle import (
        Bundle,
        BundleInfo,
        Lineage,
        reference_distributions,
        to_onnx,
        write_bundle,
    )
    from titanic_mlops.model.train import Candidate, fit, holdout_mask

    passengers = canonical(read(EMBEDDED).frame)
    few = passengers[~holdout_mask(passengers.ticket)].sample(80, random_state=0)
    X, y, ticket = feature_frame(few), few.survived.to_numpy(int), few.ticket.to_numpy(str)
    info = BundleInfo(
        candidate="weak",
        hyperparameters={"C": C},
        calibration="none",
        inputs=[*NUMERIC, *CATEGORICAL],
        split={"share": 0.2, "salt": "titanic-holdout-1"},
        figures={},
        reference=reference_distributions(X),
    )
    lineage = Lineage(git_commit="", snapshot="few", data_sha256="0" * 64, seed=0)
    oof = pd.DataFrame({"row": range(len(few)), "probability": y.mean()})
    background = background_json(few.reset_index(drop=True), oof)  # says whom it was trained on
    graph = to_onnx(fit(Candidate("logistic", {"C": C}), X, y, ticket))
    write_bundle(folder, graph, info, lineage, background=background)
    return Bundle(folder, [])


def registered(own: Settings, folder: Path, C: float = 100.0):
    "A registry, and a version in it that is no run's."
    from titanic_mlops.model.registry import Registry

    registry = Registry(own)
    experiment = registry.client.get_experiment_by_name(own.mlflow_experiment).experiment_id
    run = registry.client.create_run(experiment)
    return registry, registry.register(weak_bundle(folder, C), run.info.run_id)


@pytest.mark.parametrize("rejudged", [False, True])
def test_the_opponent_after_a_run_that_was_killed(tmp_path: Path, rejudged: bool):
    "The champion before, if the killed run has made the challenger champion; not if it has only judged it again."
    from titanic_mlops.model.gate import Decision

    registry, version = registered(settings(store=tmp_path / "store", mlflow_uri=""), tmp_path / "weak")
    experiment = registry.client.get_experiment_by_name(registry.settings.mlflow_experiment).experiment_id
    runs = [registry.client.create_run(experiment).info.run_id for _ in range(2)]
    registry.follow(Decision(promote=True, reason="first", conditions=[]), version, None, runs[0])
    if rejudged:
        registry.client.set_terminated(runs[0], "FINISHED")
        assert registry.opponent(version.digest).number == 1
        same = Decision(promote=False, reason="the same", conditions=[])
        registry.follow(same, version, registry.alias("champion"), runs[1])
    for run in runs[rejudged:]:
        registry.client.set_terminated(run, "KILLED")
    opponent = registry.opponent(version.digest)
    assert (opponent and opponent.number) == (1 if rejudged else None)
    if not rejudged:  # killed once more, in the middle of writing down the verdict
        registry.client.set_model_version_tag(registry.model, "1", "gate", "undecided")
        assert registry.opponent(version.digest) is None


def test_the_run_that_made_a_version_again_answers_for_it(tmp_path: Path):
    "Killed after the version was registered: the version names the dead run for good."
    from titanic_mlops.flow import verify
    from titanic_mlops.ground.errors import StoreError
    from titanic_mlops.model.gate import Decision

    registry, version = registered(settings(store=tmp_path / "store", mlflow_uri=""), tmp_path / "weak")
    registry.client.set_terminated(version.run_id, "KILLED")
    experiment = registry.client.get_experiment_by_name(registry.settings.mlflow_experiment).experiment_id
    parent = registry.client.create_run(experiment).info.run_id
    again = registry.client.create_run(experiment, tags={"mlflow.parentRunId": parent}).info.run_id
    registry.client.log_artifacts(again, str(tmp_path / "weak"), "outputs/bundle")
    registry.client.log_dict(again, {"context": {"mlflow_run": again}}, "manifest.json")
    registry.client.set_terminated(again, "FINISHED")
    bundle = registry.fetch(version)
    (tmp_path / "scratch").mkdir()
    with pytest.raises(StoreError, match="KILLED"):
        verify._registered_by(version, bundle, registry, tmp_path / "scratch")
    registry.judged(version, None, Decision(promote=True, reason="first", conditions=[]), again)
    version = registry.version(1)
    origin = verify._registered_by(version, bundle, registry, tmp_path / "scratch")
    assert origin.run == again and again[:8] in verify._who_registered(version, origin)


def test_no_override_reaches_a_version_that_no_gate_has_judged_and_that_can_not_answer(tmp_path: Path):
    from titanic_mlops.model.bundle import Bundle, write_bundle
    from titanic_mlops.model.gate import Decision
    from titanic_mlops.model.selftest import with_nan

    registry, weak = registered(settings(store=tmp_path / "store", mlflow_uri=""), tmp_path / "weak")
    sound, graph = Bundle(tmp_path / "weak"), (tmp_path / "weak" / "model.onnx").read_bytes()
    hurry = {"verdict": "", "reason": "we are in a great hurry", "by": "ismay", "override": True}
    for number, (content, contract, barred) in enumerate(
        [(with_nan(graph), sound.info.contract_version, "finite"), (graph, "99.0.0", "contract version")]
    ):
        folder = tmp_path / str(number)
        info = sound.info.model_copy(update={"contract_version": contract})
        write_bundle(folder, content, info, sound.lineage)
        version = registry.register(Bundle(folder), weak.run_id)
        assert "gate_barred" not in version.tags
        with pytest.raises(RegistryError, match=f"does not meet {barred}"):
            registry.promote(version, None, **hurry)
    registry.promote(weak, None, **hurry)  # nobody has judged it either, and it can answer

    # a gate that is cut off in its first words has said this one
    kept = registry.client.set_model_version_tag
    told: list[str] = []
    registry.client.set_model_version_tag = lambda *said: (told.append(said[2]), kept(*said))
    registry.judged(version, weak, Decision(promote=False, reason="stopped", conditions=[]))
    assert told[:2] == ["gate", "gate_barred"]


@pytest.mark.parametrize("by", ["x\n\n# Heading", "x", " " * 5, "n" * 101, "a\tb", "no\u200bbody"])
def test_a_name_is_one_that_can_be_shown(tmp_path: Path, by: str):
    from titanic_mlops.ground.errors import ParameterError

    registry, weak = registered(settings(store=tmp_path / "store", mlflow_uri=""), tmp_path / "weak")
    with pytest.raises(ParameterError, match="2 to 100 printable characters"):
        registry.promote(weak, None, "first", "first model", by=by)
    assert registry.entries() == []


@pytest.mark.parametrize(
    "forged", [{"action": "promote", "verdict": "better"}, {"action": "promote", "override": True}]
)
def test_an_entry_that_the_registry_was_not_told_of_moves_nobody(tmp_path: Path, forged: dict):
    ours = settings(store=tmp_path / "store", mlflow_uri="")
    registry, first = registered(ours, tmp_path / "weak")
    _, other = registered(ours, tmp_path / "other", C=50.0)
    registry.promote(first, None, "first", "first model", by="smith")
    [last] = registry.entries()
    turned = {"from_version": 1, "from_digest": first.digest, "to_version": 2, "to_digest": other.digest}
    facts = FACTS | turned | {"by": "the captain", "reason": "better by 0.1"} | forged
    entry = registry.ledger().append(last, **facts)  # the chain fits
    with pytest.raises(RegistryError, match="came past the registry: promote of version 2 by the captain"):
        registry.settle()
    assert registry.alias("champion").number == 1
    Path(registry.ledger()._path(entry.number)).unlink()
    registry.promote(registry.version(2), registry.alias("champion"), "better", "better by 0.1", by="smith")
    assert (registry.settle(), registry.alias("champion").number) == ("", 2)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkout, Settings]:
    "Version 1 serves by an override; a quick run makes version 2, which is better."
    own = checkout(tmp_path_factory.mktemp("story"))
    ours = settings(store=own.store)
    registry, weak = registered(ours, own.folder / "weak", C=0.3)
    registry.promote(weak, None, "", "we had nothing else", by="ismay", override=True)
    done = own.titanic("run", "model=logistic", *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "champion: titanic version 2" in done.stdout, done.stdout
    return own, ours


def broken(ours: Settings, file: Path | None = None) -> list[str]:
    from titanic_mlops.flow.verify import verify

    return verify(ours, file).broken


@contextmanager
def changed(path: Path, change: Callable[[bytes], bytes] | None = None) -> Iterator[None]:
    "A file with one bit flipped in its middle, or changed otherwise; put back at the end."
    good, mode = path.read_bytes(), path.stat().st_mode
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    path.write_bytes(change(good) if change else bytes(flipped))
    assert path.read_bytes() != good
    try:
        yield
    finally:
        path.write_bytes(good)
        path.chmod(mode)


def one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    assert len(found) == 1, (pattern, found)
    return found[0]


@pytest.mark.long
def test_the_whole_chain_is_whole(story):
    from titanic_mlops.flow.verify import verify

    own, ours = story
    for name in ("scored.csv", "scored.parquet"):
        chain = verify(ours, own.outputs("score") / name)
        assert not chain.broken, [link for link in chain.links if not link.whole]
        names = [link.name for link in chain.links]
        steps = ["score", "promote", "evaluate", "train.logistic", "document", "validate", "ingest"]
        wanted = {
            *(f"step {step}" for step in steps),
            "scored file",
            "rows",
            "model version",
            "bundle",
            "run",
        }
        assert wanted | {"code", "libraries", "data", "verdict", "ledger"} == set(names)
    elsewhere = shutil.copy(own.store / "latest" / "scored.csv", own.folder / "mine.csv")
    assert not broken(ours, Path(elsewhere))


BROKEN = {  # what is changed, below the store -> the link that must be named
    "latest/scored.csv": "scored file",
    "latest/scored.json": "rows",
    "steps/score/*/outputs/scored.parquet": "step score",
    "steps/score/*/manifest.json": "step score",
    "steps/score/*/notebook.ipynb": "step score",
    "steps/promote/*/outputs/decision.json": "step promote",
    "steps/promote/*/outputs/champion/model.onnx": "bundle",
    "steps/evaluate/*/notebook.ipynb": "step evaluate",
    "steps/evaluate/*/outputs/evaluation.json": "step evaluate",
    "steps/train.logistic/*/outputs/model.skops": "step train.logistic",
    "steps/validate/*/outputs/rows.parquet": "step validate",
    "steps/document/*/outputs/expectations.json": "step document",
    "steps/ingest/*/outputs/snapshot.json": "step ingest",
    "bundles/{digest}/bundle.json": "bundle",
    "mlartifacts/{run}/artifacts/model/*/data/bundle/model.onnx": "bundle",
    "mlartifacts/{run}/artifacts/model/*/data/bundle/lineage.json": "bundle",
    "mlartifacts/{run}/artifacts/model/*/MLmodel": "bundle",
    "mlartifacts/{run}/artifacts/model/*/analysis/model.skops": "bundle",
    "mlartifacts/{run}/artifacts/notebook.ipynb": "step promote",
    "mlartifacts/{run}/artifacts/manifest.json": "step promote",
    "artifacts/*/*.parquet": "data",
    "artifacts/ledger/*/00000001.json": "ledger",
    "artifacts/ledger/*/00000002.json": "ledger",
}


@pytest.mark.long
@pytest.mark.parametrize("what", BROKEN)
def test_a_changed_byte_is_found_and_its_link_named(story, what: str):
    own, ours = story
    from titanic_mlops.model.registry import Registry

    champion = Registry(ours).alias("champion")
    pattern = what.format(digest=champion.digest, run=champion.run_id)
    with changed(one(own.store, pattern)):
        assert BROKEN[what] in broken(ours)
    if "manifest" not in what:
        return
    with changed(one(own.store, pattern), lambda good: good.replace(b'"seconds": ', b'"seconds": 1')):
        assert BROKEN[what] in broken(ours)  # JSON as good as before


@pytest.mark.long
def test_what_is_changed_in_the_registry_is_found(story):
    _, ours = story
    from titanic_mlops.model.registry import Registry

    registry = Registry(ours)
    client, champion = registry.client, registry.alias("champion")
    number = str(champion.number)
    client.set_model_version_tag("titanic", number, "bundle_digest", "0" * 64)
    assert "model version" in broken(ours)
    client.set_model_version_tag("titanic", number, "bundle_digest", champion.digest)

    manifest = client.get_run(champion.run_id).data.tags["titanic.manifest"]
    client.set_tag(champion.run_id, "titanic.manifest", "0" * 64)
    assert "step promote" in broken(ours)
    client.set_tag(champion.run_id, "titanic.manifest", manifest)

    client.delete_run(champion.run_id)
    assert {"run", "step promote"} & set(broken(ours))
    client.restore_run(champion.run_id)

    client.set_registered_model_alias("titanic", "champion", "1")
    assert broken(ours) == ["ledger"]
    assert "past the ledger" in registry.settle()
    assert not broken(ours)


@pytest.mark.long
@pytest.mark.parametrize("name", ["lineage.json", "background.json", "contract.json"])
@pytest.mark.parametrize("place", ["bundles/{digest}", "mlartifacts/{run}/artifacts/model/*/data/bundle"])
def test_what_goes_with_a_model_can_not_be_changed_by_its_manifest(story, place: str, name: str):
    "The digest of a bundle says what the model is; the version's tag and the ledger vouch for the rest."
    own, ours = story
    from titanic_mlops.model.registry import Registry

    registry = Registry(ours)
    champion = registry.alias("champion")
    folder = one(own.store, place.format(digest=champion.digest, run=champion.run_id))

    good = (folder / name).read_bytes()

    def refit(manifest: bytes) -> bytes:
        said = json.loads(manifest)
        said["files"][name] = digest(folder / name)
        return json.dumps(said).encode()

    with (
        changed(folder / name, lambda good: b"1".join(good.rsplit(b"0", 1))),
        changed(folder / "manifest.json", refit),
    ):
        assert broken(ours) == ["bundle"]
        if place.startswith("bundles"):
            with pytest.raises(RegistryError, match="is not what was registered"):
                registry.fetch(champion, mend=False)
            assert (Path(registry.fetch(champion).folder) / name).read_bytes() == good  # the registered one


def test_the_ledger_vouches_for_what_goes_with_a_model(tmp_path: Path):
    from titanic_mlops.flow.verify import _require_ledger
    from titanic_mlops.ground.errors import StoreError

    registry, version = registered(settings(store=tmp_path / "store", mlflow_uri=""), tmp_path / "weak")
    registry.promote(version, None, "", "we had nothing else", by="ismay", override=True)
    bundle = registry.fetch(version)
    assert "entry 1 by ismay" in _require_ledger(bundle, version, registry)
    manifest = bundle.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("{", "{ ", 1))
    with pytest.raises(StoreError, match="entry 1 names another manifest"):
        _require_ledger(bundle, version, registry)


@pytest.mark.long
def test_what_mlflow_shows_is_what_was_found(story):
    "Figures and parameters of a step, and the gate's words on the version."
    own, ours = story
    from titanic_mlops.model.registry import Registry

    registry = Registry(ours)
    champion = registry.alias("champion")
    for tag in ("gate_verdict", "gate_reason", "gate"):
        registry.client.set_model_version_tag("titanic", str(champion.number), tag, "forged")
        assert broken(ours) == ["verdict"], tag
        registry.client.set_model_version_tag("titanic", str(champion.number), tag, champion.tags[tag])
    run = json.loads((own.outputs("evaluate").parent / "manifest.json").read_text())["context"]["mlflow_run"]
    for table, value in (("latest_metrics", 0.123), ("params", "1911")):
        with closing(sqlite3.connect(own.store / "mlflow.db")) as tables:
            where = (f"from {table} where run_uuid = ?", (run,))
            key, good = tables.execute(f"select key, value {where[0]}", where[1]).fetchone()
            for said, found in ((value, ["step evaluate"]), (good, [])):
                tables.execute(
                    f"update {table} set value = ? where run_uuid = ? and key = ?", (said, run, key)
                )
                tables.commit()
                assert broken(ours) == found


@pytest.mark.long
def test_a_ledger_that_was_cut_short_is_found(story):
    own, ours = story
    last = one(own.store, "artifacts/ledger/*/00000002.json")
    good = last.read_bytes()
    last.unlink()
    assert broken(ours) == ["ledger"]
    last.write_bytes(good)
    assert not broken(ours)


@pytest.mark.long
def test_a_row_that_names_another_model_is_found(story):
    own, ours = story
    with changed(own.store / "latest" / "scored.csv", lambda good: good.replace(b",2,", b",1,", 1)):
        assert {"scored file", "rows"} <= set(broken(ours))


@pytest.mark.long
@pytest.mark.parametrize("inputs", ["as they are", "taken out"])
def test_whoever_takes_the_run_out_of_a_manifest_is_found(story, inputs: str):
    "A scored row is changed, every file beside it made to fit, and the manifest names nobody who could object."
    own, ours = story
    outputs = own.outputs("score")
    sidecar, manifest = outputs / "scored.json", outputs.parent / "manifest.json"

    def refit(good: bytes) -> bytes:
        said = json.loads(good)
        said["outputs"] |= {file.name: digest(file) for file in (outputs / "scored.csv", sidecar)}
        del said["context"]["mlflow_run"]
        return json.dumps(said | ({} if inputs == "as they are" else {"inputs": {}})).encode()

    def rename(good: bytes) -> bytes:
        said = json.loads(good)
        return json.dumps(said | {"files": {"scored.csv": digest(outputs / "scored.csv")}}).encode()

    with (
        changed(outputs / "scored.csv", lambda good: good.replace(b",1,2,", b",0,2,", 1)),
        changed(sidecar, rename),
        changed(manifest, refit),
    ):
        found = broken(ours, outputs / "scored.csv")
    assert found == ["step score"] + ["step promote"] * (inputs == "taken out")


@pytest.mark.long
def test_an_executed_notebook_whose_manifest_names_no_run_is_found(story):
    own, ours = story
    folder = own.outputs("evaluate").parent

    def refit(good: bytes) -> bytes:
        said = json.loads(good)
        return json.dumps(said | {"notebook": digest(folder / "notebook.ipynb"), "context": {}}).encode()

    with (
        changed(folder / "notebook.ipynb", lambda good: good.replace(b"accuracy", b"acuracy!")),
        changed(folder / "manifest.json", refit),
    ):
        assert broken(ours) == ["step evaluate"]


@pytest.mark.long
def test_what_a_notebook_in_jupyterlab_has_made_first_is_on_record(tmp_path: Path):
    from titanic_mlops.flow.verify import Kept, _require_kept
    from titanic_mlops.model.registry import Registry

    own = checkout(tmp_path)
    made = own.python("from titanic_mlops.flow.execution import prepare_inputs; prepare_inputs('validate')")
    assert made.returncode == 0 and "running ingest first" in made.stdout, made.stdout + made.stderr
    kept = Kept.of(one(own.store, "steps/ingest/*/manifest.json").parent)
    registry = Registry(settings(store=own.store))
    assert _require_kept(kept, registry, tmp_path).startswith(f"run {kept.run[:8]}, ")
    parent = registry.client.get_run(kept.run).data.tags["mlflow.parentRunId"]
    assert registry.client.get_run(parent).info.status == "FINISHED"


@pytest.mark.long
def test_changed_code_is_found_by_the_command(story, tmp_path: Path):
    own, _ = story
    copy = tmp_path / "titanic_mlops"  # installed, and without the commits
    shutil.copytree(ROOT / "titanic_mlops", copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "nbs" / "pipeline", tmp_path / "nbs" / "pipeline")
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    with open(copy / "model" / "gate.py", "a") as gate:
        gate.write("\n# always better\n")
    code = "import sys; from titanic_mlops.face.cli import main; main(['verify'])"
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=own.folder,
        env=own.environment(PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert said.returncode == 1, said.stdout + said.stderr
    assert said.stdout.splitlines()[-1] == "broken: code"
    assert "neither the installed package nor commit" in said.stdout


@pytest.mark.long
def test_a_card_that_is_not_what_the_run_gives_is_found(story):
    "A figure that is the value of something else, and a row that is gone."
    from titanic_mlops.flow.figures import compare_cards
    from titanic_mlops.flow.reporting import latest_folders

    own, ours = story
    latest, folders = own.store / "latest", latest_folders(ours)
    card = latest / "model_card.md"
    assert compare_cards(latest, folders) == []
    row = next(line for line in card.read_text().splitlines() if line.startswith("| log loss |"))
    forged = "| log loss | 0.213 | 0.180 | 0.244 |"
    with changed(card, lambda good: good.replace(row.encode(), forged.encode())):
        assert compare_cards(latest, folders) == [
            f"model_card.md lacks: {row}",
            f"model_card.md says: {forged}",
        ]
        said = own.titanic("docs", "check")
    assert said.returncode == 1 and "0.213" in said.stdout, said.stdout + said.stderr


# --- from an answer of the server


@pytest.fixture(scope="module")
def answered(story) -> tuple[Checkout, Settings, dict]:
    "The champion has answered for one passenger, and that is on record."
    from titanic_mlops.model.registry import Registry
    from titanic_mlops.serve.fastpath import FastModel
    from titanic_mlops.serve.predict import OneModel
    from titanic_mlops.serve.predictions import PredictionLog, prediction_folder

    own, ours = story
    registry = Registry(ours)
    version = registry.alias("champion")
    served = OneModel(FastModel(registry.fetch(version)), str(version.number)).champion
    passenger = {"pclass": 3, "name": "Dean, Miss. Millvina", "sex": "female", "age": 0.17, "sibsp": 1, "parch": 2, "ticket": "C.A. 2315", "fare": 20.575}  # fmt: skip
    probability = served.model.one(passenger)
    log = PredictionLog(prediction_folder(ours), tidies=False, say=lambda *_, **__: None)
    log.append("dean-1", 10**18, served, passenger, probability)
    log.append("dean-2", 10**18, served, passenger | {"age": 80.0}, probability)  # whoever wrote that, lied
    log.append("dean-3", 10**18, served, passenger, probability, kind="shadow")
    log.close()
    said = {"request_id": "dean-1", "probability": probability, "model_version": str(version.number)}
    return own, ours, said | {"bundle_digest": version.digest, "survives": True, "threshold": 0.5}


def broken_from(ours: Settings, request_id: str, said: dict | None = None) -> list[str]:
    from titanic_mlops.flow.verify import verify_answer
    from titanic_mlops.serve.predictions import find, prediction_folder

    return verify_answer(ours, find(prediction_folder(ours), request_id), said).broken


@pytest.mark.long
def test_the_chain_from_an_answer(answered):
    own, _, said = answered
    kept = own.folder / "answer.json"
    kept.write_text(json.dumps(said))
    for begin in (["--response", str(kept)], ["--request-id", "dean-1"]):
        done = own.titanic("verify", *begin)
        assert done.returncode == 0, done.stdout + done.stderr
        for link in ("record", "answer", "model version", "bundle", "run", "step ingest", "data", "ledger"):
            assert f"✓ {link} " in done.stdout, (link, done.stdout)
    wrong = own.titanic("verify", "--response", str(kept), "--request-id", "dean-1")
    assert wrong.returncode == 2 and "a walk begins at one place" in wrong.stderr
    kept.write_text("<html>")
    assert own.titanic("verify", "--response", str(kept)).returncode == 2


@pytest.mark.long
def test_an_answer_that_was_changed_is_found_and_its_link_named(answered):
    own, ours, said = answered
    assert not broken_from(ours, "dean-1", said)
    for name, other in {"probability": 0.5, "model_version": "1", "bundle_digest": "0" * 64}.items():
        assert "record" in broken_from(ours, "dean-1", said | {name: other})
    assert broken_from(ours, "dean-1", {"request_id": "dean-1"}) == ["response"]
    forged = {"survives": not said["survives"], "threshold": 0.9, "caution": "promoted by ismay"}
    for name, other in forged.items():
        assert broken_from(ours, "dean-1", said | {name: other}) == ["answer"], name
    assert "record" in broken_from(ours, "nobody", said | {"request_id": "nobody"})
    assert broken_from(ours, "dean-3") == ["record"]  # of a shadow's answer nobody was told
    assert broken_from(ours, "dean-2") == ["answer"]
    [segment] = (own.store / "predictions" / "answers" / "_live").glob("*.closed")
    with changed(segment):
        assert "record" in broken_from(ours, "dean-1", said)
    with changed(one(own.store, f"bundles/{said['bundle_digest']}/model.onnx")):
        assert "bundle" in broken_from(ours, "dean-1", said)
    with changed(one(own.store, "artifacts/*/*.parquet")):
        assert broken_from(ours, "dean-1", said) == ["data"]
    with changed(one(own.store, "steps/validate/*/outputs/rows.parquet")):
        assert "step validate" in broken_from(ours, "dean-1", said)


def test_an_answer_that_has_lost_its_caution_is_found(tmp_path: Path):
    "And one from before the override is not asked for any."
    from titanic_mlops.flow.verify import _require_told
    from titanic_mlops.ground.errors import StoreError

    registry, version = registered(settings(store=tmp_path / "store", mlflow_uri=""), tmp_path / "weak")
    entry = registry.promote(version, None, "", "we had nothing else", by="ismay", override=True)
    bundle, then = registry.fetch(version), datetime.fromisoformat(entry.time)
    said = {"probability": 0.5, "survives": True, "threshold": 0.5, "model_version": "1"}
    marked = said | {"caution": entry.caution}
    _require_told(marked, {"time": then}, version, bundle, registry)
    _require_told(said, {"time": then - timedelta(seconds=2)}, version, bundle, registry)
    for answer, time in ((said, then), (marked, then - timedelta(seconds=2))):
        with pytest.raises(StoreError, match="caution is not what the ledger said"):
            _require_told(answer, {"time": time}, version, bundle, registry)


# --- back, and what stays


@pytest.mark.long
def test_two_who_have_both_seen_the_champion(story, tmp_path: Path):
    _, ours = story
    from titanic_mlops.model.registry import Registry

    registries = [registered(ours, tmp_path / str(C), C)[0] for C in (50.0, 60.0)]
    champion, start = registries[0].alias("champion"), Barrier(2)
    versions = [v for v in registries[0].versions() if v.number > champion.number]
    assert len(versions) == 2

    def promote(i: int) -> str:
        start.wait()
        try:
            registries[i].promote(versions[i], champion, "better", "at the same moment", by=f"racer {i}")
            return "won"
        except RegistryError as error:
            return error.what

    with ThreadPoolExecutor(2) as pool:
        said = sorted(pool.map(promote, range(2)))
    assert said[1] == "won" and ("same moment" in said[0] or "compared with" in said[0]), said
    registry = Registry(ours)
    assert len(registry.entries()) == 3 and registry.standing() != UNSETTLED
    registry.rollback(reason="it was a race", by="smith")
    assert registry.alias("champion").number == champion.number


@pytest.mark.long
def test_a_rollback_lasts(story):
    own, ours = story
    from titanic_mlops.model.registry import Registry

    back = own.titanic("rollback", "--reason", "too sure of third class", "--by", "murdoch")
    assert back.returncode == 0 and "version 1 is champion again" in back.stdout, back.stdout + back.stderr

    run = own.titanic("run", "model=logistic", *QUICK)  # the same data, the same bytes, the same verdict
    assert run.returncode == 0, run.stdout + run.stderr
    assert "version 2 was rolled back" in run.stdout and "murdoch (too sure of third class)" in run.stdout
    assert "champion: titanic version 1" in run.stdout
    for page in (run.stdout, (own.store / "latest" / "report.html").read_text()):
        assert "promoted by ismay against or without the gate: we had nothing else" in page

    again = own.titanic("run", "model=logistic", *QUICK)
    assert "8 of 8 steps recalled" in again.stdout, again.stdout
    sidecar = own.store / "latest" / "scored.json"
    assert "ismay" in json.loads(sidecar.read_text())["override"]
    with changed(sidecar, lambda good: good.replace(b"ismay", b"smith")):
        assert "rows" in broken(ours)
    registry = Registry(ours)
    with pytest.raises(RegistryError, match="version 2 was rolled back"):
        registry.require_gate(registry.version(2), registry.alias("champion"))


KILLED = """
import os, signal
from titanic_mlops.ground.settings import settings
from titanic_mlops.model.registry import Registry
registry = Registry(settings())
Registry._carry_out = lambda self, entry: os.kill(os.getpid(), signal.SIGKILL)
two = registry.version(2)
registry.promote(two, registry.alias("champion"), "", "third class agrees", by="lowe", override=True)
"""


@pytest.mark.long
def test_a_command_that_was_killed_is_mended_by_the_next(story):
    own, ours = story
    from titanic_mlops.model.registry import Registry

    before = len(Registry(ours).entries())
    killed = subprocess.run([sys.executable, "-c", KILLED], env=own.environment(), cwd=own.folder)
    assert killed.returncode == -signal.SIGKILL
    registry = Registry(ours)
    assert len(registry.entries()) == before + 1
    assert registry.standing() == UNSETTLED and registry.alias("champion").number == 1

    said = own.titanic("history")
    assert said.returncode == 0, said.stderr
    assert "mended: a command was cut off" in said.stdout and "version 2 is champion now" in said.stdout
    assert "OVERRIDE" in said.stdout and "lowe" in said.stdout
    assert registry.alias("champion").number == 2 and registry.standing() != UNSETTLED


# --- signatures


def test_only_what_a_trusted_key_has_signed_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from titanic_mlops.model.bundle import Bundle, new_key, sign

    weak_bundle(tmp_path / "weak")
    ours, theirs = new_key(tmp_path / "ours.pem"), new_key(tmp_path / "theirs.pem")
    assert (tmp_path / "ours.pem").stat().st_mode & 0o077 == 0
    with pytest.raises(BundleError, match="never overwritten"):
        new_key(tmp_path / "ours.pem")
    Bundle(tmp_path / "weak")  # no keys are configured
    monkeypatch.setenv("TITANIC_TRUSTED_KEYS", ours)
    with pytest.raises(BundleError, match="is not signed"):
        Bundle(tmp_path / "weak")
    sign(tmp_path / "weak", tmp_path / "theirs.pem")
    with pytest.raises(BundleError, match="not trusted"):
        Bundle(tmp_path / "weak")
    signature = json.loads((tmp_path / "weak" / "manifest.sig").read_text())
    forged = json.dumps(signature | {"key": ours})
    (tmp_path / "weak" / "manifest.sig").write_text(forged)
    with pytest.raises(BundleError, match="does not fit"):
        Bundle(tmp_path / "weak")
    sign(tmp_path / "weak", tmp_path / "ours.pem")
    assert Bundle(tmp_path / "weak").signed_by == ours
    monkeypatch.setenv("TITANIC_TRUSTED_KEYS", f"{theirs}, {ours}")
    assert Bundle(tmp_path / "weak").signed_by == ours
    for name in ("model.onnx", "bundle.json", "lineage.json", "manifest.json"):
        with changed(tmp_path / "weak" / name), pytest.raises(BundleError):
            Bundle(tmp_path / "weak")


def test_a_file_of_titanic_score_is_walked_from_and_scored_again(finished, tmp_path: Path):
    from titanic_mlops.data.sources import EMBEDDED, read

    own: Checkout = finished[0]
    source, out = tmp_path / "list.csv", tmp_path / "out.csv"
    read(EMBEDDED).frame.head(100).to_csv(source, index=False)
    assert own.titanic("score", str(source), str(out)).returncode == 0
    whole = own.titanic("verify", str(out))
    assert whole.returncode == 0 and "scored again, comes to the same bytes" in whole.stdout, whole.stdout
    kept = out.read_text()
    out.write_text(kept.replace(",0.1", ",0.2", 1))
    assert out.read_text() != kept
    changed = own.titanic("verify", str(out))
    assert changed.returncode == 1 and "comes to other rows" in changed.stdout, changed.stdout
    out.write_text(kept)
    source.write_text(source.read_text() + "\n")
    assert "not scored again" in own.titanic("verify", str(out)).stdout


def test_a_copy_of_a_bundle_that_was_damaged_is_fetched_again(finished):
    from titanic_mlops.model.registry import Registry

    own: Checkout = finished[0]
    registry = Registry(settings(store=own.store))
    version = registry.alias("champion")
    copy = Path(registry.fetch(version).folder) / "model.onnx"
    before = copy.read_bytes()
    copy.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert registry.fetch(version).digest == version.digest and copy.read_bytes() == before


def test_a_server_does_not_go_back_to_what_was_taken_back_for_all(tmp_path: Path):
    from types import SimpleNamespace

    from titanic_mlops.serve import models as serving

    own = settings(store=tmp_path / "store", mlflow_uri="")
    registry, first = registered(own, tmp_path / "first", C=100.0)
    _, second = registered(own, tmp_path / "second", C=10.0)
    registry.promote(first, None, "", "the first one", by="lightoller", override=True)
    registry.promote(second, registry.alias("champion"), "", "a better one", by="lightoller", override=True)
    before = lambda version: SimpleNamespace(
        previous=SimpleNamespace(version=str(version.number), digest=version.digest)
    )
    serving._require_not_withdrawn(before(first), own)
    registry.rollback(None, "worse at sea", "lightoller")
    serving._require_not_withdrawn(before(first), own)
    with pytest.raises(RegistryError, match="worse at sea"):
        serving._require_not_withdrawn(before(second), own)
    serving._require_not_withdrawn(before(second), None)  # a server of one folder knows no ledger
