"""The real command line, on a store and in a folder of its own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NOT_FOR_SERVERS = {  # libraries of the pipeline, which a serving process must not import
    "great_expectations", "matplotlib", "mlflow", "onnx", "pandas", "pandera", "papermill", "prefect",
    "pyarrow", "ray", "scipy", "skl2onnx", "sklearn", "skops",
}  # fmt: skip
QUICK = ("cv.folds=3", "cv.repeats=1")  # overrides for runs whose figures don't matter


@dataclass
class Checkout:
    "The real command line on a store, run from a folder that is not the checkout."

    store: Path
    folder: Path
    settings: dict[str, str] = field(default_factory=dict)  # environment variables
    first: dict[str, Path] = field(
        default_factory=dict
    )  # job -> its outputs in the first run, if there was one

    def environment(self, **more: str) -> dict[str, str]:
        return {**os.environ, "TITANIC_STORE": str(self.store), "NO_COLOR": "1", **self.settings, **more}

    def titanic(self, *arguments: str, timeout: float = 500, **more: str) -> subprocess.CompletedProcess:
        "`titanic arguments`, to its end."
        return subprocess.run(
            [str(BIN / "titanic"), *arguments],
            cwd=self.folder,
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def python(self, code: str, timeout: float = 500) -> subprocess.CompletedProcess:
        "Python code in a process of its own, to its end."
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def start(self, *arguments: str) -> subprocess.Popen:
        "`titanic arguments`, in the background and in a session of its own."
        return subprocess.Popen(
            [str(BIN / "titanic"), *arguments],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def events(self) -> list[dict]:
        "What the store's log says so far."
        log = self.store / "logs" / "titanic.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def outputs(self, job: str) -> Path:
        "The outputs of a job in the latest run."
        facts = json.loads((self.store / "latest" / "run.json").read_text())
        return Path(facts["results"][job]) / "outputs"


def checkout(folder: Path) -> Checkout:
    "A new store under `folder`."
    (folder / "elsewhere").mkdir(parents=True)
    return Checkout(folder / "store", folder / "elsewhere")
