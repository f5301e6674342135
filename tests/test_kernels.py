"""Warm kernels, with real processes: what they take over, how they end, and what happens when somebody is killed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")

SMALL = ["numpy", "IPython", "ipykernel.kernelapp", "ipykernel.ipkernel", "ipykernel.debugger"]


@pytest.fixture(scope="module", autouse=True)
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    "Parents that nobody else sees, a kernelspec with a short preload list, and nothing left behind."
    from titanic_mlops.flow import kernels

    folder = tmp_path_factory.mktemp("warm")
    spec = json.loads((kernels.install_kernelspec() / "kernel.json").read_text())
    spec["metadata"]["kernel_provisioner"]["config"] = {"preload": SMALL}
    place = folder / "data" / "kernels" / "warm-small"
    place.mkdir(parents=True)
    (place / "kernel.json").write_text(json.dumps(spec))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
        patch.setenv("JUPYTER_PATH", str(folder / "data"))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("TITANIC_WARM_IDLE", "60")
        patch.delenv("TITANIC_WARM", raising=False)
        yield folder
        kernels.shutdown_parents()
        assert kernels.parents() == []
        assert list((folder / "runtime" / kernels.KERNEL_NAME).iterdir()) == []


class Kernel:
    "A kernel and a client; `kernel(code)` is what the code prints, to both streams."

    def __init__(self, name: str = "warm-small", **options):
        from jupyter_client.manager import KernelManager

        self.manager = KernelManager(kernel_name=name)
        self.manager.start_kernel(**options)
        self.connect()

    def connect(self) -> None:
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def __call__(self, code: str) -> str:
        self.streams: dict[str, str] = {}

        def hear(message):
            content = message["content"]
            if message["msg_type"] == "stream":
                self.streams[content["name"]] = self.streams.get(content["name"], "") + content["text"]
            elif message["msg_type"] == "error":
                raise RuntimeError(f"{content['ename']}: {content['evalue']}")

        self.client.execute_interactive(code, timeout=60, output_hook=hear)
        return self.streams.get("stdout", "").strip()

    @property
    def pid(self) -> int:
        return self.manager.provisioner.pid

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def start() -> Iterator[Callable[..., Kernel]]:
    "Start kernels that are shut down after the test."
    with contextlib.ExitStack() as stack:

        def new(*arguments, **options) -> Kernel:
            kernel = Kernel(*arguments, **options)
            stack.callback(kernel.close)
            return kernel

        yield new


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def seconds_until(condition: Callable[[], bool], limit: float = 15) -> float:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < limit, f"not within {limit} s"
        time.sleep(0.02)
    return time.monotonic() - begin


def warm(kernel: Kernel) -> bool:
    from titanic_mlops.flow import kernels

    parent = int(kernel("import os; print(os.getppid())"))
    return parent != os.getpid() and parent in [info.pid for info in kernels.parents()]


def test_it_is_a_fork_with_both_streams_and_an_exit_code(start):
    # ipykernel does not catch the output of subprocesses where this variable is set
    kernel = start(env={k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"})
    assert warm(kernel)
    assert kernel("import sys; print('out'); print('err', file=sys.stderr); sys.stdout.flush()") == "out"
    assert kernel.streams["stderr"].strip() == "err"
    assert kernel("import os; os.system('echo from a subprocess')") == "from a subprocess"
    kernel.client.execute("import os; os._exit(7)")
    seconds_until(lambda: not kernel.manager.is_alive())
    assert kernel.manager.provisioner.process.returncode == 7


def test_its_ports_are_open_when_it_has_started_and_it_can_say_which():
    from jupyter_client.manager import KernelManager

    manager = KernelManager(kernel_name="warm-small")
    manager.start_kernel()
    client = manager.blocking_client()
    try:
        names = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
        ports = {name: getattr(manager, name) for name in names}
        for port in ports.values():
            socket.create_connection((manager.ip, port), 1).close()
        client.start_channels()
        client.shell_channel.send(client.session.msg("connect_request"))
        said = client.get_shell_msg(timeout=10)["content"]
        assert {name: said[name] for name in ports} == ports
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("kind", ["KernelManager", "AsyncKernelManager"])
def test_a_client_has_it_when_it_is_ready_and_hears_nothing_older(kind):
    import asyncio
    import queue

    import jupyter_client.manager
    from jupyter_core.utils import ensure_async

    async def first_words() -> None:
        manager = getattr(jupyter_client.manager, kind)(kernel_name="warm-small")
        await ensure_async(manager.start_kernel())
        client = manager.client()
        client.start_channels()
        began = time.monotonic()
        await ensure_async(client.wait_for_ready(timeout=60))
        took.append(time.monotonic() - began)
        with pytest.raises(queue.Empty):
            await ensure_async(client.get_iopub_msg(timeout=0.3))
        asked = client.execute("print('the first word')")
        heard = []
        while heard[-1:] != ["idle"]:
            message = await ensure_async(client.get_iopub_msg(timeout=10))
            assert message["parent_header"]["msg_id"] == asked
            heard.append(message["content"].get("execution_state") or message["content"].get("text"))
        assert "the first word\n" in heard
        client.stop_channels()
        await ensure_async(manager.shutdown_kernel(now=True))
        with pytest.raises(RuntimeError, match="died"):
            client = manager.client()
            client.start_channels()
            await ensure_async(client.wait_for_ready(timeout=60))

    took: list[float] = []
    for _ in range(5):
        asyncio.run(first_words())
    assert min(took) < 0.2  # Jupyter's own listens to silence for as long as that


def test_it_looks_like_an_ordinary_kernel_from_inside(start, tmp_path):
    "Whatever a notebook can see of its process is the same on both kernels."
    look = """
import json, os, resource, signal, sys, threading
print(json.dumps({
    "path": sys.path, "argv0": sys.argv[0], "argv1": sys.argv[1], "cwd": os.getcwd(), "main": __name__,
    "executable": sys.executable, "flags": list(sys.flags), "prefix": sys.prefix, "orig": sys.orig_argv[1:4],
    "environment": dict(os.environ), "session": os.getsid(0) == os.getpid(),
    "signals": [str(signal.getsignal(s)) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)],
    "blocked": [int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
    "umask": os.umask(0o22), "limits": resource.getrlimit(resource.RLIMIT_NOFILE), "stdin": sys.stdin.read(),
    "package": [m for m in sys.modules if m.startswith("titanic_mlops")],
    "threads": sorted({t.name for t in threading.enumerate() if "Thread-" not in t.name}),
}))"""
    environment = {
        **os.environ,
        "PYTHONPATH": f"relative{os.pathsep}/opt",
        "TICKET": "PC 17599",
        "ODD": "\udcff",
    }
    seen = []
    mask = os.umask(0o027)
    try:
        for name in ("warm-small", "python3"):
            kernel = start(name, env=dict(environment), cwd=str(tmp_path))
            seen.append(json.loads(kernel(look)))
    finally:
        os.umask(mask)
    ours, usual = seen
    # the debugger's own, which a warm kernel does without
    usual["environment"].pop("PYDEVD_USE_FRAME_EVAL", None)
    for name in ("environment", *usual):
        assert ours[name] == usual[name], name
    assert ours["umask"] == 0o027
    assert ours["environment"]["JPY_PARENT_PID"] == str(os.getpid())


def test_interrupt_ends_a_cell_and_its_subprocess_and_leaves_the_kernel(start):
    kernel = start()
    for code in ("import time; time.sleep(60)", "import subprocess; subprocess.run(['sleep', '60'])"):
        kernel.client.execute(f"print('begun'); {code}")
        while kernel.client.get_iopub_msg(timeout=30)["msg_type"] != "stream":
            pass  # an interrupt of an idle kernel is nothing
        time.sleep(0.2)
        kernel.manager.interrupt_kernel()
        reply = kernel.client.get_shell_msg(timeout=30)
        assert reply["content"].get("ename") == "KeyboardInterrupt", reply["content"]
        seconds_until(lambda: kernel("print('here')") == "here")  # what comes right after an error is aborted


@pytest.mark.parametrize("now", [True, False])
def test_restart(start, now):
    kernel = start()
    before = kernel.pid
    kernel("ticket = 1")
    kernel.client.stop_channels()
    kernel.manager.restart_kernel(now=now)
    kernel.connect()
    assert kernel.pid != before and not alive(before)
    assert kernel("print('ticket' in globals())") == "False"
    assert warm(kernel)


def test_a_killed_kernel_is_seen_at_once(start):
    kernel = start()
    os.kill(kernel.pid, signal.SIGKILL)
    seconds_until(lambda: not kernel.manager.is_alive())
    assert kernel.manager.provisioner.process.returncode == -signal.SIGKILL


def test_a_killed_parent_takes_its_kernels_along_and_the_next_start_finds_a_new_one(start):
    from titanic_mlops.flow import kernels

    kernel = start()
    parent = int(kernel("import os; print(os.getppid())"))
    os.kill(parent, signal.SIGKILL)
    seconds_until(lambda: not kernel.manager.is_alive())
    seconds_until(lambda: not alive(kernel.pid))
    again = start()
    assert warm(again)
    assert parent not in [info.pid for info in kernels.parents()]


def test_no_kernel_outlives_its_owner():
    code = """
import sys, time
from jupyter_client.manager import KernelManager
manager = KernelManager(kernel_name="warm-small")
manager.start_kernel()
client = manager.blocking_client(); client.start_channels(); client.wait_for_ready(60)
client.execute("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)")
import os
if os.fork() == 0:  # it holds the same sockets, and must not keep the kernel alive
    time.sleep(20)
    os._exit(0)
time.sleep(0.5)
print(manager.provisioner.pid, flush=True)
time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(owner.stdout.readline())
    assert alive(pid)
    owner.kill()
    owner.wait()
    assert seconds_until(lambda: not alive(pid)) < 6  # this one ignores the polite request


def test_a_fresh_kernel_has_little_of_its_own(start):
    def own(kernel) -> int:  # kB
        rollup = Path(f"/proc/{kernel.manager.provisioner.pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in rollup if line.startswith("Private_"))

    start()  # a parent that has just come up settles with its first kernel
    assert 2 * own(start()) < own(start("python3"))


def test_options_and_configuration_files_are_read(start):
    line = "print(get_ipython().ast_node_interactivity, globals().get('seen'))"
    assert start()(line) == "last_expr None"
    profile = Path(os.environ["IPYTHONDIR"]) / "profile_default" / "ipython_kernel_config.py"
    profile.write_text("c.InteractiveShellApp.exec_lines = ['seen = 7']\n")
    try:
        kernel = start(extra_arguments=["--InteractiveShell.ast_node_interactivity=all"])
        assert warm(kernel)
        assert kernel(line) == "all 7"
        assert start()(line) == "last_expr 7"
    finally:
        profile.unlink()


def test_a_variable_that_a_library_reads_when_it_is_imported_counts(start):
    code = "import numpy; print(numpy.__config__.CONFIG['SIMD Extensions']['found'])"
    usual = start()(code)
    feature = usual.strip("[]").split(", ")[-1].strip("'")  # of this processor
    without = {**os.environ, "NPY_DISABLE_CPU_FEATURES": feature}
    kernel = start(env=without)
    assert warm(kernel)
    assert kernel(code) == start("python3", env=without)(code) != usual


def test_random_numbers_differ(start):
    code = "import random, numpy; print(random.random(), numpy.random.random(), numpy.random.default_rng().random())"
    first, second = (start()(code).split() for _ in range(2))
    assert all(one != other for one, other in zip(first, second, strict=True))


def notebook(folder: Path, *sources: str) -> Path:
    import nbformat

    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    made.metadata.kernelspec = {"name": "warm-small", "display_name": "warm", "language": "python"}
    nbformat.write(made, folder / "some.ipynb")
    return folder / "some.ipynb"


def test_papermill_runs_it_by_name_and_refuses_questions(tmp_path):
    import papermill

    source = notebook(
        tmp_path, "port = 'C'", "print(port)", "import matplotlib.pyplot as plt; plt.plot([1, 2]);"
    )
    done = papermill.execute_notebook(
        source, tmp_path / "done.ipynb", kernel_name="warm-small", progress_bar=False
    )
    assert done.cells[1].outputs[0]["text"] == "C\n"
    asks = notebook(tmp_path, "input('name? ')")
    with pytest.raises(papermill.PapermillExecutionError, match="StdinNotImplementedError"):
        papermill.execute_notebook(
            asks, tmp_path / "done.ipynb", kernel_name="warm-small", progress_bar=False
        )


def test_it_can_be_turned_off(start, monkeypatch, caplog):
    monkeypatch.setenv("TITANIC_WARM", "0")
    with caplog.at_level("WARNING"):
        kernel = start()
    assert kernel("import os; print(os.getppid())") == str(os.getpid())
    assert [r for r in caplog.messages if "ordinary kernel" in r and "TITANIC_WARM is 0" in r]


def test_a_parent_that_cannot_start_is_no_obstacle(start, monkeypatch, caplog):
    monkeypatch.setattr("titanic_mlops.flow.kernels._ENTRY", "raise SystemExit(3)")
    monkeypatch.setenv("PYTHONHASHSEED", "1")  # another parent than that of the other tests
    with caplog.at_level("WARNING"):
        kernel = start()
    assert kernel("import os; print(os.getppid())") == str(os.getpid())
    assert any("ordinary kernel" in message for message in caplog.messages)


def test_a_parent_that_hangs_is_no_obstacle(start, monkeypatch, caplog):
    from titanic_mlops.flow import kernels

    hangs = kernels._ENTRY.replace("import runpy", "import time; time.sleep(60)")
    monkeypatch.setattr(kernels, "_ENTRY", hangs)
    monkeypatch.setattr(kernels.WarmProvisioner.start_timeout, "default_value", 1.0)
    monkeypatch.setenv("PYTHONHASHSEED", "2")
    with caplog.at_level("WARNING"):
        assert start()("import os; print(os.getppid())") == str(os.getpid())
    assert any("not ready within 1 s" in message for message in caplog.messages)
    assert any(info.preloads == () for info in kernels.parents())
    kernels.shutdown_parents()
    assert kernels.parents() == []


def test_a_parent_that_is_sent_home_when_idle_takes_no_kernel_along():
    "`titanic down` beside somebody who starts kernels: each of them comes up, and stays."
    from titanic_mlops.flow import kernels

    over = threading.Event()

    def send_home():
        while not over.wait(0.01):
            kernels.shutdown_parents(idle_only=True)

    thread = threading.Thread(target=send_home)
    thread.start()
    try:
        for number in range(12):
            kernel = Kernel()
            assert kernel(f"print({number})") == str(number)
            kernel.close()
    finally:
        over.set()
        thread.join(20)


def test_an_edited_module_is_what_runs(start, tmp_path):
    package = tmp_path / "voyage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for port in ("Southampton", "Cherbourg"):
        (package / "route.py").write_text(f"PORT = {port!r}")
        assert start(env=environment)("from voyage import route; print(route.PORT)") == port


def test_a_file_that_shadows_a_library_gets_an_ordinary_kernel(start, tmp_path):
    (tmp_path / "numpy.py").write_text("SHADOW = True")
    kernel = start(cwd=str(tmp_path))
    assert kernel("import numpy; print(numpy.SHADOW)") == "True"


def test_a_folder_that_is_not_there_is_the_usual_error():
    with pytest.raises(FileNotFoundError):
        Kernel(cwd="/no/such/folder")


def test_the_runtime_folder_is_closed_to_others(start, private):
    from titanic_mlops.flow import kernels

    start()
    folder = private / "runtime" / kernels.KERNEL_NAME
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    try:
        with pytest.raises(kernels._Cold, match="closed to others"):
            kernels._runtime_folder()
    finally:
        folder.chmod(0o700)


def test_eight_at_once_with_no_parent_before():
    from titanic_mlops.flow import kernels

    kernels.shutdown_parents()
    made: list[Kernel] = []
    threads = [threading.Thread(target=lambda: made.append(Kernel())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    try:
        assert len(made) == 8
        [parent] = kernels.parents()
        assert parent.kernels == 8
        assert {kernel("import os; print(os.getppid())") for kernel in made} == {str(parent.pid)}
    finally:
        for kernel in made:
            kernel.close()


def test_eight_notebooks_at_once_over_and_over_leave_nothing_behind(tmp_path):
    "ENGINE_EXECUTIONS=200 for the long version. Nothing: no kernel, no open file, no listening port."
    import nbformat
    import papermill

    from titanic_mlops.flow import kernels

    def execute(number: int) -> str:
        made = papermill.execute_notebook(
            tmp_path / "one.ipynb", None, {"number": number}, kernel_name="warm-small", progress_bar=False
        )
        return made.cells[-1].outputs[0]["data"]["text/plain"]

    def held(pid: int) -> tuple[int, int]:  # open files, children
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return len(os.listdir(f"/proc/{pid}/fd")), len(children)

    def listening() -> set[str]:
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
        inodes = {line.split()[9]: line.split()[1] for line in lines if line.split()[3] == "0A"}
        ours = set()
        for pid in (os.getpid(), parent.pid):
            for file in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    ours.add(os.readlink(file).removeprefix("socket:[").rstrip("]"))
        return {port for inode, port in inodes.items() if inode in ours}

    cells = [
        nbformat.v4.new_code_cell("number = 0", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("import numpy\nint(numpy.square(number))"),
    ]
    kernel = {"name": "warm-small", "display_name": "warm", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, tmp_path / "one.ipynb")
    execute(0)
    [parent] = [info for info in kernels.parents() if info.preloads == tuple(SMALL)]
    count = int(os.environ.get("ENGINE_EXECUTIONS", "32"))
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(execute, range(8))
        )  # what is opened once, such as a thread's event loop, is open by now
        seconds_until(lambda: held(parent.pid)[1] == 0)
        before = held(parent.pid), len(os.listdir("/proc/self/fd")), listening()
        assert list(pool.map(execute, range(count))) == [str(number**2) for number in range(count)]
        seconds_until(lambda: held(parent.pid)[1] == 0)
        assert held(parent.pid) == before[0] and listening() == before[2]
        assert len(os.listdir("/proc/self/fd")) <= before[1] + 8  # one for each thread may be on its way out


def test_a_library_that_starts_threads_is_left_out(start, tmp_path, monkeypatch):
    from titanic_mlops.flow import kernels

    busy = tmp_path / "lib" / "busy_threads.py"
    busy.parent.mkdir()
    busy.write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=[60], daemon=True).start()"
    )
    monkeypatch.setattr(
        kernels,
        "_ENTRY",
        kernels._ENTRY.replace("import runpy", f"sys.path.append({str(busy.parent)!r})\nimport runpy"),
    )
    assert kernels.warm_up(["json", "busy_threads", "no_such_library"])
    assert not kernels.warm_up(["json", "busy_threads", "no_such_library"])

    def ours():
        return [info for info in kernels.parents() if "json" in info.preloads]

    seconds_until(lambda: bool(ours()))
    [parent] = ours()
    assert "thread" in parent.skipped["busy_threads"] and "no_such_library" in parent.skipped
    os.kill(parent.pid, signal.SIGTERM)
    seconds_until(lambda: not alive(parent.pid))


def test_a_parent_without_kernels_goes_home(monkeypatch):
    from titanic_mlops.flow import kernels

    monkeypatch.setenv("TITANIC_WARM_IDLE", "0.5")
    assert kernels.warm_up(["json"])
    seconds_until(lambda: any(info.preloads == ("json",) for info in kernels.parents()))
    seconds_until(lambda: not any(info.preloads == ("json",) for info in kernels.parents()), 5)


def test_the_default_libraries_work_in_a_fork_with_their_threads(start):
    "Linear algebra, OpenMP, Arrow, MLflow, ONNX Runtime and an inline plot, in forks of the real parent."
    from titanic_mlops.flow import kernels

    code = """
import numpy as np, pandas as pd, pyarrow as pa, sys, threadpoolctl
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
rng = np.random.default_rng(0)
X, y = rng.normal(size=(2000, 20)), rng.integers(0, 2, 2000)
(X @ X.T).sum(), np.linalg.svd(X)
HistGradientBoostingClassifier(max_iter=20).fit(X, y)
RandomForestClassifier(10, n_jobs=2).fit(X, y)
assert pa.table({"a": list(range(100000))}).group_by("a").aggregate([("a", "sum")]).num_rows == 100000
import mlflow, onnxruntime
print(sorted({(pool["user_api"], pool["num_threads"]) for pool in threadpoolctl.threadpool_info()}))
"""
    first = start("titanic-warm", env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert warm(first)
    assert first(code) == "[('blas', 1), ('openmp', 1)]"
    processors = len(os.sched_getaffinity(0))
    second = start("titanic-warm", env={k: v for k, v in os.environ.items() if k != "MPLBACKEND"})
    assert second(code) == f"[('blas', {processors}), ('openmp', {processors})]"
    assert "inline" in second("import matplotlib.pyplot as plt; plt.plot([1, 2]); print(plt.get_backend())")
    assert not any(info.skipped for info in kernels.parents())
