"""The page, in a real browser against a real server: on a desk and on a phone, with a pointer and by keyboard alone."""

import contextlib
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import CONTRAST, asked, server, until, visits

pytestmark = pytest.mark.long
KEY = "a-key-of-this-test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A bundle with a background."
    from explained import make_bundle

    made = tmp_path_factory.mktemp("page") / "bundle"
    make_bundle(made)
    return made


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    "A server that answers everybody."
    with server(folder) as where:
        yield where


@pytest.fixture
def visit(browser):
    "Open the page: `visit(address, width=360)` gives it with what it asks for and says."

    def there(page) -> None:
        until(page, "document.querySelector('#probability').textContent !== '–'")
        page.wait_for_selector("#company li")

    with visits(browser, "", there) as visit:
        yield visit


def shown(page) -> str:
    "The probability on the page."
    return page.text_content("#probability")


DOE = {"name": "Doe, Mr. John", "sex": "male", "pclass": 3, "age": 29, "sibsp": 0, "parch": 0}
DOE |= {"fare": 8.05, "embarked": "S", "ticket": "1"}


def test_the_answer_is_there_at_once_and_adds_up_and_comes_from_nowhere_else(address: str, visit):
    page, seen = visit(address)
    truth = asked(address, "/v1/explain", DOE)
    assert shown(page) == f"{round(100 * truth['probability'])}%"
    rows = page.eval_on_selector_all(
        "#steps tr", "rows => rows.map(r => [r.cells[0].innerText, r.cells[2].innerText])"
    )
    amounts = [float(text.replace("−", "-").rstrip(" %")) for _, text in rows]
    assert rows[0][0] == "Everybody" and rows[-1][0] == "This passenger" and len(rows) == 10
    assert abs(sum(amounts[:-1]) - amounts[-1]) < 0.6, "rounded to a tenth each"
    assert f"{truth['reliability']['passengers']} passengers" in page.text_content("#trust")
    assert page.locator("#company li").count() == 10
    assert re.search("Version.*7", page.inner_text("#facts"), re.DOTALL)
    assert all(url.startswith((address, "data:")) for url in seen.asked), seen.asked
    assert not seen.said, seen.said


def test_the_policy_lets_nothing_else_run(address: str, visit):
    with urllib.request.urlopen(address, timeout=20) as answer:
        policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'self'" in policy
    page, seen = visit(address)
    page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s); }"
    )
    assert page.evaluate("window.ran") is None
    assert any("Content Security Policy" in text for text in seen.said)
    assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'went', () => 'refused')") == "refused"


def test_sliders_answer_as_they_move(address: str, visit):
    page, seen = visit(address)
    before, known = shown(page), set()
    slider = page.locator("#age-slider")
    slider.focus()
    for _ in range(6):
        for _ in range(4):
            page.keyboard.press("ArrowLeft")
        page.wait_for_timeout(150)
        known.add(shown(page))
    page.keyboard.press("Home")
    until(page, "before => document.querySelector('#probability').textContent !== before", before)
    until(page, "!document.querySelector('#steps').innerText.includes('Age 29')")
    truth = asked(address, "/v1/explain", DOE | {"age": 0})
    until(
        page,
        "text => document.querySelector('#probability').textContent === text",
        f"{round(100 * truth['probability'])}%",
    )
    assert page.input_value("#age") == "0"
    page.get_by_role("button", name="Back to the start").click()
    until(page, "text => document.querySelector('#probability').textContent === text", before)
    assert page.input_value("#age") == "29" and page.locator("#reset").is_hidden()
    assert not seen.said, seen.said


def test_an_old_answer_never_overwrites_a_newer_one(address: str, visit):
    page, _ = visit(address)
    held = []

    def late(route) -> None:
        body = route.request.post_data_json
        if body["pclass"] == 2:
            held.append(route)  # this one comes last of all
        else:
            route.continue_()

    page.route("**/v1/explain", late)
    page.get_by_label("Second").check(force=True)
    page.wait_for_timeout(400)
    page.get_by_label("First").check(force=True)
    until(page, "document.querySelector('#steps').innerText.includes('Class first')")
    first = shown(page)
    assert held, "the question about the second class was asked"
    for route in held:
        with contextlib.suppress(Exception):  # it may have been given up already
            route.continue_()
    page.wait_for_timeout(600)
    assert shown(page) == first and "Class first" in page.inner_text("#steps")


def test_a_wrong_value_has_its_message_at_its_field(address: str, visit):
    page, _ = visit(address)
    before = shown(page)
    page.fill("#age", "200")
    page.wait_for_selector("#age-error:not([hidden])")
    assert "110" in page.text_content("#age-error") and page.get_attribute("#age", "aria-invalid") == "true"
    assert "age-error" in page.get_attribute("#age", "aria-describedby")
    assert shown(page) == before and page.locator("body.stale").count() == 1, (
        "the last good answer stays, faded"
    )
    page.fill("#name", "")
    page.wait_for_selector("#name-error:not([hidden])")
    page.fill("#sibsp", "1.5")
    page.wait_for_selector("#sibsp-error:not([hidden])")
    page.fill("#name", "Doe, Mr. John")
    page.fill("#age", "30")
    page.fill("#sibsp", "0")
    until(page, "!document.body.classList.contains('stale')")
    assert (
        page.locator(".error:not([hidden])").count() == 0
        and page.get_attribute("#age", "aria-invalid") is None
    )


def test_not_known_is_a_value(address: str, visit):
    page, seen = visit(address)
    page.get_by_label("not known").first.check()
    until(page, "document.querySelector('#steps').innerText.includes('Age not known')")
    truth = asked(address, "/v1/explain", DOE | {"age": None})
    assert shown(page) == f"{round(100 * truth['probability'])}%" and page.input_value("#age") == ""
    page.get_by_label("not known").first.uncheck()
    until(page, "document.querySelector('#steps').innerText.includes('Age 29')")
    assert not seen.said, seen.said


def test_by_keyboard_alone(address: str, visit):
    page, seen = visit(address)
    focus = lambda: page.evaluate(
        "document.activeElement.id || document.activeElement.name || document.activeElement.tagName"
    )
    visited = []
    for _ in range(60):
        page.keyboard.press("Tab")
        visited.append(focus())
        outline = page.evaluate(
            "(() => { const e = document.activeElement, s = getComputedStyle(e), l = e.closest('label');"
            " return s.outlineStyle !== 'none' || (l && getComputedStyle(l).outlineStyle !== 'none'); })()"
        )
        assert outline, f"nobody sees that {visited[-1]} has the focus"
        if visited[-1] == "embarked":
            break
    order = [
        "search",
        "name",
        "title",
        "pclass",
        "sex",
        "age-unknown",
        "age-slider",
        "age",
        "sibsp-slider",
        "sibsp",
    ]
    assert [one for one in visited if one in order] == order and visited[-1] == "embarked", visited
    page.locator("#search").focus()
    page.keyboard.type("brown mrs")
    page.wait_for_selector("#found li[role=option]")
    page.keyboard.press("ArrowDown")
    assert page.get_attribute("#search", "aria-activedescendant") == "found-0"
    page.keyboard.press("Escape")
    assert page.locator("#found").is_hidden()
    page.keyboard.press("ArrowDown")
    page.wait_for_selector("#found li[role=option]")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector("#truth:not([hidden])")
    assert page.input_value("#name").startswith("Brown, Mrs.") and page.input_value("#title") == "Mrs"
    until(page, "document.querySelector('#steps').innerText.includes('Title Mrs')")
    until(page, "document.querySelector('#said').textContent.includes('chance of survival')")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")  # the next class
    until(page, "document.querySelector('#verdict').textContent.includes('At the start')")
    assert not seen.said, seen.said


def test_every_field_has_a_name_that_is_read_out(address: str, visit):
    page, _ = visit(address)
    nameless = page.eval_on_selector_all(
        "input, select, button, [role=listbox]",
        "all => all.filter(e => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).map(e => e.outerHTML)",
    )
    assert not nameless
    assert page.get_attribute("#said", "aria-live") == "polite"
    for label in (
        "Name",
        "Title",
        "Age years",
        "Siblings and spouses aboard",
        "Fare, pounds",
        "Came aboard at",
    ):
        assert page.get_by_label(label).first.is_visible(), label


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(address: str, visit, scheme: str):
    page, seen = visit(address, 360, 740, color_scheme=scheme, reduced_motion="reduce", has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    small = page.eval_on_selector_all(
        "input:not([type=checkbox]):not([type=radio]), select, .segments label",
        "all => all.filter(e => e.offsetParent && e.getBoundingClientRect().height < 40).map(e => e.id)",
    )
    assert not small, f"too small for a thumb: {small}"
    assert page.locator("#mini").is_visible(), "the answer is in sight while the form is"
    page.locator("#age-slider").focus()
    page.keyboard.press("Home")
    until(page, "document.querySelector('#steps').innerText.includes('Age 0')")
    assert page.text_content("#mini-number") == shown(page)
    page.locator("#probability").scroll_into_view_if_needed()
    until(page, "!document.querySelector('#mini').classList.contains('shown')")
    faint = page.evaluate(CONTRAST)
    assert not faint, faint
    assert not seen.said, seen.said


def test_a_hostile_name_is_text(address: str, visit):
    page, seen = visit(address)
    hostile = "<img src=x onerror='window.ran=1'>, Mr. </script><script>window.ran=1</script>"
    page.fill("#name", hostile)
    page.wait_for_timeout(500)
    page.route(
        "**/v1/similar*",
        lambda route: route.fulfill(
            json={
                "passengers": [DOE | {"name": hostile, "survived": 0, "chance": 0.5, "distance": 0.1, "row": 1}],
                "lived": 0, "rare": True, "model_version": "7", "bundle_digest": "d", "caution": None,
            }
        ),
    )  # fmt: skip
    page.get_by_label("First").check(force=True)
    until(page, "document.querySelectorAll('#company li').length === 1")
    assert page.text_content("#company button") == hostile and page.locator("#rare").is_visible()
    page.locator("#company button").click()
    page.wait_for_selector("#truth:not([hidden])")
    assert hostile in page.text_content("#truth") and page.input_value("#name") == hostile
    assert page.evaluate("window.ran") is None and page.locator("img").count() == 0
    assert not seen.said, seen.said


def test_a_server_that_goes_away_is_said_and_waited_for(address: str, visit):
    page, _ = visit(address)
    page.route("**/v1/**", lambda route: route.abort())
    page.get_by_label("First").check(force=True)
    page.wait_for_selector("#trouble:not([hidden])")
    assert "can’t be reached" in page.text_content("#trouble")
    page.unroute("**/v1/**")
    page.wait_for_selector("#trouble", state="hidden")
    until(page, "document.querySelector('#steps').innerText.includes('Class first')")


def test_too_many_questions_are_asked_again_later(address: str, visit):
    page, _ = visit(address)
    problem = {"type": "", "title": "Too many requests", "status": 429}
    page.route(
        "**/v1/explain", lambda route: route.fulfill(status=429, json=problem, headers={"retry-after": "1"})
    )
    page.get_by_label("Second").check(force=True)
    page.wait_for_selector("#trouble:not([hidden])")
    assert "1 s" in page.text_content("#trouble")
    page.unroute("**/v1/explain")
    until(page, "document.querySelector('#steps').innerText.includes('Class second')")


def test_a_key_is_asked_for_used_and_forgotten_and_a_caution_is_shown(folder: Path, visit):
    with server(folder, f"key={KEY}", "caution=promoted by hand against the gate") as address:
        page, _ = visit(address, answered=False)
        page.wait_for_selector("#key:not([hidden])")
        page.fill("#key-value", "wrong")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#key-why').textContent.includes('not accepted')")
        page.fill("#key-value", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#company li")
        assert page.locator("#key").is_hidden() and page.locator("#pick").is_visible()
        assert "against the gate" in page.text_content("#caution") and page.locator("#caution").is_visible()
        kept = "JSON.stringify([Object.keys(localStorage), Object.keys(sessionStorage), document.cookie, location.href, document.body.innerHTML])"
        assert KEY not in page.evaluate(kept) and page.input_value("#key-value") == ""
        page.reload()
        page.wait_for_selector("#key:not([hidden])")
        assert shown(page) == "–"


def test_a_key_for_predictions_alone_gets_the_number(folder: Path, visit):
    with server(folder, f"key={KEY}", "scopes=predict") as address:
        page, _ = visit(address, answered=False)
        page.wait_for_selector("#key:not([hidden])")
        page.fill("#key-value", KEY)
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#probability').textContent !== '–'")
        assert "scope explain" in page.inner_text("#unexplained") and page.locator("#key").is_hidden()
        assert page.locator("#why").is_hidden() and page.locator("#pick").is_hidden()
        before = shown(page)
        page.get_by_label("First").check(force=True)
        until(page, f"document.querySelector('#probability').textContent !== '{before}'")


def test_without_a_background_the_number_stands_alone(tmp_path: Path, visit):
    from explained import make_bundle

    make_bundle(tmp_path / "bare", background=False)
    with server(tmp_path / "bare") as address:
        page, _ = visit(address, answered=False)
        until(page, "document.querySelector('#probability').textContent !== '–'")
        assert "no background" in page.inner_text("#behind")
        assert (
            page.locator("#why").is_hidden()
            and page.locator("#like").is_hidden()
            and page.locator("#pick").is_hidden()
        )
        before = shown(page)
        page.get_by_label("First").check(force=True)
        until(page, "before => document.querySelector('#probability').textContent !== before", before)
        assert page.locator("#trouble").is_hidden()
