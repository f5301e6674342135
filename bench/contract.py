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


def plain_model(by_hand: bool = False) -> Any:
    """The contract as a Pandera class: a field for each column, with Pandera's own checks.

    `by_hand` replaces its slowest, the pattern, by a function written for speed.
    """
    import pandera.pandas as pa

    text = {} if by_hand else {"str_matches": r"^[^\x00]*$"}

    class PassengerFrame(pa.DataFrameModel):
        passenger_id: pd.Int64Dtype = pa.Field(nullable=True, ge=0, le=2**53 - 1)
        pclass: pd.Int64Dtype = pa.Field(isin=[1, 2, 3])
        survived: pd.Int64Dtype = pa.Field(nullable=True, isin=[0, 1])
        name: str = pa.Field(str_length={"min_value": 1, "max_value": 200}, **text)
        sex: str = pa.Field(isin=["female", "male"])
        age: float = pa.Field(nullable=True, ge=0, le=110)
        sibsp: pd.Int64Dtype = pa.Field(ge=0, le=20)
        parch: pd.Int64Dtype = pa.Field(ge=0, le=20)
        ticket: str = pa.Field(str_length={"min_value": 1, "max_value": 40}, **text)
        fare: float = pa.Field(nullable=True, ge=0, le=1000)
        cabin: str = pa.Field(nullable=True, str_length={"max_value": 60}, **text)
        embarked: str = pa.Field(nullable=True, isin=["C", "Q", "S"])
        boat: str = pa.Field(nullable=True, str_length={"max_value": 40}, **text)
        body: pd.Int64Dtype = pa.Field(nullable=True, ge=1, le=400)
        home_dest: str = pa.Field(nullable=True, str_length={"max_value": 200}, **text)

        @pa.dataframe_check
        def body_of_the_dead(cls, frame: pd.DataFrame) -> pd.Series:
            return ~((frame["survived"] == 1).fillna(False) & frame["body"].notna())

        # Config.unique would blame the first one as well
        @pa.dataframe_check
        def one_row_each(cls, frame: pd.DataFrame) -> pd.Series:
            return ~frame.duplicated(["name", "ticket"])

        class Config:
            strict = True

    class ByHand(PassengerFrame):
        @pa.check("name", "ticket", "cabin", "boat", "home_dest", name="no_nul")
        def no_nul(cls, texts: pd.Series) -> pd.Series:
            return ~texts.str.contains("\0", regex=False)

    return ByHand if by_hand else PassengerFrame


Verdicts = dict[str, set[int]]  # rule -> rows that break it


def with_pandera(frame: pd.DataFrame, model: Any) -> Verdicts:
    "The verdict of a Pandera class."
    from pandera.errors import SchemaErrors

    try:
        model.validate(frame, lazy=True)
    except SchemaErrors as errors:
        cases = errors.failure_cases
        wide = cases["schema_context"] == "DataFrameSchema"
        rules = cases["check"].where(wide, cases["column"])
        return {str(rule): set(group.astype(int)) for rule, group in cases["index"].groupby(rules)}
    return {}


def with_rowcheck(found: Any) -> Verdicts:
    "The verdict of the row checker."
    return {rule: set(rows.tolist()) for rule, rows in found.broken.items()}


def line(name: str, baseline: list[float], ours: list[float]) -> dict[str, Any]:
    "Print one comparison."
    before, after = statistics.median(baseline), statistics.median(ours)
    print(f"{name:<44} {before:9.3f} {after:9.3f} {before / after:7.1f}x  s")
    return {"name": name, "unit": "s", "baseline": round(before, 4), "ours": round(after, 4),
            "ratio": round(before / after, 2), "runs": [len(baseline), len(ours)]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs of each, the median counts")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--bad", type=int, default=1_000, help="rows that break a rule")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one line")
    arguments = parser.parse_args()
    import pyarrow.parquet as pq

    from titanic_mlops.data.rowcheck import check_parquet, check_table

    plain, by_hand = plain_model(), plain_model(by_hand=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "passengers.parquet"
        write_passengers(file, arguments.rows, arguments.bad)
        frame, table = pd.read_parquet(file), pq.read_table(file)
        ways: dict[str, Callable[[], Verdicts]] = {  # the first round warms up, and gives the verdicts
            "plain": lambda: with_pandera(pd.read_parquet(file), plain),
            "by hand": lambda: with_pandera(pd.read_parquet(file), by_hand),
            "ours": lambda: with_rowcheck(check_parquet(file)),
            "plain, in memory": lambda: with_pandera(frame, plain),
            "by hand, in memory": lambda: with_pandera(frame, by_hand),
            "ours, in memory": lambda: with_rowcheck(check_table(table)),
        }
        verdicts = {name: way() for name, way in ways.items()}
        took: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.runs):  # by turns, so that a busy moment of the machine hits all
            for name, way in ways.items():
                took[name].append(seconds(way))

    print(f"{arguments.rows:,} rows, {arguments.bad:,} of them bad; median of {arguments.runs}")
    print(f"{'':<44} {'pandera':>9} {'ours':>9} {'ratio':>8}")
    figures = [
        line("Parquet to verdict", took["plain"], took["ours"]),
        line("the same, Pandera's slowest check by hand", took["by hand"], took["ours"]),
        line("rows in memory to verdict", took["plain, in memory"], took["ours, in memory"]),
        line(
            "the same, Pandera's slowest check by hand", took["by hand, in memory"], took["ours, in memory"]
        ),
    ]
    same = all(one == verdicts["ours"] for one in verdicts.values())
    breaches = sum(map(len, verdicts["ours"].values()))
    print(
        f"verdicts per row and rule: {'the same' if same else 'DIFFERENT'} "
        f"({len(verdicts['ours'])} rules, {breaches} breaches)"
    )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        with arguments.json.open("a") as out:
            said = {"bench": "contract", "at": int(time.time()), "cpus": os.cpu_count(), "figures": figures}
            out.write(json.dumps(said | {"same_verdicts": same, "breaches": breaches}) + "\n")
    if not same:
        for name, one in verdicts.items():
            for rule in sorted(one.keys() | verdicts["ours"].keys()):
                odd = one.get(rule, set()) ^ verdicts["ours"].get(rule, set())
                if odd:
                    print(f"  {name}, {rule}: {len(odd)} rows differ, such as {sorted(odd)[:3]}")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
