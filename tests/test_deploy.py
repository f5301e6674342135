"""What lies under deploy/: manifests against their schemas, and against the code that they start."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from titanic_mlops.ground.errors import SettingsError
from titanic_mlops.ground.settings import Settings, settings

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted(DEPLOY.glob("*/*.yaml"))
# Kinds of extensions, whose schemas live on a cluster: what is a pod inside them is checked as one.
PODS_OF = {
    "Service serving.knative.dev/v1": lambda said: [said["spec"]["template"]],
    "RayService ray.io/v1": lambda said: [
        group["template"]
        for group in (
            said["spec"]["rayClusterConfig"]["headGroupSpec"],
            *said["spec"]["rayClusterConfig"]["workerGroupSpecs"],
        )
    ],
    "SecretProviderClass secrets-store.csi.x-k8s.io/v1": lambda said: [],
    "Kustomization kustomize.config.k8s.io/v1beta1": lambda said: [],
    "PodMonitoring monitoring.googleapis.com/v1": lambda said: [],
}
# What Knative adds to a pod's fields.
KNATIVE = {"containerConcurrency", "timeoutSeconds"}


def documents(file: Path) -> list[dict]:
    return [said for said in yaml.safe_load_all(file.read_text()) if said]


def pods(said: dict) -> list[dict]:
    "The pod templates of a manifest."
    kind = f"{said['kind']} {said['apiVersion']}"
    if kind in PODS_OF:
        return PODS_OF[kind](said)
    return [said["spec"]["template"]] if said["kind"] == "Deployment" else []


def strict(said: dict) -> None:
    "Validate with unknown fields refused; an unknown kind raises."
    kubernetes_validate.validate(said, "1.33", strict=True)


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_manifests_are_what_their_schemas_say(file: Path):
    for said in documents(file):
        if f"{said['kind']} {said['apiVersion']}" not in PODS_OF:
            strict(said)
        for template in pods(said):
            spec = {key: value for key, value in template["spec"].items() if key not in KNATIVE}
            metadata = {"name": "pod", **template.get("metadata", {})}
            strict({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})


def test_a_wrong_field_is_refused():
    "The check can fail: in a plain kind, and inside a pod of an extension's kind."
    said = documents(DEPLOY / "gke" / "deployment.yaml")[0]
    said["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        strict(said)
    pod = pods(documents(DEPLOY / "ray" / "rayservice.yaml")[0])[0]
    pod["spec"]["containers"][0]["port"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        strict({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod["spec"]})


def test_every_manifest_of_the_cluster_is_applied():
    listed = documents(DEPLOY / "gke" / "kustomization.yaml")[0]["resources"]
    there = {file.name for file in (DEPLOY / "gke").glob("*.yaml")} - {"kustomization.yaml"}
    assert set(listed) == there and len(listed) == len(there)


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_variables_are_settings(file: Path):
    known = {f"TITANIC_{name.upper()}" for name in Settings.model_fields}
    for said in documents(file):
        for template in pods(said):
            for container in template["spec"]["containers"]:
                names = {entry["name"] for entry in container.get("env", [])}
                assert {name for name in names if name.startswith("TITANIC_")} <= known
                mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
                assert mounted == {volume["name"] for volume in template["spec"].get("volumes", [])}


MEGABYTES = {"Mi": 1, "Gi": 1024}


@pytest.mark.parametrize(
    "file", [file for file in MANIFESTS if pods(documents(file)[0])], ids=lambda file: file.stem
)
def test_the_record_of_predictions_fits_where_it_is_kept(file: Path):
    "Also with segments that are being written and made into Parquet, by two replicas on one pod."
    for template in pods(documents(file)[0]):
        container = template["spec"]["containers"][0]
        said = {entry["name"].lower(): entry["value"] for entry in container["env"]}
        own = Settings.model_fields["predictions_rotate_mb"].default
        rotated = int(said.get("titanic_predictions_rotate_mb", own))
        kept = int(said["titanic_predictions_keep_mb"]) + 4 * rotated
        disks = {v["name"]: v["emptyDir"] for v in template["spec"]["volumes"] if "emptyDir" in v}
        size = disks["store"]["sizeLimit"] if disks else container["resources"]["limits"]["memory"]
        assert kept <= int(size[:-2]) * MEGABYTES[size[-2:]] / (1 if disks else 4)
        assert int(said["titanic_predictions_keep_days"]) > 0


def test_a_service_called_titanic_is_no_unknown_setting(monkeypatch: pytest.MonkeyPatch):
    "Kubernetes tells its pods where the Services are, in variables of the Services' names."
    for service in ("TITANIC", "TITANIC_HEAD_SVC"):
        for name, value in {
            "SERVICE_HOST": "10.0.0.1",
            "SERVICE_PORT": "80",
            "SERVICE_PORT_HTTP": "80",
            "PORT": "tcp://10.0.0.1:80",
            "PORT_80_TCP": "tcp://10.0.0.1:80",
            "PORT_80_TCP_PROTO": "tcp",
            "PORT_80_TCP_PORT": "80",
            "PORT_80_TCP_ADDR": "10.0.0.1",
        }.items():
            monkeypatch.setenv(f"{service}_{name}", value)
    settings()
    for file in (DEPLOY / "gke" / "deployment.yaml", DEPLOY / "ray" / "rayservice.yaml"):
        for template in pods(documents(file)[0]):
            assert template["spec"]["enableServiceLinks"] is False


def test_a_port_of_ours_would_be_an_unknown_setting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TITANIC_PORT", "8080")
    with pytest.raises(SettingsError, match="unknown setting TITANIC_PORT"):
        settings()


def test_selectors_find_the_pods():
    labels = pods(documents(DEPLOY / "gke" / "deployment.yaml")[0])[0]["metadata"]["labels"]
    for name, path in {
        "service": ("spec", "selector"),
        "disruption-budget": ("spec", "selector", "matchLabels"),
        "network-policy": ("spec", "podSelector", "matchLabels"),
        "pod-monitoring": ("spec", "selector", "matchLabels"),
    }.items():
        said = documents(DEPLOY / "gke" / f"{name}.yaml")[0]
        for key in path:
            said = said[key]
        assert said.items() <= labels.items(), name


RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_the_scraper_of_the_cluster_has_a_key():
    "The server's metrics need one, and an annotation can carry none."
    monitoring, role, binding = documents(DEPLOY / "gke" / "pod-monitoring.yaml")
    pod = pods(documents(DEPLOY / "gke" / "deployment.yaml")[0])[0]
    assert "annotations" not in pod["metadata"]
    (endpoint,) = monitoring["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
    secret = endpoint["authorization"]["credentials"]["secret"]["name"]
    assert (
        role["rules"][0]["resourceNames"] == [secret]
        and binding["roleRef"]["name"] == role["metadata"]["name"]
    )


def test_ray_runs_where_the_namespace_restricts_pods():
    "Every container says so, the autoscaler's, which KubeRay adds, too; only the pod of that one has a token."
    said = documents(DEPLOY / "ray" / "rayservice.yaml")[0]
    cluster = said["spec"]["rayClusterConfig"]
    assert cluster["autoscalerOptions"]["securityContext"] == RESTRICTED
    head, *workers = pods(said)
    assert head["spec"]["automountServiceAccountToken"] is True
    for pod in (head, *workers):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert all(container["securityContext"] == RESTRICTED for container in pod["spec"]["containers"])
    assert workers and not any(pod["spec"]["automountServiceAccountToken"] for pod in workers)


def test_ray_is_asked_for_its_health_without_wget():
    "KubeRay adds a probe of its own where there is none, and that one calls wget, which the image lacks."
    for pod in pods(documents(DEPLOY / "ray" / "rayservice.yaml")[0]):
        container = pod["spec"]["containers"][0]
        for name in ("livenessProbe", "readinessProbe"):
            assert set(container[name]) > {"httpGet", "periodSeconds"}
    text = (DEPLOY / "Dockerfile").read_text()
    assert "/opt/titanic/bin:$PATH' > /etc/profile.d/" in text  # KubeRay starts `ray` in a login shell


def test_ray_pods_reach_one_another_and_no_other_policy_holds_them():
    labels = pods(documents(DEPLOY / "ray" / "rayservice.yaml")[0])[0]["metadata"]["labels"]
    own = documents(DEPLOY / "ray" / "network-policy.yaml")[0]["spec"]
    other = documents(DEPLOY / "gke" / "network-policy.yaml")[0]["spec"]
    assert own["podSelector"]["matchLabels"].items() <= labels.items()
    assert not other["podSelector"]["matchLabels"].items() <= labels.items()
    for way, peers in (("ingress", "from"), ("egress", "to")):
        assert {peers: [{"podSelector": own["podSelector"]}]} in own[way]
    assert {"ports": [{"port": 8000}]} in own["ingress"]
    operator = [rule for rule in own["ingress"] if "kuberay-operator" in str(rule)]
    assert [{port["port"] for port in rule["ports"]} for rule in operator] == [{8265, 52365}]
    assert all(rule in own["egress"] for rule in other["egress"])


def test_no_secret_and_no_own_address_is_written_down():
    for file in DEPLOY.rglob("*"):
        if file.is_file():
            text = file.read_text()
            assert not re.search(r"BEGIN [A-Z ]*PRIVATE KEY|AIza[0-9A-Za-z_-]{30}|tk_[0-9A-Za-z_-]{20}", text)
            assert "latest" not in re.findall(r"image: \S+:(\w+)", text)


def test_the_image_installs_locked_packages_only():
    "Each installation names its lock and demands hashes; the server's lock has nothing of the pipeline."
    said = (DEPLOY / "Dockerfile").read_text()
    installs = [line for line in said.replace("\\\n", " ").splitlines() if "pip install" in line]
    assert installs and all("--require-hashes" in line and "--no-deps" in line for line in installs)
    assert "USER 10001" in said and "exec titanic serve" in said
    for surface, wanted in (("serve", {"onnxruntime", "fastapi"}), ("ray", {"onnxruntime", "ray"})):
        lock = (ROOT / "requirements" / f"{surface}.lock").read_text()
        names = set(re.findall(r"^([a-z0-9.-]+)(?:\[[a-z,]+\])?==", lock, re.M))
        assert wanted <= names
        pipeline = {"scikit-learn", "mlflow", "prefect", "great-expectations", "pandera"}
        assert not names & (pipeline | ({"pandas"} if surface == "serve" else set()))  # Ray Data has pandas


# --- Prometheus and Grafana


OBSERVE = DEPLOY / "observe"
NAME = r"\b(?:titanic_[a-z0-9_]+|up)\b"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    "What a server shows at /metrics after some requests and a look of the watcher: name -> values of the label `of`."
    from prometheus_client.parser import text_string_to_metric_families
    from starlette.testclient import TestClient

    from titanic_mlops.serve.app import create_app
    from titanic_mlops.serve.models import Models
    from titanic_mlops.serve.predictions import PredictionLog
    from titanic_mlops.serve.watched import Watched

    store = tmp_path_factory.mktemp("observed")
    finding = {"column": "fare", "test": "ks", "adjusted": 0.0, "size": 1.0, "moved": True, "says": ""}
    figures = {name: {"value": 0.5} for name in ("log_loss", "accuracy")}
    said = {"looked": 1.0, "since": "", "hours": 1, "rows": 1, "bundle": "", "findings": [finding]}
    said |= {"expected": figures, "performance": {"figures": figures, "holdout": figures}}
    file = Watched(store).latest
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(said))
    log = PredictionLog(store / "predictions", say=lambda *_, **__: None)
    app = create_app(Models(), None, log, Settings(store=store))
    app.state.metrics.predicted("1", "champion", True)
    client = TestClient(app)
    client.get("/nowhere")
    found: dict[str, set[str]] = {"up": set()}  # which Prometheus makes itself
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for name in {family.name, *(sample.name for sample in family.samples)}:
            found.setdefault(name, set()).update(s.labels.get("of", "") for s in family.samples)
    log.close()
    return found


def expressions() -> dict[str, str]:
    "Every query of the rules and of the dashboard, by its name."
    rules = yaml.safe_load((OBSERVE / "rules.yml").read_text())
    found = {rule["alert"]: rule["expr"] for group in rules["groups"] for rule in group["rules"]}
    dashboard = json.loads((OBSERVE / "grafana" / "dashboards" / "titanic.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    return found


def test_rules_and_dashboard_name_what_a_server_shows(shown: dict[str, set[str]]):
    said = expressions()
    assert len(said) > 25
    for title, expression in said.items():
        names = re.findall(NAME, expression)
        assert names, title
        for name in names:
            assert name in shown, f"{title}: no server shows {name}"
        for name, of in re.findall(r'(titanic_\w+)\{of="(\w+)"\}', expression):
            assert of in shown[name], f"{title}: {name} has no {of}"


def test_everything_that_a_watcher_shows_is_looked_at(shown: dict[str, set[str]]):
    looked_at = set(re.findall(NAME, " ".join(expressions().values())))
    assert {name for name in shown if name.startswith("titanic_watch_")} - looked_at == {
        "titanic_watch_outcomes"
    }


def test_every_rule_says_what_to_do_and_is_tried():
    rules = yaml.safe_load((OBSERVE / "rules.yml").read_text())
    said = [rule for group in rules["groups"] for rule in group["rules"]]
    cases = yaml.safe_load((OBSERVE / "rules_test.yml").read_text())["tests"]
    tried = [case for one in cases for case in one["alert_rule_test"]]
    for rule in said:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"] and rule["annotations"]["do"], rule["alert"]
        own = [bool(case.get("exp_alerts")) for case in tried if case["alertname"] == rule["alert"]]
        assert {True, False} <= set(own), f"{rule['alert']} is tried both ways"


def test_what_the_rules_say_to_do_exists():
    from typer.main import get_command

    from titanic_mlops.face.cli import app

    command = get_command(app)
    text = (OBSERVE / "rules.yml").read_text()
    for words in re.findall(r"titanic ([a-z]+(?: [a-z]+)?)", text):
        first, *rest = words.split()
        assert first in command.commands, words
        below = getattr(command.commands[first], "commands", {})
        assert not below or rest[0] in below, words
    for name, option in re.findall(r"titanic ([a-z]+) (--[a-z-]+)", text):
        assert option in {o for p in command.commands[name].params for o in p.opts}, f"{name} {option}"


def test_promtool_is_content(tmp_path: Path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    own = tmp_path / "observe"
    shutil.copytree(OBSERVE, own)
    (own / "titanic.key").touch()
    for command in (("check", "config", "prometheus.yml"), ("test", "rules", "rules_test.yml")):
        done = subprocess.run([promtool, *command], cwd=own, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_provisioned_hangs_together():
    compose = yaml.safe_load((OBSERVE / "compose.yml").read_text())["services"]
    for service in compose.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (OBSERVE / source).is_dir(), volume
        assert service["network_mode"] == "host" and "ports" not in service
    provisioned = OBSERVE / "grafana" / "provisioning"
    source = yaml.safe_load((provisioned / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    assert "--web.listen-address=127.0.0.1:9090" in compose["prometheus"]["command"]
    assert compose["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert source["url"] == "http://127.0.0.1:9090"
    asked = yaml.safe_load((OBSERVE / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"]
    assert asked == [
        {"targets": ["127.0.0.1:8080"]}
    ]  # where `titanic serve` listens, and no other name is let in
    folder = yaml.safe_load((provisioned / "dashboards" / "titanic.yml").read_text())["providers"][0]
    assert any(volume.split(":")[1] == folder["options"]["path"] for volume in compose["grafana"]["volumes"])
    dashboard = json.loads((OBSERVE / "grafana" / "dashboards" / "titanic.json").read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == source["uid"]
