"""How schemathesis makes and sends the media types that a JSON Schema can't describe; named by SCHEMATHESIS_HOOKS in `test_openapi.py`."""

import csv
import io
import json

import schemathesis
from hypothesis import strategies as st

from titanic_mlops.data.strategies import passengers
from titanic_mlops.data.targets import REQUEST_ROLES, arrow_schema

LINES, CSV, ARROW = "application/x-ndjson", "text/csv", "application/vnd.apache.arrow.stream"
ROWS = st.lists(passengers(REQUEST_ROLES), max_size=3)


def as_lines(rows: list[dict]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def as_csv(rows: list[dict]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, arrow_schema(REQUEST_ROLES).names)
    writer.writeheader()
    for (
        row
    ) in rows:  # an empty cell is a missing value, so an empty text can't be said; a lone \r ends a line
        writer.writerow({k: v.replace("\r", " ") if isinstance(v, str) else v for k, v in row.items()})
    return text.getvalue().encode()


def as_arrow(rows: list[dict]) -> bytes:
    import pyarrow as pa

    table, sink = pa.Table.from_pylist(rows, arrow_schema(REQUEST_ROLES)), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


for kind, form in ((LINES, as_lines), (CSV, as_csv), (ARROW, as_arrow)):
    schemathesis.openapi.media_type(kind, ROWS.map(form))


@schemathesis.serializer(LINES, CSV, ARROW)
def as_it_is(ctx: schemathesis.SerializationContext, value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


@schemathesis.hook
def filter_case(context: schemathesis.HookContext, case: schemathesis.Case) -> bool:
    "To these types everything is text: what is of a wrong type for the schema is no such thing on the wire."
    return case.media_type not in (LINES, CSV, ARROW) or isinstance(case.body, bytes)
