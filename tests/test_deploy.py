"""What lies under deploy/: manifests against their schemas, and against the code that they start."""

import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from titanic_mlops.ground.settings import Settings

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


def test_selectors_find_the_pods():
    labels = pods(documents(DEPLOY / "gke" / "deployment.yaml")[0])[0]["metadata"]["labels"]
    for name, path in {
        "service": ("spec", "selector"),
        "disruption-budget": ("spec", "selector", "matchLabels"),
        "network-policy": ("spec", "podSelector", "matchLabels"),
    }.items():
        said = documents(DEPLOY / "gke" / f"{name}.yaml")[0]
        for key in path:
            said = said[key]
        assert said.items() <= labels.items(), name


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
