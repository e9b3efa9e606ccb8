"""The only place where environment variables are read, and where those of child processes are chosen."""

from __future__ import annotations

import functools
import logging
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import ConfigError

LOG_LEVELS = ("debug", "info", "warning", "error")
CGROUP = Path("/sys/fs/cgroup")
# How version 2 and 1 of control groups name the CPU time of a container, in microseconds.
QUOTA_AND_PERIOD = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))


@dataclass(frozen=True, slots=True)
class Environment:
    """What Tandem takes from its environment. `log_level` is a level of the logging package, None where there is none.
    `api_key`: what calls of a service carry, "" for nothing."""

    log_level: int | None = None
    api_key: str = field(default="", repr=False)


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Reads TANDEM_LOG_LEVEL and TANDEM_API_KEY. `variables` stands in for the process's own. Raises ConfigError."""
    variables = os.environ if variables is None else variables
    level = variables.get("TANDEM_LOG_LEVEL", "")
    if level and level.lower() not in LOG_LEVELS:
        raise ConfigError(f"TANDEM_LOG_LEVEL: got {level!r}, expected one of {', '.join(LOG_LEVELS)}")
    number = logging.getLevelNamesMapping()[level.upper()] if level else None
    return Environment(number, variables.get("TANDEM_API_KEY", "").strip())


@dataclass(frozen=True, slots=True)
class OtelEnvironment:
    """What OpenTelemetry's own variables say of traces, in their words, "" where they say nothing. Its exporter reads
    the rest itself: headers, certificates, time limits."""

    is_disabled: bool = False
    endpoint: str = ""
    protocol: str = ""
    sampler: str = ""
    sampler_arg: str = ""


def read_otel_environment(variables: Mapping[str, str] | None = None) -> OtelEnvironment:
    """Reads OTEL_SDK_DISABLED, OTEL_TRACES_EXPORTER, OTEL_TRACES_SAMPLER and _ARG, and OTEL_EXPORTER_OTLP_ENDPOINT and
    _PROTOCOL, or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT and _PROTOCOL."""
    variables = os.environ if variables is None else variables
    names = ("OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER", "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG")
    disabled, exporter, sampler, sampler_arg = (variables.get(name, "").strip().lower() for name in names)
    endpoint, protocol = (
        variables.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}", "") or variables.get(f"OTEL_EXPORTER_OTLP_{name}", "")
        for name in ("ENDPOINT", "PROTOCOL")
    )
    return OtelEnvironment(disabled == "true" or exporter == "none", endpoint, protocol, sampler, sampler_arg)


def quiet_libraries() -> None:
    """Settings of libraries that read their own variables when they are loaded. What the user has set already stays."""
    # Otherwise gRPC writes to stderr what it also raises, and a line for every child process started beside it.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


def prepare_ray(*, is_local: bool) -> None:
    """Settings of Ray, which it reads when it is first imported. `is_local`: for a Ray of our own.

    The token keeps everybody else on this machine and its network from running code through Ray's open ports. It lives
    in this process and its children only, never in a file. A cluster's own token is for its users to set.
    """
    # Ray writes what it has to say about a worker's death to our stdout; the launcher says it shorter.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    # Signals are for this program's own loop; Ray's handler would print a trace and abort while Ray starts.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    # Leaves CUDA_VISIBLE_DEVICES alone for workers without a GPU; Ray warns about its own default.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if is_local:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = _ray_token()
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


@functools.cache
def _ray_token() -> str:
    """Ray keeps the first one that it sees in a process, and refuses its own head any other."""
    return secrets.token_hex(32)


def worker_variables(threads: int, variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """OpenMP's settings for a worker process, to be set before torch is loaded. What the user has set already stays.

    `threads` 0 means as many as this process may use cores.
    """
    variables = os.environ if variables is None else variables
    settings = {
        "OMP_NUM_THREADS": str(threads or usable_cores()),
        # Prefill and decode share the cores: a thread that waits must not spin on one that the other could use.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    return {name: variables.get(name, value) for name, value in settings.items()}


def child_environment(threads: int) -> dict[str, str]:
    """The whole environment of a worker that is a child of this process."""
    return {**os.environ, **worker_variables(threads)}


def use_relay(name: str, address: str) -> None:
    """From now on every new connection of this process by gRPC goes through the HTTP proxy at HOST:PORT, which gets
    `name` as its user."""
    # Without the second one no_proxy counts, which mostly spares this machine's own addresses.
    os.environ.update(grpc_proxy=f"http://{name}@{address}", no_grpc_proxy="none.invalid")


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Cores that this process may use: under taskset, or with a container's limit of CPU time, fewer than there are."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(there, _cpu_limit(cgroup))))


def _cpu_limit(cgroup: Path) -> float:
    """CPU seconds per second that this container may have; infinite where nothing says so."""
    for names in QUOTA_AND_PERIOD:
        try:
            quota, period = " ".join((cgroup / name).read_text(encoding="ascii") for name in names).split()
            if quota not in ("max", "-1"):
                return int(quota) / int(period)
        except (OSError, ValueError):
            continue
    return math.inf
