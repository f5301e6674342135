"""Foreign clients against a real server: MLflow's own, unchanged, and tensors over REST; the same contract and the same probabilities as /v1/predict."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from guarded import DEAN, Running, serving

from titanic_mlops.data.contract import columns
from titanic_mlops.data.features import CATEGORICAL, NUMERIC, feature_frame
from titanic_mlops.data.sources import EMBEDDED, canonical, read
from titanic_mlops.model.bundle import Bundle, BundleInfo, Lineage, to_onnx, write_bundle
from titanic_mlops.model.train import Candidate, fit
from titanic_mlops.serve.protocols import DATATYPES, FORMATS, Refused, read_inference, rows_of_frame
from titanic_mlops.serve.security import KeyFile

SEEN = [c.name for c in columns() if c.role == "feature"]
KINDS = {c.name: DATATYPES[c.kind] for c in columns()}


@pytest.fixture(scope="module")
def passengers() -> pd.DataFrame:
    return canonical(read(EMBEDDED).frame)


@pytest.fixture(scope="module")
def bundle(passengers: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A small model."
    X, y = feature_frame(passengers), passengers.survived.to_numpy(int)
    graph = to_onnx(fit(Candidate("logistic"), X, y, passengers.ticket.to_numpy(str)))
    empty = {"hyperparameters": {}, "calibration": "none", "split": {}, "figures": {}, "reference": {}}
    info = BundleInfo(candidate="logistic", inputs=[*NUMERIC, *CATEGORICAL], **empty)
    folder = tmp_path_factory.mktemp("bundle")
    write_bundle(
        folder, graph, info, Lineage(git_commit="0" * 40, snapshot="tests", data_sha256="0" * 64, seed=0)
    )
    return folder


@pytest.fixture(scope="module")
def keyed(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, str]]:
    "A server, and a key to it."
    store = tmp_path_factory.mktemp("protocols")
    _, key = KeyFile(store / "keys.json").new("tests", ["predict"])
    with serving(store, bundle) as running:
        yield running, key


def probabilities(bundle: Path, frame: pd.DataFrame) -> np.ndarray:
    return Bundle(bundle, []).predict(frame)


def record(row: pd.Series) -> dict:
    "A passenger as JSON has it."
    return {k: None if pd.isna(v) else v for k, v in row.astype(object).items() if k in KINDS}


# --- MLflow


def test_mlflows_client_unchanged(keyed: tuple[Running, str], bundle: Path, passengers: pd.DataFrame):
    from mlflow.pyfunc.scoring_server.client import ScoringServerClient

    running, key = keyed
    client = ScoringServerClient(
        f"anybody:{key}@127.0.0.1", running.port
    )  # the key in the address, as curl has it
    client.wait_server_ready(timeout=30)
    assert client.get_version()
    sample = passengers.sample(150, random_state=3)
    for frame in (sample[SEEN], sample):  # what the signature names; and all there is, boats too
        said = client.invoke(frame.astype(object).where(frame.notna(), np.nan))
        found = said.get_predictions("ndarray")
        assert np.abs(found - probabilities(bundle, sample)).max() < 1e-6
        assert said.get_predictions().shape == (150, 1)
    with pytest.raises(Exception, match=r"error code 400.*rows\.1\.age: above 110"):
        client.invoke(pd.DataFrame([DEAN, DEAN | {"age": 170}]))
    with pytest.raises(Exception, match="error code 401"):
        ScoringServerClient("127.0.0.1", running.port).invoke(sample[SEEN])


def test_every_spelling_is_the_same(keyed: tuple[Running, str], passengers: pd.DataFrame):
    running, key = keyed
    sample = passengers.sample(20, random_state=4)[[*SEEN, "ticket"]]
    records = [record(row) for _, row in sample.iterrows()]
    split = {"columns": list(records[0]), "data": [list(r.values()) for r in records]}
    bodies = [
        {"dataframe_split": split},
        {"dataframe_records": records},
        {"instances": records},
        {"inputs": records, "params": {"anything": 1}},
        {"inputs": {name: [r[name] for r in records] for name in records[0]}},
    ]
    answers = [running.post("/invocations", key, json=body) for body in bodies]
    for text in (
        sample.to_csv(index=False),
        sample.to_csv(),
        "\ufeff" + sample.to_csv(index=False).replace("\n", "\r\n"),
    ):
        headers = {"content-type": "text/csv; charset=utf-8"}
        answers.append(running.post("/invocations", key, json=None, content=text.encode(), headers=headers))
    singly = [running.post(key=key, json=r).json()["probability"] for r in records]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert np.abs(np.array(answer.json()["predictions"]) - singly).max() < 1e-6
        assert answer.headers["x-model-version"] == "7" and len(answer.headers["x-bundle-digest"]) == 64


def test_the_spellings_are_mlflows():
    from mlflow.pyfunc.scoring_server import infer_and_parse_data

    rows = [{"pclass": 1, "age": 2.5, "name": "a"}, {"pclass": 2, "age": None, "name": "b"}]
    split = {"columns": ["pclass", "age", "name"], "data": [[1, 2.5, "a"], [2, None, "b"]], "index": [5, 7]}
    for name, frame in zip(FORMATS[:2], (split, rows), strict=True):
        theirs = infer_and_parse_data({name: frame})
        ours = pd.DataFrame(rows_of_frame({name: frame}))
        pd.testing.assert_frame_equal(ours, theirs.reset_index(drop=True), check_dtype=False)


@pytest.mark.parametrize(
    ("body", "kind", "status", "said"),
    [
        (b"", "application/json", 400, "not JSON"),
        (b"[]", "application/json", 400, "list"),
        (b"{}", "application/json", 400, "exactly one of"),
        (b'{"instances": [], "inputs": []}', "application/json", 400, "exactly one of"),
        (b'{"instances": [], "instance": []}', "application/json", 400, "did you mean"),
        (b'{"dataframe_split": {"columns": ["age"]}}', "application/json", 400, "`data`"),
        (
            b'{"dataframe_split": {"columns": [["age"]], "data": []}}',
            "application/json",
            400,
            "unknown column",
        ),
        (b'{"dataframe_split": {"columns": ["age", "age"], "data": []}}', "application/json", 400, "twice"),
        (b'{"dataframe_split": {"columns": ["age"], "data": [[1, 2]]}}', "application/json", 400, "row 0"),
        (b'{"dataframe_records": {"age": 1}}', "application/json", 400, "list of records"),
        (b'{"dataframe_records": [{"agee": 1}]}', "application/json", 400, "did you mean 'age'"),
        (b'{"dataframe_records": [{"age": 1, "age": 2}]}', "application/json", 400, "twice"),
        (b'{"dataframe_records": [{"age": Infinity}]}', "application/json", 400, "Infinity"),
        (b'{"dataframe_records": [{"age": 1e999}]}', "application/json", 400, "not a finite number"),
        (b'{"dataframe_records": [{"name": "\\ud800"}]}', "application/json", 400, "surrogate"),
        (b'{"dataframe_records": ' + b"[" * 50_000, "application/json", 400, "deep"),
        (b'{"dataframe_records": [{"age": ' + b"9" * 6000 + b"}]}", "application/json", 400, "JSON"),
        (b"\xff\xfe", "application/json", 400, "UTF-8"),
        (b"pclass,age\n1\n", "text/csv", 400, "row 0 has 1 cells"),
        (b'pclass,name\n1,"x', "text/csv", 400, "CSV"),
        (b"agee\n1\n", "text/csv", 400, "did you mean"),
        (b"\xff", "text/csv", 400, "UTF-8"),
        (b"pclass,sex,name,sibsp,parch\nx,female,a,0,0\n", "text/csv", 400, "rows.0.pclass: of type str"),
        (b"x", "text/plain", 415, "application/json"),
        (b"x", "", 415, "application/json"),
        (b"{}", "application/json; charset=latin-1", 415, "UTF-8"),
        (b"{}", "application/json; format=pandas-split", 415, "not understood"),
    ],
)
def test_errors_in_mlflows_form(keyed: tuple[Running, str], body: bytes, kind: str, status: int, said: str):
    running, key = keyed
    answer = running.post("/invocations", key, json=None, content=body, headers={"content-type": kind})
    assert answer.status_code == status, answer.text
    found = answer.json()
    assert found["error_code"] in ("BAD_REQUEST", "INVALID_PARAMETER_VALUE") and said in found["message"], (
        found
    )
    assert "Traceback" not in answer.text and len(answer.text) < 5000


def test_nothing_and_much(keyed: tuple[Running, str]):
    running, key = keyed
    assert running.post("/invocations", key, json={"instances": []}).json() == {"predictions": []}
    many = running.post("/invocations", key, json={"instances": [DEAN] * 1234})
    assert len(set(many.json()["predictions"])) == 1 and len(many.json()["predictions"]) == 1234
    bad = running.post("/invocations", key, json={"instances": [*[DEAN] * 900, *[DEAN | {"sex": "x"}] * 99]})
    assert "rows.900.sex" in bad.json()["message"] and "and 79 more" in bad.json()["message"]


# --- Open Inference Protocol


def tensors(*rows: dict) -> list[dict]:
    found = []
    for name in dict.fromkeys(name for row in rows for name in row):
        data = [row.get(name) for row in rows]
        found.append({"name": name, "datatype": KINDS[name], "shape": [len(rows)], "data": data})
    return found


def packed(said: dict) -> tuple[bytes, bytes]:
    "A request with its tensors in the binary form: the JSON, and what stands behind it."
    tail = b""
    for tensor in said["inputs"]:
        data, empty = tensor.pop("data"), {"BYTES": "", "FP64": float("nan"), "INT64": 0}[tensor["datatype"]]
        data = [empty if value is None else value for value in data]
        if tensor["datatype"] == "BYTES":
            piece = b"".join(struct.pack("<I", len(v.encode())) + v.encode() for v in data)
        else:
            piece = np.array(data, {"FP64": "<f8", "INT64": "<i8"}[tensor["datatype"]]).tobytes()
        tensor["parameters"], tail = {"binary_data_size": len(piece)}, tail + piece
    return json.dumps(said).encode(), tail


def test_the_servers_and_the_models_facts(keyed: tuple[Running, str]):
    running, key = keyed
    assert running.get("/v2/health/live").json() == {"live": True}
    assert running.get("/v2/health/ready").json()["ready"] is True
    server = running.get("/v2", key).json()
    assert server["name"] == "titanic_mlops" and server["extensions"] == ["binary_tensor_data"]
    assert running.get("/v2").status_code == 401
    for path in ("/v2/models/titanic", "/v2/models/titanic/versions/7"):
        facts = running.get(path, key).json()
        assert facts["name"] == "titanic" and facts["versions"] == ["7"] and facts["platform"]
        assert {t["name"]: t["datatype"] for t in facts["inputs"]} == {
            c.name: KINDS[c.name] for c in columns() if c.role in ("feature", "label")
        }
        assert [t["name"] for t in facts["outputs"]] == ["probability", "survived"]
        assert running.get(f"{path}/ready", key).json() == {"name": "titanic", "ready": True}
    for path in (
        "/v2/models/olympic",
        "/v2/models/titanic/versions/8",
        "/v2/models/titanic/versions/8/ready",
    ):
        answer = running.get(path, key)
        assert answer.status_code == 404 and list(answer.json()) == ["error"]


def test_inference(keyed: tuple[Running, str], bundle: Path, passengers: pd.DataFrame):
    running, key = keyed
    sample = passengers.sample(60, random_state=5)
    rows = [record(row) for _, row in sample[SEEN].iterrows()]
    expected = probabilities(bundle, sample)
    said = {"id": "42", "parameters": {"priority": 3}, "inputs": tensors(*rows)}
    for path in ("/v2/models/titanic/infer", "/v2/models/titanic/versions/7/infer"):
        found = running.post(path, key, json=said).json()
        assert (found["id"], found["parameters"]) == ("42", {"priority": 3})
        assert (found["model_name"], found["model_version"]) == ("titanic", "7")
        probability, survived = found["outputs"]
        assert (probability["name"], probability["datatype"], probability["shape"]) == (
            "probability",
            "FP64",
            [60],
        )
        assert np.abs(np.array(probability["data"]) - expected).max() < 1e-6
        assert survived["datatype"] == "INT64" and survived["data"] == (expected >= 0.5).astype(int).tolist()

    nested = [t | {"shape": [60, 1], "data": [[v] for v in t["data"]]} for t in said["inputs"]]
    one = running.post(path, key, json={"inputs": nested, "outputs": [{"name": "probability"}]}).json()
    assert one["outputs"] == [probability] and "id" not in one

    asked = [{"name": "probability", "parameters": {"binary_data": True}}, {"name": "survived"}]
    head, tail = packed({"inputs": tensors(*rows), "outputs": asked})
    headers = {"inference-header-content-length": str(len(head)), "content-type": "application/octet-stream"}
    answer = running.post(path, key, json=None, content=head + tail, headers=headers)
    size = int(answer.headers["inference-header-content-length"])
    outputs = json.loads(answer.content[:size])["outputs"]
    assert np.array_equal(np.frombuffer(answer.content[size:], "<f8"), probability["data"])
    assert outputs[1]["data"] == survived["data"] and "data" not in outputs[0]
    for wrong in (head + tail[:-1], head + tail + b"x", head[:-1] + tail):
        assert running.post(path, key, json=None, content=wrong, headers=headers).status_code == 400
    for length in ("-1", "x", "99999999", "1e3", "", "²"):
        bad = headers | {b"inference-header-content-length": length.encode()}
        del bad["inference-header-content-length"]
        assert running.post(path, key, json=None, content=head + tail, headers=bad).status_code == 400


GOOD = tensors(DEAN)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"inputs": []}, "list of tensors"),
        ({"inputs": [7]}, "object with name"),
        ({"inputs": [*GOOD, GOOD[0]]}, "pclass is there twice"),
        ({"inputs": GOOD[1:]}, "missing: pclass"),
        (
            {"inputs": [*GOOD, {"name": "agee", "datatype": "FP64", "shape": [1], "data": [1]}]},
            "did you mean 'age'",
        ),
        (
            {"inputs": [*GOOD, {"name": "boat", "datatype": "BYTES", "shape": [1], "data": ["2"]}]},
            "afterwards",
        ),
        (
            {"inputs": [*GOOD, {"name": "age", "datatype": "INT64", "shape": [1], "data": [1]}]},
            "must be FP64",
        ),
        ({"inputs": [*GOOD, {"name": "age", "datatype": "FP64", "shape": [1, 2], "data": [1, 2]}]}, "[n, 1]"),
        ({"inputs": [*GOOD, {"name": "age", "datatype": "FP64", "shape": [-1], "data": [1]}]}, "[n, 1]"),
        ({"inputs": [*GOOD, {"name": "age", "datatype": "FP64", "shape": [True], "data": [1]}]}, "[n, 1]"),
        ({"inputs": [*GOOD, {"name": "age", "datatype": "FP64", "shape": "1", "data": [1]}]}, "[n, 1]"),
        (
            {"inputs": [*GOOD, {"name": "age", "datatype": "FP64", "shape": [10**30], "data": [1]}]},
            "its shape says",
        ),
        (
            {"inputs": [*GOOD, {"name": "age", "datatype": "FP64", "shape": [2], "data": [1, 2]}]},
            "different lengths",
        ),
        (
            {"inputs": [*GOOD, {"name": "age", "datatype": "FP64", "shape": [1], "data": [170]}]},
            "rows.0.age: above 110",
        ),
        (
            {"inputs": [*GOOD, {"name": "age", "datatype": "FP64", "shape": [1], "data": ["x"]}]},
            "not a number",
        ),
        (
            {"inputs": [*GOOD, {"name": "age", "datatype": "FP64", "shape": [1], "data": [[1]]}]},
            "not a number",
        ),
        ({"inputs": [*GOOD, {"name": "age", "datatype": "FP64", "shape": [1]}]}, "`data` is a list"),
        ({"inputs": GOOD, "id": 7}, "`id`"),
        ({"inputs": GOOD, "parameters": []}, "`parameters`"),
        ({"inputs": GOOD, "parameters": 7}, "`parameters`"),
        ({"inputs": GOOD, "outputs": [{"name": "death"}]}, "unknown output 'death'"),
        ({"inputs": GOOD, "outputs": 7}, "unknown output"),
        ({}, "list of tensors"),
    ],
)
def test_a_wrong_inference_is_told_what_is_wrong(keyed: tuple[Running, str], said: dict, wanted: str):
    running, key = keyed
    answer = running.post("/v2/models/titanic/infer", key, json=said)
    assert answer.status_code == 400 and list(answer.json()) == ["error"], answer.text
    assert wanted in answer.json()["error"], answer.text


def test_tritons_client(keyed: tuple[Running, str], bundle: Path, passengers: pd.DataFrame):
    http = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")
    running, key = keyed
    headers = {"authorization": f"Bearer {key}"}
    sample = passengers.sample(30, random_state=6)
    expected = probabilities(bundle, sample)
    with http.InferenceServerClient(f"127.0.0.1:{running.port}") as client:
        assert (
            client.is_server_live()
            and client.is_server_ready()
            and client.is_model_ready("titanic", headers=headers)
        )
        for binary in (True, False):
            inputs = []
            for t in tensors(*[record(row) for _, row in sample[SEEN].iterrows()]):
                kind = {"BYTES": object, "FP64": float, "INT64": np.int64}[t["datatype"]]
                empty = "" if kind is object else np.nan
                one = http.InferInput(t["name"], t["shape"], t["datatype"])
                one.set_data_from_numpy(
                    np.array([empty if v is None else v for v in t["data"]], kind), binary
                )
                inputs.append(one)
            outputs = [http.InferRequestedOutput("probability", binary_data=binary)]
            found = client.infer("titanic", inputs, outputs=outputs, headers=headers).as_numpy("probability")
            assert np.abs(found - expected).max() < 1e-6


@pytest.mark.parametrize("length", ["0" * 5000, "0" * 12 + "9", "-1", "x", ""])
def test_a_length_that_is_none(length: str):
    with pytest.raises(Refused, match="inference-header-content-length"):
        read_inference(b"{}", length)


# --- the record


def test_the_record_holds_them_or_nothing_is_answered(bundle: Path):
    from fastapi.testclient import TestClient

    from titanic_mlops.serve.app import create_app
    from titanic_mlops.serve.fastpath import FastModel
    from titanic_mlops.serve.predict import OneModel
    from titanic_mlops.serve.predictions import LogFullError

    class Record:
        def __init__(self) -> None:
            self.full, self.kept = False, []

        def append(self, *facts) -> None:
            if self.full:
                raise LogFullError("answers can't be recorded at the moment")
            self.kept.append(facts)

        def stats(self) -> dict[str, float]:
            return {}

    record = Record()
    client = TestClient(create_app(OneModel(FastModel(Bundle(bundle, []))), log=record))
    asked = {"/invocations": {"instances": [DEAN]}, "/v2/models/titanic/infer": {"inputs": tensors(DEAN)}}
    asked |= {"/v1/predict": DEAN}
    for path, body in asked.items():
        record.full = False
        assert client.post(path, json=body, headers={"x-request-key": "k"}).status_code == 200
        assert record.kept[-1][-3:] == ("champion", "champion", "k"), path
        record.full = True
        refused = client.post(path, json=body)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1"), path


def test_a_large_table_finds_room_in_the_record(tmp_path: Path):
    from guarded import Half
    from starlette.testclient import TestClient

    from titanic_mlops.ground.settings import Settings
    from titanic_mlops.serve.app import create_app
    from titanic_mlops.serve.predict import OneModel
    from titanic_mlops.serve.predictions import open_prediction_log

    own = Settings(store=tmp_path, predictions_queue=1000, predictions_when_full="refuse")
    log = open_prediction_log(own)
    client = TestClient(create_app(OneModel(Half(), "7"), None, log, own))
    rows = [DEAN] * 6000
    table = {"dataframe_split": {"columns": list(DEAN), "data": [list(DEAN.values())] * 6000}}
    assert len(client.post("/invocations", json=table).json()["predictions"]) == 6000
    assert len(client.post("/v1/predict/batch", json=rows).json()["predictions"]) == 6000
    log.close()
    assert (log.stats()["written"], log.stats()["dropped"]) == (12_000, 0)
