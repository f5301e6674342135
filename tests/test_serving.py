"""A real server meets what the world sends: every address, hostile bodies, headers that lie, senders that drip."""

import asyncio
import contextlib
import gzip
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from checkout import checkout
from explained import make_bundle

DEAN = {
    "pclass": 3, "name": "Dean, Miss. Millvina", "sex": "female", "age": 0.17, "sibsp": 1, "parch": 2,
    "ticket": "C.A. 2315", "fare": 20.575, "embarked": "S",
}  # fmt: skip
GOOD = json.dumps(DEAN).encode()


@dataclass
class Up:
    "A server that is up."

    port: int
    client: httpx.Client
    store: Path

    def post(self, body: bytes, kind: str = "application/json", path: str = "/v1/predict", **headers: str):
        return self.client.post(path, content=body, headers={"content-type": kind, **headers})

    def raw(self, *pieces: bytes, pause: float = 0.0) -> bytes:
        "Bytes as they are, and all that comes back."
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as line:
            for piece in pieces:
                line.sendall(piece)
                time.sleep(pause)
            answer = b""
            while piece := line.recv(65536):
                answer += piece
        return answer


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    own = checkout(tmp_path_factory.mktemp("serving"))
    own.settings |= {"TITANIC_SERVE_SECONDS": "1", "TITANIC_RATE_LIMIT": "0", "TITANIC_ACCESS_LOG": ""}
    make_bundle(own.folder / "bundle")
    process = own.start("serve", "--bundle", str(own.folder / "bundle"), "--no-auth", "--port", "0")
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://127.0.0.1:(\d+)", line)
        assert address, line
        with httpx.Client(base_url=address[0], timeout=60, trust_env=False) as client:
            yield Up(int(address[1]), client, own.store)
    finally:
        process.terminate()
        process.communicate(timeout=30)


def problem(answer: httpx.Response, status: int, kind: str) -> dict:
    "The problem that an answer must be."
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"] == "application/problem+json"
    said = answer.json()
    assert said["status"] == status and said["type"] == f"/docs#problem-{kind}"
    assert said["instance"] == f"urn:request:{answer.headers['x-request-id']}"
    assert "Traceback" not in answer.text and ".py" not in answer.text
    return said


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/openapi.json", "/healthz", "/readyz", "/metrics", "/v1/model", "/v1/passengers", "/ping", "/version", "/v2", "/v2/health/live", "/v2/models/titanic"]
)  # fmt: skip
def test_every_address_answers(up: Up, path: str):
    answer = up.client.get(path)
    assert answer.status_code == 200 and answer.content
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-request-id"]
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_one_passenger_in_all_forms_is_one_probability(up: Up):
    one = up.post(GOOD)
    said = one.json()
    assert (
        said["survives"] == (said["probability"] >= said["threshold"])
        and said["bundle_digest"] == one.headers["x-bundle-digest"]
    )
    array = up.post(json.dumps([DEAN, DEAN]).encode(), path="/v1/predict/batch").json()
    lines = up.post(GOOD + b"\n" + GOOD, "application/x-ndjson", "/v1/predict/batch").text.splitlines()
    table = (",".join(DEAN) + "\n" + ",".join(f'"{v}"' for v in DEAN.values()) + "\n").encode()
    text = up.post(table, "text/csv", "/v1/predict/batch").text.splitlines()
    form = up.client.post(
        "/v1/predict/batch", files={"file": ("people.csv", table, "text/csv")}
    ).text.splitlines()
    found = [array["predictions"][0]["probability"], json.loads(lines[1])["probability"]]
    found += [float(text[1].split(",")[1]), float(form[1].split(",")[1])]
    assert found == pytest.approx([said["probability"]] * 4, abs=1e-6)
    explained = up.post(GOOD, path="/v1/explain").json()
    assert explained["probability"] == pytest.approx(said["probability"], abs=1e-6)


MALFORMED = {
    "empty": b"",
    "no JSON": b"nonsense",
    "cut short": GOOD[:-5],
    "something after it": GOOD + b"}",
    "NaN": GOOD.replace(b"0.17", b"NaN"),
    "Infinity": GOOD.replace(b"0.17", b"-Infinity"),
    "twins": GOOD[:-1] + b', "age": 3}',
    "lone surrogate": GOOD.replace(b"Dean", b"\\ud800"),
    "not UTF-8": GOOD.replace(b"Dean", b"\xff\xfe"),
    "UTF-16": GOOD.decode().encode("utf-16"),
    "deep arrays": b"[" * 60_000,
    "deep objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "five thousand digits": GOOD.replace(b"0.17", b"9" * 5000),
}
BROKEN = {
    "a list": b"[]",
    "null": b"null",
    "nothing": b"{}",
    "huge number": GOOD.replace(b"0.17", b"1e400"),
    "huge integer": GOOD.replace(b'"pclass": 3', b'"pclass": ' + b"3" * 400),
    "too old": GOOD.replace(b"0.17", b"200"),
    "text for a number": GOOD.replace(b"0.17", b'"0.17"'),
    "true for a number": GOOD.replace(b'"pclass": 3', b'"pclass": true'),
    "object for a text": GOOD.replace(b'"female"', b'{"$ne": ""}'),
    "a NUL": GOOD.replace(b"Dean", b"\\u0000"),
    "the outcome": GOOD[:-1] + b', "survived": 1}',
    "the boat": GOOD[:-1] + b', "boat": "4"}',
}


@pytest.mark.parametrize("what", MALFORMED)
def test_what_is_no_json_is_400(up: Up, what: str):
    problem(up.post(MALFORMED[what]), 400, "malformed-body")
    assert up.post(MALFORMED[what], path="/v1/explain").status_code == 400


@pytest.mark.parametrize("what", BROKEN)
def test_what_breaks_the_contract_is_422_with_field_and_rule(up: Up, what: str):
    said = problem(up.post(BROKEN[what]), 422, "broken-rule")
    assert all(one["rule"] and one["message"] for one in said["errors"]) and said["errors"]
    batch = problem(
        up.post(b"[" + GOOD + b"," + BROKEN[what] + b"]", path="/v1/predict/batch"), 422, "broken-rule"
    )
    assert all(one["field"].startswith("1") for one in batch["errors"])
    line = up.post(BROKEN[what] + b"\n" + GOOD, "application/x-ndjson", "/v1/predict/batch").text.splitlines()
    assert json.loads(line[0])["errors"] and json.loads(line[1])["probability"]


def test_a_colon_in_a_name_is_no_twin(up: Up):
    assert up.post(GOOD.replace(b"Millvina", b"Eliza: the :youngest")).status_code == 200


def test_types_methods_and_addresses_that_are_not_taken(up: Up):
    for kind in ("text/plain", "application/xml", "", "application/jsonx", "multipart/form-data"):
        problem(up.post(GOOD, kind), 415, "unsupported-media-type")
    assert up.post(GOOD, "Application/JSON; charset=utf-8").status_code == 200
    problem(up.post(GOOD, **{"content-encoding": "br"}), 415, "unsupported-media-type")
    answer = up.client.delete("/v1/predict")
    problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "POST"
    for path in (
        "/nowhere",
        "/v1/predict/",
        "/v1//predict",
        "/docs/../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/v1/model/%00",
    ):
        problem(up.client.get(path), 404, "not-found")


def test_gzip_is_taken_whole_and_only_so_far(up: Up):
    packed, encoded = gzip.compress(GOOD), {"content-encoding": "gzip"}
    assert up.post(packed, **encoded).status_code == 200
    problem(up.post(packed[:-6], **encoded), 400, "malformed-body")
    problem(up.post(b"not gzip", **encoded), 400, "malformed-body")
    problem(up.post(packed + b"more", **encoded), 400, "malformed-body")
    problem(up.post(gzip.compress(bytes(30_000_000)), **encoded), 413, "too-large")
    lines = gzip.compress((GOOD + b"\n") * 300)
    answer = up.post(lines, "application/x-ndjson", "/v1/predict/batch", **encoded)
    assert len(answer.text.splitlines()) == 300


def test_bodies_that_are_too_large(up: Up):
    big = GOOD[:-1] + b', "home_dest": "' + b"x" * 10_000_000 + b'"}'
    problem(up.post(big), 413, "too-large")
    problem(up.post(b"[" + b" " * 5_000_000 + b"]", path="/v1/predict/batch"), 413, "too-large")
    chunked = up.client.post(
        "/v1/predict",
        content=iter([b" " * 40_000, b" " * 40_000]),
        headers={"content-type": "application/json"},
    )
    problem(chunked, 413, "too-large")


def test_request_ids_come_back_and_nothing_is_smuggled_in_with_them(up: Up):
    assert up.post(GOOD, **{"x-request-id": "order-1912"}).headers["x-request-id"] == "order-1912"
    for harmful in ("a b", '"', "x" * 200, "é", "<script>", "a;b", "%0d%0aset-cookie:x=1"):
        answer = up.client.post(
            "/v1/predict",
            content=GOOD,
            headers=[(b"content-type", b"application/json"), (b"x-request-id", harmful.encode())],
        )
        assert answer.status_code == 200 and answer.headers["x-request-id"] != harmful
        assert (
            "set-cookie" not in answer.headers
            and answer.json()["request_id"] == answer.headers["x-request-id"]
        )
    head = b"POST /v1/predict HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-type: application/json\r\n"
    folded = up.raw(
        head + b"x-request-id: a\r\n set-cookie: x=1\r\ncontent-length: %d\r\n\r\n" % len(GOOD) + GOOD
    )
    assert b"set-cookie" not in folded.lower().partition(b"\r\n\r\n")[0]


def test_lengths_that_lie_and_senders_that_drip(up: Up):
    head = b"POST /v1/predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    for lie in (b"content-length: 5000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n7d0\r\n"):
        assert b" 408 " in up.raw(head + lie + GOOD).partition(b"\r\n")[0]  # more is promised than comes
    none = up.raw(head + b"content-length: 100\r\n\r\n")
    assert b" 408 " in none.partition(b"\r\n")[0] and b"/docs#problem-timeout" in none
    twice = up.raw(head + b"content-length: 5\r\ncontent-length: 7\r\n\r\n12345")
    assert b" 400 " in twice.partition(b"\r\n")[0]
    both = up.raw(head + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")
    assert b" 400 " in both.partition(b"\r\n")[0]
    for number in (b"-1", b"1e3", b"99999999999999999999999"):
        assert b" 400 " in up.raw(head + b"content-length: " + number + b"\r\n\r\n").partition(b"\r\n")[0]
    slow = up.raw(
        head + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(GOOD), GOOD[:9], GOOD[9:], pause=0.2
    )
    assert b" 200 " in slow.partition(b"\r\n")[0]


def test_who_asks_for_another_protocol_is_answered_in_this_one(up: Up):
    upgrade = (
        b"connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
    )
    head = b"POST /v1/predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n" + upgrade
    plain = b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n"
    length = b"content-length: %d\r\n\r\n" % len(GOOD)
    chunks = b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(GOOD), GOOD)
    for pieces in ((head + length + GOOD, plain), (head + length, GOOD, plain), (head + chunks, plain)):
        answer = up.raw(*pieces, pause=0.2)
        assert answer.count(b"HTTP/1.1 200") == 2 and b'"probability"' in answer, answer
    smuggled = head + b"content-length: %d\r\n\r\n" % len(plain) + plain
    assert up.raw(smuggled, plain, pause=0.2).count(b"HTTP/1.1 200") == 1  # a body is no request
    cut = head.index(b"pgrade: h2c")
    for pieces in (
        (head[:cut], head[cut:] + length, GOOD),
        (b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n", plain),
    ):
        answer = up.raw(*pieces, pause=0.2)
        assert answer.count(b"HTTP/1.1 ") == 1, answer  # answered once, and then the line is closed


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/ping", "/nowhere"])
def test_a_head_is_a_get_without_its_body(up: Up, path: str):
    head, get = up.client.head(path), up.client.get(path)
    assert head.status_code == get.status_code and head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]


def test_what_is_no_http_is_a_problem_as_well(up: Up):
    for raw in (b"HELO there\r\n\r\n", b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n"):
        head, _, body = up.raw(raw).partition(b"\r\n\r\n")
        said, headers = json.loads(body), head.lower()
        assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n") and b"application/problem+json" in headers
        assert said["instance"].removeprefix("urn:request:").encode() in headers and b"nosniff" in headers


def test_a_decimal_of_arrow_is_a_number(up: Up):
    import pyarrow as pa

    rows = pa.Table.from_pylist([json.loads(GOOD)])
    answers = []
    for kind in (pa.float64(), pa.decimal128(9, 4)):
        fare = pa.array([json.loads(GOOD)["fare"]]).cast(kind)
        table = rows.set_column(rows.schema.get_field_index("fare"), "fare", fare)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        answer = up.post(
            sink.getvalue().to_pybytes(), "application/vnd.apache.arrow.stream", "/v1/predict/batch"
        )
        assert answer.status_code == 200, answer.text
        answers.append(pa.ipc.open_stream(answer.content).read_all()["probability"].to_pylist())
    assert answers[0] == answers[1]


def test_lines_may_begin_with_a_byte_order_mark(up: Up):
    answer = up.post(b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD, "application/x-ndjson", "/v1/predict/batch")
    assert answer.text.count('"probability"') == 2


def test_who_sends_all_lines_before_it_reads_one_is_answered(up: Up):
    rows = 100_000
    head = b"POST /v1/predict/batch HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-type: application/x-ndjson\r\n"
    answer = up.raw(head + b"content-length: %d\r\n\r\n" % (rows * (len(GOOD) + 1)), (GOOD + b"\n") * rows)
    assert answer.count(b'"probability"') == rows and b"HTTP/1.1 200" in answer[:20]


def test_heads_that_drip_are_cut(up: Up):
    began = time.monotonic()
    assert up.raw(b"GET /healthz HTTP/1.1\r\nhost:") == b""  # the rest never comes
    assert 1 < time.monotonic() - began < 10
    line = b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    with socket.create_connection(("127.0.0.1", up.port), timeout=10) as slow:
        for pause in (3, 0):  # between two requests there is more time than for a head
            slow.sendall(line)
            answer = b""
            while b'"ok"' not in answer:
                answer += slow.recv(65536)
            time.sleep(pause)
        sent, closed = 0, False
        while not closed and sent < 100:  # and the second head is no better than the first
            try:
                slow.sendall(line[sent % 20 : sent % 20 + 1])
                sent, closed = sent + 1, slow.recv(1, socket.MSG_DONTWAIT) == b""
            except BlockingIOError:
                time.sleep(0.1)
            except ConnectionError:
                closed = True
        assert closed and sent < 60


def test_after_all_that_it_still_answers_and_has_counted(up: Up):
    assert up.post(GOOD).status_code == 200
    page = up.client.get("/metrics").text
    assert re.search(r'titanic_requests_total\{method="POST",route="/v1/predict",status="200"\} \d', page)
    assert re.search(r'titanic_requests_total\{method="POST",route="/v1/predict",status="422"\} \d', page)
    assert 'status="500"' not in page and "titanic_model_ready 1.0" in page
    assert [*(up.store / "predictions").rglob("*.open")], "no record was kept"


# --- what a hostile client can make large with little


def test_small_bodies_do_not_hold_the_worker(up: Up):
    many = ",".join(f'"k{number}":1' for number in range(6000)).encode()
    twins = b"{" + many + b',"k5999":1}'
    wide = json.dumps([{f"k{number}": 1 for number in range(200_000)}]).encode()
    newlines = gzip.compress(b"\n" * 60_000_000)
    table = ",".join(DEAN) + "\n" + "\n" * 5_000_000
    packed = {"content-encoding": "gzip"}
    ways = {
        "twins": (lambda: up.post(twins), 400),
        "unknown keys": (lambda: up.post(b"{" + many + b"}"), 422),
        "a wide row": (lambda: up.post(wide, path="/v1/predict/batch"), 422),
        "empty lines": (
            lambda: up.post(newlines, "application/x-ndjson", "/v1/predict/batch", **packed),
            200,
        ),
        "empty rows": (lambda: up.post(table.encode(), "text/csv", "/v1/predict/batch"), 400),
    }
    for what, (ask, status) in ways.items():
        found: list[int] = []
        asker = threading.Thread(target=lambda ask=ask, found=found: found.append(ask().status_code))
        asker.start()
        slowest = 0.0
        while asker.is_alive():  # somebody else asks meanwhile
            start = time.monotonic()
            assert up.post(GOOD).status_code == 200
            slowest = max(slowest, time.monotonic() - start)
        assert found == [status], what
        assert slowest < 5, f"{what}: another client waited for {slowest:.1f} s"


def test_what_follows_a_gzip_stream_is_refused_at_once(up: Up):
    def endless():
        yield gzip.compress(GOOD)
        for _ in range(2000):
            yield b"\0" * 65_536

    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = up.client.post("/v1/predict", content=endless(), headers=headers)
    assert answer.status_code in (400, 413), answer.text


def test_heads_have_an_end(up: Up):
    answer = up.raw(
        b"GET /healthz HTTP/1.1\r\nhost: a\r\n" + b"".join(b"a%d: b\r\n" % n for n in range(500)) + b"\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 431 ") and b"headers-too-large" in answer
    with socket.create_connection(("127.0.0.1", up.port), timeout=30) as line:
        line.sendall(b"GET /healthz HTTP/1.1\r\nhost: a\r\nx: ")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 10_000_000:
                sent += line.send(b"x" * 65_536)
        assert sent < 5_000_000, "the server takes a head without end"
    assert problem(up.post(GOOD, **{"x-request-key": "k" * 300}), 400, "malformed-request")


def test_requests_that_are_sent_ahead_are_answered_up_to_a_bound(up: Up):
    one = b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n"
    last = b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    assert up.raw(one * 50 + last).count(b"HTTP/1.1 200") == 51
    with (
        socket.create_connection(("127.0.0.1", up.port), timeout=30) as line,
        contextlib.suppress(ConnectionError),
    ):
        for _ in range(200):
            line.sendall(one * 2000)
        line.settimeout(5)
        while line.recv(65_536):
            pass
    assert up.client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/model%0A", "/metrics%0A", "/v1/predict%0D", "/readyz%00", "/nowhere", "//v1/model"]
)
def test_an_address_that_is_not_listed_is_not_there(up: Up, path: str):
    problem(up.client.get(path), 404, "not-found")


async def _held_back(
    pieces: int, size: int
) -> tuple[int, int]:  # pieces made while nobody reads, and sent at last
    from titanic_mlops.serve.bulk import LineStream

    made, sent, reads = 0, 0, asyncio.Event()

    async def answers():
        nonlocal made
        for _ in range(pieces):
            made += 1
            yield b"x" * size

    async def send(message):
        nonlocal sent
        if message.get("body"):
            await reads.wait()
            sent += 1

    answering = asyncio.create_task(LineStream(answers(), {})({}, None, send))
    await asyncio.sleep(0.2)
    waiting = made
    reads.set()
    await answering
    return waiting, sent


def test_answers_that_nobody_reads_wait_but_do_not_fill_the_memory():
    assert asyncio.run(_held_back(100, 2**20)) == (18, 100)  # 16 MB wait, one is being sent, one was made
    assert asyncio.run(_held_back(100, 100)) == (100, 100)  # nobody has to wait for who reads late
