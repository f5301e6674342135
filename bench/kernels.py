"""Warm kernels against usual ones: papermill of a notebook that imports three libraries, and the start of an empty kernel.

Prints baseline, ours and ratio; `--json FILE` appends a line that documents can cite.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

IMPORTS = "import pandas\nimport sklearn.linear_model\nimport mlflow\npandas.DataFrame({'ticket': [1]}).shape"


def seconds(function: Callable[[], object]) -> float:
    "Wall time of a call."
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def papermill(kernel: str, folder: Path) -> None:
    "Execute the notebook on this kernel."
    import nbformat
    import papermill

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(IMPORTS)])
    notebook.metadata.kernelspec = {"name": kernel, "display_name": kernel, "language": "python"}
    nbformat.write(notebook, folder / "imports.ipynb")
    papermill.execute_notebook(
        folder / "imports.ipynb", folder / "done.ipynb", kernel_name=kernel, progress_bar=False
    )


def empty_kernel(kernel: str) -> tuple[float, float]:
    "Seconds from asking for a kernel to its first answer; and the MB that are its own (PSS without sharers)."
    from jupyter_client.manager import KernelManager

    manager = KernelManager(kernel_name=kernel)
    start = time.perf_counter()
    manager.start_kernel()
    client = manager.blocking_client()
    client.start_channels()
    client.execute("1")
    client.get_shell_msg(timeout=60)
    took = time.perf_counter() - start
    rollup = Path(f"/proc/{manager.provisioner.pid}/smaps_rollup").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in rollup[1:]}
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    return took, (sizes["Private_Dirty"] + sizes["Private_Clean"]) / 1024


def many(executions: int, folder: Path) -> dict:
    """Eight notebooks at once, over and over: how many failed, and what was left behind; and the memory of a fresh kernel.

    It is the PSS (a page counts by its share among those who share it) of kernels that have said that they are ready
    and have run nothing, with eight of them alive beside their parent, and nobody else.
    """
    import papermill
    from jupyter_client.manager import KernelManager

    from titanic_mlops.flow import kernels

    failed = 0

    def execute(number: int) -> None:
        nonlocal failed
        try:
            papermill.execute_notebook(
                folder / "imports.ipynb", None, kernel_name=kernels.KERNEL_NAME, progress_bar=False
            )
        except Exception as error:
            failed += 1
            print(f"execution {number} failed: {error}")

    [parent] = [info.pid for info in kernels.parents() if "mlflow" in info.preloads]
    files = lambda: len(os.listdir(f"/proc/{parent}/fd"))
    children = lambda: Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    while children():  # the last of the kernels before: its parent has yet to let go of it
        time.sleep(0.1)
    time.sleep(1)
    before = files()
    with ThreadPoolExecutor(8) as pool:
        took = seconds(lambda: list(pool.map(execute, range(executions))))
    time.sleep(1)
    left = {"kernels": len(children()), "open files": files() - before}
    managers = [KernelManager(kernel_name=kernels.KERNEL_NAME) for _ in range(8)]
    for manager in managers:
        manager.start_kernel()
        client = manager.blocking_client()
        client.start_channels()
        client.wait_for_ready(timeout=60)
        client.stop_channels()
    pss = []
    for manager in managers:
        rollup = Path(f"/proc/{manager.provisioner.pid}/smaps_rollup").read_text().splitlines()
        pss += [int(one.split()[1]) / 1024 for one in rollup if one.startswith("Pss:")]
    for manager in managers:
        manager.shutdown_kernel(now=True)
    print(
        f"eight at once: {executions} executions, {failed} failed, {took:.0f} s; left behind: "
        + ", ".join(f"{count} {what}" for what, count in left.items())
    )
    print(f"PSS of a fresh kernel, eight alive that have run nothing: {statistics.median(pss):.0f} MB")
    return {"executions": executions, "failed": failed, "seconds": round(took, 1),
            **{f"{what} left behind": count for what, count in left.items()},
            "PSS of a fresh kernel, MB": round(statistics.median(pss), 1)}  # fmt: skip


def line(name: str, unit: str, baseline: list[float], ours: list[float]) -> dict:
    "Print one comparison."
    before, after = statistics.median(baseline), statistics.median(ours)
    print(f"{name:<34} {before:9.3f} {after:9.3f} {before / after:7.1f}x  {unit}")
    return {"name": name, "unit": unit, "baseline": round(before, 4), "ours": round(after, 4),
            "ratio": round(before / after, 2), "runs": [len(baseline), len(ours)]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs of each, the median counts")
    parser.add_argument("--executions", type=int, default=200, help="of a notebook, eight at once")
    parser.add_argument("--json", type=Path, help="append the figures to this file, one line")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"JUPYTER_RUNTIME_DIR": str(folder / "runtime"), "TITANIC_WARM_IDLE": "300"}
        from titanic_mlops.flow import kernels

        kernels.install_kernelspec()
        try:
            first = seconds(
                lambda: papermill(kernels.KERNEL_NAME, folder)
            )  # imports papermill, starts the parent
            runs = range(arguments.runs)
            warm = [seconds(lambda: papermill(kernels.KERNEL_NAME, folder)) for _ in runs]
            stock = [seconds(lambda: papermill("python3", folder)) for _ in runs]
            warm_start = [empty_kernel(kernels.KERNEL_NAME) for _ in runs]
            stock_start = [empty_kernel("python3") for _ in runs]
            together = many(arguments.executions, folder)
        finally:
            kernels.shutdown_parents()

    print(f"{'median of ' + str(arguments.runs):<34} {'python3':>9} {'warm':>9} {'ratio':>8}")
    figures = [
        line("papermill: pandas, sklearn, mlflow", "s", stock, warm),
        line("empty kernel to first answer", "s", [s for s, _ in stock_start], [s for s, _ in warm_start]),
        line(
            "empty kernel, memory of its own", "MB", [m for _, m in stock_start], [m for _, m in warm_start]
        ),
    ]
    print(f"the first warm one, with the start of its parent and the import of papermill: {first:.1f} s")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        with arguments.json.open("a") as file:
            said = {"bench": "kernels", "at": int(time.time()), "cpus": os.cpu_count(), "figures": figures}
            said["eight at once"] = together
            file.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
