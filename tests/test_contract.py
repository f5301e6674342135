"""One contract, every target: the same verdict on made-up passengers, good and bad, and messages that name field and rule.

CONTRACT_ROWS sets how many are made up.
"""

import json
import math
import os
import re
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkout import BIN, ROOT
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from titanic_mlops.data import contract_versions as versions
from titanic_mlops.data import quality
from titanic_mlops.data.contract import (
    ROW_RULES,
    Implies,
    Passenger,
    Unique,
    columns,
    expectation_suite,
    feature_columns,
    pandera_schema,
)
from titanic_mlops.data.rowcheck import (
    check_batches,
    check_parquet,
    check_records,
    check_table,
    rule_texts,
    to_table,
)
from titanic_mlops.data.sources import EMBEDDED, read
from titanic_mlops.data.strategies import anybody, offenders, passengers
from titanic_mlops.data.targets import (
    REQUEST_ROLES,
    arrow_schema,
    create_table,
    json_schema,
    mlflow_signature,
    problems,
    reason,
    request_model,
)
from titanic_mlops.ground.errors import ContractError, SourceError

ROWS = int(os.environ.get("CONTRACT_ROWS", "1500"))
TEXTS = rule_texts()
KNOWN = {c.name: c for c in columns()}
PAIRS = [rule.name for rule in ROW_RULES if isinstance(rule, Implies)]
UNIQUE = [rule.name for rule in ROW_RULES if isinstance(rule, Unique)]
DEAN = {"pclass": 3, "name": "Dean, Miss. M.", "sex": "female", "sibsp": 1, "parch": 2, "ticket": "2315"}
Record = dict[str, Any]


# --- the crowd


@pytest.fixture(scope="module")
def crowd() -> list[Record]:
    "Half of it keeps the contract or breaks one rule, half of it may break any."
    found: list[Record] = []
    everybody = st.one_of(
        passengers(), anybody(), anybody(), st.sampled_from([*KNOWN, *PAIRS]).flatmap(offenders)
    )

    @given(everybody)
    @settings(
        max_examples=ROWS,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    def collect(record: Record) -> None:
        found.append(record)

    collect()
    assert len(found) >= ROWS / 2
    return found


@pytest.fixture(scope="module")
def verdicts(crowd: list[Record]) -> list[set[str]]:
    "The rules that each record of the crowd breaks, says `Passenger`."
    return [by_pydantic(Passenger, record) for record in crowd]


@pytest.fixture(scope="module")
def typed(crowd: list[Record]) -> tuple[pa.Table, list[int]]:
    "The records that fit into typed columns, as a table, and their numbers in the crowd."
    table, refused = to_table(crowd)
    outside = {one.row for one in refused}
    inside = [number for number in range(len(crowd)) if number not in outside]
    return table.take(pa.array(inside, pa.int64())), inside


def by_pydantic(model: type[BaseModel], record: Record) -> set[str]:
    try:
        model(**record)
    except ValidationError as error:
        found = problems(error)
        for one in found:
            assert one.reason and one.rule
            assert one.name == "columns" or TEXTS[one.name] in str(one), f"{one} does not name its rule"
            assert one.column in str(one), f"{one} does not name its field"
        return {one.name for one in found}
    return set()


def comparable(rules: set[str]) -> set[str]:
    "Pydantic looks at rules over several fields once each field is right; so do we when we compare."
    own = rules - set(PAIRS) - set(UNIQUE)
    return own or rules - set(UNIQUE)


def agree(crowd: list[Record], wanted: list[set[str]], found: list[set[str]], target: str) -> None:
    "Fail with the first records on which a target says something else."
    odd = [n for n, (w, f) in enumerate(zip(wanted, found, strict=True)) if comparable(w) != comparable(f)]
    said = [f"{crowd[n]!r}\n  Passenger: {sorted(wanted[n])}, {target}: {sorted(found[n])}" for n in odd[:3]]
    assert not odd, f"{len(odd)} of {len(crowd)} verdicts differ, such as\n" + "\n".join(said)


def test_the_crowd_is_mixed(crowd: list[Record], verdicts: list[set[str]]):
    broken = set().union(*verdicts)
    assert broken == {*KNOWN, *PAIRS, "columns"}, "a rule that nobody breaks is not tested"
    good = sum(not rules for rules in verdicts)
    assert 0.1 < good / len(crowd) < 0.9
    print(f"{len(crowd)} records, {good} of them good, {sum(map(len, verdicts))} breaches")


# --- targets that judge records


def test_json_schema(crowd: list[Record], verdicts: list[set[str]]):
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(json_schema())
    validator = Draft202012Validator(json_schema())

    def judge(record: Record) -> set[str]:
        # NaN and Infinity are Python's; JSON has no such number, nor is it a text
        value = json.loads(json.dumps(record), parse_constant=lambda name: {"no JSON": name})
        found = set()
        for error in validator.iter_errors(value):
            if error.validator == "required":
                found.add(next(name for name in KNOWN if f"'{name}'" in error.message))
            elif error.validator == "additionalProperties":
                found.add("columns")
            elif "allOf" in error.schema_path:
                found.add(PAIRS[list(error.schema_path)[1]])
            else:
                found.add(str(error.path[0]))
        return found

    agree(crowd, verdicts, [judge(record) for record in crowd], "JSON Schema")


def test_pydantic_on_json_text(crowd: list[Record], verdicts: list[set[str]]):
    found = []
    for record in crowd:
        try:
            Passenger.model_validate_json(json.dumps(record))
            found.append(True)
        except ValidationError:
            found.append(False)
    odd = [n for n, good in enumerate(found) if good == bool(verdicts[n])]
    assert not odd, crowd[odd[0]]


def test_request_model(crowd: list[Record], verdicts: list[set[str]]):
    asked = {name for name, column in KNOWN.items() if column.role in REQUEST_ROLES}
    requests = [{k: v for k, v in record.items() if k in asked or k not in KNOWN} for record in crowd]
    wanted = [rules & {*asked, "columns"} for rules in verdicts]
    found = [by_pydantic(request_model(), request) for request in requests]
    agree(requests, wanted, found, "request model")


@pytest.mark.parametrize("name", [c.name for c in columns() if c.role not in REQUEST_ROLES])
def test_a_request_tells_no_outcome(name: str):
    assert by_pydantic(request_model(), DEAN | {name: None}) == {"columns"}


def test_reasons(crowd: list[Record], verdicts: list[set[str]]):
    found = []
    for record in crowd:
        bad = {name for name, column in KNOWN.items() if reason(column, record.get(name))}
        found.append(bad | ({"columns"} if record.keys() - KNOWN.keys() else set()))
    wanted = [rules - set(PAIRS) for rules in verdicts]
    agree(crowd, wanted, found, "reason")


def by_rows(findings: Any, size: int) -> list[set[str]]:
    found: list[set[str]] = [set() for _ in range(size)]
    for rule, numbers in findings.broken.items():
        for number in numbers:
            found[number].add(rule)
    return found


def test_rowcheck(crowd: list[Record], verdicts: list[set[str]]):
    agree(crowd, verdicts, by_rows(check_records(crowd), len(crowd)), "row checker")


@given(anybody())
@settings(max_examples=100, derandomize=True, database=None, deadline=None)
def test_the_simplest_disagreement(record: Record):
    # Few records, but Hypothesis shrinks what it finds.
    wanted, found = by_pydantic(Passenger, record), set(check_records([record]).broken)
    assert comparable(wanted) == comparable(found)


# --- targets that judge typed columns


def test_the_door_refuses_what_passenger_refuses(crowd: list[Record], verdicts: list[set[str]]):
    _, refused = to_table(crowd)
    assert refused
    for one in refused:
        rule = one.column if one.column in KNOWN else "columns"
        assert rule in verdicts[one.row], f"{one} was refused, and Passenger takes {crowd[one.row]}"
        assert one.reason and one.rule


def frame_of(table: pa.Table) -> pd.DataFrame:
    return table.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)


def pandera_cases(frame: pd.DataFrame) -> pd.DataFrame:
    import pandera.pandas as pandera

    with pytest.raises(pandera.errors.SchemaErrors) as caught:
        pandera_schema(frame.columns).validate(frame, lazy=True)
    return caught.value.failure_cases


def test_pandera_and_arrow(crowd: list[Record], verdicts: list[set[str]], typed: tuple[pa.Table, list[int]]):
    table, numbers = typed
    by_text = {text: name for name, text in TEXTS.items()}
    found: list[set[str]] = [set() for _ in numbers]
    cases = pandera_cases(frame_of(table))
    for _, case in cases.iterrows():
        missing = case["check"] == "not_nullable"
        found[int(case["index"])].add(case["column"] if missing else by_text[case["check"]])
    agree([crowd[n] for n in numbers], [verdicts[n] for n in numbers], found, "Pandera")
    assert by_rows(check_table(table), len(table)) == found, "with the copies that `Unique` finds"


def test_parquet(typed: tuple[pa.Table, list[int]], tmp_path: Path):
    table, _ = typed
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=97)
    wanted = by_rows(check_table(table), len(table))
    for size in (1, 64, 100_000):
        assert by_rows(check_parquet(tmp_path / "rows.parquet", size), len(table)) == wanted
    kept = [n for n, rules in enumerate(wanted) if not rules]
    good = table.take(pa.array(kept, pa.int64())).cast(arrow_schema())
    pq.write_table(good, tmp_path / "good.parquet")
    assert check_parquet(tmp_path / "good.parquet").passed
    assert pq.read_schema(tmp_path / "good.parquet").field("age").metadata[b"unit"] == b"years"


@pytest.mark.parametrize("alike", ["numbers", "few", "long", "one"])
@pytest.mark.parametrize("coded", [False, True])
def test_copies_are_found_wherever_they_stand(alike: str, coded: bool):
    random = np.random.default_rng(1912)
    rows = 70_000  # on the way the slots of the checker grow
    number = random.integers(0, {"numbers": rows, "few": 300, "long": rows, "one": 1}[alike], rows)
    before = "é" * 40 if alike == "long" else ""  # alike at both ends
    text = pd.Series(number).astype("str")
    named = before + text + (before or random.choice(["", "a", " b"], rows))
    table = pa.table(
        {
            "pclass": np.full(rows, 3),
            "name": pa.array(named, pa.string()),
            "sex": pa.array(["male"] * rows),
            "sibsp": np.zeros(rows, int),
            "parch": np.zeros(rows, int),
            "ticket": pa.array(pd.Series(random.choice(["1", "2", None], rows), dtype=object), pa.string()),
        }
    )
    for column in columns():
        if column.name not in table.column_names and not column.may_be_absent:
            table = table.append_column(column.name, pa.nulls(rows))
    if coded:
        table = table.set_column(5, "ticket", table["ticket"].dictionary_encode())
    ends = np.sort(random.choice(rows, 9, replace=False))
    batches = [
        batch
        for first, last in zip([0, *ends], [*ends, rows], strict=True)
        for batch in table.slice(first, last - first).to_batches()
    ]
    found = check_batches(table.schema, batches).broken["one_row_each"]
    copies = table.select(["name", "ticket"]).to_pandas().duplicated()
    assert found.tolist() == np.flatnonzero(copies).tolist()


@pytest.mark.parametrize("name", [c.name for c in columns() if not c.nullable])
def test_arrow_schema_says_what_may_not_be_missing(name: str, tmp_path: Path):
    table, _ = to_table([DEAN | {name: None}])
    with pytest.raises((pa.ArrowInvalid, ValueError), match=name):
        pq.write_table(table.cast(arrow_schema()), tmp_path / "rows.parquet")


def test_sql(crowd: list[Record], verdicts: list[set[str]], typed: tuple[pa.Table, list[int]]):
    table, numbers = typed
    database = sqlite3.connect(":memory:", isolation_level=None)
    database.execute(create_table())
    marks = ", ".join("?" * table.num_columns)
    for number, row in zip(numbers, zip(*table.to_pydict().values(), strict=True), strict=True):
        database.execute("BEGIN")
        try:
            database.execute(f"INSERT INTO passengers VALUES ({marks})", row)
            said = ""
        except sqlite3.IntegrityError as error:
            said = str(error)
        database.execute("ROLLBACK")
        assert bool(said) == bool(verdicts[number]), f"{crowd[number]}: {said or 'inserted'}"
        names = [name for name in verdicts[number] if said.endswith((TEXTS[name], f"passengers.{name}"))]
        assert names or not said, f"{said!r} names none of {verdicts[number]}"


def test_sql_keeps_copies_out():
    database = sqlite3.connect(":memory:")
    database.execute(create_table())
    insert = f"INSERT INTO passengers ({', '.join(DEAN)}) VALUES ({', '.join('?' * len(DEAN))})"
    database.execute(insert, tuple(DEAN.values()))
    with pytest.raises(sqlite3.IntegrityError, match=r"name.*ticket"):
        database.execute(insert, tuple(DEAN.values()))
    for rule in TEXTS.values():
        assert f'"{rule}"' in create_table("postgresql")


@pytest.mark.long
def test_great_expectations(
    crowd: list[Record], verdicts: list[set[str]], typed: tuple[pa.Table, list[int]], monkeypatch
):
    monkeypatch.setenv("GX_ANALYTICS_ENABLED", "False")
    import great_expectations as gx

    table, numbers = typed
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    asset = context.data_sources.add_pandas("passengers").add_dataframe_asset("crowd")
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": frame_of(table)})
    suite = context.suites.add(expectation_suite())
    found: list[set[str]] = [set() for _ in numbers]
    for result in batch.validate(suite, result_format={"result_format": "COMPLETE"}).results:
        config = result.expectation_config
        if "column" not in config.kwargs or "mostly" in config.kwargs or "aggregate" in config.type:
            continue
        name = PAIRS[0] if config.kwargs.get("row_condition") else config.kwargs["column"]
        for index in result.result.get("unexpected_index_list") or ():
            found[int(index)].add(name)
    agree([crowd[n] for n in numbers], [verdicts[n] for n in numbers], found, "Great Expectations")


@pytest.mark.long
def test_mlflow_signature(crowd: list[Record], typed: tuple[pa.Table, list[int]]):
    from mlflow.exceptions import MlflowException
    from mlflow.models.utils import _enforce_schema

    schema = mlflow_signature().inputs
    assert tuple(schema.input_names()) == feature_columns()
    table, _ = typed
    kept = [n for n, rules in enumerate(by_rows(check_table(table), len(table))) if not rules]
    good = frame_of(table.take(pa.array(kept, pa.int64())))[list(feature_columns())]
    good = good.astype({c: "int64" for c in good if KNOWN[c].kind == "int"})
    assert len(_enforce_schema(good, schema)) == len(kept)
    for name in feature_columns():
        column = KNOWN[name]
        with pytest.raises(MlflowException, match=name):
            wrong = 3 if column.kind == "str" else "3"
            _enforce_schema(good.head(5).assign(**{name: [wrong] * 5}), schema)
        if not column.nullable:
            with pytest.raises(MlflowException, match=name):
                _enforce_schema(good.drop(columns=name), schema)


# --- look-alikes as columns


def look_alike(kind: str) -> list[pa.Array]:
    texts, flags = pa.array(["1", "2", "3"]), pa.array([True, False, True])
    return [flags, texts] if kind != "str" else [flags, pa.array([1, 2, 3]), pa.array([1.0, 2.0, 3.0])]


@pytest.mark.parametrize("name", KNOWN)
def test_a_column_of_look_alikes_is_refused(name: str):
    import pandera.pandas as pandera

    table, _ = to_table([DEAN | {"ticket": str(n)} for n in range(3)])
    for wrong in look_alike(KNOWN[name].kind):
        other = table.set_column(table.schema.get_field_index(name), name, wrong)
        with pytest.raises(ContractError, match=f"column {name} is {wrong.type}"):
            check_table(other)
        frame = frame_of(table).assign(**{name: wrong.to_pandas()})
        with pytest.raises(ContractError, match=f"column {name} has type"):
            quality.check_rows(frame)
        with pytest.raises(pandera.errors.SchemaErrors) as caught:
            pandera_schema(frame.columns).validate(frame, lazy=True)
        cases = caught.value.failure_cases
        assert name in set(cases["column"]), "the message does not name the column"


def test_columns_of_other_widths_are_welcome():
    table, _ = to_table(
        [DEAN | {"ticket": str(n), "age": 3, "sex": "x" if n == 1 else "male"} for n in range(3)]
    )
    for name, kind in (
        ("pclass", pa.int8()),
        ("pclass", pa.float32()),
        ("sibsp", pa.uint16()),
        ("age", pa.int64()),
        ("age", pa.float32()),
        ("name", pa.large_string()),
        ("name", pa.string_view()),
        ("sex", pa.dictionary(pa.int8(), pa.string())),
        ("name", pa.dictionary(pa.int32(), pa.large_string())),
        ("cabin", pa.null()),
    ):
        place = table.schema.get_field_index(name)
        other = table.set_column(place, name, table[name].cast(kind) if kind != pa.null() else pa.nulls(3))
        assert {k: v.tolist() for k, v in check_table(other).broken.items()} == {"sex": [1]}, (name, kind)


def test_a_float_column_of_whole_numbers():
    table, _ = to_table([DEAN | {"ticket": str(n)} for n in range(4)])
    wrong = pa.array([1.0, 2.5, math.nan, math.inf])
    found = check_table(table.set_column(table.schema.get_field_index("pclass"), "pclass", wrong))
    assert found.broken["pclass"].tolist() == [1, 2, 3]  # NaN is missing, and may not be
    found = check_table(table.set_column(table.schema.get_field_index("body"), "body", wrong))
    assert found.broken["body"].tolist() == [1, 3]


def test_bytes_that_are_no_text():
    table, _ = to_table([DEAN | {"ticket": str(n)} for n in range(3)])
    offsets, content = pa.py_buffer(b"\0\0\0\0\1\0\0\0\4\0\0\0\5\0\0\0"), pa.py_buffer(b"a\xed\xa0\x80b")
    names = pa.Array.from_buffers(pa.string(), 3, [None, offsets, content])
    found = check_table(table.set_column(table.schema.get_field_index("name"), "name", names))
    assert found.broken["name"].tolist() == [1]
    assert found.examples["name"] == (1, "\udced\udca0\udc80")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100), b"a,b\n1,2\n"])
def test_a_file_that_is_no_parquet(tmp_path: Path, content: bytes):
    file = tmp_path / "rows.parquet"
    file.write_bytes(content)
    with pytest.raises(SourceError, match=r"rows\.parquet"):
        check_parquet(file)
    with pytest.raises(SourceError):
        check_parquet(tmp_path / "not_there.parquet")


def test_keys_that_look_alike_are_no_copies():
    long = "Passenger {} of the Titanic, from Southampton to New York, third class"
    records = [DEAN | {"name": long.format(n % 10), "ticket": str(n // 10)} for n in range(100)]
    assert check_records(records).passed
    copies = check_records([*records, records[7], records[7], DEAN | {"ticket": "2"}])
    assert copies.broken["one_row_each"].tolist() == [100, 101]


# --- the data gate


def broken_frame(typed: tuple[pa.Table, list[int]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    frame = frame_of(typed[0])
    frame.index = range(1000, 1000 + len(frame))
    origin = pd.DataFrame({"source": "crowd", "line": range(len(frame))}, index=frame.index)
    return frame, origin


_ENCRYPTED = """
import base64, sys
import pyarrow as pa, pyarrow.parquet as pq, pyarrow.parquet.encryption as pe
from titanic_mlops.data.rowcheck import check_parquet
from titanic_mlops.ground.errors import SourceError
from titanic_mlops.serve.batch import find_files, open_rows

class Keys(pe.KmsClient):
    def __init__(self, _): super().__init__()
    def wrap_key(self, key, _): return base64.b64encode(key)
    def unwrap_key(self, key, _): return base64.b64decode(key)

how = pe.EncryptionConfiguration(footer_key="f", column_keys={"k": ["name"]}, plaintext_footer=True)
how = pe.CryptoFactory(Keys).file_encryption_properties(pe.KmsConnectionConfig(), how)
table = pa.table({"name": ["Dean, Miss. Millvina"], "age": [0.2]})
with pq.ParquetWriter(sys.argv[1], table.schema, encryption_properties=how) as file:
    file.write_table(table)
for use in (check_parquet, lambda path: open_rows(find_files(path)[0][0])):
    try:
        use(sys.argv[1])
    except SourceError as error:
        print(error)
"""


def test_an_encrypted_column_is_an_error_and_not_the_end_of_the_process(tmp_path: Path):
    pytest.importorskip("pyarrow.parquet.encryption")
    command = [sys.executable, "-c", _ENCRYPTED, str(tmp_path / "list.parquet")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("the Parquet file can't be read: Cannot decrypt")) == (0, 2), (
        done
    )


def test_check_rows_says_what_pandera_says(typed: tuple[pa.Table, list[int]]):
    frame, _ = broken_frame(typed)
    cases = pandera_cases(frame)
    wide = cases["schema_context"] == "DataFrameSchema"
    wanted = pd.DataFrame(
        {
            "index": cases["index"].astype("int64"),
            "column": cases["column"].where(~wide, ""),
            "value": cases["failure_case"].where(~wide, "").astype(str),
            "rule": cases["check"].where(cases["check"] != "not_nullable", cases["column"].map(TEXTS)),
        }
    ).drop_duplicates(["index", "column", "rule"])
    key = ["index", "column", "rule"]
    found = quality.check_rows(frame)
    pd.testing.assert_frame_equal(
        found.sort_values(key, ignore_index=True),
        wanted.sort_values(key, ignore_index=True),
        check_dtype=False,
    )


@pytest.mark.parametrize("severity", ["stop", "quarantine", "warn"])
def test_the_gate_obeys_the_severity_of_a_row_rule(severity: str, monkeypatch: pytest.MonkeyPatch):
    rows = read(EMBEDDED)
    frame = rows.frame.copy()
    lived = frame.index[frame["survived"] == 1][0]
    frame.loc[lived, "body"] = 7
    rules = tuple(replace(r, severity=severity) if r.name == PAIRS[0] else r for r in ROW_RULES)
    monkeypatch.setattr(quality, "ROW_RULES", rules)
    verdict = quality.judge(frame, rows.origin)
    set_aside = severity != "warn"
    assert verdict.passed == (severity != "stop")
    assert (len(verdict.accepted), len(verdict.quarantined)) == (1309 - set_aside, int(set_aside))
    assert len(verdict.warned) == (severity == "warn")
    assert verdict.summary()[severity] == {TEXTS[PAIRS[0]]: 1}
    if severity == "stop":
        with pytest.raises(ContractError, match="severity: stop"):
            verdict.require()
    else:
        verdict.require()


@pytest.mark.parametrize("severity", ["stop", "warn"])
def test_the_gate_obeys_the_severity_of_a_table_rule(severity: str, monkeypatch: pytest.MonkeyPatch):
    from titanic_mlops.data import contract

    rows = read(EMBEDDED)
    few, origin = rows.frame.head(50), rows.origin.head(50)
    rules = tuple(
        replace(r, severity=severity) if r.name == "enough_rows" else r for r in contract.TABLE_RULES
    )
    monkeypatch.setattr(contract, "TABLE_RULES", rules)
    verdict = quality.judge(
        few.assign(survived=pd.array([0, 1] * 25, dtype="Int64"), body=pd.NA).astype({"body": "Int64"}),
        origin,
    )
    assert verdict.passed == (severity == "warn")
    assert "enough_rows" in verdict._repr_markdown_()


@pytest.mark.parametrize("unknown", [1, 3, 1309])
def test_the_gate_sets_rows_without_an_outcome_aside(unknown: int):
    rows = read(EMBEDDED)
    frame = rows.frame.copy()
    frame.loc[frame.index[:unknown], "survived"] = pd.NA
    verdict = quality.judge(frame, rows.origin)
    assert (verdict.set_aside, len(verdict.accepted)) == (unknown, 1309 - unknown)
    assert verdict.passed == (unknown < 1309)
    assert verdict.accepted["survived"].notna().all()
    assert verdict.quarantined[["line", "column"]].iloc[0].tolist() == [2, "survived"]
    if unknown == 1309:
        with pytest.raises(ContractError, match="1309 of 1309 rows"):
            verdict.require()
    assert quality.judge(frame.drop(columns="survived"), rows.origin).set_aside == 0


# --- versions


def test_the_published_contract_is_this_one():
    found = versions.diff(versions.load("published"), versions.document())
    assert not found.changes and found.old == found.new, (
        f"the contract was changed: {'; '.join(map(str, found.changes))}; give it version {found.needs}, then: "
        "titanic contract show json -o titanic_mlops/data/contract.json"
    )


def changed(**facts: Any) -> dict[str, Any]:
    "The contract with other facts about `fare`, or about the column that is named."
    contract = versions.document()
    name = facts.pop("of", "fare")
    next(c for c in contract["columns"] if c["name"] == name).update(facts)
    return contract


@pytest.mark.parametrize(
    ("facts", "breaks", "serves"),
    [
        ({"high": 2000}, "readers", False),
        ({"high": 500}, "writers", False),
        ({"high": None}, "readers", False),
        ({"low": 5, "high": 2000}, "both", False),
        ({"unit": "pence of 1912"}, "both", False),
        ({"kind": "str"}, "both", False),
        ({"kind": "int"}, "writers", False),
        ({"nullable": False}, "writers", False),
        ({"role": "reveals_outcome"}, "both", False),
        ({"meaning": "what the ticket cost"}, "nobody", True),
        ({"severity": "stop"}, "writers", True),
        ({"severity": "warn"}, "readers", True),
        ({"of": "sex", "choices": ["female", "male", "other"]}, "readers", False),
        ({"of": "sex", "choices": ["female"]}, "writers", False),
        ({"of": "sex", "nullable": True}, "readers", False),
        ({"of": "name", "max_length": 100}, "writers", False),
        ({"of": "name", "plain_text": False}, "readers", False),
        ({"of": "body", "high": 500}, "readers", True),
        ({"of": "cabin", "may_be_absent": True}, "readers", True),
    ],
    ids=str,
)
def test_whom_a_change_breaks(facts: dict[str, Any], breaks: str, serves: bool):
    found = versions.diff(versions.document(), changed(**facts))
    assert len(found.changes) == 1 and found.breaks == breaks, found
    assert found.exit_code == {"nobody": 0, "writers": 3, "readers": 4, "both": 5}[breaks]
    assert not found.honest
    back = versions.diff(changed(**facts), versions.document()).breaks
    assert "role" in facts or back == {"readers": "writers", "writers": "readers"}.get(breaks, breaks), (
        "seen from the other side"
    )
    assert versions.compatible(versions.document(), changed(**facts)).ok == serves


def test_columns_and_rules_that_come_and_go():
    old, new = versions.document(), versions.document()
    extra = dict(new["columns"][-1], name="cabin_mate", role="label")
    new["columns"].append(extra)
    assert versions.diff(old, new).breaks == "nobody" and versions.diff(old, new).needs == "1.1.0"
    assert versions.diff(new, old).breaks == "both"
    assert versions.compatible(old, new) and not versions.compatible(new, old)
    extra["nullable"] = False
    assert versions.diff(old, new).breaks == "writers" and not versions.compatible(old, new)
    new = versions.document()
    dropped = new["table_rules"].pop()
    assert versions.diff(old, new).breaks == "readers" and versions.diff(new, old).breaks == "writers"
    assert versions.compatible(old, new), dropped
    new = versions.document()
    new["row_rules"].append(
        dict(new["row_rules"][0], name="no_cabin", column="pclass", value=3, missing="cabin")
    )
    assert not versions.compatible(old, new), "a rule over what a request carries"


def test_a_contract_in_a_bundle(tmp_path: Path):
    with pytest.raises(ContractError, match="train again") as caught:
        versions.load(tmp_path)
    assert "it says" not in str(caught.value)
    (tmp_path / "bundle.json").write_text('{"contract_version": "0.9.0"}')
    with pytest.raises(ContractError, match=r"0\.9\.0"):
        versions.compatible(tmp_path)
    (tmp_path / "contract.json").write_text(versions.contract_json())
    assert versions.compatible(tmp_path) and versions.require_compatible(tmp_path)
    (tmp_path / "contract.json").write_text(json.dumps(changed(unit="pence")))
    with pytest.raises(ContractError, match="unit pence → pounds of 1912"):
        versions.require_compatible(tmp_path, where="titanic version 7")
    for broken in ("", "{}", "[]", '{"format": 2}', versions.contract_json()[:500]):
        (tmp_path / "contract.json").write_text(broken)
        with pytest.raises(ContractError, match="can't be read"):
            versions.load(tmp_path)


@pytest.mark.parametrize(
    ("part", "number", "facts", "says"),
    [
        ("columns", 5, {"unit": None}, "lacks unit"),
        ("table_rules", 0, {"low": None}, "enough_rows lacks low"),
        ("row_rules", 0, {"missing": None}, "lacks missing"),
        ("columns", 5, {"colour": "red"}, "has an unknown colour"),
        ("columns", 5, {"low": "zero"}, "low is 'zero'; input should be a valid number"),
        (
            "columns",
            5,
            {"severity": "abort"},
            "severity is 'abort'; input should be 'stop', 'quarantine' or 'warn'",
        ),
        (
            "table_rules",
            0,
            {"severity": "quarantine"},
            "severity is 'quarantine'; input should be 'stop' or 'warn'",
        ),
        ("row_rules", 0, {"kind": "forbids"}, "kind is 'forbids', not implies or unique"),
        ("columns", 5, {"kind": "decimal"}, "kind is 'decimal'"),
        ("columns", 5, {"name": "pclass"}, "names pclass twice"),
    ],
)
def test_a_document_that_says_too_little_or_too_much_is_refused(tmp_path, part, number, facts, says):
    contract = versions.document()
    entry = contract[part][number] | facts
    contract[part][number] = {
        name: fact for name, fact in entry.items() if fact is not None or name not in facts
    }
    (tmp_path / "contract.json").write_text(json.dumps(contract))
    with pytest.raises(ContractError, match=re.escape(says)):
        versions.load(tmp_path)


def test_words_bind_nobody():
    old, words = versions.document(), changed(meaning="what the ticket cost")
    assert versions.contract_digest(old) == versions.contract_digest(words)
    assert versions.contract_digest(old) != versions.contract_digest(changed(unit="pence"))
    assert versions.diff(old, words).needs == "1.0.1"


# --- the command line, and what is imported


def test_commands_end_with_the_code_of_what_they_found(tmp_path: Path):
    old = tmp_path / "old.json"
    old.write_text(json.dumps(changed(high=2000)))
    for arguments, code, wanted in (
        (["diff", str(old), "current"], 3, "WRITERS"),
        (["diff", "current", str(old)], 4, "READERS"),
        (["diff", "published"], 0, "no difference"),
        (["diff", str(tmp_path / "none.json")], 2, "no such contract"),
        (["show", "sqlite"], 2, "did you mean 'sql'"),
        (["check", str(tmp_path / "none.parquet")], 2, "can't be read"),
    ):
        done = subprocess.run(
            [str(BIN / "titanic"), "contract", *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert wanted in done.stdout + done.stderr and "Traceback" not in done.stderr


HEAVY = "pandas pyarrow numpy mlflow pandera great_expectations hypothesis sklearn"


@pytest.mark.parametrize(
    "code",
    [
        "import titanic_mlops.face.cli",
        "from titanic_mlops.data.targets import *; request_model(); json_schema()",
    ],
)
def test_light_targets_import_nothing_heavy(code: str):
    check = f"{code}\nimport sys\nprint(*set({HEAVY.split()!r}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stdout.split()


def test_the_data_gate_needs_no_pandera():
    check = "import titanic_mlops.data.quality as q\nfrom titanic_mlops.data.sources import read\n"
    check += "rows = read('embedded'); assert q.judge(rows.frame, rows.origin).passed\nimport sys\n"
    check += "print(*{'pandera', 'great_expectations', 'hypothesis'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stdout.split()


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said["columns"][0].update(low=float("nan")),
        lambda said: next(c for c in said["columns"] if c["name"] == "age").update(low=200, high=110),
        lambda said: next(c for c in said["columns"] if c["name"] == "sex").update(choices=[["male"]]),
        lambda said: said.update(version="01.0.0"),
        lambda said: said.update(version="\u0663.0.0"),
    ],
)
def test_what_is_no_contract_is_refused_and_no_defect(tmp_path: Path, change):
    from titanic_mlops.data.contract_versions import document, load

    change(said := document())
    file = tmp_path / "contract.json"
    file.write_text(json.dumps(said))
    with pytest.raises(ContractError, match="can't be read"):
        load(file)
    file.write_text("[" * 100_000)
    with pytest.raises(ContractError, match="can't be read"):
        load(file)
