"""The fast path says what the bundle says, and a server imports nothing that it does not need."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from checkout import NOT_FOR_SERVERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from titanic_mlops.data.features import feature_frame
from titanic_mlops.data.sources import EMBEDDED, canonical, read
from titanic_mlops.data.strategies import passengers
from titanic_mlops.data.targets import REQUEST_ROLES, request_model
from titanic_mlops.model.bundle import Bundle, BundleInfo, Lineage, to_onnx, write_bundle
from titanic_mlops.model.train import Candidate, fit
from titanic_mlops.serve.fastpath import FastModel


@pytest.fixture(scope="module", params=["logistic", "boosting"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    everybody = canonical(read(EMBEDDED).frame)
    X, y = feature_frame(everybody), everybody.survived.to_numpy(int)
    candidate = Candidate(request.param)
    graph = to_onnx(fit(candidate, X, y, everybody.ticket.to_numpy(str)))
    info = BundleInfo(
        candidate=request.param, hyperparameters={}, calibration=candidate.calibration,
        inputs=[*X.columns], split={}, figures={}, reference={},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp(request.param)
    write_bundle(folder, graph, info, Lineage(git_commit="", snapshot="", data_sha256="", seed=0))
    yield Bundle(folder, [])


def test_one_many_and_the_bundle_agree_on_all_that_the_contract_allows(bundle: Bundle):
    model = FastModel(bundle)

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.lists(passengers(REQUEST_ROLES), min_size=1, max_size=18))
    def agree(rows: list[dict]) -> None:
        asked = [request_model().model_validate_json(json.dumps(row)).__dict__ for row in rows]
        slow = bundle.predict(pd.DataFrame(asked))
        assert np.abs(model.many(asked) - slow).max() < 1e-6
        assert np.abs(np.array([model.one(row) for row in asked]) - slow).max() < 1e-6

    agree()


def imported_by(code: str) -> set[str]:
    "Top-level modules that a fresh process holds after some code."
    ends = "; import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code + ends], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_app_imports_nothing_of_the_pipeline():
    loaded = imported_by("import titanic_mlops.serve.app, titanic_mlops.serve.server")
    assert {"numpy", "uvicorn"} <= loaded
    assert not (NOT_FOR_SERVERS | {"fastapi"}) & loaded  # no passenger waits for the framework
    loaded = imported_by("import titanic_mlops.serve.routes")
    assert "fastapi" in loaded and not NOT_FOR_SERVERS & loaded


def test_what_answers_imports_no_more_when_it_is_asked(bundle: Bundle):
    code = f"""
import json
from pathlib import Path
from starlette.testclient import TestClient
from titanic_mlops.model.bundle import Bundle
from titanic_mlops.serve.app import create_app
from titanic_mlops.serve.fastpath import FastModel

from titanic_mlops.serve.predict import OneModel
client = TestClient(create_app(OneModel(FastModel(Bundle(Path({str(bundle.folder)!r}), [])))))
dean = dict(pclass=3, name="Dean, Miss. Millvina", sex="female", sibsp=1, parch=2, ticket="2315")
assert client.post("/v1/predict", json=dean).status_code == 200
assert client.post("/v1/predict/batch", json=[dean]).status_code == 200
assert client.post("/v1/predict", json=dict(dean, age=200)).status_code == 422
assert all(client.get(path).status_code == 200 for path in ("/docs", "/metrics", "/readyz", "/v1/model", "/"))
"""
    assert not NOT_FOR_SERVERS & imported_by(code.strip())


def test_the_lock_of_a_server_holds_nothing_of_the_pipeline():
    lock = (Path(__file__).parent.parent / "requirements" / "serve.lock").read_text(encoding="utf-8")
    locked = {line.partition("==")[0] for line in lock.splitlines() if "==" in line}
    refused = {
        "great-expectations",
        "mlflow",
        "onnx",
        "pandas",
        "pandera",
        "prefect",
        "ray",
        "scikit-learn",
        "skl2onnx",
    }
    assert {"fastapi", "onnxruntime", "uvicorn"} <= locked and not refused & locked
