"""docs/kubernetes.md, as far as a machine can read it: its commands name overlays, images and secrets that exist."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml

from tests.deploy.rendered import KUBERNETES, OVERLAYS, ROOT, needs_kubectl, of_kind, pods, render
from tests.deploy.schemas import SCHEMAS, problems

PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
DOCKERFILE = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()


def test_every_overlay_is_in_the_table() -> None:
    [table] = re.findall(r"^\| overlay \| .*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE) == list(OVERLAYS)
    for path in re.findall(r"kubectl \w+ -k (\S+)", PAGE):
        assert (ROOT / path).is_relative_to(KUBERNETES / "overlays")
        assert (ROOT / path / "kustomization.yaml").exists(), path


def test_the_images_that_are_built_are_those_that_run() -> None:
    built = {tag: target for target, tag in re.findall(r"--target (\w+) -t (\S+) ", PAGE)}
    used = set()
    for overlay in OVERLAYS[:-1]:
        text = (KUBERNETES / "overlays" / overlay / "kustomization.yaml").read_text()
        names = re.search(r"newName: (\S+)\s+newTag: (\S+)", text)
        assert names is not None
        used.add(f"{names[1]}:{names[2]}")
    assert built.keys() == used
    for tag, target in built.items():
        assert tag.endswith(f"-{target}")
        assert f" AS {target}\n" in DOCKERFILE


@needs_kubectl
def test_the_secrets_that_are_made_are_those_that_are_read() -> None:
    made = set(re.findall(r"create secret generic (\S+)", PAGE))
    asked, issued = set(), set()
    for overlay in OVERLAYS:
        objects = render(overlay)
        issued |= {each["spec"]["secretName"] for each in of_kind(objects, "Certificate")}
        for pod in pods(objects):
            asked |= {volume["secret"]["secretName"] for volume in pod.spec["volumes"] if "secret" in volume}
            for variable in (each for container in pod.containers for each in container.get("env", ())):
                asked |= {variable.get("valueFrom", {}).get("secretKeyRef", {}).get("name")} - {None}
        for monitor in of_kind(objects, "PodMonitor"):
            asked |= {each["authorization"]["credentials"]["name"] for each in monitor["spec"]["podMetricsEndpoints"]}
    assert asked - issued == made


def test_secrets_that_others_read_end_in_no_newline() -> None:
    """As a file of a shell's does: Prometheus and Ray would send it along, in a header that cannot be."""
    manifests = "\n".join(path.read_text() for path in KUBERNETES.rglob("*.yaml"))
    for text in (PAGE, manifests):
        made = dict(re.findall(r"create secret generic (\S+) (.*)", text))
        assert made.keys() == {"tandem-auth", "tandem-metrics-key", "tandem-ray-token"}
        for name in made.keys() - {"tandem-auth"}:
            assert re.fullmatch(r'--from-literal=\w+="\$\(.*\)"', made[name]), name


@pytest.mark.skipif(not SCHEMAS.is_dir(), reason=f"there are no schemas in {SCHEMAS}")
def test_the_alerts_become_an_object_as_it_says() -> None:
    (command,) = re.findall(r"^(\(printf .*\)) \| kubectl apply -f -$", PAGE, re.MULTILINE)
    made = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = yaml.safe_load(made)
    assert found["spec"] == yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text())
    assert problems(found) == []


@needs_kubectl
def test_workers_are_asked_as_often_as_it_says() -> None:
    said = re.search(r"asked every (\d+) s whether it is ready and every minute whether it lives", PAGE)
    assert said is not None
    workers = [pod for pod in pods(render("gpu")) if "tandem-pool" in pod.labels]
    for container in (container for pod in workers for container in pod.containers):
        assert container["readinessProbe"]["periodSeconds"] == int(said[1])
        assert container["livenessProbe"]["periodSeconds"] == 60
