"""Overlays with components left out, as docs/kubernetes.md says how: what stays is whole."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import TandemConfig
from tests.deploy.rendered import KUBERNETES, ROOT, Object, config_text, needs_kubectl, of_kind, pods, render_folder

pytestmark = [needs_kubectl]
PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
# Of each component: what it says is to be deleted.
[TABLE] = re.findall(r"^\| without \| .*\n\|-+\|-+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
WITHOUT = dict(re.findall(r"^\| `([\w-]+)` \| (.*) \|$", TABLE, re.MULTILINE))
LEFT_OUT = (
    ("certificates",),
    ("api-keys",),
    ("models",),
    ("monitoring", "autoscaling"),
    ("autoscaling",),
    ("certificates", "api-keys"),
    tuple(WITHOUT),
)


def components(overlay: Path) -> list[str]:
    lines = yaml.safe_load((overlay / "kustomization.yaml").read_text())["components"]
    return [Path(line).name for line in lines]


def leave_out(overlay: Path, names: tuple[str, ...]) -> None:
    """As the page says."""
    kustomization, config = overlay / "kustomization.yaml", overlay / "tandem.yaml"
    text = kustomization.read_text()
    values: dict[str, Any] = yaml.safe_load(config.read_text())
    for name in names:
        text = text.replace(f"  - ../../components/{name}\n", "")
        for key in re.findall(r"`((?:engine|gateway|security)[\w.]*)`", WITHOUT[name].partition(";")[0]):
            *sections, last = key.split(".")
            section = values
            for each in sections:
                section = section[each]
            del section[last]
    kustomization.write_text(text)
    config.write_text(yaml.safe_dump(values))


@pytest.fixture
def kubernetes(tmp_path: Path) -> Path:
    return Path(shutil.copytree(KUBERNETES, tmp_path / "kubernetes"))


def test_the_page_names_every_component() -> None:
    used = {name for overlay in ("gpu", "ray-gpu") for name in components(KUBERNETES / "overlays" / overlay)}
    assert WITHOUT.keys() == used


@pytest.mark.parametrize("names", LEFT_OUT, ids=" ".join)
@pytest.mark.parametrize("overlay", ["gpu", "ray-gpu", "ray-service"])
def test_what_stays_is_whole(kubernetes: Path, overlay: str, names: tuple[str, ...]) -> None:
    if overlay == "ray-service" and "certificates" in names:
        pytest.skip("the page says that it needs them")
    leave_out(kubernetes / "overlays" / ("gpu" if overlay == "gpu" else "ray-gpu"), names)
    objects = render_folder(kubernetes / "overlays" / overlay)
    config = TandemConfig.model_validate(yaml.safe_load(config_text(objects)))
    has_certs, has_keys = "certificates" not in names, "api-keys" not in names
    assert (config.security.client_certs is not None) == has_certs
    assert config.gateway.auth.is_required == has_keys
    by_hand = {"tandem-auth"} if has_keys else set()
    check_volumes(objects, by_hand)
    for service in of_kind(objects, "Service"):
        for port in service["spec"]["ports"]:
            is_clear_grpc = port.get("appProtocol") == "kubernetes.io/h2c"
            assert is_clear_grpc == (not has_certs and port["name"] in ("grpc", "reports"))
    for pod in pods(objects):
        for container in pod.containers:
            if container["name"] in ("gateway", "worker"):
                for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                    assert ("grpc" in container[probe]) == (not has_certs)
    monitors = of_kind(objects, "PodMonitor")
    assert len(monitors) == ("monitoring" not in names)
    for monitor in monitors:
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert (endpoint.get("scheme"), "tlsConfig" in endpoint) == (("https", True) if has_certs else (None, False))
        assert ("authorization" in endpoint) == has_keys
    for deployment in of_kind(objects, "Deployment"):
        is_scaled = "autoscaling" not in names and deployment["metadata"]["name"] != "tandem-gateway"
        assert ("replicas" in deployment["spec"]) == (not is_scaled)


def check_volumes(objects: tuple[Object, ...], by_hand: set[str]) -> None:
    """Every mount has its volume, and every volume what it is of."""
    secrets = {each["spec"]["secretName"] for each in of_kind(objects, "Certificate")} | by_hand
    claims = {each["metadata"]["name"] for each in of_kind(objects, "PersistentVolumeClaim")}
    for pod in pods(objects):
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        assert {mount["name"] for each in pod.containers for mount in each["volumeMounts"]} == volumes.keys()
        for volume in volumes.values():
            if "secret" in volume:
                assert volume["secret"]["secretName"] in secrets
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
