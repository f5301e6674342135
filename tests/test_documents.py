"""Every figure in a document resolves to a recorded value, and one that does not is named."""

import json
import shutil
from pathlib import Path

import pytest
from checkout import ROOT

from titanic_mlops.flow.figures import check, check_card, figures_in, figures_of_documents, read_record


def test_every_figure_resolves_to_a_recorded_value():
    wrong = check(ROOT)
    assert not wrong, "\n".join([*wrong, "mend the sentence, or cite its value in nbs/figures.json"])


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    "The documents of this checkout."
    for name in ("nbs", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return tmp_path


def test_a_figure_that_is_from_nowhere_is_named(copy: Path):
    readme = copy / "README.md"
    readme.write_text(readme.read_text() + "\nNow with an accuracy of 0.987!\n")
    line = len(readme.read_text().splitlines())
    [wrong] = check(copy)
    assert wrong.startswith(f"README.md, line {line}: 0.987 (it is cited from nowhere")


def test_a_figure_that_was_true_once_is_named(copy: Path):
    record = copy / "nbs" / "figures.json"
    said = json.loads(record.read_text())
    said["values"]["data.share_a_ticket"] += 1
    record.write_text(json.dumps(said))
    wrong = check(copy)
    assert wrong and all("data.share_a_ticket is 597 by now" in line for line in wrong), wrong


def test_an_estimate_that_no_run_has_found_is_named(copy: Path):
    readme = copy / "README.md"
    estimates = [
        p.figure for p in figures_of_documents(copy) if p.document == "README.md" and "[" in p.figure.text
    ]
    assert estimates, "the README shows no estimate"
    one = estimates[0].text
    readme.write_text(readme.read_text().replace(one, one.replace("0.", "0.1", 1), 1))
    [wrong] = check(copy)
    assert "no estimate of the run" in wrong


def test_what_is_cited_and_not_said_is_named(copy: Path):
    record = copy / "nbs" / "figures.json"
    said = json.loads(record.read_text())
    said["cited"].setdefault("README.md", {})["0.123"] = "given: nothing"
    record.write_text(json.dumps(said))
    assert check(copy) == ["nbs/figures.json: 0.123 is cited for README.md, which does not say it"]


def test_what_is_no_figure_is_left_alone():
    assert not list(
        figures_in(
            "In 1912, `0.5`, v1.2.3, #818, [x](a/0.5), 10 bins\n\n    0.5\n```\n0.5\n```\n<!-- 0.5 -->"
        )
    )
    assert [f.text for f in figures_in("    0.1\nthen 0.25")] == ["0.25"]


def test_what_is_a_figure_is_found_wherever_it_stands(copy: Path):
    assert [f.text for f in figures_in("- a\n    - 2.5x as fast\n    1. in 120s")] == ["2.5", "120"]
    page = copy / "deploy" / "observe" / "README.md"
    page.parent.mkdir(parents=True)
    page.write_text("It answers in 12.345 ms.\n")
    assert check(copy) == ["deploy/observe/README.md, line 1: 12.345 (it is cited from nowhere)"]


def test_the_record_holds_what_a_run_finds():
    values = read_record(ROOT)["values"]
    assert values["data.passengers"] == 1309 and values["data.survived"] == 500
    assert any(name.startswith("evaluate.holdout.") for name in values)


def test_a_card_in_which_somebody_typed_a_figure_is_found(tmp_path: Path):
    import pandas as pd

    folders = {job: tmp_path / job for job in ("validate", "evaluate", "promote")}
    for folder in folders.values():
        folder.mkdir()
    people = {"ticket": ["a", "a", "b"], "survived": [1, 0, 1], "age": [1.0, None, 2.0]}
    pd.DataFrame(people).to_parquet(folders["validate"] / "accepted.parquet")
    (folders["evaluate"] / "evaluation.json").write_text(
        json.dumps({"holdout": {"accuracy": {"value": 0.78421, "low": 0.7301, "high": 0.8358}}})
    )
    crowd = {"chance": [0.999, 0.123]}  # with thousands of these, anything would be a value of the run
    (folders["promote"] / "background.json").write_text(json.dumps(crowd))
    card = tmp_path / "model_card.md"
    card.write_text("Accuracy 0.784, with 95 % intervals: 0.784 [0.730, 0.836].\nAccuracy 0.999.\n")
    assert check_card(card, folders) == ["model_card.md, line 2: 0.999 (no value of the run)"]
