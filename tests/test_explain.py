"""Explanations: what a notebook can't show. Any passenger, any model; what is asked wrongly; who may ask."""

import json
import threading
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

KINDS = ("logistic", "boosting")
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict:
    "A bundle with a background of each kind of model; the boosted one looks at the deck."
    from explained import make_bundle

    return {
        kind: make_bundle(tmp_path_factory.mktemp(kind), kind, with_deck=kind == "boosting") for kind in KINDS
    }


@pytest.fixture(scope="module")
def explainers(bundles: dict) -> dict:
    from titanic_mlops.serve.explain import Explainer

    return {kind: Explainer(bundle) for kind, bundle in bundles.items()}


def passengers() -> st.SearchStrategy[dict]:
    "Any passenger that the contract takes, mostly on a deck that there is."
    from titanic_mlops.data.strategies import passengers as any_passengers
    from titanic_mlops.data.targets import REQUEST_ROLES

    cabins = st.sampled_from((None, "C85", "B5", "D", "F G73", "T", "Z9", "é"))
    return st.builds(lambda one, cabin: one | {"cabin": cabin}, any_passengers(REQUEST_ROLES), cabins)


def probability(bundle, passenger: dict) -> float:
    "What the bundle itself says, through pandas."
    import pandas as pd

    return float(bundle.predict(pd.DataFrame([passenger]))[0])


@pytest.mark.parametrize("kind", KINDS)
def test_pushes_add_up_to_the_prediction_for_any_passenger(kind: str, bundles: dict, explainers: dict):
    seen = []

    @quick
    @given(passenger=passengers())
    def check(passenger: dict) -> None:
        found = explainers[kind].explain(passenger)
        total = found.base + sum(push.points for push in found.pushes)
        assert abs(total - found.probability) < 1e-9
        assert abs(total - probability(bundles[kind], passenger)) < 1e-6
        assert sorted(push.column for push in found.pushes) == sorted(explainers[kind].players)
        seen.append(found.probability)

    check()
    assert len(seen) >= 40 and np.ptp(seen) > 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_meet_in_no_feature(kind: str, bundles: dict, explainers: dict):
    "Each coalition's value is the mean over mixtures whose features are derived whole."
    from titanic_mlops.data.features import features
    from titanic_mlops.serve.fastpath import FastModel

    model, explainer = FastModel(bundles[kind]), explainers[kind]
    sample = [explainer.background.passenger(row) for row in explainer.background.sample]

    @settings(quick, max_examples=8)
    @given(
        passenger=passengers(),
        masks=st.lists(st.integers(0, 2 ** len(explainer.players) - 1), min_size=6, max_size=6),
    )
    def check(passenger: dict, masks: list[int]) -> None:
        values = explainer.values(passenger)
        for mask in masks:
            own = {c: passenger.get(c) for i, c in enumerate(explainer.players) if mask >> i & 1}
            rows = [features(one | own) for one in sample]
            assert abs(model.feature_rows(rows).mean() - values[mask]) < 1e-6

    check()


def test_every_feature_hangs_on_one_block_and_every_column_is_in_one():
    from titanic_mlops.data.contract import feature_columns
    from titanic_mlops.data.features import CATEGORICAL, DOUBTFUL, NUMERIC
    from titanic_mlops.serve.explain import BLOCKS

    derived = [name for names in BLOCKS.values() for name in names]
    assert sorted(derived) == sorted((*NUMERIC, *CATEGORICAL, *DOUBTFUL))
    assert sorted(c for columns in BLOCKS for c in columns) == sorted(feature_columns())


def test_shares_are_the_average_over_all_orders():
    from titanic_mlops.serve.explain import shapley

    @quick
    @given(values=st.lists(st.floats(-1, 1), min_size=16, max_size=16))
    def check(values: list[float]) -> None:
        orders, shares = list(permutations(range(4))), np.zeros(4)
        for order in orders:
            mask = 0
            for player in order:
                shares[player] += values[mask | 1 << player] - values[mask]
                mask |= 1 << player
        assert np.allclose(shapley(np.array(values)), shares / len(orders), atol=1e-12)

    check()


def test_symmetric_columns_share_alike_and_a_dummy_gets_nothing(bundles: dict, explainers: dict):
    "The model knows the size of a family only, and nothing of the deck: two columns that do the same, and one that does nothing."
    from titanic_mlops.model.background import Background
    from titanic_mlops.serve.explain import Explainer

    bundle = bundles["logistic"]
    columns = {name: list(values) for name, values in bundle.background.columns.items()}
    columns["parch"] = list(columns["sibsp"])
    columns["cabin"] = ["C85"] * len(bundle.background)
    alike = Background(**(bundle.background.model_dump() | {"columns": columns}))
    twin = type("Twin", (), {"session": bundle.session, "info": bundle.info, "background": alike})
    passenger = bundle.background.passenger(5) | {"sibsp": 2, "parch": 2, "cabin": None}
    points = {push.column: push.points for push in Explainer(twin).explain(passenger).pushes}
    assert abs(points["sibsp"] - points["parch"]) < 1e-9 and abs(points["sibsp"]) > 0.01
    assert "cabin" not in points, "the logistic model does not look at the deck, so nobody asks"

    same = bundle.background.passenger(bundle.background.sample[0])
    columns = {
        name: [values[bundle.background.sample[0]]] * len(alike)
        for name, values in bundle.background.columns.items()
    }
    nobody = Background(
        **(bundle.background.model_dump() | {"columns": columns | {"age": [33.0] * len(alike)}})
    )
    own = type("Own", (), {"session": bundle.session, "info": bundle.info, "background": nobody})
    points = {push.column: push.points for push in Explainer(own).explain(same | {"age": 12.0}).pushes}
    assert points.pop("age") != 0 and set(points.values()) == {0.0}, (
        "who differs in the age only is pushed by the age only"
    )


# --- how sure, and who was like that


def test_reliability_holds_for_any_probability(bundles: dict):
    from titanic_mlops.serve.explain import reliability

    @quick
    @given(p=st.floats(0, 1))
    def check(p: float) -> None:
        told = reliability(bundles["logistic"].background, p)
        assert told.passengers == 100 and 1 <= told.parties <= 100
        assert 0 <= told.low <= told.lived <= told.high <= 1 and told.low < told.high
        assert 0 <= told.chance_low <= told.chance_high <= 1

    check()


def test_families_are_not_so_many_witnesses(bundles: dict):
    from titanic_mlops.serve.explain import reliability

    b = bundles["logistic"].background
    n, chance = len(b), [0.5] * len(b)
    fates = [row // 4 % 2 for row in range(n)]
    alone = b.model_copy(update={"chance": chance, "survived": fates, "party": list(range(n))})
    fours = alone.model_copy(update={"party": [row // 4 for row in range(n)]})
    width = lambda told: told.high - told.low
    assert width(reliability(fours, 0.5)) > 1.7 * width(
        reliability(alone, 0.5)
    )  # half the information: 4 count as 1


def test_company_is_near_and_is_not_the_passenger(bundles: dict):
    from titanic_mlops.serve.explain import Company

    b = bundles["logistic"].background
    company = Company(b)
    for row in range(0, len(b), 97):
        passenger = b.passenger(row)
        found = company.of(passenger, 10)
        distances = [one.distance for one in found]
        assert len(found) == 10 and distances == sorted(distances) and 0 <= distances[0] <= distances[-1] < 1
        assert passenger["name"] not in {one.passenger["name"] for one in found}
    known = company.of(b.passenger(0) | {"age": None}, 3)
    assert all(one.distance > 0 for one in known if one.passenger["age"] is not None), (
        "an unknown age is no equal one"
    )


# --- the addresses


@pytest.fixture(scope="module")
def client(bundles: dict):
    from explained import app_of
    from starlette.testclient import TestClient

    return TestClient(app_of(bundles["logistic"]), raise_server_exceptions=False)


SOMEONE = {"name": "Doe, Mr. John", "sex": "male", "pclass": 3, "age": 29, "sibsp": 0, "parch": 0}
SOMEONE |= {"fare": 8.05, "embarked": "S", "ticket": "1"}


def test_explain_says_what_predict_says_and_which_model(client):
    explained, predicted = client.post("/v1/explain", json=SOMEONE), client.post("/v1/predict", json=SOMEONE)
    assert explained.status_code == 200, explained.text
    said, short = explained.json(), predicted.json()
    assert abs(said["probability"] - short["probability"]) < 1e-6
    assert all(said[key] == short[key] for key in ("survives", "threshold", "model_version", "bundle_digest"))
    assert abs(said["base"] + sum(push["points"] for push in said["pushes"]) - short["probability"]) < 1e-6
    for header in ("x-model-version", "x-bundle-digest", "x-contract-version"):
        assert explained.headers[header] == predicted.headers[header]
    assert said["caution"] is None and said["reliability"]["low"] < said["reliability"]["high"]


def test_similar_and_passengers(client):
    near = client.post("/v1/similar?count=4", json=SOMEONE).json()
    assert [len(near["passengers"]), near["rare"]] == [4, False]
    assert near["lived"] == sum(one["survived"] for one in near["passengers"])
    found = client.get("/v1/passengers", params={"search": "BROWN mrs", "limit": 2}).json()
    assert found["total"] > 2 and len(found["passengers"]) == 2
    assert all("brown" in one["name"].lower() and "mrs" in one["name"].lower() for one in found["passengers"])
    assert client.get("/v1/passengers", params={"search": "nobody of this name"}).json() == {
        "passengers": [],
        "total": 0,
    }


@pytest.mark.parametrize("path", ["/v1/explain", "/v1/similar"])
def test_what_is_asked_wrongly_gets_a_problem_that_names_field_and_rule(client, path: str):
    bad = client.post(path, json=SOMEONE | {"age": 200, "sex": "man", "fair": 1})
    assert bad.status_code == 422 and bad.headers["content-type"] == "application/problem+json"
    assert {error["field"] for error in bad.json()["errors"]} == {"age", "sex", "fair"}
    assert all(error["rule"] and error["message"] for error in bad.json()["errors"])
    for body in (
        b"",
        b"[]",
        b"{",
        b'{"age": NaN}',
        json.dumps(SOMEONE)[:-1].encode() + b', "sex": "male"}',
        b"\xff",
    ):
        answer = client.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422), (body, answer.text)
        assert answer.json()["status"] == answer.status_code
    assert client.post(path, content=b"x=1", headers={"content-type": "text/plain"}).status_code == 415
    assert client.get(path).status_code == 405


def test_who_has_gone_is_not_worked_for_and_nobody_waits_for_long(
    bundles: dict, monkeypatch: pytest.MonkeyPatch
):
    "A hundred ask at once. One is worked for, fifty may wait, and of those only two are still there afterwards."
    import anyio
    from explained import app_of

    from titanic_mlops.serve.explain import _Ready

    explain, worked, answers, patient = _Ready.explain, [], [], {0, 7, 50}
    all_are_here, app = threading.Event(), app_of(bundles["logistic"])

    def slowly(self, passenger):
        worked.append(passenger["age"])
        assert all_are_here.wait(30)
        return explain(self, passenger)

    async def ask(number: int) -> None:
        body = json.dumps(SOMEONE | {"age": number}).encode()
        messages = [{"type": "http.request", "body": body}]

        async def receive() -> dict:
            if not messages and number in patient:
                await anyio.sleep_forever()
            return messages.pop() if messages else {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            if message["type"] == "http.response.start":
                answers.append((number, message["status"], dict(message["headers"]).get(b"retry-after")))
                if len(answers) == 49:
                    all_are_here.set()

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/explain", "headers": headers}
        await app(scope | {"query_string": b"", "root_path": ""}, receive, send)

    async def crowd() -> None:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                for number in range(100):
                    group.start_soon(ask, number)

    monkeypatch.setattr(_Ready, "explain", slowly)
    anyio.run(crowd)
    assert sorted(worked) == [0, 7, 50]
    assert sorted(answers) == [(n, 200, None) for n in (0, 7, 50)] + [(n, 503, b"2") for n in range(51, 100)]


def test_a_client_that_waits_longer_than_a_body_may_take_is_no_slow_sender():
    "All of its body has come: there is nothing to be late with."
    import anyio

    from titanic_mlops.serve.http import Body

    async def wait() -> None:
        messages = [{"type": "http.request", "body": b"{}"}]

        async def receive() -> dict:
            if not messages:
                await anyio.sleep(0.2)
            return messages.pop() if messages else {"type": "http.request"}

        body = Body(receive, 100, 0.01)
        assert await body.whole() == b"{}"
        await body()

    anyio.run(wait)


def test_without_a_background_the_model_predicts_and_says_why_it_does_not_explain(tmp_path: Path):
    from explained import app_of, make_bundle
    from starlette.testclient import TestClient

    bare = TestClient(app_of(make_bundle(tmp_path, "logistic", background=False)))
    assert bare.post("/v1/predict", json=SOMEONE).status_code == 200
    for answer in (
        bare.post("/v1/explain", json=SOMEONE),
        bare.post("/v1/similar", json=SOMEONE),
        bare.get("/v1/passengers"),
    ):
        assert answer.status_code == 404 and "no background" in answer.json()["detail"]


def test_a_swapped_model_explains_itself(bundles: dict):
    from titanic_mlops.serve.explain import Explainers
    from titanic_mlops.serve.fastpath import FastModel

    served = {
        kind: type(
            "Served",
            (),
            {"model": FastModel(b), "version": kind, "digest": b.digest, "override": "", "headers": []},
        )
        for kind, b in bundles.items()
    }
    models = type("Models", (), {"champion": served["logistic"], "pick": lambda key: served["boosting"]})
    explainers = Explainers(models)
    assert explainers.of().said["model_version"] == "logistic" and explainers.of() is explainers.of()
    assert explainers.of("a key").said["model_version"] == "boosting"
    models.champion = served["boosting"]
    assert explainers.of().said["model_version"] == "boosting"


# --- in the bundle


def test_a_background_belongs_to_its_bundle_byte_for_byte(tmp_path: Path):
    from explained import make_bundle

    from titanic_mlops.ground.errors import BundleError
    from titanic_mlops.model.bundle import Bundle

    bundle = make_bundle(tmp_path, "logistic")
    file, whole = tmp_path / "background.json", (tmp_path / "background.json").read_bytes()
    for changed in (whole[:-2], whole.replace(b'"survived":[0', b'"survived":[1', 1), b""):
        file.write_bytes(changed)
        if changed != whole:
            with pytest.raises(BundleError, match=r"background\.json"):
                Bundle(tmp_path)
    file.unlink()
    with pytest.raises(BundleError, match=r"background\.json is missing"):
        Bundle(tmp_path)
    file.write_bytes(whole)
    assert Bundle(tmp_path).digest == bundle.digest


def test_serving_explanations_imports_nothing_of_the_pipeline():
    import subprocess
    import sys

    heavy = ("pandas", "sklearn", "mlflow", "prefect", "ray", "great_expectations", "pandera", "skl2onnx")
    code = f"import sys, titanic_mlops.serve.explain, titanic_mlops.serve.page; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
