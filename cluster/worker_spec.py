"""Who a worker is, where it listens and whom it reports to."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.cluster_config import ClusterConfig
from cluster.registry import Role


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
    """(role, id) of all workers of a cluster."""
    prefill: list[tuple[Role, str]] = [("prefill", f"prefill-{index}") for index in range(config.prefill)]
    decode: list[tuple[Role, str]] = [("decode", f"decode-{index}") for index in range(config.decode)]
    return prefill + decode
