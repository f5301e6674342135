"""What the OpenAPI document says is true: schemathesis makes requests from it, good ones and bad, and holds each answer against it.

Some hundred requests in the suite; `OPENAPI_EXAMPLES=500` (of a kind of request and an address) makes it over ten thousand. The server takes
few rows at a time, so that the longest arrays that the document allows, and those that are a row too long, are among them.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from checkout import BIN, Checkout, checkout
from explained import make_bundle

EXAMPLES = int(os.environ.get("OPENAPI_EXAMPLES", "6"))
TOO_LARGE_IS_A_REFUSAL = """
[checks]
negative_data_rejection.expected-statuses = ["400", "401", "403", "404", "405", "406", "409", "413", "415", "422", "429"]
"""  # of an array with a row too many, which the tool's own list does not expect
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Checkout, str, str]]:
    "`titanic serve` on a bundle; its address, and a key that may do everything."
    own = checkout(tmp_path_factory.mktemp("openapi"))
    own.settings |= {"TITANIC_RATE_LIMIT": "0", "TITANIC_AUTH_FAILURES": "1000000", "TITANIC_ACCESS_LOG": ""}
    own.settings |= {"TITANIC_SERVE_BATCH_ROWS": "20"}
    make_bundle(own.folder / "bundle")
    scopes = [part for scope in ("predict", "explain", "outcomes", "admin") for part in ("--scope", scope)]
    said = own.titanic("keys", "new", "--name", "schemathesis", *scopes)
    key = re.search(r"titanic_[0-9a-f]{12}_\S+", said.stdout)
    assert key, said.stdout + said.stderr
    process = own.start("serve", "--bundle", str(own.folder / "bundle"), "--port", "0")
    try:
        assert process.stdout is not None
        address = re.search(r"http://\S+", process.stdout.readline())
        assert address, process.stderr and process.stderr.read()
        yield own, address[0], key[0]
    finally:
        process.terminate()
        process.communicate(timeout=30)


def run(address: str, key: str, examples: int, folder: Path, *more: str) -> subprocess.CompletedProcess:
    "schemathesis, all checks."
    (folder / "schemathesis.toml").write_text(TOO_LARGE_IS_A_REFUSAL)
    return subprocess.run(
        [
            str(BIN / "schemathesis"), "run", f"{address}/openapi.json", "--checks=all", "--no-color", "--seed=1912",
            f"--max-examples={examples}", "--phases=examples,coverage,fuzzing,stateful", "--warnings=off",
            "--suppress-health-check=all", "--generation-database=none", f"--header=Authorization: Bearer {key}",
            "--generation-allow-x00=false", "--continue-on-failure", *more,
        ],
        cwd=folder,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "openapi_hooks", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )  # fmt: skip


def answered(address: str, key: str) -> int:
    "How many requests the server has counted."
    page = httpx.get(f"{address}/metrics", headers={"Authorization": f"Bearer {key}"}, trust_env=False).text
    return sum(
        int(float(count)) for count in re.findall(r"^titanic_requests_total\{.*\} (\S+)$", page, re.MULTILINE)
    )


def test_every_answer_is_as_the_document_says(server: tuple[Checkout, str, str], tmp_path: Path):
    _, address, key = server
    before = answered(address, key)
    done = run(address, key, EXAMPLES, tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-20_000:]
    asked = answered(address, key) - before
    assert asked >= (10_000 if EXAMPLES >= 500 else 500), f"only {asked} requests were made"
    tested = re.search(r"Tested: (\d+)", done.stdout)
    assert tested and int(tested[1]) >= 20, done.stdout[-3000:]
    print(f"{asked} requests;", done.stdout[-600:])
