"""`tandem config`: the configuration described, and files of it checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from cluster.config import TandemConfig, try_load
from cluster.planning.device_profile import device_profile
from cluster.security.clients import Clients
from cluster.security.identity import read_certs
from cluster.security.tenant_salts import tenant_salts
from engine.errors import TandemError

TITLE = "Configuration of Tandem"
HEADER = "| key | type | default | what |\n|---|---|---|---|"


def schema_text() -> str:
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **TandemConfig.model_json_schema()}
    return json.dumps(schema | {"title": TITLE}, indent=2)


def reference_text() -> str:
    """A table for each section, of its keys with dots."""
    schema = TandemConfig.model_json_schema()
    tables = []
    for name, section in schema["properties"].items():
        rows = "\n".join(_rows(section, name, schema["$defs"]))
        tables.append(f"## `{name}`\n\n{HEADER}\n{rows}")
    return "\n\n".join(tables)


def check(path: Path, *, reads_files: bool) -> list[str]:
    """Prints what a file in good order sets; returns what is wrong with another one. Raises ConfigError for one that
    cannot be read."""
    loaded = try_load(path)
    if not isinstance(loaded, TandemConfig):
        return loaded
    if reads_files and (problems := _unreadable(loaded)):
        return problems
    changed = loaded.model_dump(mode="json", exclude_defaults=True)
    print(f"{path}: in good order; it sets {'this:' if changed else 'nothing but defaults'}")
    if changed:
        print(yaml.safe_dump(changed, sort_keys=False).rstrip())
    return []


def _unreadable(config: TandemConfig) -> list[str]:
    """What is wrong with the files that a configuration names."""
    security, auth = config.security, config.gateway.auth
    reads: list[Callable[[], object]] = [
        partial(read_certs, folder)
        for folder in (security.gateway_certs, security.worker_certs, security.client_certs)
        if folder is not None
    ]
    if auth.is_required:
        reads.append(partial(Clients, auth))
    if auth.salt_file is not None:
        reads.append(partial(tenant_salts, auth.salt_file))
    if config.cluster.profile:
        reads.append(partial(device_profile, config.cluster.profile))
    problems = []
    for read in reads:
        try:
            read()
        except TandemError as error:
            problems.append(str(error))
    return problems


def _rows(field: Mapping[str, Any], name: str, definitions: Mapping[str, Any]) -> Iterator[str]:
    inner = _section(field, definitions)
    if inner is None:
        default = json.dumps(field["default"]) if "default" in field else ""
        yield f"| `{name}` | {_type(field)} | `{default}` | {_cell(field.get('description', ''))} |"
        return
    for key, value in inner["properties"].items():
        yield from _rows(value, f"{name}.{key}", definitions)


def _section(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a field holds, where that is a mapping with keys of its own."""
    reference = field.get("$ref")
    return definitions[reference.rpartition("/")[2]] if reference is not None else None


def _type(field: Mapping[str, Any]) -> str:
    """In words, with its bounds."""
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(option) for option in field["anyOf"]))
    if "$ref" in field:
        return "mapping"
    kind = str(field.get("type", "any"))
    if kind == "array":
        items = field.get("items") or {}
        return f"list of {_type(items)}" if items else "list"
    if kind == "object":
        return "mapping"
    return " ".join([kind, *_bounds(field)])


def _bounds(field: Mapping[str, Any]) -> Sequence[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return [f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
