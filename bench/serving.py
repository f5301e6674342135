"""`titanic serve` beside an empty FastAPI endpoint with the same body, and beside `mlflow models serve`.

Real servers on free ports, one worker each, asked by `wrk` where it is installed and by a small process of our own where not. Rounds alternate;
the median of each counts. Ours runs with its defaults and the prediction log on, but for the rate limit (here one client stands
for many) and the access log, which goes to a file. Prints baseline, ours and ratio; `--json FILE` appends a line that documents can cite.

`--steps` asks the servers of `baselines/serving_steps.py` instead: what each step on the way from the one to the other has brought.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "baselines"))
from serving_steps import REFERENCE, STEPS

BIN = Path(sys.executable).parent
PASSENGER = {
    "pclass": 3, "name": "Dean, Miss. Elizabeth Gladys", "sex": "female", "age": 0.17, "sibsp": 1, "parch": 2,
    "ticket": "C.A. 2315", "fare": 20.575, "cabin": None, "embarked": "S",
}  # fmt: skip
FEATURES = {name: value for name, value in PASSENGER.items() if name != "ticket"}
EMPTY = """
import sys
import uvicorn
from fastapi import FastAPI
from titanic_mlops.data.targets import request_model
Passenger = request_model()
app = FastAPI()
@app.post("/v1/predict")
async def predict(passenger: Passenger) -> dict:
    return {}
uvicorn.run(app, port=int(sys.argv[1]), log_level="error", access_log=False)
"""


# --- load


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


async def ask(port: int, request: bytes, until: float, gap: float, took: list[float]) -> None:
    "One connection: a request after the other, or one every `gap` seconds, each timed from when it was due."
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    due = time.perf_counter()
    while time.perf_counter() < until:
        if gap:
            due += gap
            await asyncio.sleep(max(due - time.perf_counter(), 0))
        else:
            due = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"refused: {head[:200]!r}")
        await reader.readexactly(int(re.search(rb"content-length: (\d+)", head.lower())[1]))
        took.append(time.perf_counter() - due)
    writer.close()


async def load(port: int, request: bytes, connections: int, seconds: float, rate: float) -> list[float]:
    "Latencies under load; `rate` requests a second altogether, or as many as there can be if 0."
    took: list[float] = []
    until = time.perf_counter() + seconds
    gap = connections / rate if rate else 0.0
    await asyncio.gather(*(ask(port, request, until, gap, took) for _ in range(connections)))
    return took


def http_request(path: str, body: dict) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def by_own_client(server: "Server", connections: int, seconds: float, rate: float = 0.0) -> dict[str, float]:
    "Requests a second and latencies in ms, by a process of our own."
    arguments = [str(server.port), server.path, json.dumps(server.body), connections, seconds, rate]
    command = [sys.executable, __file__, "--load", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def by_wrk(server: "Server", connections: int, seconds: float) -> dict[str, float]:
    "The same by wrk, which costs less of the machine."
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        body = json.dumps(server.body).replace("\\", "\\\\").replace("'", "\\'")
        script.write(
            f"wrk.method='POST'\nwrk.headers['content-type']='application/json'\nwrk.body='{body}'\n"
        )
        script.flush()
        address = f"http://127.0.0.1:{server.port}{server.path}"
        command = [
            "wrk",
            "-t1",
            f"-c{connections}",
            f"-d{seconds:g}s",
            "--latency",
            "-s",
            script.name,
            address,
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in said:
        raise SystemExit(f"refused: {said}")
    unit = {"us": 0.001, "ms": 1.0, "s": 1000.0}
    times = {name: float(n) * unit[u] for name, n, u in re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s)", said)}
    return {
        "rate": float(re.search(r"Requests/sec:\s+([\d.]+)", said)[1]),
        "p50": times["50"],
        "p99": times["99"],
    }


# --- servers


class Server:
    "A server process, from its start to its first answer."

    def __init__(self, name: str, command: list[str], path: str, body: dict, environment: dict[str, str]):
        self.name, self.path, self.body = name, path, body
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [part.replace("PORT", str(self.port)) for part in command]
        began = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.first_answer = self._first_answer(began)

    def _first_answer(self, began: float) -> float:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{self.path}",
            json.dumps(self.body).encode(),
            {"content-type": "application/json"},
        )
        while time.perf_counter() - began < 180:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name} ended with {self.process.returncode}")
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=60) as answer:
                answer.read()
                return time.perf_counter() - began
            time.sleep(0.01)
        raise SystemExit(f"{self.name} gave no answer")

    def memory(self) -> dict[str, float]:
        "MB of the process that answers: resident, and its share of what is shared."
        rollup = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        return {
            name.lower(): int(re.search(rf"^{name}:\s+(\d+)", rollup, re.M)[1]) / 1024
            for name in ("Rss", "Pss")
        }

    def cpu(self) -> float:
        "Seconds of processor time so far, of the process and its children."
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ticks = 0
        for pid in (self.process.pid, *children):
            said = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(said[11]) + int(said[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def champion(folder: Path, given: Path | None) -> Path:
    "A store with a champion: a copy of the one given, or one that is made here."
    store = folder / "store"
    if given:
        shutil.copytree(given, store)
    else:
        environment = {**os.environ, "TITANIC_STORE": str(store)}
        overrides = ["cv.folds=3", "cv.repeats=1"]
        subprocess.run(
            [str(BIN / "titanic"), "run", *overrides], env=environment, check=True, stdout=subprocess.DEVNULL
        )
    return store


def servers(store: Path) -> dict[str, tuple[list[str], str, dict, dict[str, str]]]:
    "How to start each, and what to ask it."
    own = {**os.environ, "TITANIC_STORE": str(store), "MLFLOW_DISABLE_TELEMETRY": "true"}
    own["PATH"] = f"{BIN}{os.pathsep}{own['PATH']}"
    ours = {**own, "TITANIC_RATE_LIMIT": "0", "TITANIC_ACCESS_LOG": str(store / "access.jsonl")}
    mlflow = {**own, "MLFLOW_TRACKING_URI": f"sqlite:///{store / 'mlflow.db'}"}
    model = "models:/titanic@champion"
    uri = [
        str(BIN / "mlflow"),
        "models",
        "serve",
        "-m",
        model,
        "--env-manager",
        "local",
        "-p",
        "PORT",
        "-w",
        "1",
    ]
    return {
        "empty": ([sys.executable, "-c", EMPTY, "PORT"], "/v1/predict", PASSENGER, own),
        "ours": (
            [str(BIN / "titanic"), "serve", "--no-auth", "--port", "PORT"],
            "/v1/predict",
            PASSENGER,
            ours,
        ),
        "mlflow": (uri, "/invocations", {"dataframe_records": [FEATURES]}, mlflow),
    }


# --- the figures


def measure_steps(store: Path, rounds: int, seconds: float, connections: int) -> list[dict]:
    "Each step's medians; rounds alternate, so that a bad minute of the machine meets all."
    if not shutil.which("wrk"):
        raise SystemExit(
            "wrk is not installed, and a client in Python would be slower than the last steps: apt-get install wrk"
        )
    known, file = servers(store), Path(__file__).parent / "baselines" / "serving_steps.py"
    own = known["empty"][3]
    kinds = {"mlflow": known["mlflow"], "titanic": known["ours"]}
    for name in ("empty", *STEPS):
        kinds.setdefault(name, ([sys.executable, str(file), name, "PORT"], "/v1/predict", PASSENGER, own))
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in ("empty", *STEPS)}
    for number in range(rounds):
        for name, said in found.items():
            server = Server(name, *kinds[name])
            try:
                by_wrk(server, connections, 1)
                before = server.cpu()
                asked = by_wrk(server, connections, seconds)
                asked["cpu"] = (server.cpu() - before) / (asked["rate"] * seconds) * 1e6
                for key, value in {**asked, "first": server.first_answer}.items():
                    said[key].append(value)
            finally:
                server.stop()
            print(
                f"round {number + 1}: {name:<12} {said['rate'][-1]:9.0f} requests/s",
                file=sys.stderr,
                flush=True,
            )
    words = {"empty": REFERENCE, **STEPS}
    return [
        {"step": name, "what": words[name], "requests/s": round(statistics.median(said["rate"]), 1)}
        | {f"{key}, ms": round(statistics.median(said[key]), 3) for key in ("p50", "p99")}
        | {"processor, us": round(statistics.median(said["cpu"]), 1), "first answer, s": round(statistics.median(said["first"]), 2)}
        for name, said in found.items()
    ]  # fmt: skip


def measure(
    store: Path, rounds: int, seconds: float, connections: int, with_mlflow: bool
) -> dict[str, list[float]]:
    "All rounds."
    found: dict[str, list[float]] = defaultdict(list)
    hard = by_wrk if shutil.which("wrk") else by_own_client
    known = servers(store)
    for number in range(rounds):
        for name in known:
            if name == "mlflow" and (number or not with_mlflow):
                continue
            server = Server(name, known[name][0], *known[name][1:])
            try:
                found[f"{name} first answer"].append(server.first_answer)
                hard(server, connections, 1)
                before = server.cpu()
                said = hard(server, connections, seconds)
                found[f"{name} cpu"].append((server.cpu() - before) / (said["rate"] * seconds) * 1e6)
                for key, value in said.items():
                    found[f"{name} {key}"].append(value)
                if name != "mlflow":
                    found[f"{name} steady p99"].append(by_own_client(server, 8, seconds, 1000.0)["p99"])
                    for kind, size in server.memory().items():
                        found[f"{name} {kind}"].append(size)
            finally:
                server.stop()
    return found


LINES = (  # name, unit, baseline, ours, which way is good
    ("requests/s against an empty endpoint", "1/s", "empty rate", "ours rate", 0.95),
    ("requests/s against mlflow models serve", "1/s", "mlflow rate", "ours rate", 45),
    ("p99 at 1000 requests/s against an empty endpoint", "ms", "empty steady p99", "ours steady p99", 1.2),
    ("start to first answer against mlflow", "s", "mlflow first answer", "ours first answer", 1 / 8),
    ("processor time of a request, empty endpoint", "us", "empty cpu", "ours cpu", None),
    ("processor time of a request, mlflow models serve", "us", "mlflow cpu", "ours cpu", None),
    ("resident memory against an empty endpoint", "MB", "empty rss", "ours rss", None),
    ("its share of the memory (PSS)", "MB", "empty pss", "ours pss", None),
)


def record(arguments: argparse.Namespace, said: dict) -> None:
    "Append a line to the file of results, if one is named."
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        how = {
            "at": int(time.time()),
            "cpus": os.cpu_count(),
            "load": os.getloadavg()[1],
            "runs": arguments.runs,
        }
        with arguments.json.open("a") as file:
            file.write(json.dumps(said | how | {"connections": arguments.connections}) + "\n")


def tell_steps(arguments: argparse.Namespace, steps: list[dict]) -> None:
    "Print the steps, each beside the one before."
    print(f"median of {arguments.runs}, {arguments.connections} connections, one worker")
    print(f"{'':<74} {'requests/s':>10} {'p50 ms':>8} {'p99 ms':>8} {'cpu us':>8}  times the one before")
    before = None
    for one in [*steps[1:], steps[0]]:
        times = f"{one['requests/s'] / before:8.2f}x" if before and one is not steps[0] else ""
        print(f"{one['what']:<74} {one['requests/s']:10,.0f} {one['p50, ms']:8.2f} {one['p99, ms']:8.2f} {one['processor, us']:8.0f} {times}")  # fmt: skip
        before = one["requests/s"]
    record(arguments, {"bench": "serving-steps", "steps": steps})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="rounds, the median counts")
    parser.add_argument("--seconds", type=float, default=5, help="of load in each round")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--store", type=Path, help="with a champion; it is copied. One is made without")
    parser.add_argument("--without-mlflow", action="store_true")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one line")
    parser.add_argument("--steps", action="store_true", help="the story, step by step")
    parser.add_argument("--load", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        port, path, body, connections, seconds, rate = arguments.load
        request = http_request(path, json.loads(body))
        took = asyncio.run(load(int(port), request, int(connections), float(seconds), float(rate)))
        times = {"p50": percentile(took, 0.5) * 1000, "p99": percentile(took, 0.99) * 1000}
        print(json.dumps({"rate": len(took) / float(seconds), **times}))
        return
    with tempfile.TemporaryDirectory(prefix="titanic-bench-") as name:
        store = champion(Path(name), arguments.store)
        if arguments.steps:
            tell_steps(
                arguments, measure_steps(store, arguments.runs, arguments.seconds, arguments.connections)
            )
            return
        found = measure(
            store, arguments.runs, arguments.seconds, arguments.connections, not arguments.without_mlflow
        )
    median = {name: statistics.median(values) for name, values in found.items()}
    print(f"median of {arguments.runs:<40} {'baseline':>9} {'ours':>9} {'ours/base':>9}")
    figures = []
    for what, unit, baseline, ours, goal in LINES:
        if baseline not in median:
            continue
        ratio = median[ours] / median[baseline]
        aim = "" if goal is None else f", goal {'>=' if unit == '1/s' else '<='} {goal:.3g}x"
        print(f"{what:<50} {median[baseline]:9.2f} {median[ours]:9.2f} {ratio:8.3f}x  {unit}{aim}")
        figures.append({"name": what, "unit": unit, "baseline": round(median[baseline], 3), "ours": round(median[ours], 3), "ratio": round(ratio, 4)})  # fmt: skip
    print("under full load: " + ", ".join(f"{n} p50 {median[f'{n} p50']:.2f} ms, p99 {median[f'{n} p99']:.2f} ms" for n in ("empty", "ours", "mlflow") if f"{n} p50" in median))  # fmt: skip
    everything = {name: [round(value, 3) for value in values] for name, values in found.items()}
    record(arguments, {"bench": "serving", "figures": figures, "all": everything})


if __name__ == "__main__":
    main()
