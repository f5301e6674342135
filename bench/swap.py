"""What swapping models costs those who ask meanwhile: 50 swaps in 60 s at 70 % of capacity, against the same load without.

The load is open: requests are due at a steady rate, whatever the server does, and a request that has to wait for a free
connection waits on the clock. Every answer is held against the model that it names: its probability, version and digests
must be those of one. Prints baseline, ours and ratio; `--json FILE` appends a line that documents can cite.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

CONNECTIONS = 16
PASSENGERS = 40  # different ones, that are asked about in turn


# --- the load: a process of its own


class Line(asyncio.Protocol):
    "One connection: a request at a time, and the next one that is due when the answer is there."

    def __init__(self, crowd: "Crowd"):
        self.crowd, self.got = crowd, b""
        self.number, self.due = -1, 0.0

    def connection_made(self, transport):
        self.transport = transport
        self.crowd.free.append(self)

    def send(self, number: int, due: float) -> None:
        self.number, self.due = number, due
        self.transport.write(self.crowd.requests[number % len(self.crowd.requests)])

    def data_received(self, data: bytes) -> None:
        self.got += data
        head, split, body = self.got.partition(b"\r\n\r\n")
        if not split or len(body) < int(re.search(rb"content-length: (\d+)", head)[1]):
            return
        self.crowd.answers.append((self.number, time.perf_counter() - self.due, self.got))
        self.got, self.number = b"", -1
        self.crowd.next(self)

    def connection_lost(self, error) -> None:
        if self.number >= 0:
            self.crowd.lost.append(self.number)
        self.crowd.open -= 1


class Crowd:
    "Those who ask: at a rate, or as fast as they are answered."

    def __init__(self, requests: list[bytes], rate: float):
        self.requests, self.rate = requests, rate
        self.free: deque[Line] = deque()
        self.waiting: deque[tuple[int, float]] = deque()
        self.answers: list[tuple[int, float, bytes]] = []
        self.lost: list[int] = []
        self.sent, self.open = 0, CONNECTIONS
        self.over = False

    def next(self, line: Line) -> None:
        if not self.rate and not self.over:
            line.send(self.sent, time.perf_counter())
            self.sent += 1
        elif self.waiting:
            line.send(*self.waiting.popleft())
        else:
            self.free.append(line)

    async def ask(self, port: int, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(CONNECTIONS):
            await loop.create_connection(lambda: Line(self), "127.0.0.1", port)
        start = time.perf_counter()
        if not self.rate:
            for line in [self.free.popleft() for _ in range(CONNECTIONS)]:
                self.next(line)
            await asyncio.sleep(seconds)
        while self.rate and (now := time.perf_counter()) < start + seconds:
            while self.sent < (now - start) * self.rate:
                if self.free:
                    self.free.popleft().send(self.sent, now)
                else:
                    self.waiting.append((self.sent, now))
                self.sent += 1
            await asyncio.sleep(0.0005)
        self.over = True
        end = time.perf_counter() + 10
        while len(self.answers) + len(self.lost) < self.sent and self.open and time.perf_counter() < end:
            await asyncio.sleep(0.01)
        self.lost += [-1] * (self.sent - len(self.answers) - len(self.lost))


def load(arguments: argparse.Namespace) -> None:
    "Ask, judge, and print what was found, as JSON."
    import gc

    import uvloop

    known = json.loads(Path(arguments.known).read_text())
    requests = []
    for passenger in known["passengers"]:
        body = json.dumps(passenger).encode()
        head = b"POST /v1/predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        requests.append(head % len(body) + body)
    crowd = Crowd(requests, arguments.rate)
    gc.disable()  # a pause of ours is not the server's
    uvloop.run(crowd.ask(arguments.port, arguments.seconds))
    failed, mixed, seen = len(crowd.lost), 0, set()
    for number, _, answer in crowd.answers:
        verdict, digest = judge(number, answer, known["models"])
        failed, mixed = failed + (verdict == "failed"), mixed + (verdict == "mixed")
        seen.add(digest)
    times = sorted(round(took * 1e6) for _, took, _ in crowd.answers)  # microseconds
    facts = {"sent": crowd.sent, "failed": failed, "mixed": mixed, "models": sorted(seen - {""})}
    print(json.dumps({**facts, "times": times}))


def judge(number: int, answer: bytes, models: dict) -> tuple[str, str]:
    "Is it an answer, and is all of it of one model?"
    head, _, body = answer.partition(b"\r\n\r\n")
    try:
        said = json.loads(body)
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
        if not head.startswith(b"HTTP/1.1 200"):
            return "failed", ""
        digest = headers["x-bundle-digest"]
        wanted = models[digest][number % PASSENGERS]
        whole = (
            said["bundle_digest"] == digest
            and said["model_version"] == headers["x-model-version"] == digest[:12]
        )
        return ("good" if whole and abs(said["probability"] - wanted) < 1e-6 else "mixed"), digest
    except (ValueError, KeyError):
        return "failed", ""


# --- models, server, swaps


def models(folder: Path) -> dict:
    "Two real models as bundles, some passengers, and what each model says of each of them."
    from titanic_mlops.data.features import CATEGORICAL, NUMERIC, feature_frame
    from titanic_mlops.data.sources import EMBEDDED, canonical, read
    from titanic_mlops.data.targets import request_model
    from titanic_mlops.model.bundle import (
        Bundle,
        BundleInfo,
        Lineage,
        reference_distributions,
        to_onnx,
        write_bundle,
    )
    from titanic_mlops.model.train import Candidate, fit
    from titanic_mlops.serve.fastpath import FastModel

    frame = canonical(read(EMBEDDED).frame)
    X, y, ticket = feature_frame(frame), frame.survived.to_numpy(int), frame.ticket.to_numpy(str)
    asked = [name for name in request_model().model_fields if name in frame.columns]
    rows = frame.head(PASSENGERS)[asked].astype(object)
    passengers = rows.where(rows.notna(), None).to_dict("records")
    found = {}
    for name, C in (("mild", 1.0), ("strict", 0.01)):
        info = BundleInfo(candidate=name, hyperparameters={"C": C}, calibration="none", inputs=[*NUMERIC, *CATEGORICAL],
                          split={}, figures={}, reference=reference_distributions(X))  # fmt: skip
        lineage = Lineage(git_commit="", snapshot="embedded", data_sha256="", seed=0)
        graph = to_onnx(fit(Candidate("logistic", {"C": C}), X, y, ticket))
        digest = write_bundle(folder / name, graph, info, lineage)
        model = FastModel(Bundle(folder / name, []))
        found[digest] = [model.one(passenger) for passenger in passengers]
    return {"passengers": passengers, "models": found}


def put(bundle: Path, drop: Path) -> None:
    "Put a bundle in place of another: its files first, the manifest last."
    drop.mkdir(exist_ok=True)
    for file in sorted(bundle.iterdir(), key=lambda file: file.name == "manifest.json"):
        shutil.copy(file, drop / f".{file.name}")
        os.replace(drop / f".{file.name}", drop / file.name)


@contextlib.contextmanager
def titanic_serve(folder: Path, workers: int) -> Iterator[tuple[int, list[dict]]]:
    "A server on the folder `drop`; its port, and the events that it tells."
    command = [
        Path(sys.executable).parent / "titanic",
        "serve",
        "--no-auth",
        "--port",
        "0",
        "--bundle",
        folder / "drop",
    ]
    own = {"STORE": folder / "store", "RATE_LIMIT": 0, "ACCESS_LOG": folder / "access.jsonl"}
    process = subprocess.Popen(
        [*map(str, command), "--workers", str(workers), "--every", "0.1"],
        env={**os.environ, **{f"TITANIC_{name}": str(value) for name, value in own.items()}, "NO_COLOR": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    events: list[dict] = []

    def listen() -> None:
        for line in process.stderr:
            with contextlib.suppress(ValueError):
                events.append(json.loads(line))

    threading.Thread(target=listen, daemon=True).start()
    try:
        found = re.search(r":(\d+)", process.stdout.readline().split("http://")[-1])
        yield int(found[1]), events
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def asked(port: int, known: Path, rate: float, seconds: float) -> subprocess.Popen:
    command = [sys.executable, __file__, "--load", "--port", str(port), "--known", str(known)]
    return subprocess.Popen(
        [*command, "--rate", str(rate), "--seconds", str(seconds)], stdout=subprocess.PIPE, text=True
    )


def percentile(times: list[int], q: float) -> float:
    "In milliseconds."
    times = sorted(times)
    return times[min(int(q * len(times)), len(times) - 1)] / 1000 if times else float("nan")


def together(rounds: list[dict]) -> dict:
    "Several rounds as one."
    found = {name: sum(one[name] for one in rounds) for name in ("sent", "failed", "mixed")}
    times = [time for one in rounds for time in one["times"]]
    found |= {"answered": len(times), "models": len({model for one in rounds for model in one["models"]})}
    return found | {f"p{100 * q:g}": percentile(times, q) for q in (0.5, 0.99, 0.999)}


def capacity_of(ask) -> float:
    "The highest steady rate that is kept up with: nobody fails, and one in a hundred waits 10 ms at most."
    most = (
        len(ask(0, 2)["times"]) / 2
    )  # as fast as they are answered: the crowd comes in step, which is cheaper
    low, high = 0.3 * most, most
    for _ in range(6):
        rate = (low + high) / 2
        tried = ask(rate, 2)
        kept_up = not tried["failed"] and percentile(tried["times"], 0.99) <= 10
        low, high = (rate, high) if kept_up else (low, rate)
    return low


def measure(arguments: argparse.Namespace, folder: Path) -> dict:
    "Capacity; then the load without swaps and with them, in turns, so that the machine's moods meet both."
    known = folder / "known.json"
    known.write_text(json.dumps(models(folder)))
    put(folder / "mild", folder / "drop")
    said = lambda process: json.loads(process.communicate()[0])
    seconds, number = arguments.seconds / arguments.rounds, 0
    with titanic_serve(folder, arguments.workers) as (port, events):
        ask = lambda rate, seconds: said(asked(port, known, rate, seconds))
        warm = together([ask(0, 1)])
        assert not warm["failed"] and not warm["mixed"], warm
        capacity = arguments.capacity or capacity_of(ask)
        swaps = lambda: sum(event.get("message") == "model swapped" for event in events) // arguments.workers
        before, quiet, swapping = swaps(), [], []
        for turn in range(arguments.rounds):
            quiet.append(ask(0.7 * capacity, seconds))
            crowd = asked(port, known, 0.7 * capacity, seconds)
            time.sleep(0.5)  # it starts
            start, share = time.monotonic(), arguments.swaps * (turn + 1) // arguments.rounds - number
            for one in range(share):
                number += 1
                put(folder / ("strict" if number % 2 else "mild"), folder / "drop")
                time.sleep(max(start + (one + 1) * (seconds - 0.5) / share - time.monotonic(), 0))
            swapping.append(said(crowd))
        done = swaps() - before
    return {"capacity": capacity, "quiet": together(quiet), "swapping": together(swapping), "swaps": done}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=50, help="number of swaps")
    parser.add_argument("--seconds", type=float, default=60, help="time that they are spread over")
    parser.add_argument("--workers", type=int, default=1, help="of the server")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one line")
    parser.add_argument("--rounds", type=int, default=3, help="turns in which that is done")
    parser.add_argument("--capacity", type=float, help="requests a second; measured if it is not given")
    for name, kind in (("--load", None), ("--port", int), ("--known", str), ("--rate", float)):
        more = {"action": "store_true"} if kind is None else {"type": kind}
        parser.add_argument(name, help=argparse.SUPPRESS, **more)
    arguments = parser.parse_args()
    if arguments.load:
        return load(arguments)

    with tempfile.TemporaryDirectory() as name:
        found = measure(arguments, Path(name))
    quiet, swapping = found["quiet"], found["swapping"]
    print(
        f"{0.7 * found['capacity']:.0f} requests/s, 70 % of {found['capacity']:.0f}; "
        f"{arguments.workers} worker(s), {found['swaps']} swaps in {arguments.seconds:.0f} s"
    )
    print(f"{'':<34} {'without':>9} {'swapping':>9} {'ratio':>8}")
    figures = []
    for share in ("p50", "p99", "p99.9"):
        before, after = quiet[share], swapping[share]
        print(f"{share:<34} {before:9.3f} {after:9.3f} {after / before:7.2f}x  ms")
        figures.append({"name": f"{share} while models are swapped", "unit": "ms", "baseline": round(before, 4),
                        "ours": round(after, 4), "ratio": round(after / before, 2)})  # fmt: skip
    print(
        f"of {swapping['answered']} answers while models were swapped: {swapping['failed']} failed, "
        f"{swapping['mixed']} of mixed versions, {swapping['models']} models seen"
    )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        told = {"bench": "swap", "at": int(time.time()), "cpus": os.cpu_count(), "figures": figures}
        told |= {name: swapping[name] for name in ("sent", "answered", "failed", "mixed")}
        told |= {"swaps": found["swaps"], "workers": arguments.workers, "capacity": round(found["capacity"])}
        with arguments.json.open("a") as file:
            file.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
