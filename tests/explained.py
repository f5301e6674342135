"""A bundle that can be explained, made in seconds, and the app that serves it; `python explained.py FOLDER` is a server process."""

import sys
from pathlib import Path


def make_bundle(folder: Path, kind: str = "logistic", with_deck: bool = False, background: bool = True):
    "Fit on the embedded list and write a bundle, as the pipeline does."
    from titanic_mlops.data.features import CATEGORICAL, DOUBTFUL, NUMERIC, feature_frame
    from titanic_mlops.data.sources import EMBEDDED, canonical, read
    from titanic_mlops.model import bundle as b
    from titanic_mlops.model.background import background_json
    from titanic_mlops.model.train import Candidate, cross_validate, fit, holdout_mask

    passengers = canonical(read(EMBEDDED).frame)
    training = passengers[~holdout_mask(passengers.ticket)].reset_index(drop=True)
    candidate = Candidate(kind, with_deck=with_deck)
    X, y, ticket = feature_frame(training), training.survived.to_numpy(int), training.ticket.to_numpy(str)
    info = b.BundleInfo(
        candidate=kind,
        hyperparameters=candidate.settings,
        calibration="none",
        inputs=[*NUMERIC, *CATEGORICAL, *(DOUBTFUL if with_deck else ())],
        split={"share": 0.2, "salt": "titanic-holdout-1"},
        figures={"accuracy": {"value": 0.78, "low": 0.73, "high": 0.84}},
        reference=b.reference_distributions(X),
    )
    lineage = b.Lineage(git_commit="0" * 40, snapshot="titanic-test", data_sha256="0" * 64, seed=0)
    graph = b.to_onnx(fit(candidate, X, y, ticket), with_deck)
    known = b""
    if background:
        known = background_json(training, cross_validate(candidate, training, folds=3, repeats=1), with_deck)
    b.write_bundle(folder, graph, info, lineage, background=known)
    return b.Bundle(folder)


def app_of(bundle, guard=None, caution: str = ""):
    "The app of one model."
    from dataclasses import replace

    from titanic_mlops.serve.app import create_app
    from titanic_mlops.serve.fastpath import FastModel
    from titanic_mlops.serve.predict import OneModel

    models = OneModel(FastModel(bundle), "7")
    models.champion = replace(models.champion, override=caution)
    return create_app(models, guard)


def main(folder: str, port: str, *more: str) -> None:
    "Serve a bundle on a port, as a process of its own."
    import uvicorn

    from titanic_mlops.model.bundle import Bundle

    said = dict(one.split("=", 1) for one in more)
    guard = OneKey(said["key"], said.get("scopes", "predict,explain,admin")) if "key" in said else None
    uvicorn.run(
        app_of(Bundle(folder), guard, said.get("caution", "")),
        host="127.0.0.1",
        port=int(port),
        log_level="warning",
    )


class OneKey:
    "A guard that knows one key."

    def __init__(self, key: str, scopes: str):
        self.key, self.scopes = key, scopes.split(",")

    def check(self, headers, scope: str, client: str):
        "Raise `Problem` unless this is the key."
        from titanic_mlops.serve.http import Problem

        if dict(headers).get(b"authorization") != f"Bearer {self.key}".encode():
            raise Problem("unauthenticated", "an API key is needed", headers={"www-authenticate": "Bearer"})
        if scope not in self.scopes:
            raise Problem("forbidden", f"this needs the scope {scope}")


if __name__ == "__main__":
    main(*sys.argv[1:])
