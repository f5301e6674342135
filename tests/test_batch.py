"""What a notebook can't show of batch: features that three paths derive alike, real processes that are killed, buckets, full disks."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from checkout import BIN, NOT_FOR_SERVERS, ROOT, Checkout, checkout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_sources import free_port, process

from titanic_mlops.data.features import CATEGORICAL, DOUBTFUL, NUMERIC, feature_frame, features, title
from titanic_mlops.data.rowcheck import check_parquet, check_records, to_table
from titanic_mlops.data.sources import EMBEDDED, LAYOUTS, canonical, read
from titanic_mlops.data.strategies import anybody, passengers
from titanic_mlops.model.bundle import BundleInfo, Lineage, open_graph, require_parity, to_onnx, write_bundle
from titanic_mlops.model.train import KINDS, Candidate, fit
from titanic_mlops.serve import batch as scoring
from titanic_mlops.serve.columns import TOLERANCE, Encoder, _Titles, open_model

LISTED = canonical(read(EMBEDDED).frame)
KNOWN_BEFORE = LISTED.drop(columns=["survived", "boat", "body", "home_dest"])
ROWS = int(os.environ.get("CONTRACT_ROWS", 300))
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A logistic regression in a bundle."
    inputs = [*NUMERIC, *CATEGORICAL]
    info = BundleInfo(candidate="logistic", hyperparameters={}, calibration="none", inputs=inputs, split={}, figures={},
                      reference={})  # fmt: skip
    outcome, ticket = LISTED.survived.to_numpy(int), LISTED.ticket.to_numpy(str)
    graph = to_onnx(fit(Candidate("logistic"), feature_frame(LISTED), outcome, ticket))
    folder = tmp_path_factory.mktemp("bundle")
    write_bundle(
        folder, graph, info, Lineage(git_commit="0" * 40, snapshot="t", data_sha256="0" * 64, seed=0)
    )
    return folder


@pytest.fixture
def ship(tmp_path: Path, bundle: Path) -> Checkout:
    "The command line, in a folder with the list as Parquet."
    own = checkout(tmp_path)
    KNOWN_BEFORE.to_parquet(own.folder / "list.parquet", index=False)
    return own


def score(own: Checkout, bundle: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    return own.titanic("score", *arguments, "--bundle", str(bundle), **more)


# --- one definition, three paths


def same(one: object, other: object) -> bool:
    return one == other or (one != one and other != other)


@settings(max_examples=max(ROWS // 10, 10), deadline=None, suppress_health_check=SLOW)
@given(st.lists(passengers(("feature", "label")), min_size=1, max_size=20))
def test_features_of_dictionaries_frames_and_columns_are_the_same(records: list[dict]):
    table, refused = to_table(records)
    assert not refused
    [batch] = table.combine_chunks().to_batches()
    encoder = Encoder(with_deck=True)
    arrow = encoder.derive(encoder(batch))
    for order in (1, -1):  # names as codes, of one dictionary and then of another
        coded = pa.concat_batches([batch, batch]).take(pa.array(np.arange(2 * len(batch))[::order]))
        place, names = coded.schema.get_field_index("name"), coded["name"].dictionary_encode()
        for name, values in encoder.derive(encoder(coded.set_column(place, "name", names))).items():
            assert all(map(same, values[::order], [*arrow[name], *arrow[name]])), name
    frame = feature_frame(pd.DataFrame(table.to_pylist()))
    for row, record in enumerate(records):
        wanted = features(record)
        for name in (*NUMERIC, *CATEGORICAL, *DOUBTFUL):
            assert same(arrow[name][row], wanted[name]), (name, record)
            assert same(frame[name].iloc[row], wanted[name]), (name, record)


@settings(max_examples=ROWS, deadline=None)
@given(st.lists(st.text(st.sampled_from("., \tMrsthe éİ\u2003") | st.characters(codec="utf-8")), max_size=40))
def test_the_title_of_any_text(names: list[str]):
    titles = _Titles()
    assert [titles.known[code] for code in titles(pa.array(names, pa.string()))] == [
        title(one) for one in names
    ]


@settings(max_examples=max(ROWS // 10, 10), deadline=None, suppress_health_check=SLOW)
@given(st.data())
def test_probabilities_are_those_of_the_graph(bundle: Path, data: st.DataObject):
    records = data.draw(st.lists(passengers(("feature", "label")), min_size=1, max_size=20))
    model = _opened(bundle)
    [batch] = to_table(records)[0].combine_chunks().to_batches()
    assert np.abs(model.predict(batch) - model.model.many(records)).max() <= TOLERANCE
    assert model.by_terms


_MODELS: dict[Path, object] = {}


def _opened(bundle: Path):
    return _MODELS.setdefault(bundle, open_model(bundle))


@settings(max_examples=max(ROWS // 10, 10), deadline=None, suppress_health_check=SLOW)
@given(st.data())
def test_rows_are_rejected_for_what_the_contract_says(bundle: Path, data: st.DataObject):
    records = data.draw(st.lists(anybody(), min_size=1, max_size=10))
    table, refused = to_table(records)
    told = [scoring.Rejected(one.row + 1, one.column, one.rule, None) for one in refused]
    [batch] = table.combine_chunks().to_batches()
    probabilities, rejected = scoring.score_batch(_opened(bundle), batch, 0, told)
    broken = {
        name: rows
        for name, rows in check_records(records).broken.items()
        if name not in ("one_row_each", "home_dest")
    }
    wanted = {int(row) + 1 for rows in broken.values() for row in rows}
    unknown = {
        one.row for one in told if one.field == "home_dest"
    }  # of a rule that only warns, but no text at all
    assert {one.row for one in rejected} | unknown == wanted | unknown
    assert set(np.flatnonzero(np.isnan(probabilities)) + 1) == {one.row for one in rejected}


def test_a_rejected_number_reads_as_the_file_has_it(tmp_path: Path, bundle: Path):
    KNOWN_BEFORE.head(3).assign(age=["541", "22", "-0.5"]).to_csv(tmp_path / "list.csv", index=False)
    [rows] = scoring.open_rows(scoring.find_files(str(tmp_path / "list.csv"))[0][0])()
    rejected = scoring.score_batch(_opened(bundle), rows.batch)[1]
    assert [(one.row, one.field, one.value) for one in rejected] == [(1, "age", "541"), (3, "age", "-0.5")]


def written(bundle: Path, source: Path, *keep: str) -> tuple[pa.Table, list[dict]]:
    "The output for a file, and its rejections."
    model, target = _opened(bundle), source.parent / "scores" / "out.parquet"
    own = scoring.Settings(store=source.parent / "store")
    scoring.score(model, str(source), str(target), scoring.Task("1", model.digest, 0.5, keep), own)
    rejected = target.with_name("out.rejected.parquet")
    return pq.read_table(target), pq.read_table(rejected).to_pylist() if rejected.exists() else []


@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_a_missing_integer_stays_missing_where_a_file_has_floats(tmp_path: Path, bundle: Path, kind: str):
    frame = KNOWN_BEFORE.head(3)
    numbers = np.array([1, np.nan, 3], kind)
    frame.assign(passenger_id=numbers).to_parquet(tmp_path / "list.parquet", index=False)
    assert written(bundle, tmp_path / "list.parquet")[0]["passenger_id"].to_pylist() == [1, None, 3]


def test_a_bad_row_among_views_is_the_only_one_rejected(tmp_path: Path, bundle: Path):
    table = pa.Table.from_pandas(KNOWN_BEFORE.head(4).assign(age=[541, 22, 30, None]), preserve_index=False)
    views = pa.schema(
        [(f.name, pa.string_view() if f.type == pa.large_string() else f.type) for f in table.schema]
    )
    assert pa.string_view() in views.types
    pq.write_table(table, tmp_path / "plain.parquet")
    pq.write_table(table.cast(views), tmp_path / "list.parquet")
    scores, rejected = written(bundle, tmp_path / "list.parquet", "name", "sex")
    assert scores["row"].to_pylist() == [2, 3, 4] and [one["row"] for one in rejected] == [1]
    assert scores.equals(written(bundle, tmp_path / "plain.parquet", "name", "sex")[0])


@pytest.mark.parametrize("name", ["sex", "embarked", "name", "cabin", "ticket"])
def test_a_text_of_a_dictionary_that_is_no_unicode_costs_its_row_only(bundle: Path, name: str):
    table = pa.Table.from_pandas(KNOWN_BEFORE.head(4), preserve_index=False)
    values = pa.array([b"male", b"m\xe4nnlich"] if name == "sex" else [b"S", b"\xe4 Herr"]).cast(pa.binary())
    values = pa.Array.from_buffers(pa.string(), 2, values.buffers())
    cells = pa.DictionaryArray.from_arrays(pa.array([1, 0, 0, 0], pa.int32()), values)
    [batch] = table.set_column(table.schema.get_field_index(name), name, cells).combine_chunks().to_batches()
    probabilities, rejected = scoring.score_batch(_opened(bundle), batch)
    assert [(one.row, one.field) for one in rejected] == [(1, name)]
    assert np.isnan(probabilities).tolist() == [True, False, False, False]
    assert not np.isnan(scoring.score_batch(_opened(bundle), batch.slice(1))[0]).any()  # keeps the dictionary
    if name == "cabin":
        encoder = Encoder(with_deck=True)
        assert len(encoder.derive(encoder(batch.slice(1)))["deck"]) == 3


def test_a_key_that_is_no_unicode_is_a_rejected_row(tmp_path: Path, bundle: Path):
    good = KNOWN_BEFORE.head(2).to_json(orient="records", lines=True)
    (tmp_path / "list.ndjson").write_text(good + good.splitlines()[0].replace('"age"', '"\\ud83d"') + "\n")
    scores, rejected = written(bundle, tmp_path / "list.ndjson")
    assert scores["row"].to_pylist() == [1, 2]
    assert [(one["row"], one["field"]) for one in rejected] == [(3, "\\ud83d")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_lines_of_any_end(tmp_path: Path, bundle: Path, end: str, delimiter: str):
    text = (
        KNOWN_BEFORE.head(3).assign(age=[541, 22, 30]).to_csv(index=False, sep=delimiter, lineterminator=end)
    )
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbf" + (end + end + text).encode())
    scores, rejected = written(bundle, tmp_path / "list.csv")
    assert scores["row"].to_pylist() == [2, 3] and [one["row"] for one in rejected] == [1]
    assert len(read(tmp_path / "list.csv").frame) == 3


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda text: "   \n" + text,
            "no column of a passenger list",
        ),  # blanks are a header, as for the reader
        (lambda text: "\ufeff\n", "no column of a passenger list|is empty"),
        (lambda text: text.replace("name", '"na"me', 1), "the CSV can't be read"),
        (lambda text: "\n".join("\t" + line for line in text.splitlines()), "a column without a name"),
    ],
)
def test_a_header_that_is_none(tmp_path: Path, bundle: Path, change: object, said: str):
    text = change(KNOWN_BEFORE.head(3).to_csv(index=False, sep="\t"))
    (tmp_path / "list.tsv").write_text(text)
    with pytest.raises(scoring.TitanicError, match=said):
        written(bundle, tmp_path / "list.tsv")
    with pytest.raises(scoring.TitanicError, match=said):
        read(tmp_path / "list.tsv")


KAGGLE_NAMES = {target: name for name, target in LAYOUTS["kaggle"].items()}


def test_ndjson_with_the_names_of_kaggle(tmp_path: Path, bundle: Path):
    frame = KNOWN_BEFORE.head(4).assign(name=lambda one: one.name + "\u2028")
    records = frame.rename(columns=KAGGLE_NAMES).assign(PassengerId=range(7, 11)).to_dict("records")
    records = [{k: v for k, v in one.items() if v == v} for one in records]
    del records[0]["Age"], records[0]["PassengerId"]  # an object may lack what is missing
    records[2]["Shoes"] = 42
    records[3]["age"] = 30
    lines = [json.dumps(one, ensure_ascii=False, default=str) for one in records]
    (tmp_path / "list.ndjson").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    scores, rejected = written(bundle, tmp_path / "list.ndjson")
    assert scores["row"].to_pylist() == [1, 2] and scores["passenger_id"].to_pylist() == [None, 8]
    assert [(one["row"], one["field"]) for one in rejected] == [(3, "Shoes"), (4, "")]
    assert rejected[1]["rule"] == "a column is there once"


@pytest.mark.parametrize(
    "first, said",
    [({"a": 1}, "no column of a passenger list"), ({"Pclass": 3, "Sexx": "male"}, "did you mean 'Sex'")],
)
def test_ndjson_of_something_else_is_refused_as_a_whole(tmp_path: Path, bundle: Path, first: dict, said: str):
    (tmp_path / "list.ndjson").write_text(json.dumps(first) + "\n")
    with pytest.raises(scoring.TitanicError, match=said):
        written(bundle, tmp_path / "list.ndjson")


# --- categories that training did not see


@pytest.mark.parametrize("kind", KINDS)
def test_a_category_that_training_lacks_is_answered_as_the_twin_does(kind: str):
    training = LISTED[LISTED.embarked.notna() & (LISTED.cabin.str[:1] != "T").fillna(True)]
    outcome, ticket = training.survived.to_numpy(int), training.ticket.to_numpy(str)
    model = fit(Candidate(kind, with_deck=True), feature_frame(training), outcome, ticket)
    session = open_graph(to_onnx(model, with_deck=True))
    somebody = LISTED.head(5).assign(
        cabin=["T", "H7", "é", "c22", None], embarked=[None, None, "S", "C", None]
    )
    assert require_parity(session, model, feature_frame(somebody)) < 1e-6


# --- killed, and taken up again


@pytest.mark.long
def test_a_killed_run_goes_on_and_writes_the_same_bytes(ship: Checkout, bundle: Path):
    big = pa.concat_tables([pq.read_table(ship.folder / "list.parquet")] * 1200)  # 1.6 million rows, 6 parts
    pq.write_table(big, ship.folder / "big.parquet", row_group_size=200_000)
    whole = score(ship, bundle, "big.parquet", "whole.parquet", "--columns", "name")
    assert whole.returncode == 0, whole.stderr
    random, resumed = np.random.default_rng(1912), 0
    journal = ship.folder / ".killed.parquet.journal"
    for _ in range(3):
        running = ship.start(
            "score", "big.parquet", "killed.parquet", "--columns", "name", "--bundle", str(bundle)
        )
        size = journal.stat().st_size if journal.exists() else 0
        deadline = time.monotonic() + 60
        while running.poll() is None and time.monotonic() < deadline:
            if journal.exists() and journal.stat().st_size > size + 2000:
                break
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.1))
        running.send_signal(signal.SIGKILL)
        running.communicate()
        if not (ship.folder / "killed.parquet").exists():
            resumed += 1
    assert resumed  # at least one of them was killed before its end
    done = score(ship, bundle, "big.parquet", "killed.parquet", "--columns", "name")
    assert done.returncode == 0, done.stderr
    assert "in a run before" in done.stdout or "unchanged" in done.stdout
    assert (ship.folder / "killed.parquet").read_bytes() == (ship.folder / "whole.parquet").read_bytes()
    assert not [one.name for one in ship.folder.iterdir() if one.name.startswith(".")]


def test_once_is_enough_until_something_changes(ship: Checkout, bundle: Path):
    assert "unchanged" not in score(ship, bundle, "list.parquet", "out.csv").stdout
    assert "unchanged" in score(ship, bundle, "list.parquet", "out.csv").stdout
    assert "unchanged" not in score(ship, bundle, "list.parquet", "out.csv", "--threshold", "0.7").stdout
    KNOWN_BEFORE.head(1000).to_parquet(ship.folder / "list.parquet", index=False)
    done = score(ship, bundle, "list.parquet", "out.csv")
    assert "1000 of 1000" in done.stdout and "unchanged" not in done.stdout
    assert len(pd.read_csv(ship.folder / "out.csv")) == 1000
    record = json.loads((ship.folder / "out.csv.scored.json").read_text())
    assert record["rows"] == 1000 and record["of"]["digest"]


# --- what can't be done


def test_bad_input_is_one_clear_error(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    good = KNOWN_BEFORE.head(20)
    cases = {
        "no.parquet": (b"PAR1" + bytes(100), "can't be read"),
        "empty.csv": (b"", "the file is empty"),
        "header.csv": (b"name,sex,age,pclass,sibsp,parch,ticket,fare,cabin,embarked\n", "holds no rows"),
        "latin.csv": (good.to_csv(index=False).replace("Mr", "Mÿ").encode("latin-1"), "not UTF-8"),
        "sexx.csv": (good.rename(columns={"sex": "sexx"}).to_csv(index=False).encode(), "did you mean 'sex'"),
        "lacks.csv": (good.drop(columns="fare").to_csv(index=False).encode(), "'fare' is missing"),
        "quote.csv": (good.to_csv(index=False).encode() + b'1,"open', "the CSV can't be read"),
    }
    for name, (content, _) in cases.items():
        Path(name).write_bytes(content)
    good.head(0).to_parquet("none.parquet")
    good.assign(age="old").to_parquet("types.parquet")
    expected = {name: said for name, (_, said) in cases.items()}
    expected |= {"none.parquet": "holds no rows", "types.parquet": "column age is"}
    model, own = _opened(bundle), scoring.Settings(store=tmp_path / "store")
    for name, said in expected.items():
        with pytest.raises(scoring.TitanicError) as error:
            scoring.score(model, name, "out.parquet", scoring.Task("1", model.digest, 0.5), own)
        assert said in str(error.value) and name in str(error.value), (name, str(error.value))
        assert not Path("out.parquet").exists()
    assert not list(tmp_path.glob(".out*")), "partial files were left"


@pytest.mark.parametrize("name", ["out.csv", "out.rejected.csv", "out.csv.scored.json", "link.csv"])
def test_an_input_is_never_among_the_outputs(tmp_path: Path, bundle: Path, name: str):
    source, model = tmp_path / name, _opened(bundle)
    KNOWN_BEFORE.head(5).to_csv(tmp_path / name.replace("link", "out.rejected"), index=False)
    if name == "link.csv":
        source.symlink_to(tmp_path / "out.rejected.csv")
    own, before = scoring.Settings(store=tmp_path / "store"), source.read_bytes()
    with pytest.raises(scoring.ParameterError, match="are the same file"):
        task = scoring.Task("1", model.digest, 0.5)
        scoring.score(model, str(source), str(tmp_path / "out.csv"), task, own)
    assert source.read_bytes() == before


def test_one_bad_file_does_not_stop_the_others(ship: Checkout, bundle: Path):
    lists = ship.folder / "lists"
    (lists / "deep").mkdir(parents=True)
    KNOWN_BEFORE.to_csv(lists / "a.csv.gz", index=False)
    (lists / "b.parquet").write_bytes(b"PAR1, or not")
    (lists / "deep" / "c.ndjson").write_text(
        KNOWN_BEFORE.head(9).to_json(orient="records", lines=True) + '{"pclass": 4}\nno\n'
    )
    done = score(ship, bundle, "lists", "out/")
    assert done.returncode == 2 and "b.parquet" in done.stderr
    assert len(pq.read_table(ship.folder / "out" / "a.parquet")) == 1309
    assert len(pq.read_table(ship.folder / "out" / "deep" / "c.parquet")) == 9
    rejected = pq.read_table(ship.folder / "out" / "deep" / "c.rejected.parquet").to_pylist()
    assert {one["row"] for one in rejected} == {10, 11}
    assert {"row": 11, "field": "", "rule": "a line is one JSON object", "value": "no"} in rejected


def test_a_full_disk_keeps_what_is_done(ship: Checkout, bundle: Path):
    big = pa.concat_tables([pq.read_table(ship.folder / "list.parquet")] * 600)
    pq.write_table(big, ship.folder / "big.parquet")
    command = f"ulimit -f 2000; exec {BIN / 'titanic'} score big.parquet out.parquet --bundle {bundle}"  # of 1,024 bytes
    full = subprocess.run(["bash", "-c", command], cwd=ship.folder, env=ship.environment(), capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert full.returncode == 2, full.stdout + full.stderr
    assert "full" in full.stderr and "the same command again" in full.stderr
    assert not (ship.folder / "out.parquet").exists()
    done = score(ship, bundle, "big.parquet", "out.parquet")
    assert done.returncode == 0 and "in a run before" in done.stdout, done.stdout + done.stderr
    assert len(pq.read_table(ship.folder / "out.parquet")) == len(big)


def test_the_champion_of_a_store_without_mlflow_in_the_process(bundle: Path):
    code = "import sys, titanic_mlops.serve.batch; print(*sys.modules)"
    done = subprocess.run(
        [str(BIN / "python"), "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not {*NOT_FOR_SERVERS, "fastcore"} & set(done.stdout.split())


def test_a_file_is_never_in_memory_as_a_whole(tmp_path: Path):
    rows, group = 1_200_000, 100_000
    name = pc.utf8_lpad(pa.array(np.arange(rows)).cast(pa.string()), 40)
    filler = dict(pclass=3, sex="male", sibsp=0, parch=0, ticket="1")
    columns = {"name": name, **{k: pa.repeat(v, rows) for k, v in filler.items()}}
    columns["age"] = columns["fare"] = pa.array(np.random.default_rng(1).uniform(1, 80, rows))
    columns["embarked"], columns["cabin"] = pa.repeat("S", rows), pa.nulls(rows, pa.string())
    file = tmp_path / "list.parquet"
    pq.write_table(pa.table(columns), file, row_group_size=group, compression="NONE", use_dictionary=False)
    del name, columns
    [found], _ = scoring.find_files(str(file))
    before, most, seen = pa.total_allocated_bytes(), 0, 0
    for some in scoring.open_rows(found)():
        seen += len(some.batch)
        most = max(most, pa.total_allocated_bytes() - before)
    assert seen == rows and most < file.stat().st_size / 2, f"{most / 1e6:.0f} MB"


# --- buckets


@pytest.mark.long
def test_s3(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch):
    import s3fs

    port = free_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "a")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with process([str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(port)], port) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()
        bucket = s3fs.S3FileSystem()
        bucket.mkdir("ship")
        _through_a_bucket(bucket, "s3", bundle, tmp_path)


@pytest.mark.long
def test_cloud_storage(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch):
    import gcsfs

    port = free_port()
    start = [
        "-d",
        str(tmp_path / "gcs"),
        "start",
        "--host=127.0.0.1",
        f"--port={port}",
        "--default-bucket=ship",
    ]
    with process([str(BIN / "gcp-storage-emulator"), *start], port) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        gcsfs.GCSFileSystem.clear_instance_cache()
        _through_a_bucket(gcsfs.GCSFileSystem(token="anon"), "gs", bundle, tmp_path)


def _through_a_bucket(bucket, protocol: str, bundle: Path, tmp_path: Path) -> None:
    bucket.pipe("ship/lists/a.parquet", KNOWN_BEFORE.to_parquet(index=False))
    bucket.pipe("ship/lists/b.csv", KNOWN_BEFORE.head(50).to_csv(index=False).encode())
    model, own = _opened(bundle), scoring.Settings(store=tmp_path / "store")
    task = scoring.Task("1", model.digest, 0.5)
    first = scoring.score(model, f"{protocol}://ship/lists/*", f"{protocol}://ship/out/", task, own)
    assert [(one.rows, one.recalled) for one in first] == [(1309, False), (50, False)]
    bucket.invalidate_cache()
    with bucket.open("ship/out/a.parquet") as file:
        assert pq.read_table(file).num_rows == 1309
    again = scoring.score(model, f"{protocol}://ship/lists/*", f"{protocol}://ship/out/", task, own)
    assert [one.recalled for one in again] == [True, True]
    assert not list((tmp_path / "store" / "scoring").iterdir())


def test_no_output_is_the_list_of_anothers_rejected_rows():
    from titanic_mlops.ground.errors import ParameterError
    from titanic_mlops.serve.batch import File, outputs_of

    files = [File(name, None, f"in/{name}") for name in ("a.csv", "a.rejected.csv")]
    with pytest.raises(ParameterError, match="the same output"):
        outputs_of(files, "in", "out", "csv")
    assert outputs_of(files[:1], "in", "out", "csv") == ["out/a.csv"]


def test_a_file_that_no_run_has_made_is_not_replaced(ship: Checkout, bundle: Path):
    folder = ship.folder / "mine"
    folder.mkdir()
    pq.write_table(pq.read_table(ship.folder / "list.parquet"), folder / "a.parquet")
    shutil.copy(folder / "a.parquet", ship.folder / "a.pq")
    before = (folder / "a.parquet").read_bytes()
    done = score(ship, bundle, "a.pq", "mine/")
    assert done.returncode == 2 and "not scored by this" in done.stderr
    assert (folder / "a.parquet").read_bytes() == before
    inside = score(ship, bundle, "mine", "mine/")
    assert inside.returncode == 2 and "in the folder of the outputs" in inside.stderr
    (folder / "a.parquet").unlink()
    assert score(ship, bundle, "a.pq", "mine/").returncode == 0
    assert score(ship, bundle, "a.pq", "mine/", "--force").returncode == 0  # its own may be replaced
    assert score(ship, bundle, "a.pq", "-").returncode == 2 and not (ship.folder / "-").exists()


def test_decimals_are_numbers(ship: Checkout, bundle: Path):
    table = pq.read_table(ship.folder / "list.parquet")
    fares = pc.round(table["fare"].cast(pa.float64()), 2)
    for name, cells in (("float", fares), ("decimal", fares.cast(pa.decimal128(9, 2)))):
        place = table.schema.get_field_index("fare")
        pq.write_table(table.set_column(place, "fare", cells), ship.folder / f"{name}.parquet")
        assert score(ship, bundle, f"{name}.parquet", f"{name}.out.parquet").returncode == 0
        assert check_parquet(ship.folder / f"{name}.parquet").passed
    read = lambda name: pq.read_table(ship.folder / f"{name}.out.parquet")["probability"]
    assert read("float").equals(read("decimal"))
