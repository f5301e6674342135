"""The watcher as a Prefect deployment: real servers, a real schedule, and what is left when they end."""

import json
import os
import sqlite3
import time
from typing import Any

import pytest
from browsing import asked
from checkout import Checkout

EVERY = 10  # seconds; the command line begins at a minute
UP = f"""
from titanic_mlops.flow.services import up
from titanic_mlops.ground.settings import settings

up(settings(), every={EVERY})
"""


def card(own: Checkout, name: str) -> dict[str, Any]:
    return json.loads((own.store / "services" / f"{name}.json").read_text())


def ask(own: Checkout, what: str, **body: Any) -> list[dict[str, Any]]:
    "Prefect's answer."
    return asked(card(own, "prefect")["url"], f"/api/{what}/filter", body)


def ended(own: Checkout) -> list[dict[str, Any]]:
    "The looks that were taken, the latest first."
    done = {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}}
    return ask(own, "flow_runs", flow_runs=done, sort="START_TIME_DESC")


@pytest.mark.long
def test_the_watcher_on_a_schedule(fresh: Checkout):
    soon = fresh.titanic("up", "--watch", "soon")
    assert soon.returncode == 2 and "30m" in soon.stderr and not (fresh.store / "services").exists()
    assert fresh.titanic("up", "--act").returncode == 2

    assert fresh.python(UP).returncode == 0
    first, pages = card(fresh, "watch"), card(fresh, "prefect")
    try:
        until = time.monotonic() + 180
        while not (looks := ended(fresh)) and time.monotonic() < until:
            time.sleep(1)
        assert looks, (fresh.store / "logs" / "watch.log").read_text()[-3000:]
        assert looks[0]["state"]["name"] == "Completed", looks[0]["state"]
        this, until = {"flow_run_id": {"any_": [looks[0]["id"]]}}, time.monotonic() + 60
        said: list[str] = []
        while not any("recorded as run" in line for line in said):  # its last lines come after its state
            assert time.monotonic() < until, said
            time.sleep(0.5)
            said = [line["message"] for line in ask(fresh, "logs", logs=this)]
        with sqlite3.connect(fresh.store / "mlflow.db") as books:
            kept = books.execute("SELECT count(*) FROM tags WHERE key = 'titanic.job' AND value = 'watch'")
            assert kept.fetchone()[0] >= 1

        again = fresh.titanic("up", "--watch", "30m", "--act")
        assert again.returncode == 0 and "every 30m" in again.stdout, again.stdout + again.stderr
        assert card(fresh, "prefect") == pages and card(fresh, "watch")["pid"] != first["pid"]
        with pytest.raises(ProcessLookupError):
            os.kill(first["pid"], 0)
        (deployed,) = ask(fresh, "deployments")
        (schedule,) = deployed["schedules"]
        assert schedule["active"] and schedule["schedule"]["interval"] == 1800
        assert deployed["parameters"] == {"act": True} and not deployed["paused"]
    finally:
        down = fresh.titanic("down")
    assert "watch" in down.stdout, down.stdout + down.stderr
    with sqlite3.connect(fresh.store / "prefect" / "prefect.db") as books:
        assert books.execute("SELECT paused FROM deployment").fetchall() == [(1,)]  # nothing piles up
