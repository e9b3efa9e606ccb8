"""Every object against the schemas of Kubernetes and of the operators, with unknown fields refused."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from tests.deploy.rendered import OVERLAYS, ROOT, Object, needs_kubectl, of_kind, render

SCHEMAS = ROOT.parent / "shared" / "data"
pytestmark = [
    needs_kubectl,
    pytest.mark.skipif(not SCHEMAS.is_dir(), reason=f"there are no schemas in {SCHEMAS}"),
]
# cert-manager's, of which there is none here: https://cert-manager.io/docs/reference/api-docs
BY_HAND = {"Certificate", "Issuer"}


def schema_file(found: Object) -> Path:
    group, _, version = found["apiVersion"].rpartition("/")
    kind = found["kind"].lower()
    if group.endswith((".coreos.com", "ray.io")):
        return SCHEMAS / "crds" / "schemas" / group / f"{kind}_{version}.json"
    short = group.removesuffix(".k8s.io").split(".")[0]
    name = "-".join(part for part in (kind, short, version) if part)
    return SCHEMAS / "k8s-schemas" / "v1.36.0-strict" / f"{name}.json"


def problems(found: Object) -> list[str]:
    validator = jsonschema.Draft7Validator(json.loads(schema_file(found).read_text()))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(found)]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(overlay: str) -> None:
    objects = [each for each in render(overlay) if each["kind"] not in BY_HAND]
    assert len(objects) >= 10
    assert {each["metadata"]["name"]: wrong for each in objects if (wrong := problems(each))} == {}


def test_the_schemas_refuse_what_is_misspelt() -> None:
    (service, *_) = of_kind(render("cpu-demo"), "Service")
    assert problems({**service, "spec": {**service["spec"], "selektor": {}}}) != []
    (cluster,) = of_kind(render("ray-cpu-demo"), "RayCluster")
    assert problems({**cluster, "spec": {**cluster["spec"], "headGroup": {}}}) != []
