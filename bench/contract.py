"""A Parquet of a million passengers against the row rules: a plain Pandera class-based schema, and the row checker.

Both read the file and find every row that breaks a rule; the verdicts must be the same, per row and rule.
Prints baseline, ours and ratio; `--json FILE` appends a line that documents can cite.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

BATCH = 131_072


def seconds(function: Callable[[], object]) -> float:
    "Wall time of a call."
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def write_passengers(file: Path, rows: int, bad: int, seed: int = 1912) -> None:
    "The real list over and over, each copy with names of its own; `bad` rows break a rule, each rule in turn."
    from titanic_mlops.data.sources import EMBEDDED, read

    real = read(EMBEDDED).frame
    numbers = np.arange(rows)
    frame = real.iloc[numbers % len(real)].reset_index(drop=True)
    frame["name"] = frame["name"] + " (" + pd.Series(numbers // len(real)).astype("str") + ")"
    frame.insert(0, "passenger_id", pd.array(numbers, dtype="Int64"))
    victims = np.random.default_rng(seed).choice(np.arange(1, rows), bad, replace=False)
    crimes: list[tuple[dict[str, Any], int]] = [
        ({"passenger_id": -1}, 0),
        ({"pclass": 4}, 0),
        ({"pclass": pd.NA}, 0),
        ({"survived": 2}, 0),
        ({"name": ""}, 0),
        ({"name": "x" * 201}, 0),
        ({"sex": "femal"}, 0),
        ({"sex": None}, 0),
        ({"age": -0.5}, 0),
        ({"age": np.inf}, 0),
        ({"sibsp": 21}, 0),
        ({"parch": -1}, 0),
        ({"ticket": "é" * 41}, 0),
        ({"fare": 1000.01}, 0),
        ({"cabin": "C" * 61}, 0),
        ({"embarked": "s"}, 0),
        ({"boat": "12" * 21}, 0),
        ({"body": 401, "survived": 0}, 0),
        ({"home_dest": "a\0b"}, 0),
        ({"survived": 1, "body": 7}, 0),
        ({}, -1),  # the passenger before, once more
    ]
    for number, (changes, copied) in enumerate(crimes):
        at = victims[number :: len(crimes)]
        for name, value in changes.items():
            frame.loc[at, name] = value
        if copied:
            for name in ("name", "ticket"):
                frame.loc[at, name] = frame[name].to_numpy(object)[at + copied]
    frame.to_parquet(file, index=False)


def plain_model() -> Any:
    "The contract as one would write it for Pandera by hand: a class with a field for each column."
    import pandera.pandas as pa

    class PassengerFrame(pa.DataFrameModel):
        passenger_id: pd.Int64Dtype = pa.Field(nullable=True, ge=0, le=2**53 - 1)
        pclass: pd.Int64Dtype = pa.Field(isin=[1, 2, 3])
        survived: pd.Int64Dtype = pa.Field(nullable=True, isin=[0, 1])
        name: str = pa.Field(str_length={"min_value": 1, "max_value": 200})
        sex: str = pa.Field(isin=["female", "male"])
        age: float = pa.Field(nullable=True, ge=0, le=110)
        sibsp: pd.Int64Dtype = pa.Field(ge=0, le=20)
        parch: pd.Int64Dtype = pa.Field(ge=0, le=20)
        ticket: str = pa.Field(str_length={"min_value": 1, "max_value": 40})
        fare: float = pa.Field(nullable=True, ge=0, le=1000)
        cabin: str = pa.Field(nullable=True, str_length={"max_value": 60})
        embarked: str = pa.Field(nullable=True, isin=["C", "Q", "S"])
        boat: str = pa.Field(nullable=True, str_length={"max_value": 40})
        body: pd.Int64Dtype = pa.Field(nullable=True, ge=1, le=400)
        home_dest: str = pa.Field(nullable=True, str_length={"max_value": 200})

        @pa.check("name", "ticket", "cabin", "boat", "home_dest", name="no_nul")
        def no_nul(cls, texts: pd.Series) -> pd.Series:
            return ~texts.str.contains("\0", regex=False)

        @pa.dataframe_check
        def body_of_the_dead(cls, frame: pd.DataFrame) -> pd.Series:
            return ~((frame["survived"] == 1).fillna(False) & frame["body"].notna())

        @pa.dataframe_check
        def one_row_each(cls, frame: pd.DataFrame) -> pd.Series:
            return ~frame.duplicated(["name", "ticket"])

        class Config:
            strict = True

    return PassengerFrame


def with_pandera(file: Path) -> dict[str, set[int]]:  # rule -> rows that break it
    "The verdict of the plain class."
    from pandera.errors import SchemaErrors

    frame = pd.read_parquet(file)
    try:
        plain_model().validate(frame, lazy=True)
    except SchemaErrors as errors:
        cases = errors.failure_cases
        wide = cases["schema_context"] == "DataFrameSchema"
        rules = cases["check"].where(wide, cases["column"])
        return {str(rule): set(group.astype(int)) for rule, group in cases["index"].groupby(rules)}
    return {}


def with_rowcheck(file: Path) -> dict[str, set[int]]:
    "The verdict of the row checker."
    from titanic_mlops.data.rowcheck import check_parquet

    found = check_parquet(file, BATCH)
    return {rule: set(rows.tolist()) for rule, rows in found.broken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs of the row checker, the median counts")
    parser.add_argument("--slow-runs", type=int, default=3, help="runs of Pandera")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--bad", type=int, default=1_000, help="rows that break a rule")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one line")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "passengers.parquet"
        write_passengers(file, arguments.rows, arguments.bad)
        wanted, found = with_pandera(file), with_rowcheck(file)  # and imports what both need
        slow = [seconds(lambda: with_pandera(file)) for _ in range(arguments.slow_runs)]
        quick = [seconds(lambda: with_rowcheck(file)) for _ in range(arguments.runs)]

    same = wanted == found
    before, after = statistics.median(slow), statistics.median(quick)
    name = f"{arguments.rows:,} rows, {arguments.bad:,} of them bad"
    print(f"{'Parquet to verdict, median':<38} {'pandera':>9} {'ours':>9} {'ratio':>8}")
    print(f"{name:<38} {before:9.3f} {after:9.3f} {before / after:7.1f}x  s")
    broken = sum(map(len, found.values()))
    print(
        f"verdicts per row and rule: {'the same' if same else 'DIFFERENT'} ({len(found)} rules, {broken} breaches)"
    )
    if arguments.json:
        figure = {"name": name, "unit": "s", "baseline": round(before, 4), "ours": round(after, 4),
                  "ratio": round(before / after, 2), "runs": [len(slow), len(quick)], "same": same}  # fmt: skip
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        with arguments.json.open("a") as out:
            said = {"bench": "contract", "at": int(time.time()), "cpus": os.cpu_count(), "figures": [figure]}
            out.write(json.dumps(said) + "\n")
    if not same:
        for rule in sorted(wanted.keys() | found.keys()):
            odd = wanted.get(rule, set()) ^ found.get(rule, set())
            print(f"  {rule}: {len(odd)} rows differ" if odd else "", end="\n" if odd else "")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
