"""Who a worker is, where it listens and whom it reports to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.cluster_config import ClusterConfig
from cluster.registry import Role
from engine.errors import ConfigError

# Workers that take local routes only are told by their name.
COLOCATED = "colocated-"


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker process. `gateway` is HOST:PORT. `port` 0 means any free one.

    `reached_at` is the host under which others reach it, where that is not `host` (0.0.0.0).
    """

    role: Role
    worker_id: str
    gateway: str
    host: str = "127.0.0.1"
    port: int = 0
    reached_at: str = ""


def worker_names(config: ClusterConfig) -> list[tuple[Role, str]]:
    """(role, id) of all workers that a cluster starts with. A worker keeps its id when its role changes."""
    prefill: list[tuple[Role, str]] = [("prefill", f"prefill-{index}") for index in range(config.prefill)]
    decode: list[tuple[Role, str]] = [("decode", f"decode-{index}") for index in range(config.decode)]
    colocated: list[tuple[Role, str]] = [("decode", f"{COLOCATED}{index}") for index in range(config.colocated)]
    return prefill + decode + colocated


class WorkerNames:
    """Names for workers that are added later. None is given twice, whatever became of who had it."""

    def __init__(self, config: ClusterConfig) -> None:
        self._counts: dict[Role, int] = {"prefill": config.prefill, "decode": config.decode}

    def next(self, role: Role) -> str:
        self._counts[role] += 1
        return f"{role}-{self._counts[role] - 1}"


def is_colocated(worker_id: str) -> bool:
    """Whether a worker is one that takes local routes only."""
    return worker_id.startswith(COLOCATED)


def cpus_of(worker_id: str, config: ClusterConfig, available: Sequence[int]) -> tuple[int, ...]:
    """The CPUs that a worker's threads are bound to: its share of the `available` ones, none where nothing is bound.

    Shares differ by one CPU at most. Raises ConfigError where there are fewer CPUs than workers.
    """
    names = [name for _, name in worker_names(config)]
    if not config.pin_cpus or worker_id not in names:
        return ()
    if len(available) < len(names):
        raise ConfigError(
            f"pin_cpus: {len(names)} workers cannot each have a CPU of their own: there are {len(available)}"
        )
    index = names.index(worker_id)
    ends = [len(available) * share // len(names) for share in (index, index + 1)]
    return tuple(available[ends[0] : ends[1]])
