"""The prediction log with real processes: kills, full disks, several workers, crashes while it is tidied, and reading while it is written."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from titanic_mlops.ground.errors import ParameterError, SettingsError
from titanic_mlops.ground.settings import Settings, settings
from titanic_mlops.serve.predictions import (
    LogFullError,
    PredictionLog,
    find,
    joined,
    open_prediction_log,
    read_log,
)
from titanic_mlops.serve.record import ANSWERS, OUTCOMES, tidy
from titanic_mlops.serve.segments import recover

SERVED = SimpleNamespace(version="3", digest="d" * 64, override="")
INPUTS = {"pclass": 3, "name": "Braund, Mr. Owen Harris", "sex": "male", "age": 22.0, "sibsp": 1, "parch": 0, "ticket": "A/5 21171"}  # fmt: skip


class Heard(list):
    "What a log says."

    def __call__(self, message: str, severity: str = "INFO", **facts: Any) -> None:
        self.append((severity, message, facts))

    def has(self, part: str) -> bool:
        return any(part in message for _, message, _ in self)


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[tuple[PredictionLog, Heard]]:
    heard = Heard()
    log = PredictionLog(folder, **{"tidies": False, "say": heard} | options)
    try:
        yield log, heard
    finally:
        log.close()


def fill(log: PredictionLog, start: int, end: int, **more: Any) -> None:
    for i in range(start, end):
        log.append(f"r{i}", 10**18 + i * 1000, SERVED, INPUTS | {"fare": i / 7}, i % 100 / 100, **more)


def ids(folder: Path) -> list[str]:
    "All request ids on record, in the order of reading."
    return read_log(folder, columns=["request_id"]).table()["request_id"].to_pylist()


def until(true: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


# A worker: appends answers and writes, after each, its number to a pipe, which outlives it.
WORKER = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from titanic_mlops.serve.predictions import PredictionLog
folder, name, count, pause = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
options = eval(sys.argv[5])
log = PredictionLog(folder, **{"tidies": False} | options)
served = SimpleNamespace(version="3", digest="d" * 64, override="")
inputs = {"pclass": 3, "name": "Braund, Mr. Owen Harris", "sex": "male", "age": 22.0, "sibsp": 1, "parch": 0}
for i in range(count):
    log.append(f"{name}{i}", time.time_ns(), served, inputs, 0.5)
    os.write(1, b"%d\\n" % i)
    if pause:
        time.sleep(pause)
log.close()
"""


def worker(
    folder: Path, name: str, count: int, pause: float = 0.0, **options: Any
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WORKER, str(folder), name, str(count), str(pause), repr(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# --- kill -9


def test_a_kill_loses_at_most_the_last_second_and_the_next_start_says_how_much(tmp_path: Path):
    draw, kills = random.Random(5), int(os.environ.get("PREDICTION_KILLS", "4"))
    kept_before = 0
    for kill in range(kills):
        victim = worker(tmp_path, f"k{kill}-", 10**9, 0.0002)
        while not victim.stdout.readline():
            pass
        time.sleep(draw.uniform(0.05, 1.2))
        os.kill(victim.pid, signal.SIGKILL)
        killed_at = time.time_ns()
        said, err = victim.communicate()
        taken = int(said.split()[-1]) + 1  # whole lines only: the pipe holds all of them
        with opened(tmp_path) as (log, heard):
            until(lambda heard=heard: heard)
            [recovery] = log.recovered
        assert taken <= recovery.accepted <= taken + 1, err
        table = read_log(tmp_path, columns=["request_id", "time", "number"]).table()
        assert table.num_rows == kept_before + recovery.kept
        assert recovery.kept + recovery.lost == recovery.accepted
        mine = [row for row in table.to_pylist() if row["request_id"].startswith(f"k{kill}-")]
        assert [row["request_id"] for row in mine] == [f"k{kill}-{i}" for i in range(recovery.kept)]
        assert [row["number"] for row in mine] == list(range(recovery.kept))
        missing = (killed_at - int(mine[-1]["time"].timestamp() * 1e9)) / 1e9 if mine else 0.0
        assert missing < 5 or not recovery.lost  # 0.1 s where the machine has nothing else to do
        wanted = f"process {victim.pid} was killed: of {recovery.accepted:,} answers {recovery.kept:,} are on"
        assert heard.has(wanted), heard
        kept_before += recovery.kept
    with opened(tmp_path) as (log, heard):
        until(lambda: heard)
        assert not log.recovered and heard.has("nothing was lost")


def test_a_tail_that_was_torn_is_cut_and_said(tmp_path: Path):
    victim = worker(tmp_path, "t", 300)
    victim.stdout.read()
    victim.wait()
    [closed] = (tmp_path / ANSWERS / "_live").glob("*.closed")
    whole = closed.read_bytes()
    draw = random.Random(1)
    everything = read_log(tmp_path).table().to_pylist()
    for _ in range(150):
        at, kind = draw.randrange(len(whole)), draw.randrange(3)
        flipped = whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :]
        spoiled = (whole[:at], flipped, whole[:at] + whole[at + draw.randrange(1, 400) :])[kind]
        closed.write_bytes(spoiled)
        reading = read_log(tmp_path)
        found = reading.table().to_pylist()
        assert found == [everything[row["number"]] for row in found]  # none was made up
        tally = reading.tally
        noticed = tally.torn_bytes or tally.damaged_bytes or tally.missing or tally.unended
        assert len(found) == 300 or noticed, (at, kind)
    os.rename(closed, closed.with_suffix(".open"))
    closed.with_suffix(".open").write_bytes(whole[:-200])
    [recovery] = recover(tmp_path / ANSWERS)
    assert recovery.torn_bytes and recovery.kept < 300
    assert recover(tmp_path / ANSWERS) == []
    assert read_log(tmp_path).table().num_rows == recovery.kept
    [tail] = (tmp_path / ANSWERS / "_damaged").glob("*.tail")
    assert tail.stat().st_size == recovery.torn_bytes


def test_two_who_start_at_once_mend_each_thing_once(tmp_path: Path):
    victims = [worker(tmp_path, name, 10**9, 0.0002) for name in "ab"]
    for victim in victims:
        victim.stdout.readline()
    time.sleep(0.3)
    for victim in victims:
        victim.kill()
    for victim in victims:
        victim.communicate()
    starts = [worker(tmp_path, name, 10) for name in "cd"]
    said = b"".join(start.communicate(timeout=60)[1] for start in starts).decode()
    assert said.count("was killed") == 2, said
    found = ids(tmp_path)
    assert len(found) == len(set(found)) and {"c9", "d9"} <= set(found)


# --- full disks


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can make a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def stuff(folder: Path) -> Path:
    "Leave no room."
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"x" * 4096)
    return filler


@pytest.mark.parametrize("policy", ["drop", "refuse"])
def test_a_full_disk_is_waited_for(tmp_path: Path, policy: str):
    with small_disk(tmp_path / "disk", "1m") as disk:
        with opened(disk / "log", queue=500, when_full=policy) as (log, heard):
            fill(log, 0, 100)
            assert log.flush()
            filler = stuff(disk)
            refused, taken = 0, 100
            for _ in range(60):  # the last page of a file may still have room
                try:
                    fill(log, taken, taken + 50)
                except LogFullError as error:
                    assert error.retry_after >= 1
                    refused += 1
                taken += 50
                time.sleep(0.01)
                if log.stats()["dropped"] > 100:
                    break
            until(lambda: log.failing)
            assert heard.has("nothing can be written (No space left on device)")
            assert bool(refused) == (policy == "refuse")
            before = log.stats()
            assert before["waiting"] <= 500 and before["dropped"]
            filler.unlink()
            assert log.flush()
            assert heard.has("writes again") and not log.failing
            fill(log, taken, taken + 10)
            assert log.flush()
            stats = log.stats()
            assert stats["written"] == stats["accepted"] == read_log(disk / "log").table().num_rows
            assert read_log(disk / "log").tally.torn_bytes == 0
        assert heard.has("answers are not recorded")
        assert sum(facts["dropped"] for _, _, facts in heard if "dropped" in facts) == stats["dropped"]


def test_a_disk_that_is_full_to_the_end_and_at_the_start(tmp_path: Path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        heard = Heard()
        log = PredictionLog(disk / "log", queue=2_000, tidies=False, say=heard)
        fill(log, 0, 100)
        assert log.flush()
        filler = stuff(disk)
        fill(log, 100, 1_100)
        until(lambda: log.failing)
        log.close()
        assert heard.has("did not end in good order")
        with opened(disk / "log") as (second, told):  # no room for its state either
            fill(second, 2_000, 2_050)
            until(lambda: second.failing)
            filler.unlink()
            assert second.flush()
            assert second.stats()["written"] == second.stats()["accepted"] == 50
        with opened(disk / "log") as (third, told):
            until(lambda: told)
            lost = sum(found.lost for found in second.recovered + third.recovered)
        kept = [id for id in ids(disk / "log") if int(id[1:]) < 2_000]
        assert len(kept) + lost == 1_100 and lost


def test_nobody_waits_for_room_while_nothing_can_be_written(tmp_path: Path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        log = PredictionLog(disk / "log", queue=200, tidies=False, say=Heard())
        filler = stuff(disk)
        fill(log, 0, 150)
        until(lambda: log.failing)
        assert not log.crowded
        filler.unlink()
        assert log.flush()
        log.close()


def test_a_file_that_may_not_grow_is_followed_by_the_next(tmp_path: Path):
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n" + WORKER
    command = [sys.executable, "-c", code, str(tmp_path), "f", "1000", "0", "{}"]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted(ids(tmp_path), key=lambda id: int(id[1:])) == [f"f{i}" for i in range(1000)]
    assert len([*(tmp_path / ANSWERS / "_live").glob("*.closed")]) > 3
    assert not recover(tmp_path / ANSWERS)


def test_a_folder_that_is_taken_away(tmp_path: Path):
    with opened(tmp_path / "log", sync_seconds=0.05) as (log, heard):
        fill(log, 0, 100)
        assert log.flush()
        shutil.rmtree(tmp_path / "log")
        fill(log, 100, 200)
        log.flush()
        until(lambda: heard.has("its segment was taken away"))
        fill(log, 200, 300)
        assert log.flush()
        assert {f"r{i}" for i in range(200, 300)} <= set(ids(tmp_path / "log"))
        assert log.stats()["taken_away"] in (100, 200)
    assert not recover(tmp_path / "log" / ANSWERS)


# --- several workers, and rotation


def test_two_workers_write_side_by_side_and_are_read_meanwhile(tmp_path: Path):
    count = 6_000
    workers = [
        worker(tmp_path, name, count, 0.00005, rotate_bytes=60_000, tidies=True, sync_seconds=0.05)
        for name in "ab"
    ]
    drains = [subprocess.Popen(["cat"], stdin=w.stdout, stdout=subprocess.DEVNULL) for w in workers]
    seen: list[str] = []
    cursor: dict[str, list[int]] = {}
    while True:
        running = any(w.poll() is None for w in workers)
        reading = read_log(tmp_path, columns=["request_id"], after=cursor)
        for batch in reading:
            seen += batch.column("request_id").to_pylist()
        assert not reading.tally.damaged_bytes and not reading.tally.missing
        cursor = json.loads(json.dumps(reading.cursor))
        if not running:
            break
        tidy(tmp_path)
        time.sleep(0.05)
    for process in [*workers, *drains]:
        assert process.wait(60) == 0
    for name in "ab":
        mine = [id for id in seen if id.startswith(name)]
        assert mine == [f"{name}{i}" for i in range(count)]
    assert sorted(ids(tmp_path)) == sorted(seen)
    tidy(tmp_path)
    assert sorted(ids(tmp_path)) == sorted(seen)
    assert not [*(tmp_path / ANSWERS / "_live").iterdir()]

    import pyarrow.dataset

    found = pyarrow.dataset.dataset(tmp_path / ANSWERS, format="parquet", partitioning="hive")
    assert found.count_rows() == 2 * count


# A child kills itself the n-th time that it comes to one of the calls that change what is on the disk, for n = 0, 1, 2, ...
CRASHES = """
import os, shutil, signal, sys
from pathlib import Path
import pyarrow.parquet as pq
from titanic_mlops.serve import record, segments
good, own = Path(sys.argv[1]), Path(sys.argv[1] + "-now")
ids = lambda folder: sorted(record.read_log(folder, columns=["request_id"]).table()["request_id"].to_pylist())

def dying(call):
    def wrapped(*given, **more):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*given, **more)
    return wrapped

def die_at(n):
    global left
    left = n
    pq.ParquetWriter.write_batch = dying(pq.ParquetWriter.write_batch)
    pq.ParquetWriter.close = dying(pq.ParquetWriter.close)
    os.rename, os.fsync, Path.unlink = dying(os.rename), dying(os.fsync), dying(Path.unlink)
    record.flush_folder = segments.flush_folder = dying(segments.flush_folder)
    Path.write_bytes = dying(Path.write_bytes)
    segments.recover(own / "answers")
    record.tidy(own)
    os._exit(0)

expected, n, status = ids(good), 0, -1
assert len(expected) > 300
while status:
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(good, own)
    child = os.fork()
    if not child:
        die_at(n)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    assert ids(own) == expected, f"killed before call {n}"
    segments.recover(own / "answers")
    record.tidy(own)
    assert ids(own) == expected, f"killed before call {n}, and tidied again"
    assert not [*(own / "answers" / "_live").iterdir()]
    assert not [*own.glob("*/date=*/.*")]
    n += 1
print(n)
"""


def test_tidying_that_is_killed_anywhere_neither_loses_nor_doubles(tmp_path: Path):
    good = tmp_path / "good"
    for name in "ab":
        with opened(good) as (log, _):
            for i in range(150):
                log.append(f"{name}{i}", 10**18 + i, SERVED, INPUTS, 0.5)
    victim = worker(good, "c", 10**9, 0.0002)
    for _ in range(200):
        victim.stdout.readline()
    time.sleep(0.2)
    victim.kill()
    victim.communicate()
    [last] = (good / ANSWERS / "_live").glob("*.open")
    with last.open("ab") as file:
        file.write(b"TLR1 torn")
    command = [sys.executable, "-c", CRASHES, str(good)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def move_back(place: Path, day: str) -> Path:
    "Today's one Parquet file, as if it were of another day."
    (made,) = place.glob(f"date={time.strftime('%Y-%m-%d', time.gmtime())}/*.parquet")
    old = place / f"date={day}" / f"{made.stem.rpartition('-')[0]}-{day.replace('-', '')}.parquet"
    old.parent.mkdir()
    return made.rename(old)


def test_what_was_kept_for_long_enough_is_removed(tmp_path: Path):
    place = tmp_path / ANSWERS
    for part, day in enumerate(("2020-01-31", "2020-02-01", "")):
        with opened(tmp_path) as (log, _):
            fill(log, part * 10, part * 10 + 10)
        assert tidy(tmp_path).records == 10
        if day:
            move_back(place, day)
    (place / "_damaged").mkdir()
    (place / "_damaged" / "x-000001-20200131.tail").write_bytes(b"")
    (place / "date=2020-01-31" / "note.parquet").write_bytes(b"")  # somebody else's

    whole = read_log(tmp_path)
    started = iter(whole)
    next(started)
    tidy(tmp_path, keep_days=30)
    assert [path.name for path in place.glob("date=20*/*") if "2020" in str(path)] == ["note.parquet"]
    assert not list((place / "_damaged").iterdir()) and not (place / "date=2020-02-01").exists()
    rest = [batch["request_id"][0].as_py() for batch in started]
    assert rest == ["r20"] and whole.tally.removed == 1 and "1 files removed" in whole.tally.text
    assert read_log(tmp_path).table()["request_id"].to_pylist() == [f"r{i}" for i in range(20, 30)]


def test_what_a_small_disk_can_not_hold_is_removed_the_oldest_first(tmp_path: Path):
    place = tmp_path / ANSWERS
    old = []
    for part, day in enumerate(("2020-01-31", "2020-02-01")):
        with opened(tmp_path) as (log, _):
            fill(log, part * 10, part * 10 + 10)
        tidy(tmp_path)
        old.append(move_back(place, day))
        with old[-1].open("ab") as file:
            file.truncate(700 << 10)
    with opened(tmp_path) as (log, _):
        fill(log, 20, 30)
        assert log.flush()
        tidy(tmp_path, keep_mb=2)
        assert all(path.exists() for path in old)
        tidy(tmp_path, keep_mb=1)
        assert not old[0].parent.exists() and old[1].exists()
        (live,) = (place / "_live").glob("*.open")
        with live.open("ab") as file:  # alone, it is above the bound
            file.truncate(2 << 20)
        tidy(tmp_path, keep_mb=1)
        assert live.exists() and not old[1].exists()


@pytest.mark.parametrize("bound", [{"keep_days": 30}, {"keep_mb": 1}])
def test_the_log_removes_by_itself_what_its_settings_say(tmp_path: Path, bound: dict[str, int]):
    with opened(tmp_path) as (log, _):
        fill(log, 0, 10)
    tidy(tmp_path)
    old = move_back(tmp_path / ANSWERS, "2020-01-31")
    with old.open("ab") as file:
        file.truncate(2 << 20)
    with opened(tmp_path, tidies=True, **bound):
        deadline = time.monotonic() + 60
        while old.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    assert not old.parent.exists()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_the_serving_process_stays_small(tmp_path: Path):
    code = """
import sys, time
from pathlib import Path
from titanic_mlops.serve.predictions import PredictionLog
folder = Path(sys.argv[1])
log = PredictionLog(folder, rotate_bytes=200_000)
class served: version, digest, override = "3", "d" * 64, ""
for i in range(30_000):
    log.append(f"r{i}", time.time_ns(), served, {"age": float(i % 80), "sex": "male"}, 0.5)
    if i % 1000 == 0: log.flush()
deadline = time.monotonic() + 60
while not [*folder.glob("answers/date=*/*.parquet")] and time.monotonic() < deadline: time.sleep(0.1)
log.close()
[peak] = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(int(peak) // 1024, *(m for m in ("pyarrow", "pandas", "numpy") if m in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    megabytes, *heavy = done.stdout.split()
    assert int(megabytes) < 100 and not heavy, done.stdout
    assert [*(tmp_path / ANSWERS).glob("date=*/*.parquet")]
    assert len(set(ids(tmp_path))) == 30_000


def test_a_damaged_parquet_file_is_noticed_and_the_others_are_read(tmp_path: Path):
    for _ in range(2):
        with opened(tmp_path) as (log, _):
            fill(log, 0, 2_000)
    tidy(tmp_path)
    spoiled, _ = sorted((tmp_path / ANSWERS).glob("date=*/*.parquet"))
    everything = read_log(tmp_path).table().to_pylist()
    whole, draw = spoiled.read_bytes(), random.Random(2)
    for i in range(40):
        at = draw.randrange(4, len(whole) - 4)
        cut = whole[: draw.randrange(len(whole))]
        spoiled.write_bytes(cut if i % 4 == 0 else whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        reading = read_log(tmp_path)
        found = reading.table().to_pylist()
        assert found[-2_000:] == everything[2_000:]
        if found[:-2_000] != everything[:2_000]:
            assert reading.tally.unreadable == 1, (i, at)  # a byte of the footer may be of no account


# --- what is recorded


def test_odd_values_are_recorded_or_left_out_but_never_stop_the_log(tmp_path: Path):
    import numpy as np

    round_inputs: dict[str, Any] = dict(INPUTS)
    round_inputs["name"] = round_inputs
    odd: list[tuple[Any, Any]] = [
        ({"ticket": "lone \ud800 surrogate", "age": float("nan")}, np.float32(0.5)),
        ({"age": "old", "sibsp": 2**70, "fare": np.float64(7.25), "pclass": np.int64(3)}, 0.25),
        ({"cabin": object(), "embarked": "\u0000"}, np.float64(1.0)),
        (INPUTS | {"ticket": round_inputs, "home_dest": "x" * 100_000}, 0.0),
        (None, 0.75),
    ]
    with opened(tmp_path, redact="") as (log, heard):
        for i, (inputs, probability) in enumerate(odd):
            log.append(f"r{i}", 10**18, SERVED, inputs, probability, key=("k", "\udfff")[i % 2])
        assert log.flush()
        assert not any(severity == "ERROR" for severity, *_ in heard), heard
    reading = read_log(tmp_path)
    rows = reading.table().to_pylist()
    assert [row["probability"] for row in rows] == [0.5, 0.25, 1.0, 0.0, 0.75]
    assert (rows[1]["age"], rows[1]["fare"], rows[1]["pclass"]) == (None, 7.25, 3)
    assert rows[0]["ticket"] == "lone ? surrogate" and rows[3]["name"] is None
    assert reading.tally.unfit >= 2
    tidy(tmp_path)
    assert repr(read_log(tmp_path).table().to_pylist()) == repr(rows)  # NaN is not NaN


def test_what_is_redacted_is_nowhere_on_the_disk(tmp_path: Path):
    salt = "a salt of some length"
    with opened(tmp_path, redact="name=title, ticket=hash, home_dest=drop", salt=salt) as (log, _):
        for i in range(3):
            log.append(f"r{i}", 10**18, SERVED, INPUTS | {"home_dest": "Bath"}, 0.5)
    assert recover(tmp_path / ANSWERS) == []
    tidy(tmp_path)
    rows = read_log(tmp_path).table().to_pylist()
    assert {row["ticket"] for row in rows} == {rows[0]["ticket"]} and len(rows[0]["ticket"]) == 32
    assert (rows[0]["name"], rows[0]["home_dest"]) == ("?, Mr. ?", None)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [word for word in (b"Braund", b"21171", b"Bath", salt.encode()) if word in content]


def test_the_clock_goes_backwards(tmp_path: Path):
    with opened(tmp_path) as (log, _):
        for i in range(100):
            log.append(f"r{i}", 10**18 - i * 10**9, SERVED, INPUTS, 0.5)
    table = read_log(tmp_path).table()
    assert table["request_id"].to_pylist() == [f"r{i}" for i in range(100)]
    assert table["number"].to_pylist() == list(range(100))
    some = read_log(tmp_path, since=10**18 - 9 * 10**9, until=10**18).table()
    assert some["request_id"].to_pylist() == [f"r{i}" for i in range(1, 10)]
    tidy(tmp_path)
    assert read_log(tmp_path, since=10**18 - 9 * 10**9, until=10**18).table().equals(some)


def test_a_sample_holds_all_or_nothing_of_a_request(tmp_path: Path):
    with opened(tmp_path, share=0.25) as (log, _):
        fill(log, 0, 2_000)
        fill(log, 0, 2_000, kind="shadow")
        assert log.flush()
        stats = log.stats()
    table = read_log(tmp_path, columns=["request_id", "kind"]).table().to_pylist()
    kinds = {kind: {r["request_id"] for r in table if r["kind"] == kind} for kind in ("champion", "shadow")}
    assert kinds["champion"] == kinds["shadow"] and 400 < len(kinds["shadow"]) < 600
    assert stats["sampled_out"] + stats["accepted"] == 4_000


def test_settings(tmp_path: Path):
    given = {"predictions_folder": str(tmp_path), "predictions_redact": "name=drop"}
    log = open_prediction_log(settings(**given), Heard())
    fill(log, 0, 3)
    log.close()
    assert read_log(tmp_path).table()["name"].to_pylist() == [None] * 3
    assert open_prediction_log(Settings(predictions_share=0)) is None
    for wrong, said in {
        "nmae=drop": "did you mean 'name'",
        "name": "is no redaction",
        "ticket=title": "is no redaction",
        "ticket=hash": "there is no salt",
    }.items():
        with pytest.raises(SettingsError, match=said):
            open_prediction_log(settings(predictions_folder=str(tmp_path), predictions_redact=wrong))
    with pytest.raises(SettingsError, match="predictions_when_full"):
        settings(predictions_when_full="wait")
    with pytest.raises(ParameterError, match="did you mean 'age'"):
        read_log(tmp_path, columns=["agee"])
    with pytest.raises(ParameterError, match="can't be combined"):
        read_log(tmp_path, until=0, after={})


# --- what became of them


def test_outcomes_unknown_twice_and_contradicting(tmp_path: Path):
    with opened(tmp_path) as (log, _):
        fill(log, 0, 10)
        fill(log, 3, 4, kind="shadow")
        log.append("r5", 2 * 10**18, SERVED, INPUTS, 0.99)  # the id again, and another answer
        log.append("r6", 2 * 10**18, SERVED, INPUTS, 0.06)  # the id again, and the same answer
        log.flush()
        log.outcomes.record([("r3", 1), ("r5", 0), ("r6", 1), ("r7", 0)], 1_000)
        log.outcomes.record([("r7", 0)], 2_000)
        log.outcomes.record([("r7", 1), ("r8", 1)], 3_000)
        log.outcomes.record([("r8", 0)], 1_000)  # told later, by a clock that is behind: the later time wins
        log.outcomes.record([("who", 1)], 4_000)
        early = joined(tmp_path)
    tidy(tmp_path)
    table = joined(tmp_path)
    assert table.equals(early)
    rows = {(row["request_id"], row["kind"]): row for row in table.to_pylist()}
    assert len(rows) == len(table) == 12
    look = lambda id, *names, kind="champion": tuple(rows[id, kind][name] for name in names)
    assert look("r3", "survived") == look("r3", "survived", kind="shadow") == (1,)
    assert look("r5", "survived", "answers", "ambiguous", "probability") == (0, 2, True, 0.99)
    assert look("r6", "answers", "ambiguous") == (2, False)
    assert look("r7", "survived", "outcomes", "contradicted") == (1, 3, True)
    assert look("r8", "survived", "contradicted") == (1, True)
    assert look("r9", "survived", "outcomes", "known") == (None, None, True)
    assert look("who", "survived", "known", "probability", kind=None) == (1, False, None)
    assert joined(tmp_path, pending=False).num_rows == 7
    assert joined(tmp_path / "nowhere").num_rows == 0
    assert {row["kind"] for row in find(tmp_path, "r3")} == {"champion", "shadow"}


@pytest.fixture
def api(tmp_path: Path):
    "A small app with the route, and its log."
    import fastapi
    from starlette.testclient import TestClient

    from titanic_mlops.serve.http import Front, State
    from titanic_mlops.serve.predictions import outcomes_router

    with opened(tmp_path) as (log, _):
        state = State(None, log=log)
        app = fastapi.FastAPI()
        app.include_router(outcomes_router(state))
        yield TestClient(app), log, app, Front, state


def test_outcomes_are_posted(api, tmp_path: Path):
    client, log, *_ = api
    fill(log, 0, 3)
    log.flush()
    assert client.post("/v1/outcomes", json={"request_id": "r1", "survived": 1}).json() == {"recorded": 1}
    many = [{"request_id": f"r{i}", "survived": i % 2} for i in range(3)]
    assert client.post("/v1/outcomes", json=many).json() == {"recorded": 3}
    for wrong in (
        {"request_id": "r1"},
        {"request_id": "r1", "survived": 2},
        {"request_id": "r1", "survived": True},
        {"request_id": "", "survived": 1},
        {"request_id": "two words", "survived": 1},
        {"request_id": "r1", "survived": 1, "age": 3},
        [],
        [{"request_id": "r1", "survived": 1}] * 10_001,
    ):
        assert client.post("/v1/outcomes", json=wrong).status_code == 422, str(wrong)[:80]
    rows = joined(tmp_path).to_pylist()
    assert [(row["request_id"], row["survived"], row["outcomes"]) for row in rows] == [
        ("r0", 0, 1),
        ("r1", 1, 2),
        ("r2", 0, 1),
    ]
    assert read_log(tmp_path, stream=OUTCOMES).table().num_rows == 4


def test_outcomes_that_can_not_be_kept_are_refused(api, monkeypatch: pytest.MonkeyPatch):
    client, log, *_ = api
    one = {"request_id": "r1", "survived": 1}
    assert client.post("/v1/outcomes", json=one).status_code == 200
    monkeypatch.setattr(log.outcomes._writer.file, "append", _full)
    refused = client.post("/v1/outcomes", json=one)
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    monkeypatch.undo()
    assert client.post("/v1/outcomes", json=one).status_code == 200


def _full(content: bytes) -> None:
    raise OSError(28, "No space left on device")
