"""Data Docs in a real browser, from the disk: they load nothing, and lists, tabs, folds and the filter work."""

from pathlib import Path

import pytest
from browsing import CONTRAST, chromium, visits

from titanic_mlops.data.docs import data_docs
from titanic_mlops.data.sources import EMBEDDED, read

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Pages about a list with a few errors."
    frame = read(EMBEDDED).frame
    frame.loc[3, "age"], frame.loc[5, "pclass"], frame.loc[8, "sex"] = -3, 4, None
    frame.loc[11, ["name", "ticket"]] = frame.loc[10, ["name", "ticket"]].tolist()
    frame.loc[9, "home_dest"] = "<script>document.title = 'taken over'</script>" * 20
    folder = tmp_path_factory.mktemp("docs") / "of a broken list"
    assert not data_docs(frame, folder)["success"]
    return folder


@pytest.fixture(scope="module")
def visit():
    with (
        chromium() as browser,
        visits(browser, "", lambda page: page.wait_for_selector(".ge-section")) as visit,
    ):
        yield lambda file, **options: visit(file.as_uri(), **options)


def page_of(site: Path, kind: str) -> Path:
    [page] = site.joinpath(kind).rglob("*.html")
    return page


def test_the_list_of_results_is_there_and_leads_on(site: Path, visit):
    page, seen = visit(site / "index.html")
    results, suites = page.locator("table").all()
    assert "contract_1.0.0" in results.locator("tbody").inner_text() and not suites.is_visible()
    search = page.get_by_role("searchbox").first
    search.fill("no such run")
    assert results.locator("tbody tr").count() == 0
    page.get_by_role("button", name="Clear Filters").first.click()
    assert results.locator("tbody tr").count() == 1 and search.input_value() == ""
    page.get_by_role("tab", name="Expectation Suites").click()
    assert suites.is_visible() and not results.is_visible()
    suites.get_by_role("link").click()
    page.wait_for_url("**/expectations/**")
    page.go_back()
    results.get_by_role("link").first.click()
    page.wait_for_url("**/validations/**")
    assert "Failed" in page.locator("#section-1").inner_text()
    assert {address.split(":")[0] for address in seen.asked} == {"file"} and seen.said == []


def test_what_failed_can_be_seen_alone_and_the_rest_unfolded(site: Path, visit):
    page, seen = visit(page_of(site, "validations"))
    rows = page.locator("td:first-child i.fas")
    before = rows.count()
    assert before == rows.filter(visible=True).count() > 20
    page.get_by_text("Failed Only").click()
    assert rows.filter(visible=True).count() == 5 and page.get_by_text("-3.0").first.is_visible()
    page.get_by_text("Show All").click()
    assert rows.filter(visible=True).count() == before
    more = page.get_by_text("Show more info...")
    assert not page.get_by_text("Batch Markers").is_visible()
    more.click()
    assert page.get_by_text("Batch Markers").is_visible() and more.get_attribute("aria-expanded") == "true"
    assert page.get_by_text("<script>document.title").first.is_visible()  # what a passenger wrote is text
    assert "null\nnull" not in page.locator("body").inner_text()
    assert page.title() != "taken over" and seen.said == []


@pytest.mark.parametrize("kind", ["index", "validations", "expectations"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_on_a_phone_by_day_and_by_night(site: Path, visit, kind: str, scheme: str):
    file = site / "index.html" if kind == "index" else page_of(site, kind)
    page, seen = visit(file, width=360, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate(CONTRAST) == [] and seen.said == []
