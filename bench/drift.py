"""How often the drift test cries wolf, and how often it sees what moved, beside the usual one: each column on its own at 5 %.

Windows without a change are drawn again from the reference, with replacement. The shifts are of medium size, said in the table.
Prints both rates with 95 % intervals (Clopper and Pearson); `--json FILE` appends a line that documents can cite.
"""

import argparse
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ALARMS, POWER = "false alarms", "power"
COLUMNS = ("name", "pclass", "sex", "age", "sibsp", "parch", "fare", "embarked")


def known() -> Any:
    "The passengers with a probability for each, from a logistic regression out of fold, by ticket."
    import pyarrow as pa

    from titanic_mlops.data.sources import EMBEDDED, canonical, read
    from titanic_mlops.model.train import Candidate, cross_validate

    passengers = canonical(read(EMBEDDED, outcome=True).frame)
    oof = cross_validate(Candidate("logistic"), passengers, repeats=1)
    chance = oof.groupby("row")["probability"].mean().reindex(range(len(passengers)))
    table = pa.Table.from_pandas(passengers[list(COLUMNS)], preserve_index=False)
    return table.append_column("probability", pa.array(chance.to_numpy(float)))


def older(rows: Any, draws: Any) -> Any:
    rows["age"] = rows["age"] + 5
    return rows


def poorer(rows: Any, draws: Any) -> Any:
    rows["fare"] = rows["fare"] * 0.7
    return rows


def other_ports(rows: Any, draws: Any) -> Any:
    moved = draws.random(len(rows)) < 0.2
    rows.loc[moved, "embarked"] = "C"
    return rows


def pence(rows: Any, draws: Any) -> Any:
    rows["fare"] = rows["fare"] * 240
    return rows


def broken_age(rows: Any, draws: Any) -> Any:
    rows.loc[draws.random(len(rows)) < 0.2, "age"] = None
    return rows


def surer(rows: Any, draws: Any) -> Any:
    p = rows["probability"]
    rows["probability"] = p + 0.3 * ((p > 0.5) - p)
    return rows


SHIFTS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "older": ("ages 5 years up", older),
    "poorer": ("fares 30 % down", poorer),
    "port mix": ("a fifth moved to Cherbourg", other_ports),
    "pence for pounds": ("fares times 240", pence),
    "broken upstream": ("a fifth of the ages lost", broken_age),
    "label shift": ("probabilities 30 % nearer to 0 and 1", surer),
}


def usual(reference: Any, window: Any) -> bool:
    "Does any column differ at 5 % by its own test, as reports have it by default?"
    from titanic_mlops.watch.drift import NUMBERS, WORDS, _chi_square, _ks

    p = [_ks(window.counts[n], reference.sketch.counts[n])[1] for n in NUMBERS]
    p += [_chi_square(window.counts[n], reference.sketch.counts[n]) for n in WORDS]
    return min(p) < 0.05


_OWN: list[Any] = []


def trials(job: tuple[str, int, int, int]) -> tuple[str, int, int, int]:  # what, windows, ours, usual
    "Draw windows and count the alarms."
    import numpy as np
    import pyarrow as pa

    from titanic_mlops.watch.drift import Reference, Sketch, analyse

    what, seed, windows, rows = job
    if not _OWN:
        table = known()
        _OWN.extend((table, Reference.of(table)))
    table, reference = _OWN
    draws, ours, theirs = np.random.default_rng([seed, len(what)]), 0, 0
    for _ in range(windows):
        drawn = table.take(draws.integers(0, len(table), rows))
        if what in SHIFTS:
            drawn = pa.Table.from_pandas(SHIFTS[what][1](drawn.to_pandas(), draws), preserve_index=False)
        window = Sketch.of(reference, drawn)
        ours += bool(analyse(reference, window).moved)
        theirs += usual(reference, window)
    return what, windows, ours, theirs


def rate(hits: int, of: int) -> dict[str, float]:
    from scipy.stats import binomtest

    ends = binomtest(hits, of).proportion_ci(method="exact")
    return {"value": hits / of, "low": ends.low, "high": ends.high}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=2000, help="of 200 rows, without a change")
    parser.add_argument("--shifted", type=int, default=200, help="of 500 rows, for each shift")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one line")
    arguments = parser.parse_args()
    piece = 100
    jobs = [("nothing", seed, piece, 200) for seed in range(-(-arguments.windows // piece))]
    jobs += [(name, 0, arguments.shifted, 500) for name in SHIFTS]
    os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    counted: dict[str, list[int]] = {}
    with ProcessPoolExecutor(2) as pool:
        for what, *counts in pool.map(trials, jobs):
            counted[what] = [a + b for a, b in zip(counted.get(what, [0, 0, 0]), counts, strict=True)]
    figures = {}
    print(f"{'windows':20}{'':54}{'usual':>24}{'ours':>24}")
    for what, (windows, ours, theirs) in counted.items():
        said = {"usual": rate(theirs, windows), "ours": rate(ours, windows)}
        figures[f"{ALARMS if what == 'nothing' else POWER}: {what}"] = said
        shown = [f"{r['value']:.1%} [{r['low']:.1%}, {r['high']:.1%}]" for r in said.values()]
        about = (
            f"{windows} of 200 rows, goal <= 1 %" if what == "nothing" else SHIFTS[what][0] + ", goal >= 90 %"
        )
        print(f"{what:20}{about:54}{shown[0]:>24}{shown[1]:>24}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        with arguments.json.open("a") as file:
            file.write(json.dumps({"figures": figures}) + "\n")


if __name__ == "__main__":
    main()
