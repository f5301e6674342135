"""What Evidently's default data drift preset says of windows: is any column drifted, are half of them.

Takes a folder of Parquet files: the reference, and windows (numbered) of some kinds. The preset makes a page of plots for each window, a second of
work; here the tests that it chooses are called without the page, and of some windows of each file the whole preset has to say the same.
Runs in an environment of its own (evidently does not import beside the project's pandas): `bench/drift.py` starts it.
"""

import json
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pandas as pd
from evidently import DataDefinition, Dataset, Report
from evidently.legacy.calculations.stattests import get_stattest
from evidently.presets import DataDriftPreset

NUMBERS = ["age", "fare", "sibsp", "parch", "probability"]
WORDS = ["pclass", "sex", "embarked", "title", "survived"]
KINDS = dict.fromkeys(NUMBERS, "num") | dict.fromkeys(WORDS, "cat")


def drifted(reference: pd.DataFrame, window: pd.DataFrame) -> int:
    "Columns that have drifted, by the tests and thresholds that the preset chooses."
    count = 0
    for name, kind in KINDS.items():
        old, new = reference[name].dropna(), window[name].dropna()
        count += bool(get_stattest(old, new, kind, None)(old, new, kind, None).drifted)
    return count


def by_preset(reference: pd.DataFrame, window: pd.DataFrame) -> int:
    "The same by the preset itself."
    kinds = DataDefinition(numerical_columns=NUMBERS, categorical_columns=WORDS)
    old, new = (Dataset.from_pandas(rows, data_definition=kinds) for rows in (reference, window))
    found = Report([DataDriftPreset()]).run(new, old).dict()["metrics"]
    return int(next(m["value"]["count"] for m in found if "DriftedColumnsCount" in m["metric_name"]))


def of_file(file: Path) -> tuple[str, list[list[bool]]]:
    warnings.simplefilter("ignore")
    reference, found = pd.read_parquet(file.with_name("reference.parquet")), []
    for number, window in pd.read_parquet(file).groupby("window"):
        rows = window.drop(columns="window").reset_index(drop=True)
        count = drifted(reference, rows)
        if number in (0, 1):
            assert by_preset(reference, rows) == count, (file.name, number)
        found.append([count > 0, count >= len(KINDS) / 2])
    return file.stem.rsplit("-", 1)[0], found


def main() -> None:
    said: dict[str, list[list[bool]]] = {}
    files = sorted(Path(sys.argv[1]).glob("*-*.parquet"))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for what, found in pool.map(of_file, files):
            said.setdefault(what, []).extend(found)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
