"""What cert-manager is asked for is what Tandem's ports want to see."""

from __future__ import annotations

import pytest

from cluster.security.names import GATEWAY_NAME, WORKER_NAME
from kvtransfer.rpc_tls import FILES
from tests.deploy.rendered import Object, Pod, named, needs_kubectl, of_kind, pods, render

pytestmark = [needs_kubectl]
OVERLAYS = ("gpu", "ray-gpu", "ray-service")
KNOWN = {
    "commonName",
    "dnsNames",
    "duration",
    "isCA",
    "issuerRef",
    "privateKey",
    "renewBefore",
    "secretName",
    "usages",
}


def hours(text: str) -> int:
    assert text.endswith("h")
    return int(text[:-1])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_objects_are_complete(overlay: str) -> None:
    objects = render(overlay)
    issuers = {each["metadata"]["name"]: each["spec"] for each in of_kind(objects, "Issuer")}
    assert [list(spec) for spec in issuers.values()] == [["ca"], ["selfSigned"]]
    for each in of_kind(objects, "Certificate"):
        spec = each["spec"]
        assert each["apiVersion"] == "cert-manager.io/v1"
        assert set(spec) <= KNOWN
        assert spec["issuerRef"].items() >= {"group": "cert-manager.io", "kind": "Issuer"}.items()
        assert spec["issuerRef"]["name"] in issuers
        assert hours(spec["renewBefore"]) < hours(spec["duration"])
        assert (spec["privateKey"]["algorithm"], spec["privateKey"]["size"]) == ("ECDSA", 256)
    signed_by = named(objects, "Certificate", "tandem-ca")["spec"]
    assert signed_by["isCA"] is True
    assert issuers["tandem-ca"]["ca"]["secretName"] == signed_by["secretName"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_end_shows_the_name_that_the_other_asks_for(overlay: str) -> None:
    objects = render(overlay)
    gateway, worker = (named(objects, "Certificate", f"tandem-{role}")["spec"] for role in ("gateway", "worker"))
    clients = named(objects, "Certificate", "tandem-clients")["spec"]
    assert gateway["dnsNames"] == [GATEWAY_NAME]
    assert worker["dnsNames"] == [WORKER_NAME]
    # Both ends call, and both are called.
    assert {"server auth", "client auth"} <= set(gateway["usages"]) & set(worker["usages"])
    # What clients are shown must open no door inside.
    assert not {GATEWAY_NAME, WORKER_NAME} & set(clients["dnsNames"])
    assert "client auth" not in clients["usages"]
    service = named(objects, "Service", "tandem")["metadata"]
    assert f"{service['name']}.{service['namespace']}.svc" in clients["dnsNames"]


def mounted(pod: Pod, container: Object) -> dict[str, str]:
    """Which secret is at which folder."""
    secrets = {volume["name"]: volume["secret"]["secretName"] for volume in pod.spec["volumes"] if "secret" in volume}
    return {
        mount["mountPath"]: secrets[mount["name"]] for mount in container["volumeMounts"] if mount["name"] in secrets
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_part_has_the_keys_of_another(overlay: str) -> None:
    assert FILES == ("ca.crt", "tls.crt", "tls.key"), "those of a secret that cert-manager fills"
    for pod in pods(render(overlay)):
        for container in pod.containers:
            at = mounted(pod, container)
            if pod.labels["app.kubernetes.io/component"] != "gateway":
                assert at == {"/certs/worker": "tandem-worker-certs"}
            elif container["name"] == "gateway":
                assert at == {
                    "/certs/gateway": "tandem-gateway-certs",
                    "/certs/clients": "tandem-clients-certs",
                    "/auth": "tandem-auth",
                }
            else:
                # Ray's own container, which reads who signed the clients' certificate for a RayService.
                assert set(at.values()) <= {"tandem-clients-certs"}
