"""The manifests as kustomize renders them, and what tests ask of them."""

from __future__ import annotations

import functools
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("cpu-demo", "gpu", "ray-cpu-demo", "ray-gpu", "ray-service")
# The first kustomize with everything that is used here; kubectl has had it since 1.28.
KUSTOMIZE = (5, 0)

Object = dict[str, Any]


@functools.cache
def why_not() -> str:
    """Why nothing can be rendered on this machine, "" where it can."""
    if shutil.which("kubectl") is None:
        return "there is no kubectl here"
    said = subprocess.run(["kubectl", "version", "--client"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"Kustomize Version: v(\d+)\.(\d+)", said)
    if found is None or (int(found[1]), int(found[2])) < KUSTOMIZE:
        return f"kubectl has no kustomize of {KUSTOMIZE[0]}.{KUSTOMIZE[1]} or later: {said!r}"
    return ""


needs_kubectl = pytest.mark.skipif(bool(why_not()), reason=why_not() or "kubectl is there")


@functools.cache
def render(overlay: str) -> tuple[Object, ...]:
    """Every object of an overlay."""
    return render_folder(KUBERNETES / "overlays" / overlay)


def render_folder(folder: Path) -> tuple[Object, ...]:
    """Every object of the overlay in a folder."""
    command = ["kubectl", "kustomize", str(folder)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(yaml.safe_load_all(text))


def of_kind(objects: tuple[Object, ...], kind: str) -> list[Object]:
    return [found for found in objects if found["kind"] == kind]


def named(objects: tuple[Object, ...], kind: str, name: str) -> Object:
    (found,) = [each for each in of_kind(objects, kind) if each["metadata"]["name"] == name]
    return found


@dataclass(frozen=True, slots=True)
class Pod:
    """A template of pods: `owner` is the object that makes them."""

    name: str
    owner: str
    labels: Mapping[str, str]
    spec: Object
    is_scalable: bool

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for each in self.containers for port in each.get("ports", ())}


def pods(objects: tuple[Object, ...]) -> list[Pod]:
    """Those that the objects of one overlay lead to."""
    return [pod for each in objects for pod in _pods_of(each)]


def _pods_of(found: Object) -> Iterator[Pod]:
    name, spec = found["metadata"]["name"], found.get("spec", {})
    if found["kind"] == "Deployment":
        yield _pod(name, "Deployment", spec["template"], is_scalable=True)
    if found["kind"] in ("RayCluster", "RayService"):
        cluster = spec if found["kind"] == "RayCluster" else spec["rayClusterConfig"]
        yield _pod(f"{name}-head", found["kind"], cluster["headGroupSpec"]["template"])
        for group in cluster["workerGroupSpecs"]:
            yield _pod(f"{name}-{group['groupName']}", found["kind"], group["template"])


def _pod(name: str, owner: str, template: Object, *, is_scalable: bool = False) -> Pod:
    return Pod(name, owner, template["metadata"]["labels"], template["spec"], is_scalable)


def selects(selector: Object | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector of Kubernetes matches. An empty one matches everything, none matches nothing."""
    if selector is None:
        return False
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for wanted in selector.get("matchExpressions", ()):
        is_in = labels.get(wanted["key"]) in wanted["values"]
        assert wanted["operator"] in ("In", "NotIn"), wanted
        if is_in != (wanted["operator"] == "In"):
            return False
    return True


def commands(container: Object) -> list[list[str]]:
    """What of Tandem a container runs: itself, and its probes. The image's entrypoint is `tandem`."""
    found = []
    if "command" not in container and "args" in container:
        found.append(list(container["args"]))
    texts = [[*container.get("command", ()), *container.get("args", ())]]
    texts += [
        container[probe]["exec"]["command"]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe")
        if "exec" in container.get(probe, {})
    ]
    for words in texts:
        for call in re.findall(r"exec tandem (.*)", words[-1] if words[:2] == ["sh", "-c"] else ""):
            found.append(shlex.split(call))
    return found


def config_text(objects: tuple[Object, ...]) -> str:
    """The configuration that an overlay's pods read."""
    (found,) = of_kind(objects, "ConfigMap")
    text = found["data"]["tandem.yaml"]
    assert isinstance(text, str)
    return text
