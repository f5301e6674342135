"""One champion behind ever thinner servers: the steps from a pipeline behind FastAPI, and from `mlflow models serve`, to `titanic serve`, one process each.

    python bench/baselines/serving_steps.py STEP PORT

The champion is that of the store in the environment. `bench/serving.py --steps` starts these and asks them all the same.
"""

import sys
from collections.abc import Callable
from typing import Any

STEPS = {  # in the order of the story: what answers, and what the step has changed
    "pipeline": "FastAPI, the scikit-learn pipeline on a frame of one row",
    "mlflow": "`mlflow models serve`, the model as an ONNX graph",
    "frame": "FastAPI, the graph, still from a frame",
    "dictionary": "the graph fed from a dictionary: no frame, no pandas",
    "lean": "the body checked and the answer put together without the framework",
    "together": "one run of the graph for all that came in one turn",
    "titanic": "`titanic serve`: the same, with record, access log and limits",
}
REFERENCE = "FastAPI, the same body, an empty answer"


def champion() -> Any:
    "The folder of the champion's bundle."
    from titanic_mlops.ground.settings import settings
    from titanic_mlops.serve.origins import origin_of

    own = settings()
    origin = origin_of("champion", own)
    return origin.fetch(origin.look(), own.store / "served")


def behind_fastapi(predict: Callable[[Any], float]) -> Any:
    "The endpoint that one writes first: a body in, a number out."
    from fastapi import FastAPI

    from titanic_mlops.data.targets import request_model

    app, passenger_model = FastAPI(), request_model()

    @app.post("/v1/predict")
    async def answer(passenger: passenger_model) -> dict:  # type: ignore[valid-type]
        return {"probability": predict(passenger)}

    return app


def empty() -> Any:
    return behind_fastapi(lambda passenger: 0.5)


def pipeline() -> Any:
    import json

    import pandas as pd

    from titanic_mlops.data.features import feature_frame
    from titanic_mlops.ground.settings import settings
    from titanic_mlops.model.train import load_model

    digest = json.loads((champion() / "manifest.json").read_text())["digest"][:12]
    fitted = load_model(
        next(settings().store.glob(f"mlartifacts/*/artifacts/model/{digest}/analysis/model.skops"))
    )
    frame = lambda passenger: feature_frame(pd.DataFrame([passenger.model_dump()]))
    return behind_fastapi(lambda passenger: float(fitted.predict_proba(frame(passenger))[0, 1]))


def frame() -> Any:
    import pandas as pd

    from titanic_mlops.model.bundle import Bundle

    bundle = Bundle(champion())
    return behind_fastapi(lambda passenger: float(bundle.predict(pd.DataFrame([passenger.model_dump()]))[0]))


def dictionary() -> Any:
    from titanic_mlops.model.bundle import Bundle
    from titanic_mlops.serve.fastpath import FastModel

    model = FastModel(Bundle(champion()))
    return behind_fastapi(lambda passenger: model.one(passenger.__dict__))


def lean() -> Any:
    from titanic_mlops.serve.fastpath import Together

    Together.CLOSE = -1.0  # nobody is ever close enough to share a run
    return together()


def together() -> Any:
    from titanic_mlops.model.bundle import Bundle
    from titanic_mlops.serve.app import create_app
    from titanic_mlops.serve.fastpath import FastModel
    from titanic_mlops.serve.predict import OneModel

    return create_app(OneModel(FastModel(Bundle(champion()))))


if __name__ == "__main__":
    import uvicorn

    made = {
        "empty": empty,
        "pipeline": pipeline,
        "frame": frame,
        "dictionary": dictionary,
        "lean": lean,
        "together": together,
    }
    uvicorn.run(
        made[sys.argv[1]](),
        port=int(sys.argv[2]),
        log_level="error",
        access_log=False,
        http="httptools",
        loop="uvloop",
    )
