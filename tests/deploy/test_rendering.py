"""Every overlay renders, and is nothing but what the repository says."""

from __future__ import annotations

import pytest
import yaml

from tests.deploy.rendered import KUBERNETES, OVERLAYS, needs_kubectl, of_kind, pods, render

pytestmark = [needs_kubectl]


def test_no_overlay_is_forgotten() -> None:
    assert sorted(path.name for path in (KUBERNETES / "overlays").iterdir()) == sorted(OVERLAYS)


def test_every_file_is_part_of_an_overlay() -> None:
    """Of those that kustomizations name; what they do not name is named here."""
    named = {KUBERNETES / "components" / "autoscaling" / "prometheus-adapter-values.yaml"}
    todo = [KUBERNETES / "overlays" / overlay / "kustomization.yaml" for overlay in OVERLAYS]
    while todo:
        file = todo.pop()
        named.add(file)
        kustomization = yaml.safe_load(file.read_text())
        paths = [*kustomization.get("resources", ()), *kustomization.get("components", ())]
        paths += kustomization.get("configurations", ())
        paths += [patch["path"] for patch in kustomization.get("patches", ()) if "path" in patch]
        paths += [path for maps in kustomization.get("configMapGenerator", ()) for path in maps["files"]]
        for path in ((file.parent / path).resolve() for path in paths):
            if path.is_dir():
                todo.append(path / "kustomization.yaml")
            else:
                named.add(path)
    assert sorted(path for path in KUBERNETES.rglob("*") if path.is_file() and path not in named) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_it_renders_once_each(overlay: str) -> None:
    objects = render(overlay)
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(names) == len(set(names))
    assert of_kind(objects, "Secret") == [], "secrets are made by hand, and never in a repository"
    assert {each["metadata"].get("namespace", "tandem") for each in objects} == {"tandem"}
    assert {pod.labels["app.kubernetes.io/component"] for pod in pods(objects)} == {"gateway", "prefill", "decode"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_change_of_the_configuration_is_a_change_of_the_pods(overlay: str) -> None:
    """The ConfigMap's name carries a hash of what it holds, and every pod names it."""
    objects = render(overlay)
    (config,) = of_kind(objects, "ConfigMap")
    assert config["metadata"]["name"] != "tandem"
    for pod in pods(objects):
        (volume,) = [volume["configMap"] for volume in pod.spec["volumes"] if "configMap" in volume]
        assert volume["name"] == config["metadata"]["name"]


def test_a_ray_service_is_the_ray_cluster_again() -> None:
    (cluster,), (service,) = of_kind(render("ray-gpu"), "RayCluster"), of_kind(render("ray-service"), "RayService")
    expected, got = cluster["spec"], service["spec"]["rayClusterConfig"]
    mounts = got["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    # What Ray Serve's replica reads beside.
    mounts.remove({"name": "clients-certs", "mountPath": "/certs/clients", "readOnly": True})
    assert got == expected
