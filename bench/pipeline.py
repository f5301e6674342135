"""`titanic run` beside a plain script that does the same fitting and MLflow logging without notebooks.

Whole processes, one after the other, each round on empty stores: the script; `titanic run` from nothing at all, and with the
parent of the warm kernels there; the same once more with nothing changed, with that parent, without it, and with
`titanic up`. Prints medians and ratios; `--json FILE` appends a line that documents can cite. Overrides go to all.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

SCRIPT = Path(__file__).parent / "baselines" / "pipeline_script.py"
TITANIC = str(Path(sys.executable).parent / "titanic")
IMPORTS = "from prefect import flow, task; from prefect.task_runners import ThreadPoolTaskRunner"


def seconds(command: list[str], store: Path) -> float:
    "Wall time of a process that must succeed."
    environment = {**os.environ, "TITANIC_STORE": str(store), "MLFLOW_DISABLE_TELEMETRY": "true"}
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    took = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return took


def wait_for_parent() -> None:
    "Have a parent that is ready."
    from titanic_mlops.flow.kernels import parents, warm_up

    warm_up()
    while not any(parent.preloads for parent in parents()):
        time.sleep(0.2)


def one_round(folder: Path, overrides: list[str], times: dict[str, list[float]]) -> None:
    "Measure everything once."
    run, a, b = [TITANIC, "run", *overrides], folder / "a", folder / "b"
    seconds([TITANIC, "down"], a)  # no parent is left over from the round before
    times["script"].append(
        seconds([sys.executable, str(SCRIPT), str(folder / "s"), *overrides], folder / "s")
    )
    times["nothing is running"].append(seconds(run, a))
    wait_for_parent()
    times["a warm parent"].append(seconds(run, b))
    times["unchanged, a warm parent"].append(seconds(run, b))
    seconds([TITANIC, "down"], b)
    times["unchanged, nothing is running"].append(seconds(run, b))
    seconds([TITANIC, "up"], b)
    times["unchanged, titanic up"].append(seconds(run, b))
    seconds([TITANIC, "down"], b)
    times["imports"].append(seconds([sys.executable, "-c", IMPORTS], b))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="rounds, the median counts")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one line")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as cv.folds=3")
    arguments = parser.parse_args()

    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(arguments.runs):
        with tempfile.TemporaryDirectory(prefix="titanic-bench-") as name:
            one_round(Path(name), arguments.overrides, times)
    median = {name: statistics.median(values) for name, values in times.items()}
    first = median["nothing is running"]
    rows = [
        ("empty store, nothing is running", median["script"], first),
        ("empty store, a warm parent", median["script"], median["a warm parent"]),
    ]
    rows += [(name, first, value) for name, value in median.items() if name.startswith("unchanged")]
    print(f"median of {arguments.runs:<25} {'baseline':>9} {'titanic':>9} {'ratio':>7}")
    figures = []
    for name, baseline, ours in rows:
        what = "the script" if name.startswith("empty") else "its first run"
        print(f"{name:<35} {baseline:9.1f} {ours:9.1f} {ours / baseline:6.2f}x  s, baseline: {what}")
        figures.append(
            {"name": name, "unit": "s", "baseline": round(baseline, 2), "ours": round(ours, 2)}
            | {"ratio": round(ours / baseline, 3)}
        )
    beyond = median["unchanged, titanic up"] - median["imports"]
    print(
        f"unchanged, titanic up: {beyond:+.1f} s beyond Python and the import of Prefect's client ({median['imports']:.1f} s)"
    )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        with arguments.json.open("a") as file:
            said = {"bench": "pipeline", "at": int(time.time()), "cpus": os.cpu_count(), "figures": figures}
            file.write(json.dumps(said | {"runs": arguments.runs, "beyond_imports": round(beyond, 2)}) + "\n")


if __name__ == "__main__":
    main()
