"""Passengers from files that are not what they should be, and from real servers: S3, Cloud Storage, HTTP, OpenML."""

import contextlib
import datetime
import gzip
import http.server
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from decimal import Decimal
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkout import BIN, ROOT

from titanic_mlops.data.sources import EMBEDDED, read, snapshot
from titanic_mlops.ground.errors import ContractError, SourceError, TitanicError
from titanic_mlops.ground.store import Artifacts

LIST = (ROOT / "titanic_mlops" / "data" / "titanic.csv").read_bytes()
KAGGLE = (
    "PassengerId,Survived,Pclass,Name,Sex,Age,SibSp,Parch,Ticket,Fare,Cabin,Embarked\n"
    '1,0,3,"Braund, Mr. Owen Harris",male,22,1,0,A/5 21171,7.25,,S\n'
    '2,1,1,"Cumings, Mrs. John Bradley",female,38,1,0,PC 17599,71.2833,C85,C\n'
)


# --- files that are not what they should be

HEAD = KAGGLE.splitlines()[0]
ROW = KAGGLE.splitlines()[1]
PARQUET = read(EMBEDDED).frame.to_parquet()
BAD = {
    "empty": (b"", ["the file is empty"]),
    "blank": (b"\n\n \n", []),
    "header only": (HEAD.encode(), ["no rows"]),
    "missing column": (KAGGLE.replace("Sex,", "").replace("male,", "").encode(), ["'Sex' is missing"]),
    "extra column": (KAGGLE.replace("Embarked\n", "Embarked,Shoes\n", 1).encode(), ["'Shoes'"]),
    "doubled column": (KAGGLE.replace("Cabin", "Fare", 1).encode(), ["'Fare' is there twice"]),
    "another table": (b"a,b\n1,2\n", ["no column of a passenger list"]),
    "binary": (bytes(range(256)) * 40, ["binary", "byte 0"]),
    "png": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(64), ["binary"]),
    "utf-16": (KAGGLE.encode("utf-16"), ["UTF-16"]),
    "latin-1": (KAGGLE.replace("Braund", "Bråund").encode("latin-1"), ["UTF-8", "line 2", "0xe5", "iconv"]),
    "open quote": (KAGGLE.replace('Harris"', "Harris").encode(), ["line 2", "quotes"]),
    "truncated Parquet": (PARQUET[: len(PARQUET) // 2], ["Parquet"]),
    "Parquet without a foot": (b"PAR1" + bytes(100), ["Parquet"]),
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        ["git lfs pull"],
    ),
    "damaged gzip": (gzip.compress(KAGGLE.encode())[:10] + b"\xff" * 30, ["gzip"]),
    "html": (b"<!doctype html><html><body>404</body></html>", []),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", ["mine.csv", "mine.parquet"])
def test_a_file_that_is_no_passenger_list(tmp_path: Path, kind: str, name: str):
    content, wanted = BAD[kind]
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(TitanicError) as caught:
        read(file, outcome=True)
    assert name in str(caught.value)
    for part in wanted:
        assert part in str(caught.value), str(caught.value)


def _kaggle(**columns: object) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(KAGGLE)).assign(**columns)


def test_a_parquet_is_read_with_the_index_that_has_a_name(tmp_path: Path):
    kinds = {"Sex": "category", "Pclass": "category", "Survived": "Int64"}
    ids = [7, 2, 9, 3]  # equal steps would make a range, of which Parquet keeps no column
    frame = pd.concat([_kaggle()] * 2).assign(PassengerId=ids)
    frame.astype(kinds).set_index("PassengerId").to_parquet(tmp_path / "mine.parquet")
    frame.to_csv(tmp_path / "mine.csv", index=False)
    frame = read(tmp_path / "mine.parquet").frame
    pd.testing.assert_frame_equal(frame, read(tmp_path / "mine.csv").frame)


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("Name", ["Braund", "Mr."], "column 'Name' is list"),
        ("Name", {"last": "Braund"}, "column 'Name' is struct"),
        ("Cabin", b"C85", "column 'Cabin' is binary"),
        ("Survived", True, "column 'Survived' is bool"),
        ("Age", datetime.date(1890, 1, 1), "column 'Age' is date32"),
        ("Fare", datetime.timedelta(days=7), "column 'Fare' is duration"),
    ],
)
def test_a_parquet_column_of_another_type_is_refused(tmp_path: Path, name: str, value: object, said: str):
    _kaggle(**{name: [value, value]}).to_parquet(tmp_path / "mine.parquet")
    with pytest.raises(SourceError, match=said) as caught:
        read(tmp_path / "mine.parquet")
    assert "convert it to" in str(caught.value) and "texts or numbers" in str(caught.value)


def test_numbers_and_texts_of_any_width_are_read(tmp_path: Path):
    table = pa.Table.from_pandas(_kaggle(Fare=[Decimal("7.25"), Decimal("71.28")], Ticket=[21171, 17599]))
    for name, kind in (("Pclass", pa.uint8()), ("Sex", pa.string_view()), ("Age", pa.float32())):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, table[name].cast(kind))
    pq.write_table(table, tmp_path / "mine.parquet")
    frame = read(tmp_path / "mine.parquet").frame
    assert frame["fare"].tolist() == [7.25, 71.28] and frame["ticket"].tolist() == ["21171", "17599"]
    assert frame["sex"].tolist() == ["male", "female"] and frame["pclass"].tolist() == [3, 1]


def test_a_parquet_text_that_is_no_unicode_is_named(tmp_path: Path):
    table = pa.Table.from_pandas(_kaggle(), preserve_index=False)
    raw = pa.array([b"Cumings", "Bråund".encode("latin-1")], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    for names in (texts, pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int32()), texts)):
        place = table.schema.get_field_index("Name")
        pq.write_table(table.set_column(place, "Name", names), tmp_path / "mine.parquet")
        with pytest.raises(SourceError, match="column 'Name' is not UTF-8: byte 0xe5") as caught:
            read(tmp_path / "mine.parquet")
        assert "row 2" in str(caught.value)


def test_the_outcome_is_needed_for_training_only(tmp_path: Path):
    file = tmp_path / "test.csv"
    file.write_text(KAGGLE.replace("Survived,", "").replace("1,0,3", "1,3").replace("2,1,1", "2,1"))
    assert len(read(file).frame) == 2
    with pytest.raises(ContractError, match="'Survived' is missing"):
        read(file, outcome=True)


def test_a_cell_that_can_not_be_typed_is_kept_with_its_place(tmp_path: Path):
    file = tmp_path / "mine.csv"
    file.write_text(KAGGLE.replace(",22,", ",old,") + "3,1,3,short\n")
    rows = read(file)
    assert len(rows.frame) == 1
    kept = rows.rejected.set_index("line")
    assert kept.loc[2, "column"] == "age" and kept.loc[2, "value"] == "old"
    assert 4 in kept.index and str(kept.loc[4, "source"]) == str(file)


# --- the same rows give the same name


@pytest.mark.parametrize("kind", ["csv", "semicolon", "tab", "bom", "crlf", "parquet", "shuffled"])
def test_a_snapshot_is_named_by_its_rows(tmp_path: Path, kind: str):
    frame = read(EMBEDDED).frame
    file = tmp_path / ("mine.parquet" if kind == "parquet" else "mine.csv")
    if kind == "parquet":
        frame.to_parquet(file)
    elif kind == "shuffled":
        frame.sample(frac=1, random_state=0).to_csv(file, index=False)
    else:
        delimiter = {"semicolon": ";", "tab": "\t"}.get(kind, ",")
        text = frame.to_csv(index=False, sep=delimiter, lineterminator="\r\n" if kind == "crlf" else "\n")
        file.write_text(text, encoding="utf-8-sig" if kind == "bom" else "utf-8", newline="")
    artifacts = Artifacts(str(tmp_path / "artifacts"))
    assert snapshot(read(file).frame, artifacts) == snapshot(frame, artifacts)
    changed = frame.copy()
    changed.loc[0, "age"] = 30.0
    assert snapshot(changed, artifacts).id != snapshot(frame, artifacts).id


def test_a_glob_is_read_in_order(tmp_path: Path):
    frame = read(EMBEDDED).frame
    for number in range(3):
        frame[number::3].to_csv(tmp_path / f"part-{number}.csv", index=False)
    rows = read(str(tmp_path / "part-*.csv"))
    artifacts = Artifacts(str(tmp_path / "artifacts"))
    assert snapshot(rows.frame, artifacts).id == snapshot(frame, artifacts).id
    assert rows.origin["source"].nunique() == 3 and rows.origin["line"].iloc[0] == 2


# --- servers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def process(command: list[str], port: int):
    "A server as a process of its own, until it is no longer needed."
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


def same_as_embedded(address: str, tmp_path: Path) -> None:
    artifacts = Artifacts(str(tmp_path / "artifacts"))
    assert snapshot(read(address).frame, artifacts).id == snapshot(read(EMBEDDED).frame, artifacts).id


@pytest.mark.long
def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import s3fs

    port = free_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    with process([str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(port)], port) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()
        files = s3fs.S3FileSystem()
        files.mkdir("ship")
        files.pipe("ship/lists/a.csv", LIST)
        same_as_embedded("s3://ship/lists/a.csv", tmp_path)
        assert len(read("s3://ship/lists/*.csv").frame) == 1309
        with pytest.raises(SourceError, match="not found"):
            read("s3://ship/lists/b.csv")
        with pytest.raises(SourceError, match="no file fits"):
            read("s3://ship/lists/*.parquet")
        frozen = snapshot(read(EMBEDDED).frame, Artifacts("s3://ship/artifacts"))
        assert files.exists(f"ship/artifacts/{frozen.artifact}") or files.glob("ship/artifacts/**")


@pytest.mark.long
def test_cloud_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import gcsfs

    port = free_port()
    command = [
        str(BIN / "gcp-storage-emulator"),
        "-d",
        str(tmp_path / "gcs"),
        "start",
        "--host=127.0.0.1",
        f"--port={port}",
    ]
    with process([*command, "--default-bucket=ship"], port) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        gcsfs.GCSFileSystem.clear_instance_cache()
        files = gcsfs.GCSFileSystem(token="anon")
        files.pipe("ship/lists/a.csv", LIST)
        same_as_embedded("gs://ship/lists/a.csv", tmp_path)
        with pytest.raises(SourceError, match="not found"):
            read("gs://ship/lists/b.csv")


class _Site(http.server.BaseHTTPRequestHandler):
    "A site with the list, and OpenML's API for data set 40945."

    def do_GET(self) -> None:
        host = f"http://{self.headers['Host']}"
        about = {
            "data_set_description": {
                "id": "40945",
                "url": f"{host}/titanic.arff",
                "format": "ARFF",
                "name": "Titanic",
            }
        }
        pages = {
            "/list.csv": LIST,
            "/api/v1/json/data/40945": json.dumps(about).encode(),
            "/titanic.arff": _arff(),
        }
        body = pages.get(self.path)
        self.send_response(
            200 if body is not None else 500 if "broken" in self.path else 412 if "api" in self.path else 404
        )
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body or b"")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def _arff() -> bytes:
    "The embedded list as OpenML serves it."
    import csv
    import io

    reader = csv.reader(io.StringIO(LIST.decode()))
    header = next(reader)
    nominal = {"survived": "{0,1}", "sex": "{female,male}", "embarked": "{C,Q,S}"}
    numeric = {"pclass", "age", "sibsp", "parch", "fare", "body"}
    lines = ["@RELATION Titanic", ""]
    lines += [f"@ATTRIBUTE {n} {nominal.get(n, 'NUMERIC' if n in numeric else 'STRING')}" for n in header]
    quote = lambda v, n: v if v == "?" or n in numeric or n in nominal else "'" + v.replace("'", "\\'") + "'"
    lines += [
        "",
        "@DATA",
        *(",".join(quote(v, n) for v, n in zip(row, header, strict=True)) for row in reader),
    ]
    return "\n".join(lines).encode()


@pytest.fixture
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_http(site: str, tmp_path: Path):
    same_as_embedded(f"{site}/list.csv", tmp_path)
    with pytest.raises(SourceError, match="not found"):
        read(f"{site}/none.csv")
    with pytest.raises(SourceError, match="can't be fetched"):
        read(f"http://127.0.0.1:{free_port()}/list.csv")


def test_openml(site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TITANIC_OPENML_URL", site)
    same_as_embedded("openml:40945", tmp_path)
    with pytest.raises(SourceError, match="no such data set"):
        read("openml:4")
    monkeypatch.setenv("TITANIC_OPENML_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(SourceError, match="can't be reached"):
        read("openml:40945")
    with pytest.raises(SourceError):
        read("openml:titanic")


def test_a_file_that_may_not_be_read(tmp_path: Path):
    file = tmp_path / "mine.csv"
    file.write_bytes(LIST)
    file.chmod(0)
    if os.geteuid() == 0:  # root may read everything: ask as nobody
        code = f"from titanic_mlops.data.sources import read; read({str(file)!r})"
        drop = "import os; os.setgid(65534); os.setuid(65534); "
        tmp_path.chmod(0o755)
        imports = "import titanic_mlops.data.sources, pandas; "
        done = subprocess.run(
            [sys.executable, "-c", imports + drop + code], capture_output=True, text=True, check=False
        )
        assert "no permission" in done.stderr, done.stderr
    else:
        with pytest.raises(SourceError, match="no permission"):
            read(file)


def test_pandas_types_are_those_of_the_contract():
    frame = read(EMBEDDED).frame
    assert len(frame) == 1309 and frame["survived"].sum() == 500
    assert frame["age"].isna().sum() == 263 and isinstance(frame, pd.DataFrame)
