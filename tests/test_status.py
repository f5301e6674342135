"""The operators' page, in a real browser, in front of what a real watcher has left: nobody looked, all well, drift, no reference, a watcher that stopped."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from browsing import CONTRAST, asked, server, until, visits
from guarded import DEAN, serving
from watching import answered, look, passengers, promoted

from titanic_mlops.ground.settings import Settings
from titanic_mlops.model.bundle import Bundle
from titanic_mlops.serve.security import KeyFile
from titanic_mlops.serve.status import Answers, Traffic, reasons_of
from titanic_mlops.serve.watched import Watched, sight

pytestmark = pytest.mark.long


# --- what is looked at: bundles, a log, a watcher that looks, a ledger


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    "A bundle with what a window is held against, and one without."
    from explained import make_bundle

    folder = tmp_path_factory.mktemp("bundles")
    for background in (True, False):
        make_bundle(folder / str(background) / "bundle", background=background)
    return {background: folder / str(background) / "bundle" for background in (True, False)}


@pytest.fixture
def visit(browser):
    "Open the status page: `visit(address, width=360)` gives it with what it asks for and says."
    there = lambda page: page.wait_for_selector("#all:not([hidden])")
    with visits(browser, "/status", there, height=1000) as visit:
        yield visit


def verdict(page) -> str:
    "The word on the page, and all that is said with it."
    return f"{page.text_content('#word-text')}: {page.inner_text('#verdict')}"


# --- the states


@pytest.fixture(scope="module")
def drifted(
    bundles: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    "A server on a store whose passengers pay in pence."
    store = tmp_path_factory.mktemp("drifted")
    answered(store, bundles[True], passengers(500, fare=240.0), wrong=False)
    look(store)
    promoted(store, Bundle(bundles[True]).digest)
    with server(bundles[True], store=str(store)) as address:
        yield address, store


def test_nobody_has_looked(bundles: dict[bool, Path], tmp_path: Path, visit):
    with server(bundles[True], store=str(tmp_path)) as address:
        page, seen = visit(address)
        assert "Nobody watches" in verdict(page) and verdict(page).startswith("Look at this today")
        assert "titanic watch" in page.inner_text("#reasons code")
        assert (
            page.inner_text("#drift-says") == "Nobody has looked." and page.locator("#no-alerts").is_visible()
        )
        assert "no ledger" in page.inner_text("#no-history") and "version 7" in page.inner_text("#model")
        for _ in range(20):
            asked(address, "/v1/predict", DEAN)
        until(page, "document.querySelector('#routes').innerText.includes('/v1/predict')")
        assert page.inner_text("#routes tr td:nth-child(2)") == "20", "its own questions are not counted"
        assert not seen.said and all(url.startswith((address, "data:")) for url in seen.asked)


def test_all_is_well(bundles: dict[bool, Path], tmp_path: Path, visit):
    answered(tmp_path, bundles[True], passengers(500))
    look(tmp_path)
    with server(bundles[True], store=str(tmp_path)) as address:
        page, seen = visit(address)
        assert verdict(page).startswith("All is well") and page.title() == "All is well"
        assert page.locator("#reasons").is_hidden() and "Nothing has moved in 500" in page.inner_text(
            "#drift-says"
        )
        assert page.locator("#moved li").count() == 0 and page.locator("#still li").count() > 10
        assert not seen.said


def test_drift_with_a_critical_alert(drifted: tuple[str, Path], visit):
    address, store = drifted
    page, seen = visit(address)
    assert verdict(page).startswith("Act now") and page.locator("#reasons .critical").count() >= 1
    moved = [found.says for found in sight(Watched(store)).look.moved]
    assert page.eval_on_selector_all("#moved li > :last-child", "all => all.map(e => e.textContent)") == moved
    assert "fare" in page.inner_text("#moved") and "critical" in page.inner_text("#alerts")
    assert page.eval_on_selector("#moved .size", "e => e.width.baseVal.value") > 25, "beyond the stroke"
    history = page.inner_text("#history")
    assert "promoted 7 from 6" in history and "<b>the owner wants it</b>" in history and "override" in history
    assert page.locator("#history tr").count() == 2 and page.locator("#history b").count() == 0
    assert not seen.said


def test_a_silence_is_seen_and_does_not_alarm(bundles: dict[bool, Path], tmp_path: Path):
    from titanic_mlops.watch.monitor import open_desk

    own = Settings(store=tmp_path)
    open_desk(own).silence("drift:*", 3600, "ismay", "the fares are known to be wrong")
    answered(tmp_path, bundles[True], passengers(500, fare=240.0))
    look(tmp_path)
    seen = sight(Watched.of(own))
    assert "drift:fare" in seen.alerts and not seen.alerts_of("critical") and seen.look.moved
    quiet = Traffic(seconds=30, all=Answers(), routes=[])
    assert reasons_of({"ready": True, "digest": seen.look.bundle}, quiet, seen) == []


def test_a_model_without_a_reference(bundles: dict[bool, Path], tmp_path: Path, visit):
    answered(tmp_path, bundles[False], passengers(300))
    promoted(tmp_path, Bundle(bundles[False]).digest)
    look(tmp_path)
    with server(bundles[False], store=str(tmp_path)) as address:
        page, seen = visit(address)
        assert "carries no reference" in verdict(page)
        assert "without a reference" in page.inner_text("#drift-says") and not seen.said


def test_a_watcher_that_has_stopped_and_half_a_file(bundles: dict[bool, Path], tmp_path: Path, visit):
    answered(tmp_path, bundles[True], passengers(300))
    look(tmp_path)
    latest = tmp_path / "watch" / "latest.json"
    said = json.loads(latest.read_text())
    latest.write_text(json.dumps(said | {"looked": said["looked"] - 86_400}))
    with server(bundles[True], store=str(tmp_path)) as address:
        page, seen = visit(address)
        assert "has stopped: it last looked 24 hours ago" in verdict(page)
        assert "looked 24 hours ago" in page.inner_text("#looked")
        latest.write_text(json.dumps(said)[:200])
        until(page, "document.querySelector('#reasons').innerText.includes('latest.json can\\'t be read')")
        latest.write_text(json.dumps(said))
        until(page, "document.querySelector('#word-text').textContent === 'All is well'")
        assert not seen.said


def test_a_model_that_is_worse_than_promised(bundles: dict[bool, Path], tmp_path: Path, visit):
    answered(tmp_path, bundles[True], passengers(150), wrong=True)
    look(tmp_path)
    with server(bundles[True], store=str(tmp_path)) as address:
        page, seen = visit(address)
        assert verdict(page).startswith("Act now") and "log loss" in verdict(page)
        assert page.inner_text("#performance-says") == "It is surely worse than promised."
        assert "150 outcomes" in page.inner_text("#outcomes")
        figures = json.loads((tmp_path / "watch" / "latest.json").read_text())["performance"]["figures"]
        row = page.inner_text("#performance-rows tr:has-text('log loss')")
        assert f"{figures['log_loss']['value']:.3g}" in row and not seen.said


def test_too_few_answers_are_no_alarm(bundles: dict[bool, Path], tmp_path: Path, visit):
    answered(tmp_path, bundles[True], passengers(20))
    look(tmp_path)
    with server(bundles[True], store=str(tmp_path)) as address:
        page, _ = visit(address)
        assert verdict(page).startswith("All is well") and "too few to tell drift" in verdict(page)


def test_a_server_that_goes_away(drifted: tuple[str, Path], visit):
    page, _ = visit(drifted[0])
    page.route("**/v1/status", lambda route: route.abort())
    page.wait_for_selector("#trouble:not([hidden])")
    assert (
        "can’t be reached" in page.text_content("#trouble") and page.text_content("#word-text") == "No answer"
    )
    assert page.locator("body.stale").count() == 1 and page.locator("#moved li").count() > 0
    page.unroute("**/v1/status")
    until(page, "document.querySelector('#word-text').textContent === 'Act now'")
    assert page.locator("#trouble").is_hidden() and page.locator("body.stale").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_on_every_screen(drifted: tuple[str, Path], visit, width: int, scheme: str):
    page, seen = visit(drifted[0], width, 800, color_scheme=scheme)
    page.locator("#rest summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelector('#verdict').getBoundingClientRect().top") < 100, (
        "seen at once"
    )
    cropped = "all => all.filter(e => e.scrollWidth > e.clientWidth).map(e => e.textContent)"
    assert not page.eval_on_selector_all(".scroll", cropped)
    faint = page.evaluate(CONTRAST)
    assert not faint, faint
    assert not seen.said


# --- who may see it


def test_only_an_admin_sees_it(tmp_path: Path):
    ring = KeyFile(tmp_path / "keys.json")
    _, admin = ring.new("operator", ["admin"])
    _, client = ring.new("client", ["predict"])
    with serving(tmp_path) as running:
        answers = [running.get("/v1/status", key).status_code for key in (None, client, admin)]
        assert answers == [401, 403, 200] and running.get("/status").status_code == 200
        assert running.get("/v1/status", admin).json()["level"] == "warning"


def test_a_key_is_asked_for(bundles: dict[bool, Path], tmp_path: Path, visit):
    with server(bundles[True], "key=of-this-test", store=str(tmp_path)) as address:
        page, _ = visit(address, answered=False)
        page.wait_for_selector("#key:not([hidden])")
        assert page.locator("#all").is_hidden()
        page.fill("#key-value", "wrong")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#key-why').textContent.includes('not known')")
        page.fill("#key-value", "of-this-test")
        page.keyboard.press("Enter")
        page.wait_for_selector("#all:not([hidden])")
        assert page.locator("#key").is_hidden() and page.evaluate("Object.keys(localStorage).length") == 0


# --- the rules


def traffic(**facts) -> Traffic:
    return Traffic(seconds=30, all=Answers(**facts), routes=[])


@pytest.mark.parametrize(
    ("model", "lately", "level", "word"),
    [
        ({"ready": False}, {}, "critical", "no model"),
        ({"ready": True}, {"answers": 100, "failed": 9}, "critical", "9 of the last 100 answers failed"),
        ({"ready": True}, {"answers": 5, "failed": 3}, "critical", "3 of the last 5"),
        ({"ready": True}, {"answers": 100, "p99": 0.7}, "warning", "700 ms"),
        ({"ready": True, "degraded": ["record: no space"]}, {}, "warning", "record: no space"),
    ],
)  # fmt: skip
def test_what_counts(model: dict, lately: dict, level: str, word: str):
    worst = reasons_of(model, traffic(**lately), sight(Watched(Path("nowhere"))))[0]
    assert worst.level == level and word in worst.what


@pytest.mark.parametrize(
    "lately",
    [
        {"answers": 1000, "failed": 5},
        {"answers": 5, "failed": 2},
        {"answers": 1000, "refused": 900},
        {"answers": 3, "p99": 2.0},
    ],
)
def test_what_does_not(lately: dict):
    reasons = reasons_of({"ready": True}, traffic(**lately), sight(Watched(Path("nowhere"))))
    assert [reason.what[:14] for reason in reasons] == ["Nobody watches"]


def test_letters_that_nobody_takes(tmp_path: Path):
    from titanic_mlops.watch.alerts import Alert, Desk, Undelivered, deliver

    class Deaf:
        name = "deaf"

        def send(self, notice, key) -> None:
            raise Undelivered("nobody is there", final=key is not None)

    desk = Desk(tmp_path / "alerts", {"deaf": Deaf()})
    since = datetime.now(UTC).isoformat()
    desk.note([Alert(name="drift", subject="age", summary="age: older", since=since)], ["drift"])
    before = sight(Watched(tmp_path))
    assert (before.waiting, before.refused, list(before.alerts)) == (1, 0, ["drift:age"])
    deliver(desk)
    after = sight(Watched(tmp_path))
    assert (after.waiting, after.refused) == (0, 1)
    said = [reason.what for reason in reasons_of({"ready": True}, traffic(), after)]
    assert "Letters about alerts that were refused for good: 1" in said
