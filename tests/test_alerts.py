"""Alerts against real receivers: down, slow, failing, resetting; and watchers that are killed, or two at once."""

import base64
import hashlib
import hmac
import json
import os
import random
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from titanic_mlops.ground.settings import Settings
from titanic_mlops.watch import alerts
from titanic_mlops.watch.alerts import (
    Alert,
    Alertmanager,
    Desk,
    Email,
    Slack,
    Webhook,
    channels_of,
    dead_letters,
    deliver,
    retry,
)

SECRET = "a secret of the tests"


class Listener:
    "A webhook's receiver with moods: each request takes the next one, and 200 when none is left."

    def __init__(self, *moods):
        self.moods, self.got, self.lock = list(moods), [], threading.Lock()
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                with listener.lock:
                    mood = listener.moods.pop(0) if listener.moods else 200
                    listener.got.append(
                        (self.path, {k.lower(): v for k, v in self.headers.items()}, body, mood)
                    )
                if mood == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    return
                if mood == "slow":
                    time.sleep(3)
                    return
                status, headers = mood if isinstance(mood, tuple) else (mood, {})
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    @property
    def taken(self):
        return [(headers, body) for _, headers, body, mood in self.got if mood == 200]


def trouble(subject: str = "age", **more) -> Alert:
    return Alert(
        name="drift",
        subject=subject,
        summary=f"{subject} moved up: PSI 0.31 <b>&",
        since="2026-03-01T00:00:00Z",
        next="titanic watch",
        **more,
    )


def test_a_signed_letter_arrives(tmp_path: Path):
    with Listener() as listener:
        desk = Desk(tmp_path, {"webhook": Webhook(listener.url + "/hook", SECRET)})
        desk.note([trouble(), trouble("fare", severity="critical")], ["drift"])
        assert deliver(desk).sent == 1
        path, headers, body, _ = listener.got[0]
    said = json.loads(body)
    assert path == "/hook" and said["severity"] == "critical"
    assert [alert["subject"] for alert in said["firing"]] == ["age", "fare"]
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    right = base64.b64encode(hmac.new(SECRET.encode(), signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{right}"
    assert abs(time.time() - int(headers["webhook-timestamp"])) < 60
    desk.note([], ["drift"])
    assert desk.read().outbox[0].notice.title.startswith("resolved: ")


@pytest.mark.parametrize(
    "moods",
    [[500, 503], ["reset", "reset"], [(429, {"Retry-After": "1"})], [408, (503, {"Retry-After": "x"})]],
    ids=["failing", "resetting", "busy", "late"],
)
def test_a_receiver_in_a_bad_mood_gets_it_in_the_end(tmp_path: Path, moods: list):
    with Listener(*moods) as listener:
        desk = Desk(tmp_path, {"webhook": Webhook(listener.url)})
        desk.note([trouble()], ["drift"])
        done = deliver(desk, patience=30)
        assert (done.sent, done.waiting, done.dead) == (1, 0, 0), done
        assert len(done.errors) == len(moods)
        assert len({headers["webhook-id"] for _, headers, _, _ in listener.got}) == 1
        assert len(listener.got) == len(moods) + 1


def test_a_receiver_that_says_later_is_not_asked_sooner(tmp_path: Path):
    with Listener((429, {"Retry-After": "600"})) as listener:
        desk = Desk(tmp_path, {"webhook": Webhook(listener.url)})
        desk.note([trouble()], ["drift"])
        done = deliver(desk, patience=3)
        assert (done.waiting, len(listener.got)) == (1, 1)
        assert 550 < desk.read().outbox[0].due - time.time() < 650


def test_nobody_there_and_a_slow_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(alerts, "_READ", 1.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with Listener("slow") as listener:
        channels = {"webhook": Webhook(f"http://127.0.0.1:{port}"), "slack": Slack(listener.url)}
        desk = Desk(tmp_path, channels)
        desk.note([trouble()], ["drift"])
        done = deliver(desk)
        assert (done.sent, done.waiting) == (0, 2)
        assert "ReadTimeout" in " ".join(done.errors) and "ConnectError" in " ".join(done.errors)
        again = Desk(tmp_path, channels)  # as after a restart
        with again.change() as book:
            for letter in book.outbox:
                letter.due = 0
        assert deliver(again).sent == 1
    [(_, first), (_, second)] = [(h, b) for _, h, b, _ in listener.got]
    assert first == second
    assert "<b>" not in json.loads(first)["blocks"][0]["text"]["text"]


def test_what_can_not_be_written_down_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    with Listener() as listener:
        desk = Desk(tmp_path, {"webhook": Webhook(listener.url)})
        desk.note([trouble()], ["drift"])
        with monkeypatch.context() as patch:
            patch.setattr(alerts, "write_atomic", full)
            with pytest.raises(OSError, match="No space"):
                deliver(desk)
        assert not listener.got
        assert deliver(desk).sent == 1


def test_no_end_overtakes_its_beginning(tmp_path: Path):
    with Listener(503) as listener:
        desk = Desk(tmp_path, {"webhook": Webhook(listener.url)})
        desk.note([trouble()], ["drift"])
        assert deliver(desk).waiting == 1
        desk.note([trouble("fare")], ["drift"])  # the end of one, the beginning of another
        desk.note([trouble("fare"), trouble("sex")], ["drift"])
        done = deliver(desk)
        assert (done.sent, done.waiting) == (1, 2)  # what has nothing to do with it goes at once
        assert deliver(desk, patience=20).waiting == 0
        said = [json.loads(body) for _, body in listener.taken]
    told = [[[alert["subject"] for alert in one[state]] for state in ("firing", "resolved")] for one in said]
    assert told == [[["sex"], []], [["age"], []], [["fare"], ["age"]]]


def test_what_nobody_takes_is_kept_and_can_be_sent_again(tmp_path: Path):
    with Listener(400, 404) as listener:
        desk = Desk(tmp_path, {"webhook": Webhook(listener.url)})
        desk.note([trouble()], ["drift"])
        assert deliver(desk).dead == 1
        [letter] = dead_letters(desk)
        assert "answered 400" in letter.error and letter.notice.fires == [trouble()]
        assert retry(desk) == 1 and deliver(desk).dead == 1
        assert retry(desk) == 1 and deliver(desk).sent == 1
        assert {headers["webhook-id"] for _, headers, _, _ in listener.got} == {letter.key}
    assert dead_letters(desk) == []


def test_alertmanager_is_told_of_the_end(tmp_path: Path):
    with Listener() as listener:
        desk = Desk(tmp_path, {"alertmanager": Alertmanager(listener.url + "/")})
        desk.note([trouble()], ["drift"])
        desk.note([], ["drift"])
        assert deliver(desk).sent == 2
        assert {path for path, *_ in listener.got} == {"/api/v2/alerts"}
        [first], [second] = (json.loads(body) for _, body in listener.taken)
    assert first["labels"] == second["labels"]
    until, end = (datetime.fromisoformat(one["endsAt"]).timestamp() for one in (first, second))
    assert end <= time.time() and until > time.time() + 25 * 3600, "a day until it is reminded"


def test_alertmanager_is_told_of_the_end_of_each_severity(tmp_path: Path):
    "The severity is one of the labels, and those together say which alert it is."
    ends: dict[str, float] = {}
    with Listener() as listener:
        desk = Desk(tmp_path, {"alertmanager": Alertmanager(listener.url)})
        for hour, severity in enumerate(
            ["warning", "critical", "warning", None, "critical", "warning", None]
        ):
            found = [trouble(severity=severity)] if severity else []
            desk.note(found, ["drift"], now=time.time() + 3600 * hour - 12 * 3600)
            assert deliver(desk).errors == []
            for alert in json.loads(listener.taken[-1][1]):
                end = datetime.fromisoformat(alert["endsAt"]).timestamp()
                ends[alert["labels"]["severity"]] = end
            firing = sorted(one for one, end in ends.items() if end > time.time())
            assert firing == (["critical"] if severity == "critical" or hour in (2, 5) else
                              ["warning"] if severity else [])  # fmt: skip
        desk.tell(trouble("done"))
        deliver(desk)
        assert "endsAt" not in json.loads(listener.taken[-1][1])[0], "it is over when it is told"


class Mail(socketserver.StreamRequestHandler):
    "Enough of SMTP to take a letter; the first recipient is refused for now if the server says so."

    def handle(self):
        say = lambda line: self.wfile.write(line.encode() + b"\r\n")
        say("220 here")
        while line := self.rfile.readline().decode().strip():
            word = line.split()[0].upper()
            self.server.said.append(line)
            if word == "EHLO":
                say("250-here")
                say("250 AUTH PLAIN")
            elif word == "AUTH":
                say("235 welcome")
            elif word == "RCPT" and self.server.refusals:
                say(self.server.refusals.pop(0))
            elif word == "DATA":
                say("354 go on")
                lines = []
                while (said := self.rfile.readline()) != b".\r\n":
                    lines.append(said.decode())
                self.server.letters.append("".join(lines))
                say("250 taken")
            elif word == "QUIT":
                return say("221 bye")
            else:
                say("250 ok")


def test_by_mail(tmp_path: Path):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mail) as server:
        server.daemon_threads, server.letters, server.said = True, [], []
        server.refusals = ["450 greylisted", "550 no such user"]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"smtp://127.0.0.1:{server.server_address[1]}/?from=titanic@example.org&to=ops@example.org"
        desk = Desk(tmp_path, {"email": Email(address)})
        desk.note([trouble("na\nme")], ["drift"])  # a line break must not become a header
        done = deliver(desk)
        assert (done.waiting, done.dead) == (1, 0), done
        with desk.change() as book:
            book.outbox[0].due = 0
        assert deliver(desk).dead == 1
        retry(desk)
        assert deliver(desk).sent == 1
        server.shutdown()
    [letter] = server.letters
    assert "Subject: [warning]" in letter and "titanic watch" in letter and "To: ops@example.org" in letter


def test_a_login_is_not_sent_in_clear(tmp_path: Path):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mail) as server:
        server.daemon_threads, server.letters, server.refusals, server.said = True, [], [], []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = (
            f"smtp://bob:geheim@127.0.0.1:{server.server_address[1]}/?from=a@example.org&to=b@example.org"
        )
        desk = Desk(tmp_path, {"email": Email(address)})
        desk.note([trouble()], ["drift"])
        done = deliver(desk)
        assert done.dead == 1 and "offers no TLS" in done.errors[0] and "geheim" not in done.errors[0]
        assert not server.letters and not any(line.startswith("AUTH") for line in server.said)
        trusting = Desk(tmp_path, {"email": Email(address + "&tls=none")})
        retry(trusting)
        deliver(trusting)
        assert any(line.startswith("AUTH") for line in server.said)
        server.shutdown()


def test_an_address_that_is_none_is_said():
    from titanic_mlops.ground.errors import AlertError

    with pytest.raises(AlertError, match="not complete"):
        channels_of(Settings(alert_email="smtp://example.org"))
    with pytest.raises(AlertError, match="not complete"):
        channels_of(Settings(alert_email="smtp://mail:abc/?from=a@example.org&to=b@example.org"))
    assert "secret" not in repr(Settings(alert_secret="secret"))


class Broken:
    name = "broken"

    def send(self, notice: alerts.Notice, key: str) -> None:
        "ä secret".encode("ascii")


def test_a_channel_that_breaks_holds_up_nobody(tmp_path: Path):
    with Listener() as listener:
        desk = Desk(tmp_path, {"broken": Broken(), "webhook": Webhook(listener.url)})
        desk.note([trouble()], ["drift"])
        done = deliver(desk)
    assert (done.sent, done.waiting, done.errors) == (1, 1, ["broken: UnicodeEncodeError"])
    [letter] = desk.read().outbox
    assert letter.attempts == 1 and letter.due > time.time()


WATCHER = """
import sys
from pathlib import Path
from titanic_mlops.watch.alerts import Alert, Desk, Webhook, deliver

folder, url, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
desk = Desk(folder, {"webhook": Webhook(url)})
print("ready", flush=True)
for subject in "abcdefghijkl"[:count]:
    desk.note([Alert(name=f"drift_{subject}", subject="x", summary="moved", since="2026-03-01T00:00:00Z")], [])
    deliver(desk)
print("done", flush=True)
"""


def watcher(folder: Path, url: str, count: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WATCHER, str(folder), url, str(count)], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.long
def test_killed_watchers_lose_nothing_and_say_nothing_under_two_keys(tmp_path: Path):
    rng, count, moods = random.Random(3), 12, [200, 500, 200, "reset"] * 3
    with Listener(*moods) as listener:
        for _ in range(6):
            process = watcher(tmp_path, listener.url, count)
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.6))
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        process = watcher(tmp_path, listener.url, count)
        assert process.communicate(timeout=120)[0].endswith("done\n")
        desk = Desk(tmp_path, {"webhook": Webhook(listener.url)})
        with desk.change() as book:
            for letter in book.outbox:
                letter.due = 0
        deliver(desk, patience=20)
        assert desk.read().outbox == [] and dead_letters(desk) == []
        keys: dict[str, set[str]] = {}
        for _, headers, body, _ in listener.got:
            for alert in json.loads(body)["firing"]:
                keys.setdefault(alert["name"], set()).add(headers["webhook-id"])
        arrived = {alert["name"] for _, body in listener.taken for alert in json.loads(body)["firing"]}
    assert arrived == {f"drift_{subject}" for subject in "abcdefghijkl"}
    assert all(len(own) == 1 for own in keys.values()), keys


@pytest.mark.long
def test_two_watchers_at_once_tell_once(tmp_path: Path):
    with Listener() as listener:
        both = [watcher(tmp_path, listener.url, 8) for _ in range(2)]
        assert all(process.communicate(timeout=120)[0].endswith("done\n") for process in both)
        deliver(Desk(tmp_path, {"webhook": Webhook(listener.url)}), patience=10)
        told = Counter(a["name"] for _, body in listener.taken for a in json.loads(body)["firing"])
    assert told == Counter({f"drift_{subject}": 1 for subject in "abcdefgh"})
