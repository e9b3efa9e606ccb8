"""Every object against the schemas of Kubernetes and of the operators, with unknown fields refused."""

from __future__ import annotations

import pytest

from tests.deploy.rendered import OVERLAYS, needs_kubectl, of_kind, render
from tests.deploy.schemas import SCHEMAS, problems

pytestmark = [
    needs_kubectl,
    pytest.mark.skipif(not SCHEMAS.is_dir(), reason=f"there are no schemas in {SCHEMAS}"),
]
# cert-manager's, of which there is none here: https://cert-manager.io/docs/reference/api-docs
BY_HAND = {"Certificate", "Issuer"}


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
