"""A store as a watcher finds it: answers on the record with a bundle beside them, outcomes, a ledger."""

import json
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

from titanic_mlops.ground.settings import Settings
from titanic_mlops.model.bundle import Bundle


def passengers(count: int, fare: float = 1.0) -> list[dict]:
    "Rows as those that the model was trained on, with other fares."
    from titanic_mlops.data.sources import EMBEDDED, canonical, read

    frame = canonical(read(EMBEDDED).frame).sample(count, replace=True, random_state=3)
    columns = ["name", "pclass", "sex", "age", "sibsp", "parch", "fare", "embarked"]
    rows = json.loads(frame[columns].to_json(orient="records"))
    return [row | {"fare": row["fare"] and fare * row["fare"]} for row in rows]


def answered(store: Path, bundle: Path, rows: list[dict], wrong: bool | None = None) -> None:
    "Have a model answer some passengers, on the record, with outcomes as it says or against that."
    from titanic_mlops.serve.fastpath import FastModel
    from titanic_mlops.serve.predictions import PredictionLog

    model = FastModel(Bundle(bundle))
    shutil.copytree(bundle, store / "bundles" / model.digest)
    served = SimpleNamespace(version="7", digest=model.digest, override="", contract_version="1.0.0")
    log, now = PredictionLog(store / "predictions", say=lambda *_, **__: None), time.time_ns()
    for number, (row, chance) in enumerate(zip(rows, model.many(rows), strict=True)):
        log.append(f"r-{number}", now - 1000 * number, served, row, float(chance))
        if wrong is not None:
            log.flush()
            log.outcomes.record([(f"r-{number}", int((chance >= 0.5) != wrong))])
    log.close()


def look(store: Path) -> None:
    "One look of the watcher."
    from titanic_mlops.watch.monitor import watch_once

    watch_once(Settings(store=store))


def promoted(store: Path, digest: str) -> None:
    "A ledger of two promotions, the second of them by hand, beside the registry's tables."
    from titanic_mlops.model.ledger import Ledger

    with closing(sqlite3.connect(store / "mlflow.db")) as database:
        database.executescript("""
            create table registered_model_tags (name, key, value);
            create table model_versions (name, version, source);
            create table model_version_tags (name, version, key, value);
            create table registered_model_aliases (name, alias, version);
            insert into registered_model_tags values ('titanic', 'ledger', 'titanic-demo');
        """)
    ledger = Ledger(str(store / "artifacts"), "titanic-demo")
    facts = {"by": "ismay", "gate_version": "1"}
    first = ledger.append(
        None, action="promote", from_version=None, from_digest="", to_version=6, to_digest="0" * 64,
        verdict="first", reason="there was none", **facts,
    )  # fmt: skip
    ledger.append(
        first, action="promote", from_version=6, from_digest="0" * 64, to_version=7, to_digest=digest,
        verdict="inconclusive", reason="<b>the owner wants it</b>", override=True, **facts,
    )  # fmt: skip
