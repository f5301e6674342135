"""Two Ray nodes on one machine, the app on both, and one node killed under load; prints what was seen as JSON.

A program of its own, started in a network namespace of its own: Ray's processes listen on all addresses.
"""

import json
import os
import sys
import threading
import time
import urllib.request

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",  # else all is answered by the proxy's own node
    "RAY_DEDUP_LOGS": "0",
}

import ray
from ray import serve
from ray.cluster_utils import Cluster

from titanic_mlops.serve.ray_app import Arguments, application

PASSENGER = {"pclass": 3, "name": "Dooley, Mr. Patrick", "sex": "male", "age": 32, "sibsp": 0, "parch": 0}
PASSENGER |= {"ticket": "370376", "fare": 7.75, "embarked": "Q"}
URL = "http://127.0.0.1:8123"
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}


def ask(path: str, body: object = None) -> tuple[dict, dict]:
    "An answer and its headers."
    said = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(URL + path, said, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer), {name.lower(): value for name, value in answer.headers.items()}


def replicas() -> list[str]:
    "The node of each replica that runs."
    from ray.serve.context import _get_global_client

    found = ray.get(_get_global_client()._controller._all_running_replicas.remote())
    return sorted(replica.node_id for group in found.values() for replica in group)


def until(true, patience: float = 60.0) -> bool:
    end = time.monotonic() + patience
    while not (met := true()) and time.monotonic() < end:
        time.sleep(0.1)
    return met


def main(bundle: str) -> dict:
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    other = cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False)
    seen: dict = {"failed": [], "asked_again": [], "answers": 0}
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": 8123, "location": "HeadOnly"})
        arguments = Arguments(bundle=bundle, no_auth=True)
        two = application(arguments)._bound_deployment.options(autoscaling_config=None, num_replicas=2)
        serve.run(two.bind(arguments), route_prefix="/")
        until(lambda: len(set(replicas())) == 2)
        seen["nodes_before"] = len(set(replicas()))
        seen["first"], seen["headers"] = ask("/v1/predict", PASSENGER)
        seen["ready"] = ask("/readyz")[0]
        stop = threading.Event()

        def once(last: bool) -> bool:
            try:
                answer = ask("/v1/predict", PASSENGER)[0]
            except Exception as error:
                seen["failed" if last else "asked_again"].append(repr(error)[:200])
                return False
            seen["answers"] += answer["probability"] == seen["first"]["probability"]
            return True

        def load() -> None:
            "As clients do: what was on the node that died is asked once more."
            while not stop.is_set():
                once(False) or once(True)

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(2)
        dead = other.node_id
        seen["before"] = seen["answers"]
        cluster.remove_node(other, allow_graceful=False)
        seen["noticed"] = until(lambda: len(replicas()) == 2 and dead not in replicas())
        time.sleep(2)
        stop.set()
        for thread in threads:
            thread.join()
        seen["nodes_after"] = len(set(replicas()))
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
    return seen


def score(bundle: str, source: str, out: str) -> dict:
    "Score a file on two nodes, and kill one of them when the first part is there."
    from titanic_mlops.ground.settings import settings
    from titanic_mlops.serve.batch import Task
    from titanic_mlops.serve.columns import open_model
    from titanic_mlops.serve.ray_batch import score as score_on_ray

    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    other = cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False)
    killed = []

    def listener(name: str):
        def hears(done: int, share: float) -> None:
            if not killed:
                killed.append(done)
                cluster.remove_node(other, allow_graceful=False)

        return hears

    try:
        model = open_model(bundle)
        task = Task("1", model.digest, model.threshold)
        [done] = score_on_ray(model, source, out, task, settings(), listener=listener)
        return {"rows": done.rows, "rejected": done.rejected, "killed_at": killed}
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    what = score if len(sys.argv) > 2 else main
    print("RESULT " + json.dumps(what(*sys.argv[1:])), flush=True)
