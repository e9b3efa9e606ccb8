"""What kube-linter and the strictest pod security profile ask of manifests; each rule with what it is for."""

from __future__ import annotations

from typing import Any

import pytest

from tests.deploy.rendered import OVERLAYS, Object, Pod, needs_kubectl, of_kind, pods, render, selects

pytestmark = [needs_kubectl, pytest.mark.parametrize("overlay", OVERLAYS)]


def containers(overlay: str) -> list[tuple[Pod, Object]]:
    return [(pod, container) for pod in pods(render(overlay)) for container in pod.containers]


def test_images_have_a_version(overlay: str) -> None:
    for _, container in containers(overlay):
        name, _, tag = container["image"].rpartition(":")
        assert name.endswith("tandem")
        assert tag.startswith("0.1.0-")


def test_cpu_and_memory_are_asked_for_and_bounded(overlay: str) -> None:
    for pod, container in containers(overlay):
        for bound in ("requests", "limits"):
            assert container["resources"][bound].keys() >= {"cpu", "memory"}, (pod.name, container["name"])


def test_there_are_probes_and_their_ports_exist(overlay: str) -> None:
    for pod, container in containers(overlay):
        own = {port["name"]: port["containerPort"] for port in container["ports"]}
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = container[kind]
            (how,) = probe.keys() & {"grpc", "httpGet", "exec"}
            if how == "grpc":
                assert probe["grpc"]["port"] in own.values()
            elif how == "httpGet":
                port = probe["httpGet"]["port"]
                # Of Ray's agent, at the port that every node of Ray has.
                assert port in (*own, 52365), (pod.name, port)
            else:
                (call,) = [word for word in probe["exec"]["command"] if "tandem health" in word]
                assert f'--url "$POD_IP:{own["kv"]}"' in call
                assert "POD_IP" in {variable["name"] for variable in container["env"]}


def test_probes_can_be_answered(overlay: str) -> None:
    """The kubelet shows no certificate and speaks no TLS with gRPC: no such probe where there is a certificate."""
    for pod, container in containers(overlay):
        if any(mount["mountPath"].startswith("/certs/") for mount in container["volumeMounts"]):
            assert not any("grpc" in container[kind] for kind in ("startupProbe", "livenessProbe", "readinessProbe"))
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                get: Any = container[kind].get("httpGet", {"scheme": "HTTPS"})
                assert get.get("scheme") == "HTTPS" or get["port"] == 52365, (pod.name, kind)


def test_nothing_runs_as_root_or_could_become_it(overlay: str) -> None:
    for pod in pods(render(overlay)):
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0 < context["runAsGroup"]
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_nothing_of_the_node_is_shared(overlay: str) -> None:
    for pod in pods(render(overlay)):
        assert not pod.spec.keys() & {"hostNetwork", "hostPID", "hostIPC", "hostAliases"}
        kinds = {kind for volume in pod.spec["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"configMap", "emptyDir", "secret", "persistentVolumeClaim"}
        assert not any("hostPort" in port for container in pod.containers for port in container["ports"])


def test_a_driver_beside_ray_shares_what_it_is_found_by(overlay: str) -> None:
    """A driver looks for the raylet among the processes that it sees, and for its sockets in Ray's folder."""
    for pod in pods(render(overlay)):
        if len(pod.containers) > 1:
            assert pod.spec["shareProcessNamespace"] is True
            shared = [{mount["mountPath"]: mount["name"] for mount in each["volumeMounts"]} for each in pod.containers]
            assert len({(mounts["/tmp"], mounts["/tmp/ray"], mounts["/dev/shm"]) for mounts in shared}) == 1


def test_what_is_written_is_a_volume_with_an_end(overlay: str) -> None:
    for pod in pods(render(overlay)):
        for volume in pod.spec["volumes"]:
            if "emptyDir" in volume:
                assert "sizeLimit" in volume["emptyDir"], (pod.name, volume)
        names = {volume["name"] for volume in pod.spec["volumes"]}
        for container in pod.containers:
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert "/tmp" in mounts
            assert {mount["name"] for mount in mounts.values()} <= names
            for path, mount in mounts.items():
                assert mount.get("readOnly") or path in ("/tmp", "/tmp/ray", "/dev/shm")
        assert names == {mount["name"] for container in pod.containers for mount in container["volumeMounts"]}


def test_nobody_may_ask_kubernetes_anything(overlay: str) -> None:
    objects = render(overlay)
    (account,) = of_kind(objects, "ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    for pod in pods(objects):
        assert pod.spec["serviceAccountName"] == account["metadata"]["name"]
        assert pod.spec["automountServiceAccountToken"] is False
        assert pod.spec["enableServiceLinks"] is False
    kinds = {each["kind"] for each in objects}
    assert not kinds & {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}


def test_secrets_come_as_files_or_by_reference(overlay: str) -> None:
    for _, container in containers(overlay):
        for variable in container.get("env", ()):
            assert "TOKEN" not in variable["name"] or "secretKeyRef" in variable["valueFrom"]
    for pod in pods(render(overlay)):
        assert {volume["secret"]["defaultMode"] for volume in pod.spec["volumes"] if "secret" in volume} <= {0o440}


def test_services_lead_to_pods_that_listen(overlay: str) -> None:
    objects = render(overlay)
    for service in of_kind(objects, "Service"):
        found = [pod for pod in pods(objects) if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)]
        assert [pod.labels["app.kubernetes.io/component"] for pod in found] == ["gateway"]
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in found[0].ports()


def test_deployments_select_their_own_pods_alone(overlay: str) -> None:
    objects = render(overlay)
    for deployment in of_kind(objects, "Deployment"):
        found = [pod.name for pod in pods(objects) if selects(deployment["spec"]["selector"], pod.labels)]
        assert found == [deployment["metadata"]["name"]]


def test_disruption_budgets_leave_room_and_can_be_counted(overlay: str) -> None:
    objects = render(overlay)
    for budget in of_kind(objects, "PodDisruptionBudget"):
        (pod,) = [pod for pod in pods(objects) if selects(budget["spec"]["selector"], pod.labels)]
        if pod.is_scalable:
            assert budget["spec"]["maxUnavailable"] >= 1
        else:
            # Kubernetes knows nothing of how many a RayCluster wants: whole numbers of those that stay, and no other.
            (found,) = [*of_kind(objects, "RayCluster"), *of_kind(objects, "RayService")]
            spec = found["spec"].get("rayClusterConfig", found["spec"])
            counts = {group["groupName"]: group["replicas"] for group in spec["workerGroupSpecs"]}
            assert 1 <= budget["spec"]["minAvailable"] < counts[pod.labels["app.kubernetes.io/component"]]


def test_autoscalers_have_somebody_to_scale(overlay: str) -> None:
    objects = render(overlay)
    recorded = {
        rule["record"]: rule["expr"]
        for each in of_kind(objects, "PrometheusRule")
        for group in each["spec"]["groups"]
        for rule in group["rules"]
        if "record" in rule
    }
    wanted = {"tandem-prefill": "ttft", "tandem-decode": "tpot"}
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        (deployment,) = [
            each
            for each in of_kind(objects, target["kind"])
            if (each["metadata"]["name"], each["apiVersion"]) == (target["name"], target["apiVersion"])
        ]
        # Else applying the overlay again would set back what the autoscaler has decided.
        assert "replicas" not in deployment["spec"]
        (metric,) = scaler["spec"]["metrics"]
        asked = metric["external"]["metric"]
        assert "tandem:attainment_ratio" in recorded[asked["name"]]
        assert asked["selector"]["matchLabels"] == {"objective": wanted[target["name"]]}
        assert scaler["spec"]["minReplicas"] >= 1
    assert len(of_kind(objects, "HorizontalPodAutoscaler")) == (2 if overlay == "gpu" else 0)


def test_metrics_are_scraped_where_they_are(overlay: str) -> None:
    objects = render(overlay)
    for monitor in of_kind(objects, "PodMonitor"):
        (pod,) = [pod for pod in pods(objects) if selects(monitor["spec"]["selector"], pod.labels)]
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")
        assert endpoint["port"] in pod.ports()
        assert endpoint["scheme"] == "https"
        # Where keys are asked for, metrics are for operators.
        assert endpoint["authorization"] == {"credentials": {"name": "tandem-metrics-key", "key": "key"}}
        assert endpoint["tlsConfig"]["ca"]["secret"]["name"] in {
            volume["secret"]["secretName"] for volume in pod.spec["volumes"] if "secret" in volume
        }


def test_the_namespace_takes_no_pod_that_wants_more(overlay: str) -> None:
    (namespace,) = of_kind(render(overlay), "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
