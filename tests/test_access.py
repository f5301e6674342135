"""The access log and the traces against real things: pipes that stall, full disks, processes that write at once, a collector that takes OTLP."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from guarded import DEAN, serving

from titanic_mlops.ground.errors import SettingsError
from titanic_mlops.ground.settings import Settings
from titanic_mlops.serve.access import AccessLog, LineWriter, open_access, write_lines
from titanic_mlops.serve.security import KeyFile

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE, SPAN = PARENT.split("-")[1:3]


def request(path: str = "/v1/predict", **headers: str) -> SimpleNamespace:
    "A request as `Front` hands it over."
    sent = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    scope = {"method": "POST", "path": path}
    return SimpleNamespace(scope=scope, headers=sent, id="r-1", client="192.0.2.7", principal=None)


def wait_for(what: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.02)
    assert what()


# --- the writer


def test_a_pipe_that_nobody_reads(monkeypatch: pytest.MonkeyPatch):
    reading, writing = os.pipe()
    monkeypatch.setattr("titanic_mlops.serve.access.open_lines", lambda target, opened=-1: writing)
    writer = LineWriter("-", most=200_000, every=0.01)
    line = b"x" * 999 + b"\n"
    for _ in range(2000):  # ten times what may wait, far more than a pipe holds: it returns all the same
        writer.put(line)
    assert writer.dropped >= 1000
    kept = 2000 - writer.dropped
    got = bytearray()

    def drain() -> None:
        while len(got) < kept * len(line) and (piece := os.read(reading, 65536)):
            got.extend(piece)

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    writer.close(within=20)
    reader.join(20)
    assert bytes(got) == line * kept  # whole lines, and all that were not counted as dropped
    os.close(reading)
    os.close(writing)


class _Met(bytes):
    "A line during whose measuring something happens, as when the other thread has its turn then."

    happens: list[Any]

    def __len__(self) -> int:
        if self.happens:
            self.happens.pop()()
        return super().__len__()


def test_a_line_that_comes_while_others_are_counted_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("titanic_mlops.serve.access.write_lines", lambda *_: None)
    writer = LineWriter(str(tmp_path / "a.log"), most=1000, every=3600)
    met, line = _Met(b"x" * 100), b"y" * 100
    met.happens = []
    writer.put(met)
    met.happens.append(lambda: writer.put(line))
    writer.close()  # writes what there is, the line that comes meanwhile too
    assert not met.happens and not writer.dropped
    for _ in range(20):
        writer.put(line)
    assert writer.dropped == 9  # nothing waited, eleven filled it


def test_a_full_disk(tmp_path: Path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    log = AccessLog(LineWriter("/dev/full", every=0.01))
    for _ in range(3):
        log(request(), 200, 0.001, 10)
        wait_for(lambda: log.writer.dropped)
    log.close()
    assert log.writer.dropped == 3


def test_a_log_that_is_moved_away(tmp_path: Path):
    file = tmp_path / "access.jsonl"
    log = AccessLog(LineWriter(str(file), every=0.01))
    log(request("/first"), 200, 0.001, 10)
    wait_for(lambda: file.stat().st_size)
    file.rename(tmp_path / "old.jsonl")
    log(request("/second"), 200, 0.001, 10)
    wait_for(lambda: file.exists() and file.stat().st_size)
    log.close()
    urls = [json.loads(f.read_text())["httpRequest"]["requestUrl"] for f in (tmp_path / "old.jsonl", file)]
    assert urls == ["/first", "/second"]
    assert file.stat().st_mode & 0o007 == 0


def test_lines_of_several_processes_do_not_mix():
    reading, writing = os.pipe()
    code = (
        "import sys; from titanic_mlops.serve.access import write_lines\n"
        "write_lines(int(sys.argv[1]), [sys.argv[2].encode() * (n % 1500 + 1) + b'\\n' for n in range(3000)])"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(writing), letter], pass_fds=[writing])
        for letter in "abc"
    ]
    os.close(writing)
    text = b""
    while piece := os.read(reading, 65536):
        text += piece
    assert [w.wait(60) for w in writers] == [0, 0, 0]
    lines = text.splitlines()
    assert len(lines) == 9000 and all(len(set(line)) == 1 for line in lines)
    os.close(reading)


def test_write_lines_goes_on_where_a_pipe_takes_only_a_part(tmp_path: Path):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    lines = [b"y" * 3000 + b"\n"] * 100
    thread = threading.Thread(target=write_lines, args=(writing, lines), daemon=True)
    thread.start()
    text = b""
    while len(text) < 300_100:
        text += os.read(reading, 1000)
    thread.join(20)
    assert text == b"".join(lines)


# --- the line


def test_no_request_breaks_a_line(tmp_path: Path):
    file = tmp_path / "access.jsonl"
    log = AccessLog(LineWriter(str(file)), project="p")
    hostile = [
        '/"}\n{"severity":"EMERGENCY',
        "/\x00\x1b[31m\u2028",
        "/" + "\U0001f4a9" * 5000,
        "/\ud800",
        "/" + "a/" * 3000,
    ]
    for path in hostile:
        for agent in hostile:
            one = request(path)
            one.headers[b"user-agent"] = agent.encode("utf-8", "surrogatepass")
            log(one, 404, 0.001, 10)
    for n in range(3000):  # paths come from outside: what is remembered of them has a bound
        log(request(f"/{n}", user_agent=f"agent {n}"), 404, 0.001, 10)
    log.close()
    written = file.read_bytes().splitlines(keepends=True)
    assert len(written) == 25 + 3000 and max(map(len, written)) <= 4096
    assert {json.loads(line)["severity"] for line in written} == {"WARNING"}
    assert len(log._head._made) <= 512 and len(log._agent._made) <= 512


@pytest.mark.parametrize(
    ("status", "severity"), [(200, "INFO"), (304, "INFO"), (404, "WARNING"), (499, "WARNING"), (503, "ERROR")]
)
def test_severity(tmp_path: Path, status: int, severity: str):
    log = AccessLog(LineWriter(str(tmp_path / "a.jsonl")))
    log(request(), status, 1.5, 0)
    log.close()
    line = json.loads((tmp_path / "a.jsonl").read_text())
    assert (line["severity"], line["httpRequest"]["latency"]) == (severity, "1.500000s")


def test_the_names_are_googles(tmp_path: Path):
    handlers = pytest.importorskip(
        "google.cloud.logging_v2.handlers", reason="google-cloud-logging is not installed"
    )
    import io
    import logging

    log = AccessLog(LineWriter(str(tmp_path / "a.jsonl")), project="p")
    log(request(traceparent=PARENT, user_agent="curl"), 200, 0.25, 10)
    log.close()
    ours = json.loads((tmp_path / "a.jsonl").read_text())
    stream = io.StringIO()
    logger = logging.Logger("oracle")
    logger.addHandler(handlers.StructuredLogHandler(project_id="p", stream=stream))
    extra = {
        "http_request": ours["httpRequest"],
        "labels": ours["logging.googleapis.com/labels"],
        "trace": ours["logging.googleapis.com/trace"],
        "span_id": ours["logging.googleapis.com/spanId"],
        "trace_sampled": True,
    }
    logger.info(ours["message"], extra=extra)
    theirs = json.loads(stream.getvalue())
    for name in ours.keys() - {"time"}:
        if name == "logging.googleapis.com/labels":
            assert ours[name].items() <= theirs[name].items()
        else:
            assert theirs[name] == ours[name], name


# --- traces


class Collector:
    "Takes traces over OTLP/HTTP, as a collector does."

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        self.spans: list[Any] = []
        self.resources: list[Any] = []
        collector = self

        class Pages(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                import gzip

                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.resources.append(resource.resource)
                    collector.spans += [span for scope in resource.scope_spans for span in scope.spans]
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.server.shutdown()


def test_a_server_sends_its_traces(tmp_path: Path, collector: Collector):
    _, key = KeyFile(tmp_path / "keys.json").new("tests")
    with serving(tmp_path, trace_endpoint=collector.address, trace_sample="0", access_project="p") as running:
        assert (
            running.post(key=key, headers={"traceparent": PARENT, "x-request-id": "mine"}).status_code == 200
        )
        assert running.post(key=key).status_code == 200  # nobody wants this one
        assert running.post(key=key, headers={"traceparent": PARENT[:-2] + "00"}).status_code == 200
        assert running.post(key=key, headers={"traceparent": "nonsense"}).status_code == 200
        running.stop()
        lines = running.lines()
    [span] = collector.spans
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, SPAN)
    assert span.name == "POST /v1/predict" and span.kind == 2  # a server's
    assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 60e9
    said = {attribute.key: attribute.value for attribute in span.attributes}
    assert (
        said["http.response.status_code"].int_value == 200
        and said["titanic.request_id"].string_value == "mine"
    )
    assert key[21:] not in str(span) and DEAN["name"] not in str(span)
    assert "titanic" in str(collector.resources[0])

    place = [
        "logging.googleapis.com/trace",
        "logging.googleapis.com/spanId",
        "logging.googleapis.com/trace_sampled",
    ]
    assert [lines[0][name] for name in place] == [f"projects/p/traces/{TRACE}", span.span_id.hex(), True]
    assert lines[2][place[0]] == f"projects/p/traces/{TRACE}" and lines[2][place[2]] is False
    assert len(lines) == 4 and TRACE not in json.dumps([lines[1], lines[3]])


def test_a_collector_that_is_away_stops_nobody(tmp_path: Path):
    _, key = KeyFile(tmp_path / "keys.json").new("tests")
    with serving(tmp_path, trace_endpoint="http://127.0.0.1:9") as running:
        assert [running.post(key=key).status_code for _ in range(5)] == [200] * 5


def test_nothing_of_opentelemetry_without_traces():
    code = (
        "import sys; from titanic_mlops.ground.settings import Settings\n"
        "from titanic_mlops.serve.access import open_access\n"
        "open_access(Settings(access_log='/dev/null'))\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('opentelemetry', 'jwt', 'structlog', 'grpc')])"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TITANIC_")}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=clean).strip() == "[]"


def test_traces_without_opentelemetry(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SettingsError, match=r"titanic-mlops\[tracing\]"):
        open_access(Settings(trace_endpoint="http://127.0.0.1:9"))


def test_an_access_log_that_can_not_be_opened_is_said(tmp_path: Path):
    (tmp_path / "file").touch()
    for place in ("/proc/nowhere/log", str(tmp_path / "file" / "log"), str(tmp_path)):
        with pytest.raises(SettingsError, match="TITANIC_ACCESS_LOG"):
            open_access(Settings(access_log=place))
