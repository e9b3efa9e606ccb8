"""The schemas of Kubernetes and of the operators, in which unknown fields are refused."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema

from tests.deploy.rendered import ROOT, Object

SCHEMAS = ROOT.parent / "shared" / "data"


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
