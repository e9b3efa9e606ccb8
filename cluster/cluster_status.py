"""The cluster's status, put together from what the gateway's parts know."""

from __future__ import annotations

from cluster.admission import Admission
from cluster.messages import ClusterStatus, WorkerStatus
from cluster.outcomes import Outcomes
from cluster.registry import KnownWorker, Registry
from cluster.token_flow import TokenFlow
from engine.stats import LoopStats

# What a worker says of itself that is passed on.
_STATS = tuple(name for name in LoopStats.__dataclass_fields__ if name in WorkerStatus.__dataclass_fields__)


def cluster_status(
    model: str,
    registry: Registry,
    admission: Admission,
    outcomes: Outcomes,
    router: str,
    over_quota: int,
    flow: TokenFlow,
    now: float,
) -> ClusterStatus:
    """As it is at `now`, on the clock of the gateway's loop."""
    workers = [_worker_status(worker, registry, now) for worker in registry.all(now)]
    attainment = outcomes.attainment(now)
    return ClusterStatus(
        model=model,
        workers=tuple(sorted(workers, key=lambda worker: (worker.role, worker.worker_id))),
        requests_running=admission.running_count,
        requests_waiting=admission.waiting_count,
        requests_finished=outcomes.finished_count,
        requests_rejected=outcomes.rejected_count,
        router=router,
        attainment=attainment.both,
        attainment_ttft=attainment.ttft,
        attainment_tpot=attainment.tpot,
        attainment_window=attainment.count,
        requests_over_quota=over_quota,
        prompt_tokens=flow.prompt_tokens,
        generation_tokens=flow.generation_tokens,
    )


def _worker_status(worker: KnownWorker, registry: Registry, now: float) -> WorkerStatus:
    report, stats = worker.report, worker.report.stats
    return WorkerStatus(
        worker_id=report.worker_id,
        role=report.role,
        address=report.address,
        incarnation=report.incarnation,
        heartbeat_age_s=now - worker.heard_s,
        fresh=registry.is_fresh(worker, now),
        **{name: getattr(stats, name) for name in _STATS},
    )
