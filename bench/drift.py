"""How often the drift test cries wolf, how often it sees what moved, and what ten million logged predictions cost.

Windows without a change are drawn again from the reference, with replacement; the shifts are those of `watch.shifts`, of medium size. All
outcomes are known, and the outcome is one column more: an alarm of ours is one of drift or of performance. On the same windows, for comparison: each column on its own at 5 %, each column's PSI at 0.1, and Evidently's default preset, which says of each column whether it
has drifted, and of the data set if half of them have. Rates with 95 % intervals (Clopper and Pearson). Evidently runs in an environment of its own,
which uv makes; where that can't be, its columns stay empty. `--json FILE` appends a line that documents can cite.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

COLUMNS = ("name", "pclass", "sex", "age", "sibsp", "parch", "fare", "embarked")
NUMBERS = ("age", "fare", "sibsp", "parch", "probability")
WORDS = ("pclass", "sex", "embarked", "title", "survived")
GOALS = {"alarms": 0.01, "power": 0.9, "seconds": 30, "peak_mb": 1024}
EVIDENTLY = ("evidently==0.7.23", "pandas<3.1", "pyarrow")  # it does not import beside pandas 3.1
PEER = Path(__file__).parent / "baselines" / "evidently_preset.py"


def known() -> Any:
    "The passengers with what became of them, and a probability for each: a logistic regression's, out of fold, by ticket."
    import pyarrow as pa

    from titanic_mlops.data.sources import EMBEDDED, canonical, read
    from titanic_mlops.model.train import Candidate, cross_validate

    passengers = canonical(read(EMBEDDED, outcome=True).frame)
    oof = cross_validate(Candidate("logistic"), passengers, repeats=1)
    chance = oof.groupby("row")["probability"].mean().reindex(range(len(passengers)))
    table = pa.Table.from_pandas(passengers[[*COLUMNS, "ticket", "survived"]], preserve_index=False)
    return table.append_column("probability", pa.array(chance.to_numpy(float)))


def more_men(rows: Any, draws: Any) -> Any:
    import pandas as pd

    women = (rows["sex"] == "female").to_numpy()
    gone = women & (draws.random(len(rows)) < 0.112)  # men are 64 of a hundred; four more
    men = rows[~women].sample(int(gone.sum()), replace=True, random_state=draws)
    return pd.concat([rows[~gone], men], ignore_index=True)


def kinds() -> dict[str, tuple[str, int, Callable[[Any, Any], Any]]]:  # what -> how, rows of a window, change
    "Windows of all kinds: two that are no news, and the named shifts."
    from titanic_mlops.watch.shifts import SHIFTS

    quiet = {
        "nothing": ("drawn again from the reference", 200, lambda rows, draws: rows),
        "trifle": ("four more men in a hundred", 10_000, more_men),
    }
    return quiet | {name: (shift.says(), 500, shift.apply) for name, shift in SHIFTS.items()}


METHODS = ("column at 5 %", "PSI at 0.1", "Evidently, column", "Evidently, data set", "ours")


def naive(reference: Any, window: Any, outcomes: tuple[Any, Any]) -> tuple[bool, bool]:  # by p-value, by PSI
    "Does any column differ, by its own test at 5 %, or with a PSI of 0.1?"
    import numpy as np

    from titanic_mlops.watch import drift

    pairs = [(window.counts[name], reference.sketch.counts[name]) for name in drift.WATCHED]
    p = [
        (drift._ks(*pair)[1] if n in drift.NUMBERS else drift._chi_square(*pair))
        for n, pair in zip(drift.WATCHED, pairs, strict=True)
    ]
    p.append(drift._chi_square(*outcomes))
    tenths = [(drift._tenths(b, a), drift._tenths(b, b)) for a, b in pairs[: len(drift.NUMBERS)]]
    psi = []
    for a, b in (*tenths, *pairs[len(drift.NUMBERS) :], outcomes):
        x, y = (
            np.maximum(counts, 0.5) / counts.sum() for counts in (a, b)
        )  # an empty cell counts as half a row
        psi.append(((x - y) * np.log(x / y))[(a + b) > 0].sum())
    return min(p) < 0.05, max(psi) >= 0.1


def promised(table: Any) -> dict[str, dict[str, float]]:
    "Figures of a hold-out: a fifth of the tickets."
    import numpy as np

    from titanic_mlops.model.evaluate import estimate

    ticket = table["ticket"].to_numpy()
    held = np.isin(
        ticket, np.random.default_rng(1).permutation(np.unique(ticket))[: len(np.unique(ticket)) // 5]
    )
    rows = [table[name].to_numpy()[held].astype(float) for name in ("survived", "probability")]
    return {name: one.model_dump() for name, one in estimate(*rows, ticket[held]).items()}


_OWN: list[Any] = []


def trials(job: tuple[str, int, int, str]) -> tuple[str, list[tuple[bool, bool, bool]]]:
    "Draw windows, keep them for the others, and say whose alarm each would be: two naive ones, ours."
    import numpy as np
    import pandas as pd
    import pyarrow as pa

    from titanic_mlops.data.features import title
    from titanic_mlops.watch.drift import Reference, Rules, Sketch, analyse
    from titanic_mlops.watch.performance import _worse

    what, seed, windows, folder = job
    if not _OWN:
        table = known()
        _OWN.extend((table, Reference.of(table), promised(table)))
    table, reference, holdout = _OWN
    _, rows, change = kinds()[what]
    draws, found, kept = np.random.default_rng([seed, len(what)]), [], []
    before = np.bincount(table["survived"].to_numpy(), minlength=2)
    for number in range(windows):
        drawn = change(table.take(draws.integers(0, len(table), rows)).to_pandas(), draws)
        kept.append(drawn.assign(title=drawn["name"].map(title), window=number)[[*NUMBERS, *WORDS, "window"]])
        window = Sketch.of(reference, pa.Table.from_pandas(drawn, preserve_index=False))
        p, y = drawn["probability"].to_numpy(float), drawn["survived"].to_numpy(float)
        worse = any(one.moved for one in _worse(p, y, holdout, Rules()))
        usual = naive(reference, window, (np.bincount(y.astype(int), minlength=2), before))
        found.append((*usual, bool(analyse(reference, window).moved) or worse))
    pd.concat(kept).to_parquet(Path(folder) / f"{what}-{seed:03}.parquet", index=False)
    return what, found


def by_evidently(folder: Path, table: Any) -> dict[str, list[list[bool]]]:  # what -> any column, half of them
    "What Evidently says of the same windows; nothing if it can't be had."
    from titanic_mlops.data.features import title

    frame = table.to_pandas()
    frame.assign(title=frame["name"].map(title))[[*NUMBERS, *WORDS]].to_parquet(folder / "reference.parquet")
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    command = [uv, "run", "--quiet", "--no-project", "--python", "3.11"]
    command += [part for name in EVIDENTLY for part in ("--with", name)]
    try:
        done = subprocess.run([*command, "python", PEER, folder], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        print(f"Evidently could not be run: {why}", file=sys.stderr)
        return {}
    return json.loads(done.stdout)


def rate(hits: int, of: int) -> dict[str, float]:
    from scipy.stats import binomtest

    ends = binomtest(hits, of).proportion_ci(method="exact")
    return {"value": hits / of, "low": ends.low, "high": ends.high}


def rates(windows: int, shifted: int, folder: Path) -> dict[str, dict[str, Any]]:  # what -> method -> rate
    "Alarms of all methods on the same windows."
    piece = 100
    jobs = [("nothing", seed, piece, str(folder)) for seed in range(-(-windows // piece))]
    jobs += [(name, 0, shifted, str(folder)) for name in kinds() if name != "nothing"]
    found: dict[str, list[tuple[bool, ...]]] = {name: [] for name in kinds()}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for what, alarms in pool.map(trials, jobs):
            found[what] += alarms
    theirs = by_evidently(folder, known())
    said: dict[str, dict[str, Any]] = {}
    for what, alarms in found.items():
        columns = [*zip(*alarms, strict=True)]
        peer = [*zip(*theirs[what], strict=True)] if theirs else [None, None]
        hits = dict(zip(METHODS, (columns[0], columns[1], *peer, columns[2]), strict=True))
        about, rows, _ = kinds()[what]
        said[what] = {"about": about, "rows": rows, "windows": len(alarms)}
        said[what] |= {name: rate(sum(h), len(h)) for name, h in hits.items() if h is not None}
    return said


def logged(table: Any, first: int, size: int, times: Any, draws: Any) -> Any:
    "Answers as the server's own tidying leaves them; ids, probabilities and fares are all different."
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from titanic_mlops.serve.record import schema_of

    chosen, noise = table.take(draws.integers(0, len(table), size)), draws.normal(0, 0.01, size)
    ids = [pa.array(draws.integers(1 << 62, 1 << 63, size, np.uint64)).cast("string") for _ in range(2)]
    same = {"model_version": "1", "bundle_digest": "b" * 64, "contract_version": "1.0.0", "override": ""}
    same |= {"kind": "champion", "redacted": "name=title", "writer": "bench"}
    own = {name: chosen[name] for name in COLUMNS}
    own |= {name: pa.repeat(value, size) for name, value in same.items()}
    own |= {
        "number": pa.array(np.arange(first, first + size)),
        "time": pa.array(times).cast(pa.timestamp("us", "UTC")),
        "request_id": pc.binary_join_element_wise(*ids, "-"),
        "probability": pa.array(np.clip(chosen["probability"].to_numpy() + noise, 0, 1)),
        "fare": pc.multiply(chosen["fare"].cast("float64"), pa.array(1 + noise)),
    }
    schema, nothing = schema_of("answers"), pa.nulls(size)
    return pa.table([own.get(field.name, nothing).cast(field.type) for field in schema], schema=schema)


def write_log(folder: Path, rows: int, start: int, table: Any) -> None:
    "A prediction log of a day."
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from titanic_mlops.data.features import title
    from titanic_mlops.serve.record import ROW_GROUP

    day = folder / "answers" / "date=2026-03-01"
    day.mkdir(parents=True)
    names = pa.array([f"?, {title(name)}. ?" for name in table["name"].to_pylist()])
    table = table.set_column(table.column_names.index("name"), "name", names).combine_chunks()
    piece, draws = min(rows, 1_000_000), np.random.default_rng(0)
    for first in range(0, rows, piece):
        size = min(piece, rows - first)
        times = start * 1_000_000 + (first + np.arange(size)) * (86_000_000_000 // rows)
        file = day / f"bench-{first // piece + 1:06}-20260301.parquet"
        written = logged(table, first, size, times, draws)
        pq.write_table(written, file, compression="zstd", row_group_size=ROW_GROUP)


def look_at(folder: Path, start: int) -> None:
    "One look at a log of which nothing was read before; prints seconds and peak memory."
    import pyarrow.parquet as pq

    from titanic_mlops.watch.drift import Reference
    from titanic_mlops.watch.monitor import Memory, References, look

    references = References(folder, {"b" * 64: Reference.of(pq.read_table(folder / "known.parquet"))})
    seen = look(folder / "log", Memory(folder / "watch"), references, "b" * 64, now=start + 86_390)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"rows": seen.drift.rows, "peak_mb": peak}))


def ten_million(rows: int, folder: Path) -> dict[str, float]:
    "Seconds, those of the processor, and peak memory of a process that analyses so many predictions, start and imports included."
    import pyarrow.parquet as pq

    start, table = 1_772_323_200, known()
    pq.write_table(table, folder / "known.parquet")
    write_log(folder / "log", rows, start, table)
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, __file__, "--look", str(folder), str(start)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["rows"] == rows, found
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return found | {"seconds": round(seconds, 1), "cpu_seconds": round(used, 1)}


def show(said: dict[str, dict[str, Any]]) -> None:
    print(f"{'windows':57}" + "".join(f"{name:>23}" for name in METHODS))
    for what, line in said.items():
        goal = f"goal <= {GOALS['alarms']:.0%}" if what == "nothing" else f"goal >= {GOALS['power']:.0%}"
        about = f"{what}, {line['windows']} of {line['rows']} rows: {line['about']}"
        print(about + (f", {goal}" if what != "trifle" else ""))
        shown = (line.get(name) for name in METHODS)
        cells = (f"{r['value']:.1%} [{r['low']:.1%}, {r['high']:.1%}]" if r else "-" for r in shown)
        print(" " * 57 + "".join(f"{cell:>23}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--windows", type=int, default=2000, help="of 200 rows, without a change; 0: no windows at all"
    )
    parser.add_argument("--shifted", type=int, default=200, help="for each shift")
    parser.add_argument("--log", type=int, default=10_000_000, help="logged predictions to analyse; 0: none")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one line")
    parser.add_argument("--look", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.look:
        return look_at(Path(arguments.look[0]), int(arguments.look[1]))
    os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    said: dict[str, Any] = {"bench": "drift", "at": int(time.time()), "cpus": os.cpu_count()}
    if arguments.windows:
        with tempfile.TemporaryDirectory() as folder:
            said["rates"] = rates(arguments.windows, arguments.shifted, Path(folder))
            show(said["rates"])
    if arguments.log:
        with tempfile.TemporaryDirectory() as folder:
            said["log"] = log = ten_million(arguments.log, Path(folder))
        goal = f"goal < {GOALS['seconds']} s, < {GOALS['peak_mb']} MB, for ten million"
        print(
            f"{log['rows']:,} logged predictions: {log['seconds']} s ({log['cpu_seconds']} of a core), {log['peak_mb']} MB, {goal}"
        )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        with arguments.json.open("a") as file:
            file.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
