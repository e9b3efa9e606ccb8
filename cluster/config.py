"""All of the configuration as one frozen value: YAML file, then command line flags, then checked.

    engine:  {model: smollm2-135m-instruct, kv_cache_bytes: 536870912}
    prefill: {token_budget: 512}
    decode:  {max_batch: 64}
    gateway: {max_running: 256}
    cluster: {prefill: 1, decode: 1, address: ray}
    security: {gateway_certs: certs/gateway, worker_certs: certs/worker}
    tracing: {endpoint: "http://127.0.0.1:4317", sample_ratio: 0.1}
    logging: {level: info, format: json}

Every key may be left out. A key that does not exist, or a value that cannot be, is a ConfigError that names its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from cluster.cluster_config import ClusterConfig
from cluster.gateway_config import GatewayConfig
from cluster.logs.logging_config import LoggingConfig
from cluster.security.security_config import SecurityConfig
from cluster.tracing.tracing_config import TracingConfig
from cluster.yaml_file import parse_mapping, read_text
from decode_worker.config import DecodeConfig
from engine.config import EngineConfig
from engine.errors import ConfigError
from prefill_worker.config import PrefillConfig

# Command line flags and the keys that they stand for.
FLAGS = {
    "--model": "engine.model",
    "--prefill": "cluster.prefill",
    "--decode": "cluster.decode",
    "--colocated": "cluster.colocated",
    "--router": "gateway.router.policy",
    "--address": "cluster.address",
    "--grpc-port": "cluster.grpc_port",
    "--http-port": "cluster.http_port",
}


class TandemConfig(BaseModel):
    """Everything that can be configured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: EngineConfig = EngineConfig()
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig()
    gateway: GatewayConfig = GatewayConfig()
    cluster: ClusterConfig = ClusterConfig()
    security: SecurityConfig = SecurityConfig()
    tracing: TracingConfig = TracingConfig()
    logging: LoggingConfig = LoggingConfig()


def load(path: Path | None = None, flags: Mapping[str, object] | None = None) -> TandemConfig:
    """The configuration of `path`, overridden by `flags` (see FLAGS; a value of None means not given).

    Raises ConfigError, one line: the place (file and line, or flag), the key, the value and what would be right.
    """
    loaded = try_load(path, flags)
    if isinstance(loaded, TandemConfig):
        return loaded
    more = f" (and {len(loaded) - 1} more)" if len(loaded) > 1 else ""
    raise ConfigError(loaded[0] + more)


def try_load(path: Path | None = None, flags: Mapping[str, object] | None = None) -> TandemConfig | list[str]:
    """As `load`, but gives all that is wrong with values, one line each. Raises ConfigError for a file that cannot be
    read, or is no mapping."""
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    text = "" if path is None else read_text(path)
    values = parse_mapping(text, str(path), f"a mapping with the sections {', '.join(TandemConfig.model_fields)}")
    for flag, value in given.items():
        _put(values, FLAGS[flag].split("."), value, str(path))
    try:
        return TandemConfig.model_validate(values)
    except ValidationError as error:
        return [_describe(problem, text, str(path), given) for problem in error.errors()]


def from_json(text: str) -> TandemConfig:
    """What `to_json` gave, in another process of the same service."""
    return TandemConfig.model_validate_json(text)


def to_json(config: TandemConfig) -> str:
    """Text that `load` reads too: JSON is YAML."""
    return config.model_dump_json()


def known_keys(model: type[BaseModel] = TandemConfig, prefix: str = "") -> Iterator[str]:
    """Every key of the configuration, sections included, as dotted names."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{prefix}{name}.")


def _put(values: dict[str, Any], keys: Sequence[str], value: object, where: str) -> None:
    section = values
    for depth, key in enumerate(keys[:-1], 1):
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise ConfigError(f"{where}: {'.'.join(keys[:depth])}: got {section!r}, expected a mapping")
    section[keys[-1]] = value


def _describe(problem: ErrorDetails, text: str, where: str, flags: Mapping[str, object]) -> str:
    keys = [str(part) for part in problem["loc"]]
    key = ".".join(keys)
    flag = next((flag for flag in flags if FLAGS[flag] == key), None)
    place = flag or f"{where}{_line(text, keys)}: {key}"
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown key, {_nearest(key)}"
    message = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "a mapping"
    value = repr(problem["input"])
    # A check across several keys is about their section, whose whole content would not help.
    got = "" if isinstance(problem["input"], Mapping) else f"got {value if len(value) <= 80 else value[:77] + '...'}, "
    return f"{place}: {got}expected: {message}"


def _nearest(key: str) -> str:
    """Names the known key that was probably meant, or all that could be."""
    section, _, name = key.rpartition(".")
    names: dict[str, list[str]] = {}
    for known in known_keys():
        names.setdefault(known.rpartition(".")[2], []).append(known)
    here = [known for group in names.values() for known in group if known.rpartition(".")[0] == section]
    # The right name in the wrong section, a misspelt one in this section, a misspelt one in another.
    near = names.get(name) or get_close_matches(key, here, 1)
    near = near or [known for match in get_close_matches(name, names, 1) for known in names[match]]
    return f"nearest known key: {near[0]}" if near else f"known here: {', '.join(here)}"


def _line(text: str, keys: Sequence[str]) -> str:
    """ ":<line>" of the last of `keys` that the file spells out, "" where it has none."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    line = ""
    for key in keys:
        if not isinstance(node, yaml.MappingNode):
            break
        pair = next((pair for pair in node.value if pair[0].value == key), None)
        if pair is None:
            break
        line, node = f":{pair[0].start_mark.line + 1}", pair[1]
    return line
