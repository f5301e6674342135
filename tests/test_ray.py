"""The app on a Ray cluster of two nodes, one of which is killed under load."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import Checkout

HERE = Path(__file__).parent


def alone(*command: str, **more: object) -> list[str]:
    "The command in a network namespace of its own, where only loopback is."
    own = ["unshare", "-n"] if os.getuid() == 0 else ["unshare", "-rn"]
    return [*own, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]


@pytest.mark.long
@pytest.mark.skipif(
    not shutil.which("unshare") or not shutil.which("ip"), reason="needs unshare and ip (Linux)"
)
def test_a_node_dies_under_load(finished: tuple[Checkout, object], tmp_path: Path):
    own, _ = finished
    bundle = own.first["promote"] / "champion"
    done = subprocess.run(
        alone(sys.executable, str(HERE / "ray_cluster.py"), str(bundle)),
        env=os.environ | {"TITANIC_STORE": str(tmp_path / "store")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    seen = json.loads(lines[-1].removeprefix("RESULT "))
    assert seen["nodes_before"] == 2 and seen["nodes_after"] == 1 and seen["noticed"], seen
    assert seen["failed"] == [], seen
    assert len(seen["asked_again"]) <= 8, seen  # what was under way on the node, and no more
    assert 0 < seen["before"] < seen["answers"], seen
    assert seen["headers"]["x-bundle-digest"] == seen["first"]["bundle_digest"]
