"""The app on a Ray cluster of two nodes, one of which is killed under load."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from checkout import Checkout

from titanic_mlops.data.contract import Passenger
from titanic_mlops.ground.settings import settings
from titanic_mlops.serve.batch import PART_ROWS, Task, score
from titanic_mlops.serve.columns import open_model
from titanic_mlops.serve.ray_batch import _shares

HERE = Path(__file__).parent


def alone(*command: str, **more: object) -> list[str]:
    "The command in a network namespace of its own, where only loopback is."
    own = ["unshare", "-n"] if os.getuid() == 0 else ["unshare", "-rn"]
    return [*own, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]


def on_two_nodes(folder: Path, *arguments: object) -> dict:
    "What the program on the cluster has seen."
    done = subprocess.run(
        alone(sys.executable, str(HERE / "ray_cluster.py"), *map(str, arguments)),
        env=os.environ | {"TITANIC_STORE": str(folder / "store")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


NEEDS = pytest.mark.skipif(
    not shutil.which("unshare") or not shutil.which("ip"), reason="needs unshare and ip (Linux)"
)


@pytest.mark.parametrize("group", [1000, PART_ROWS, 1_000_000, 50_000_000])
@pytest.mark.parametrize("start", [0, PART_ROWS, 7 * PART_ROWS])
def test_what_a_worker_gets_begins_at_a_part_and_takes_a_row_group_whole(group: int, start: int):
    rows = 20 * PART_ROWS + 7
    begins = [*range(0, rows, group), rows]
    found = _shares(SimpleNamespace(rows=rows, begins=begins), start, processors=2)
    edges = [found[0]["start"], *(one["stop"] for one in found)]
    assert edges[0] == start and edges[-1] == rows
    assert edges[:-1] == [one["start"] for one in found] and edges == sorted(set(edges))
    assert all((edge - start) % PART_ROWS == 0 for edge in edges[:-1])
    for one in found[1:]:  # what must be read and thrown away before it
        assert one["start"] - max(edge for edge in begins if edge <= one["start"]) < PART_ROWS
    assert len(found) >= min(6, (rows - start) // max(group, PART_ROWS))


@pytest.mark.long
@NEEDS
def test_a_node_dies_under_load(finished: tuple[Checkout, object], tmp_path: Path):
    own, _ = finished
    bundle = own.first["promote"] / "champion"
    seen = on_two_nodes(tmp_path, bundle)
    assert seen["nodes_before"] == 2 and seen["nodes_after"] == 1 and seen["noticed"], seen
    assert seen["failed"] == [], seen
    assert len(seen["asked_again"]) <= 8, seen  # what was under way on the node, and no more
    assert 0 < seen["before"] < seen["answers"], seen
    assert seen["headers"]["x-bundle-digest"] == seen["first"]["bundle_digest"]


@pytest.mark.long
@NEEDS
def test_batch_is_the_same_when_a_node_dies(
    finished: tuple[Checkout, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    own, _ = finished
    bundle = own.first["promote"] / "champion"
    monkeypatch.setenv("TITANIC_STORE", str(tmp_path / "store"))
    known = pq.read_table(own.first["validate"] / "rows.parquet")
    names = [name for name in known.column_names if name in Passenger.model_fields]
    times = 3 * PART_ROWS // len(known) + 1
    rows = pa.concat_tables([known.select(names)] * times)
    place = rows.column_names.index("pclass")
    wrong = pc.if_else(pc.equal(pa.array(range(len(rows))), 700_000), 9, rows["pclass"].combine_chunks())
    pq.write_table(rows.set_column(place, "pclass", wrong), tmp_path / "rows.parquet")
    seen = on_two_nodes(tmp_path, bundle, tmp_path / "rows.parquet", tmp_path / "ray.parquet")
    assert seen["rows"] == len(rows) and seen["rejected"] == 1 and seen["killed_at"], seen

    model = open_model(bundle)
    task = Task("1", model.digest, model.threshold)
    score(model, str(tmp_path / "rows.parquet"), str(tmp_path / "here.parquet"), task, settings())
    assert pq.read_table(tmp_path / "ray.parquet").equals(pq.read_table(tmp_path / "here.parquet"))
    rejections = [pq.read_table(tmp_path / f"{name}.rejected.parquet") for name in ("ray", "here")]
    assert rejections[0].equals(rejections[1]) and rejections[0].num_rows == 1
