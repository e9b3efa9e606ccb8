"""The configuration that one worker runs by: the cluster's, with the parallel degrees of its role."""

from __future__ import annotations

from cluster.config import TandemConfig
from cluster.registry import Role
from cluster.worker_spec import worker_names


def worker_config(config: TandemConfig, role: Role) -> TandemConfig:
    """`config` as a worker that starts in `role` takes it. All of its ranks do the same, whatever it becomes later."""
    degrees = config.cluster.prefill_parallel if role == "prefill" else config.cluster.decode_parallel
    if degrees is None:
        return config
    tensor, pipeline = degrees
    engine = config.engine.model_copy(update={"tensor_parallel": tensor, "pipeline_parallel": pipeline})
    return config.model_copy(update={"engine": engine})


def ranks_of(config: TandemConfig, role: Role) -> int:
    """Processes that make one worker of `role`."""
    return worker_config(config, role).engine.ranks


def most_ranks(config: TandemConfig) -> int:
    """Processes of all the workers that there may ever be at once."""
    cluster = config.cluster
    start = [ranks_of(config, role) for role, _ in worker_names(cluster)]
    most = cluster.controller.max_workers if cluster.controller.enabled else None
    more = 0 if most is None else most - cluster.prefill - cluster.decode
    return sum(start) + more * max(start)
