"""Who reaches whom: the network policies, read as Kubernetes does, over every pair of pods and every port."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from tests.deploy.rendered import OVERLAYS, Object, Pod, needs_kubectl, of_kind, pods, render, selects

pytestmark = [needs_kubectl]
OWN = {"kubernetes.io/metadata.name": "tandem"}


@dataclass(frozen=True, slots=True)
class End:
    """One end of a connection. `ports` by name, `namespace` its labels."""

    name: str
    labels: Mapping[str, str]
    namespace: Mapping[str, str] = field(default_factory=lambda: OWN)
    ports: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, pod: Pod) -> End:
        return cls(pod.labels["app.kubernetes.io/component"], pod.labels, ports=pod.ports())


CLIENT = End("client", {"app": "chat"})
STRANGER = End("stranger", {"app": "chat"}, {"kubernetes.io/metadata.name": "other"})
GUEST = End("guest", {"app": "ingress"}, {"kubernetes.io/metadata.name": "web", "tandem-clients": "allowed"})
# Who takes the name of a worker in another namespace is none.
IMPOSTOR = End(
    "impostor",
    {
        "app.kubernetes.io/name": "tandem",
        "app.kubernetes.io/component": "decode",
        "tandem-pool": "workers",
    },
    {"kubernetes.io/metadata.name": "other"},
)
PROMETHEUS = End("prometheus", {"app.kubernetes.io/name": "prometheus"}, {"kubernetes.io/metadata.name": "monitoring"})
OPERATOR = End("operator", {"app.kubernetes.io/name": "kuberay-operator"}, {"kubernetes.io/metadata.name": "kuberay"})
DNS = End("dns", {"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"}, {"dns": 53})
OUTSIDE = (CLIENT, STRANGER, GUEST, IMPOSTOR, PROMETHEUS, OPERATOR, DNS)


def allows(overlay: str, source: End, target: End, port: int) -> bool:
    """Whether a connection passes: out of the one, if it is restricted, and into the other, if that is."""
    policies = of_kind(render(overlay), "NetworkPolicy")
    ways = (("Egress", "egress", "to", source, target), ("Ingress", "ingress", "from", target, source))
    for kind, rules, peers, own, other in ways:
        mine = [
            policy["spec"]
            for policy in policies
            if own.namespace == OWN
            and selects(policy["spec"]["podSelector"], own.labels)
            and kind in policy["spec"]["policyTypes"]
        ]
        passes = (
            _is_peer(rule.get(peers), other) and _has_port(rule.get("ports"), target, port)
            for spec in mine
            for rule in spec.get(rules, ())
        )
        if mine and not any(passes):
            return False
    return True


def _is_peer(peers: list[Object] | None, end: End) -> bool:
    if peers is None:
        return True
    for peer in peers:
        assert peer.keys() <= {"podSelector", "namespaceSelector"}
        in_namespace = end.namespace == OWN
        if "namespaceSelector" in peer:
            in_namespace = selects(peer["namespaceSelector"], end.namespace)
        if in_namespace and selects(peer.get("podSelector", {}), end.labels):
            return True
    return False


def _has_port(ports: list[Object] | None, target: End, port: int) -> bool:
    if ports is None:
        return True
    numbers = [target.ports.get(each["port"]) if isinstance(each["port"], str) else each["port"] for each in ports]
    return port in numbers


def flows(overlay: str) -> set[str]:
    """Every connection that passes, as "source > target:port's name"."""
    inside = [End.of(pod) for pod in pods(render(overlay))]
    ends = [*inside, *OUTSIDE]
    return {
        f"{source.name} > {target.name}:{name}"
        for source in ends
        for target in ends
        if source in inside or target in inside
        for name, port in target.ports.items()
        if allows(overlay, source, target, port)
    }


CLIENTS = {f"{who} > gateway:{port}" for who in ("client", "guest") for port in ("grpc", "http")}
NAMES = {f"{who} > dns:dns" for who in ("gateway", "prefill", "decode")}


@pytest.mark.parametrize("overlay", ["cpu-demo", "gpu"])
def test_only_workers_and_their_gateway_reach_a_workers_port(overlay: str) -> None:
    scraped = {"prometheus > gateway:http"} if overlay == "gpu" else set()
    workers = {f"{one} > {other}:kv" for one in ("prefill", "decode") for other in ("prefill", "decode")}
    gateway = {f"gateway > {worker}:kv" for worker in ("prefill", "decode")}
    reports = {f"{worker} > gateway:reports" for worker in ("prefill", "decode")}
    assert flows(overlay) == CLIENTS | NAMES | scraped | workers | gateway | reports


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name.startswith("ray")])
def test_ray_is_reached_by_its_own_nodes_only(overlay: str) -> None:
    inside = [End.of(pod) for pod in pods(render(overlay))]
    own = {f"{one.name} > {other.name}:{port}" for one in inside for other in inside for port in other.ports}
    scraped = set() if overlay == "ray-cpu-demo" else {"prometheus > gateway:http"}
    assert flows(overlay) == CLIENTS | NAMES | scraped | own | {"operator > gateway:dashboard"}
    # Workers listen at ports of their own choice: for each other, and for the gateway on the head.
    gateway, prefill, decode = sorted(inside, key=lambda end: ("gateway", "prefill", "decode").index(end.name))
    assert allows(overlay, decode, prefill, 40123)
    assert allows(overlay, gateway, decode, 40123)
    assert not any(allows(overlay, end, prefill, 40123) for end in OUTSIDE)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_leads_out(overlay: str) -> None:
    internet = End("internet", {}, {}, {"https": 443})
    assert not any(allows(overlay, End.of(pod), internet, 443) for pod in pods(render(overlay)))
