"""Runs notebooks again in place and cleans them, so that stored outputs are those of a fresh run.

    python scripts/notebooks.py                     all: library notebooks, then the pipeline's in order, then the index
    python scripts/notebooks.py nbs/pipeline        those of a folder, or single ones

The pipeline's notebooks share one new store. A notebook that fails is left as it was.
"""

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"


def in_order() -> list[Path]:
    "All notebooks: library by plane and number, the pipeline by step, the index last (it cites the others)."
    found = [file for file in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in file.parts)]
    return sorted(found, key=lambda f: (f.name == "index.ipynb", f.parent.name == "pipeline", f))


def chosen(
    names: list[str],  # notebooks and folders; empty: all
) -> list[Path]:  # in running order
    "Pick the notebooks that `names` name."
    wanted = [Path(name).resolve() for name in names]
    for name, path in zip(names, wanted, strict=True):
        if not path.exists():
            raise SystemExit(f"notebooks: there is no {name}")
    return [f for f in in_order() if not wanted or any(f == w or w in f.parents for w in wanted)]


def run(
    file: Path,  # .ipynb
) -> None:
    "Execute one notebook from its own folder and write it back, clean. Raises what the notebook raises."
    import nbformat
    from nbclient import NotebookClient
    from nbdev.clean import nbdev_clean

    notebook = nbformat.read(file, as_version=4)
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(file.parent)}})
    client.extra_arguments = ["--log-level=50"]  # that a kernel on loopback is not encrypted is no news
    client.execute()
    nbformat.write(notebook, file)
    nbdev_clean(str(file))


def prepare() -> None:
    "Run the steps up to the registry, so that step notebooks find their inputs and say nothing of having made them."
    print("notebooks: preparing the inputs of the pipeline's notebooks", flush=True)
    from titanic_mlops.flow.execution import prepare_inputs

    with contextlib.redirect_stdout(None):
        prepare_inputs("promote")


def main(names: list[str]) -> int:
    os.chdir(ROOT)
    os.environ |= {"IN_TEST": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    files, failed = chosen(names), []
    with tempfile.TemporaryDirectory(prefix="titanic-notebooks-") as store:
        os.environ["TITANIC_STORE"] = store
        if any(file.parent.name == "pipeline" for file in files):
            prepare()
        for number, file in enumerate(files, 1):
            name, start = file.relative_to(ROOT), time.monotonic()
            print(f"notebooks: {number}/{len(files)} {name}", end="", flush=True)
            try:
                run(file)
            except Exception as error:
                failed.append(str(name))
                print(f" failed\n{error}", flush=True)
            else:
                print(f" {time.monotonic() - start:.1f} s", flush=True)
    if failed:
        print("notebooks: failed, and left as they were: " + ", ".join(failed), file=sys.stderr)
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
