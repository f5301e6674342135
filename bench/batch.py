"""Batch from Parquet to Parquet with contract checks, beside the scikit-learn pipeline's `predict_proba` on a frame in memory.

Both on one core, by turns. First the real list over and over. Then passengers that are made up from it: drawn again, with a name, a
ticket, an age (whole and half years) and a fare (whole pence) of their own; and the worst case, in which each row has features that
no other has.
Every row is checked against the row rules. Prints rows/s, ratio and peak memory; `--json FILE` appends a line that documents can cite.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

PIECE = 1_000_000  # rows made up at a time
FRAME = 500_000  # rows of the frame in memory


def texts(values: Any) -> Any:
    "Texts as Arrow has them."
    import pyarrow as pa

    return pa.array([None if value != value else value for value in values.astype(object)], pa.string())


COLUMNS = ["pclass", "name", "sex", "age", "sibsp", "parch", "ticket", "fare", "cabin", "embarked"]


def repeat(real: Any, rows: int, first: int) -> Any:
    "A table of the real passengers over and over."
    import numpy as np
    import pyarrow as pa

    numbers = pa.array(np.arange(first, first + rows))
    known = pa.Table.from_pandas(real[COLUMNS], preserve_index=False)
    table = known.take(pa.array(numbers.to_numpy() % len(real)))
    return table.add_column(0, "passenger_id", numbers)


def make_up(real: Any, rows: int, first: int, alike: bool, seed: int) -> Any:
    "A table of made-up passengers."
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    random = np.random.default_rng([seed, first])
    at, others, more = (random.integers(0, len(real), rows) for _ in range(3))
    parts = real["name"].str.extract(r"^(?P<surname>[^,]*), (?P<title>[^.]*)\. ?(?P<given>.*)$")
    drawn = lambda column, which: texts(column).take(pa.array(which))
    surname, title, given = (
        drawn(parts[name], n) for name, n in (("surname", others), ("title", at), ("given", more))
    )
    name = pc.binary_join_element_wise(surname, title, pa.scalar(""), ", ")
    name = pc.binary_join_element_wise(pc.utf8_rtrim(name, ", "), given, ". ")
    prefix = drawn(real["ticket"].str.replace(r"\d+$", "", regex=True), at)
    ticket = pc.binary_join_element_wise(
        prefix, pa.array(random.integers(1000, 999_999, rows)).cast("string"), ""
    )
    age, fare = real["age"].to_numpy(float)[at], real["fare"].to_numpy(float)[at]
    if alike:
        moved = np.clip(np.round(2 * (age + random.normal(0, 3, rows))) / 2, 1, 80)
        age = np.where(age > 1, moved, age)  # babies keep their months
        fare = np.round(np.round(fare * random.choice(np.linspace(0.8, 1.2, 41), rows) * 240) / 240, 4)
    else:
        age = np.where(
            np.isnan(age), random.uniform(0, 80, rows), np.clip(age + random.normal(0, 2, rows), 0, 100)
        )
        fare = np.clip(np.nan_to_num(fare, nan=8.0) * random.uniform(0.8, 1.2, rows), 0, 1000)
    known = lambda values: pa.array(values, mask=np.isnan(values))
    whole = lambda column: pa.array(real[column].to_numpy(np.int64)[at])
    return pa.table(
        {
            "passenger_id": pa.array(np.arange(first + 1, first + rows + 1)),
            "pclass": whole("pclass"),
            "name": name,
            "sex": drawn(real["sex"], at),
            "age": known(age),
            "sibsp": whole("sibsp"),
            "parch": whole("parch"),
            "ticket": ticket,
            "fare": known(fare),
            "cabin": drawn(real["cabin"], at),
            "embarked": drawn(real["embarked"], at),
        }
    )


def write_passengers(file: Path, rows: int, case: str, codec: str, seed: int = 1912) -> None:
    "A Parquet file of passengers, piece by piece."
    import pyarrow.parquet as pq

    from titanic_mlops.data.sources import EMBEDDED, read

    real, writer = read(EMBEDDED).frame, None
    for first in range(0, rows, PIECE):
        piece = min(PIECE, rows - first)
        if case == "the real list":
            table = repeat(real, piece, first)
        else:
            table = make_up(real, piece, first, case == "passengers", seed)
        writer = writer or pq.ParquetWriter(file, table.schema, compression=codec)
        writer.write_table(table)
    writer.close()


def write_models(folder: Path, kind: str) -> None:
    "A pipeline fitted on the real list, and the bundle of the same model."
    from titanic_mlops.data.features import CATEGORICAL, NUMERIC, feature_frame
    from titanic_mlops.data.sources import EMBEDDED, canonical, read
    from titanic_mlops.model.bundle import BundleInfo, Lineage, to_onnx, write_bundle
    from titanic_mlops.model.train import Candidate, fit, save_model

    real = canonical(read(EMBEDDED).frame)
    pipeline = fit(
        Candidate(kind), feature_frame(real), real.survived.to_numpy(int), real.ticket.to_numpy(str)
    )
    inputs = [*NUMERIC, *CATEGORICAL]
    info = BundleInfo(candidate=kind, hyperparameters={}, calibration="none", inputs=inputs, split={}, figures={},
                      reference={})  # fmt: skip
    lineage = Lineage(git_commit="0" * 40, snapshot="bench", data_sha256="0" * 64, seed=0)
    write_bundle(folder / "bundle", to_onnx(pipeline), info, lineage)
    save_model(pipeline, folder / "model.skops")


def distinct(file: Path, folder: Path) -> int:
    "How many different rows of features the first rows of a file hold."
    import numpy as np
    import pyarrow.parquet as pq

    from titanic_mlops.serve.columns import open_model

    encoder = open_model(folder / "bundle").encoder
    rows = [encoder(batch) for batch in pq.ParquetFile(file).iter_batches(65_536)]
    cells = [np.concatenate([getattr(one, name) for one in rows]) for name in ("group", "fare", "age")]
    cells[2] = np.nan_to_num(cells[2].astype(np.float32), nan=-1)
    return len(np.unique(np.rec.fromarrays(cells)))


def baseline(folder: Path, file: Path) -> Any:
    "What predicts the rows of a frame in memory."
    import pyarrow.parquet as pq

    from titanic_mlops.data.features import feature_frame
    from titanic_mlops.model.train import load_model

    batch = next(pq.ParquetFile(file).iter_batches(FRAME))
    pipeline, frame = load_model(folder / "model.skops"), feature_frame(batch.to_pandas())

    def once() -> int:
        pipeline.predict_proba(frame)
        return len(frame)

    return once


def ours(folder: Path, file: Path) -> Any:
    "What scores a file."
    import pyarrow as pa

    from titanic_mlops.ground.settings import Settings
    from titanic_mlops.serve.batch import Task, find_files, places_of, score_file
    from titanic_mlops.serve.columns import open_model

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    model = open_model(folder / "bundle")
    task = Task("1", model.digest, 0.5)
    places = places_of(str(folder / "scores.parquet"), Settings(store=folder / "store"))

    def once() -> int:
        done = score_file(model, find_files(str(file))[0][0], places, task, force=True)
        assert not done.rejected, f"{done.rejected} rows were rejected"
        return done.rows

    return once


def peak() -> float:
    "The peak memory of this process in MB; getrusage would count its parent's, from before it became another program."
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def worker(wire: Any, way: Any, *places: Path) -> None:
    "A process that does one thing when it is told to, and says how fast it was, and its peak memory."
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    once = way(*places)
    while wire.recv():
        start = time.perf_counter()
        rows = once()
        seconds = time.perf_counter() - start
        wire.send((rows / seconds, peak()))


def compare(folder: Path, file: Path, runs: int) -> tuple[list[float], list[float], float]:
    "Rows/s of both by turns, after a first round that warms up; and our peak memory in MB."
    spawn = multiprocessing.get_context("spawn")
    wires, processes = [], []
    try:
        for way in (baseline, ours):
            here, there = spawn.Pipe()
            processes.append(spawn.Process(target=worker, args=(there, way, folder, file)))
            processes[-1].start()
            wires.append(here)
        found: list[list[tuple[float, float]]] = [[], []]
        for _ in range(runs + 1):
            for wire, list_ in zip(wires, found, strict=True):
                wire.send(True)
                list_.append(wire.recv())
        for wire in wires:
            wire.send(False)
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    warm = [[rate for rate, _ in one[1:]] or [rate for rate, _ in one] for one in found]
    return warm[0], warm[1], found[1][-1][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--runs", type=int, default=5, help="runs of each, the median counts; 0: the first alone"
    )
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument(
        "--codecs", default="snappy,zstd,none", help="compression of the input, comma between"
    )
    parser.add_argument("--model", default="logistic", help="logistic or boosting")
    parser.add_argument("--cases", default="the real list,passengers,all different", help="comma between")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one line")
    arguments = parser.parse_args()
    os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    figures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, arguments.model)
        print(
            f"{arguments.rows:,} rows, one core, {arguments.model}; median of {max(arguments.runs, 1)}, million rows/s"
        )
        print(
            f"{'input':<34} {'in memory':>9} {'batch':>9} {'ratio':>8}   {'peak':>7}   different rows of features"
        )
        for case in arguments.cases.split(","):
            for codec in arguments.codecs.split(","):
                file = folder / "passengers.parquet"
                write_passengers(file, arguments.rows, case, codec)
                different = distinct(file, folder) if arguments.rows <= 5_000_000 else None
                before, after, peak = compare(folder, file, arguments.runs)
                one, two = statistics.median(before), statistics.median(after)
                shown = "not counted" if different is None else f"{different:,}"
                print(f"{case + ', ' + codec:<34} {one / 1e6:9.2f} {two / 1e6:9.2f} {two / one:7.2f}x   {peak:4.0f} MB   {shown}",
                      flush=True)  # fmt: skip
                figures.append({"name": f"{case}, {codec}", "unit": "rows/s", "baseline": round(one), "ours": round(two),
                                "ratio": round(two / one, 2), "runs": [len(before), len(after)],
                                "peak memory, MB": round(peak), "different": different})  # fmt: skip
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        with arguments.json.open("a") as out:
            said = {"bench": "batch", "at": int(time.time()), "cpus": os.cpu_count(), "rows": arguments.rows}
            out.write(json.dumps(said | {"model": arguments.model, "figures": figures}) + "\n")


if __name__ == "__main__":
    main()
