"""What a Ray cluster buys and costs: batch on two nodes of one core beside one, and the app behind Ray Serve beside the app alone.

The nodes are processes on this machine, each on a core of its own; the first is also where the file is put together. A run begins
with the start of Ray's actors, some seconds that no second node shortens: the longer the file, the less they count. Runs itself in a
network namespace of its own (Linux), since Ray's processes listen on all addresses. Prints baseline, ours and ratio; `--json FILE`
appends a line that documents can cite.
"""

import argparse
import contextlib
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from batch import repeat, write_models

PASSENGER = {
    **{"pclass": 3, "name": "Dooley, Mr. Patrick", "sex": "male", "age": 32, "sibsp": 0, "parch": 0},
    **{"ticket": "370376", "fare": 7.75, "embarked": "Q"},
}
NODE = {"num_cpus": 1, "object_store_memory": 100_000_000}


@contextlib.contextmanager
def cluster(nodes: int) -> Iterator[None]:
    "A cluster of so many nodes, each on a core of its own; who asks sits on the first."
    import ray
    from ray.cluster_utils import Cluster

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])  # what is started takes it over
    own = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    try:
        for core in cores[1:nodes]:
            os.sched_setaffinity(0, [core])
            own.add_node(**NODE)
        os.sched_setaffinity(0, cores[:1])
        ray.init(address=own.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        own.shutdown()
        os.sched_setaffinity(0, cores)


def write_passengers(rows: int, file: Path) -> None:
    "The real passengers over and over, a row group for each part of the batch."
    import pyarrow.parquet as pq

    from titanic_mlops.data.sources import EMBEDDED, read
    from titanic_mlops.serve.batch import PART_ROWS

    part = repeat(read(EMBEDDED).frame, PART_ROWS, 0)
    with pq.ParquetWriter(file, part.schema) as writer:
        for _ in range(-(-rows // PART_ROWS)):
            writer.write_table(part, row_group_size=PART_ROWS)


def batch_seconds(bundle: Path, file: Path, nodes: int, runs: int) -> list[float]:
    "Seconds that each of some runs takes on a cluster that is up; one before is not counted."
    from titanic_mlops.ground.settings import settings
    from titanic_mlops.serve.batch import Task
    from titanic_mlops.serve.columns import open_model
    from titanic_mlops.serve.ray_batch import score

    model = open_model(bundle)
    task, took = Task("1", model.digest, model.threshold), []
    with cluster(nodes):
        for _ in range(runs + 1):
            start = time.perf_counter()
            score(model, str(file), str(file.with_name("out.parquet")), task, settings(), force=True)
            took.append(time.perf_counter() - start)
    return took[1:]


def ask(port: int, requests: int) -> list[float]:
    "Milliseconds of each request over one connection."
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    took, body = [], json.dumps(PASSENGER)
    for _ in range(requests):
        start = time.perf_counter()
        line.request("POST", "/v1/predict", body, {"content-type": "application/json"})
        answer = line.getresponse()
        answer.read()
        took.append(1000 * (time.perf_counter() - start))
        if answer.status != 200:
            raise SystemExit(f"the app answered {answer.status}")
    return took


def until_ready(port: int, process: subprocess.Popen) -> None:
    "Wait for the first answer."
    for _ in range(300):
        with contextlib.suppress(OSError):
            return ask(port, 1) and None
        if process.poll() is not None:
            raise SystemExit("the server has ended")
        time.sleep(0.1)


def alone(bundle: Path, requests: int) -> list[float]:
    "Milliseconds of requests to `titanic serve`."
    command = [str(Path(sys.executable).parent / "titanic"), "serve", "--bundle", str(bundle)]
    process = subprocess.Popen([*command, "--no-auth", "--port", "8201"], stdout=subprocess.DEVNULL)
    try:
        until_ready(8201, process)
        return ask(8201, requests)
    finally:
        process.terminate()
        process.wait()


def behind_ray(bundle: Path, requests: int) -> list[float]:
    "Milliseconds of requests to the same app behind Ray Serve, one replica."
    from ray import serve

    from titanic_mlops.serve.ray_app import Arguments, application

    with cluster(1):
        serve.start(http_options={"host": "127.0.0.1", "port": 8202, "location": "HeadOnly"})
        serve.run(application(Arguments(bundle=str(bundle), no_auth=True)), route_prefix="/")
        ask(8202, 20)
        took = ask(8202, requests)
        serve.shutdown()
    return took


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    "All of it."
    write_models(folder, "logistic")
    bundle = folder / "bundle"
    write_passengers(arguments.rows, folder / "rows.parquet")
    one, two = (
        statistics.median(batch_seconds(bundle, folder / "rows.parquet", nodes, arguments.runs))
        for nodes in (1, 2)
    )
    plain, ray = (statistics.median(f(bundle, arguments.requests)) for f in (alone, behind_ray))
    return {
        "batch, rows/s": {"base": arguments.rows / one, "ours": arguments.rows / two, "ratio": one / two},
        "one request, ms": {"base": plain, "ours": ray, "ratio": ray / plain},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=60_000_000)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--runs", type=int, default=3, help="of the batch, the median counts")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one line")
    arguments = parser.parse_args()
    if not os.environ.get("BENCH_ALONE"):
        if not shutil.which("unshare") or not shutil.which("ip"):
            raise SystemExit("needs unshare and ip (Linux, util-linux and iproute2)")
        own = ["unshare", "-n"] if os.getuid() == 0 else ["unshare", "-rn"]
        again = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, *sys.argv]
        os.execvpe("unshare", [*own, *again], os.environ | {"BENCH_ALONE": "1"})
    quiet = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "TITANIC_ACCESS_LOG": "",
        "TITANIC_RATE_LIMIT": "0",
    }
    with tempfile.TemporaryDirectory() as name:
        os.environ |= quiet | {"TITANIC_STORE": str(Path(name) / "store")}
        found = measure(arguments, Path(name))
    print(f"{'':24}{'baseline':>14}{'on Ray':>14}{'ratio':>9}")
    goals = {
        "batch, rows/s": "two nodes of one core beside one, goal >= 1.6x",
        "one request, ms": "Ray Serve beside the app alone",
    }
    for what, said in found.items():
        print(f"{what:24}{said['base']:14,.1f}{said['ours']:14,.1f}{said['ratio']:8.2f}x  {goals[what]}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        with arguments.json.open("a") as file:
            file.write(json.dumps({"rows": arguments.rows, "figures": found}) + "\n")


if __name__ == "__main__":
    main()
