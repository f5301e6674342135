"""A server in a process of its own: the app behind the guard, with the access log and the traces that its settings ask for."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

DEAN = {
    "pclass": 3,
    "name": "Dean, Miss. Millvina",
    "sex": "female",
    "sibsp": 1,
    "parch": 2,
    "ticket": "2315",
}


@dataclass
class Running:
    "A server that runs."

    port: int
    store: Path
    process: subprocess.Popen
    client: httpx.Client = field(
        default_factory=lambda: httpx.Client(timeout=60, trust_env=False, verify=False)
    )

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def access_log(self) -> Path:
        return self.store / "access.jsonl"

    def post(self, path: str = "/v1/predict", key: str | None = None, **more) -> httpx.Response:
        "One request, with a key if there is one."
        headers = {"authorization": f"Bearer {key}"} if key is not None else {}
        more.setdefault("json", DEAN)
        return httpx.post(
            self.address + path,
            headers=headers | more.pop("headers", {}),
            timeout=60,
            trust_env=False,
            **more,
        )

    def get(self, path: str, key: str | None = None) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key is not None else {}
        return self.client.get(self.address + path, headers=headers)

    def raw(self, request: bytes) -> bytes:
        "Bytes as they are, and what comes back before the server closes."
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        return answer

    def stop(self) -> None:
        "End it in order, so that the log is written to its end."
        self.process.terminate()
        self.process.wait(60)

    def lines(self) -> list[dict]:
        "The access log. After `stop`."
        return [json.loads(line) for line in self.access_log.read_text().splitlines()]


@contextmanager
def serving(store: Path, bundle: Path | None = None, **settings: str) -> Iterator[Running]:
    "A server on a free port, stopped in the end."
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TITANIC_")}
    own = {"TITANIC_STORE": str(store), "TITANIC_ACCESS_LOG": str(store / "access.jsonl")}
    own |= {f"TITANIC_{name.upper()}": value for name, value in settings.items()}
    command = [sys.executable, __file__, str(bundle or "")]
    process = subprocess.Popen(command, env=clean | own, cwd=store, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.strip().isdigit(), f"the server did not start: {line}"
        running = Running(int(line), store, process)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Half:
    "Stands for a model where none is needed."

    threshold, digest, contract_version, folder = 0.5, "0" * 64, "1.0.0", Path("nowhere")
    info = lineage = None

    def one(self, passenger: dict) -> float:
        return 0.5

    def many(self, passengers: list[dict]):
        import numpy as np

        return np.full(len(passengers), 0.5)


def main(bundle: str) -> None:
    import signal

    import uvicorn

    from titanic_mlops.ground.settings import settings
    from titanic_mlops.serve.access import open_access
    from titanic_mlops.serve.app import OneModel, create_app
    from titanic_mlops.serve.protocols import inference_router, mlflow_router
    from titanic_mlops.serve.security import open_guard

    model = Half()
    if bundle:
        from titanic_mlops.model.bundle import Bundle
        from titanic_mlops.serve.fastpath import FastModel

        model = FastModel(Bundle(bundle, []))
    own = settings()
    app = create_app(OneModel(model, "7"), open_guard(own), None, own)
    app.state.access = open_access(own)
    if not any(getattr(route, "path", "") == "/invocations" for route in app.app.routes):
        app.app.include_router(mlflow_router(app.state))
        app.app.include_router(inference_router(app.state))
    app.large |= {"/invocations", "/v2/models/titanic/infer"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again when it is done
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(app, log_level="error", access_log=False, server_header=False, lifespan="off")
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        if app.state.access is not None:
            app.state.access.close()


if __name__ == "__main__":
    main(sys.argv[1])
