"""`titanic run` beside a plain script that does the same fitting and MLflow logging without notebooks.

Whole processes, each on an empty store, in turn; then `titanic run` once more with nothing changed. Prints
both and the ratio; `--json FILE` appends a line that documents can cite. Overrides go to both.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).parent / "baselines" / "pipeline_script.py"
TITANIC = Path(sys.executable).parent / "titanic"


def seconds(command: list[str], store: Path) -> float:
    "Wall time of a process that must succeed."
    environment = {**os.environ, "TITANIC_STORE": str(store), "MLFLOW_DISABLE_TELEMETRY": "true"}
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    took = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="runs of each, the median counts")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one line")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as cv.folds=3")
    arguments = parser.parse_args()

    script, first, again = [], [], []
    for _ in range(arguments.runs):
        with tempfile.TemporaryDirectory(prefix="titanic-bench-") as name:
            # no kernel parent is left over from the run before: the first run pays for its start
            subprocess.run(
                [str(TITANIC), "down"], env={**os.environ, "TITANIC_STORE": name}, capture_output=True
            )
            script.append(
                seconds([sys.executable, str(SCRIPT), f"{name}/a", *arguments.overrides], Path(name, "a"))
            )
            first.append(seconds([str(TITANIC), "run", *arguments.overrides], Path(name, "b")))
            again.append(seconds([str(TITANIC), "run", *arguments.overrides], Path(name, "b")))
    baseline = statistics.median(script)
    print(f"median of {arguments.runs:<21} {'script':>9} {'titanic':>9} {'ratio':>7}")
    figures = []
    for name, times in (("empty store", first), ("nothing changed", again)):
        ours = statistics.median(times)
        print(f"{name:<31} {baseline:9.1f} {ours:9.1f} {ours / baseline:6.2f}x  s")
        figures.append(
            {
                "name": name,
                "unit": "s",
                "baseline": round(baseline, 2),
                "ours": round(ours, 2),
                "ratio": round(ours / baseline, 3),
            }
        )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        with arguments.json.open("a") as file:
            said = {"bench": "pipeline", "at": int(time.time()), "cpus": os.cpu_count(), "figures": figures}
            file.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
