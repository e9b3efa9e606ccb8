"""What the pods run is what Tandem knows: its flags, its configuration, its ports and how long it drains."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from cluster.cli import app
from cluster.config import TandemConfig, load
from cluster.watchdog import END_MARGIN_S
from tests.deploy.rendered import OVERLAYS, Pod, commands, config_text, needs_kubectl, of_kind, pods, render

pytestmark = [needs_kubectl]
CONFIG = "/etc/tandem/tandem.yaml"


def config_of(overlay: str, folder: Path) -> TandemConfig:
    file = folder / "tandem.yaml"
    file.write_text(config_text(render(overlay)))
    return load(file)


def parsed(words: list[str]) -> dict[str, Any]:
    """What the command line makes of a command. Raises for whatever it does not know."""
    group = typer.main.get_command(app)
    command = group.get_command(group.make_context("tandem", list(words)), words[0])  # type: ignore[attr-defined]
    assert command is not None, words
    return dict(command.make_context(words[0], list(words[1:])).params)


def grace_s(pod: Pod) -> int:
    return int(pod.spec["terminationGracePeriodSeconds"])


def pre_stop_s(container: dict[str, Any]) -> int:
    return int(container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_command_is_one_of_tandems(overlay: str) -> None:
    found = [words for pod in pods(render(overlay)) for container in pod.containers for words in commands(container)]
    assert {words[0] for words in found} >= ({"serve"} if overlay.startswith("ray") else {"gateway", "worker"})
    for words in found:
        values = parsed(words)
        if "config" in values:
            assert values["config"] == Path(CONFIG)


def test_the_command_line_refuses_what_it_does_not_know() -> None:
    with pytest.raises(typer.exceptions.TyperException):
        parsed(["gateway", "--konfig", CONFIG])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_configuration_is_mounted_where_it_is_read(overlay: str) -> None:
    for pod in pods(render(overlay)):
        (volume,) = [volume["name"] for volume in pod.spec["volumes"] if "configMap" in volume]
        for container in pod.containers:
            if any("--config" in word for words in commands(container) for word in words):
                mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
                assert mounts[volume] == str(Path(CONFIG).parent)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_configuration_can_be_loaded_and_its_paths_are_mounted(overlay: str, tmp_path: Path) -> None:
    config = config_of(overlay, tmp_path)
    wanted = {
        "gateway": {config.security.gateway_certs, config.security.client_certs, config.gateway.auth.keys_file},
        "worker": {config.security.worker_certs},
        "model": {Path(config.engine.model)} if config.engine.model.startswith("/") else set(),
    }
    for pod in pods(render(overlay)):
        is_gateway = pod.labels["app.kubernetes.io/component"] == "gateway"
        (container,) = [each for each in pod.containers if each["name"] in ("gateway", "worker", "ray-worker")]
        places = {Path(mount["mountPath"]) for mount in container["volumeMounts"]}
        for path in (wanted["gateway" if is_gateway else "worker"] | wanted["model"]) - {None}:
            assert path is not None
            assert {path, *path.parents} & places, f"{pod.name}: nothing is mounted at {path}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_ports_are_those_of_the_configuration(overlay: str, tmp_path: Path) -> None:
    cluster = config_of(overlay, tmp_path).cluster
    objects = render(overlay)
    assert cluster.grpc_host == "0.0.0.0", "others must reach the gateway"
    (gateway,) = [pod for pod in pods(objects) if pod.labels["app.kubernetes.io/component"] == "gateway"]
    ports = {"grpc": cluster.grpc_port, "http": cluster.http_listens_on, "reports": cluster.reports_to_port}
    assert gateway.ports().items() >= ports.items()
    for service in of_kind(objects, "Service"):
        for port in service["spec"]["ports"]:
            assert port["port"] == ports[port["targetPort"]]
    for pod in pods(objects):
        for words in (words for container in pod.containers for words in commands(container)):
            values = parsed(words)
            if words[0] == "worker":
                assert values["port"] == pod.ports()["kv"]
                assert values["gateway"] == f"tandem-registry:{cluster.reports_to_port}"
                assert values["role"] == pod.labels["app.kubernetes.io/component"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_is_given_the_time_that_it_takes_to_drain(overlay: str, tmp_path: Path) -> None:
    drain_s = config_of(overlay, tmp_path).cluster.drain_s
    for pod in pods(render(overlay)):
        for container in pod.containers:
            if container["name"] in ("gateway", "worker"):
                assert grace_s(pod) >= pre_stop_s(container) + drain_s + END_MARGIN_S
            else:
                # Ray outlives the gateway that drains in another container, and is not killed for that.
                assert drain_s + 5 < pre_stop_s(container) < grace_s(pod)
    for service in of_kind(render(overlay), "RayService"):
        assert service["spec"]["rayClusterDeletionDelaySeconds"] >= drain_s


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if "cpu" in name])
def test_workers_have_a_thread_for_each_of_their_cpus(overlay: str, tmp_path: Path) -> None:
    """They would have one for each of the node's otherwise, and be throttled."""
    config = config_of(overlay, tmp_path)
    for pod in pods(render(overlay)):
        for container in pod.containers:
            if container["name"] in ("worker", "ray-worker"):
                assert int(container["resources"]["limits"]["cpu"]) == config.engine.threads
                memory = container["resources"]["limits"]["memory"]
                assert memory.endswith("Gi")
                assert int(memory[:-2]) << 30 >= 4 * config.engine.kv_cache_bytes


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name.startswith("ray")])
def test_ray_has_places_for_all_workers(overlay: str, tmp_path: Path) -> None:
    cluster = config_of(overlay, tmp_path).cluster
    (found,) = [*of_kind(render(overlay), "RayCluster"), *of_kind(render(overlay), "RayService")]
    spec = found["spec"].get("rayClusterConfig", found["spec"])
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    for role, count in (("prefill", cluster.prefill), ("decode", cluster.decode)):
        group = groups[role]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert group["labels"] == cluster.nodes_of(role)
        offered = {"CPU": int(limits["cpu"]), "GPU": int(limits.get("nvidia.com/gpu", 0))}
        asked = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker or 0}
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == count
        assert all(offered[name] >= amount for name, amount in asked.items()), (offered, asked)
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name.startswith("ray")])
def test_ray_is_the_one_that_is_installed(overlay: str) -> None:
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    (found,) = [*of_kind(render(overlay), "RayCluster"), *of_kind(render(overlay), "RayService")]
    spec = found["spec"].get("rayClusterConfig", found["spec"])
    assert f"ray=={spec['rayVersion']}" in pins


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_application_of_ray_serve_is_one(tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    (service,) = of_kind(render("ray-service"), "RayService")
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"])).applications
    module, _, name = application.import_path.partition(":")
    builder = getattr(importlib.import_module(module), name)
    assert builder(application.args) is not None
    config = config_of("ray-service", tmp_path)
    assert application.args == {
        "url": f"https://localhost:{config.cluster.http_listens_on}/ready",
        "ca": f"{config.security.client_certs}/ca.crt",
    }
    from cluster.ray_service import GATEWAY_RESOURCE

    offered = service["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["resources"]
    assert yaml.safe_load(offered.strip("'")) == {GATEWAY_RESOURCE: 1}


def test_the_first_probe_of_a_worker_waits_for_its_model() -> None:
    """Longer than `cluster.start_timeout_s`, by default and in the overlays."""
    for overlay in ("cpu-demo", "gpu"):
        for pod in pods(render(overlay)):
            for container in pod.containers:
                probe = container["startupProbe"]
                allowed_s = probe["periodSeconds"] * probe["failureThreshold"]
                assert allowed_s >= (900 if container["name"] == "worker" else 60)
                assert probe["timeoutSeconds"] <= probe["periodSeconds"]
