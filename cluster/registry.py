"""Who is there: the workers' last reports, and which of them are recent enough to act on. Pure: `now` is an argument.

    unknown ── heartbeat ──▶ FRESH ── silent for fresh_s ──▶ STALE ── silent for expire_s ──▶ unknown
                               ▲                               │
                               └────────── heartbeat ──────────┘

A worker that restarts keeps its id and reports a larger incarnation: its predecessor is replaced, and what that one may
still send is refused.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from engine.errors import InvalidArgument, Overloaded, Unavailable
from engine.stats import LoopStats

Role = Literal["prefill", "decode"]
MAX_WORKERS = 4096


@dataclass(frozen=True, slots=True)
class KVEvents:
    """Changes of a worker's prefix cache since its last report, by the first 8 bytes of block names as little-endian
    integers. `sequence` counts reports; with `is_snapshot` the `stored` names are all that there are."""

    sequence: int
    is_snapshot: bool
    stored: tuple[int, ...] = ()
    evicted: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One heartbeat: who the worker is, where to reach it, and its load. `incarnation` grows with every restart.

    `links`: bytes per second that a decode worker measured of its streams, by the prefill worker's address.
    """

    worker_id: str
    role: Role
    address: str
    incarnation: int
    model: str
    stats: LoopStats
    links: tuple[tuple[str, float], ...] = ()
    kv_events: KVEvents | None = None


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """What the gateway asks of a worker: to report again after `interval_s` seconds, to take `role` where that differs
    from its own ("": as it is), and with `kv_resync` to send a snapshot of its prefix cache."""

    interval_s: float
    role: Role | Literal[""] = ""
    kv_resync: bool = False


@dataclass(frozen=True, slots=True)
class KnownWorker:
    """A report and when it came, in seconds of the gateway's clock."""

    report: WorkerReport
    heard_s: float


class Registry:
    """The last report of every worker. A worker is fresh for `fresh_s` and known for `expire_s` after each.

    A report costs the same however many workers there are: they are kept in order of their last report, so those that
    are to be forgotten are the first.
    """

    def __init__(self, fresh_s: float, expire_s: float, max_workers: int = MAX_WORKERS) -> None:
        assert 0 < fresh_s <= expire_s, f"a worker cannot be fresh ({fresh_s} s) for longer than known ({expire_s} s)"
        self._fresh_s = fresh_s
        self._expire_s = expire_s
        self._max_workers = max_workers
        self._workers: OrderedDict[str, KnownWorker] = OrderedDict()

    def heartbeat(self, report: WorkerReport, now: float) -> None:
        """Takes a report.

        Raises Unavailable for one from a predecessor, InvalidArgument where a field is wrong or contradicts what is
        known of the worker, Overloaded when too many workers are known already. A refused report changes nothing.
        """
        self._forget(now)
        _check_fields(report)
        known = self._workers.get(report.worker_id)
        if known is not None:
            _check_successor(known.report, report)
        elif len(self._workers) >= self._max_workers:
            raise Overloaded(f"{len(self._workers)} workers are registered already", self._expire_s)
        self._workers[report.worker_id] = KnownWorker(report, now)
        self._workers.move_to_end(report.worker_id)

    def remove(self, worker_id: str) -> None:
        """Forgets a worker at once. Unknown ids are ignored."""
        self._workers.pop(worker_id, None)

    def is_fresh(self, worker: KnownWorker, now: float) -> bool:
        return now - worker.heard_s <= self._fresh_s

    def fresh(self, role: Role, now: float) -> list[KnownWorker]:
        """The workers of a role that were heard of recently, draining ones included, in order of id."""
        return [worker for worker in self.all(now) if worker.report.role == role and self.is_fresh(worker, now)]

    def all(self, now: float) -> list[KnownWorker]:
        """Every worker that is still known, in order of id."""
        known = [worker for worker in self._workers.values() if now - worker.heard_s <= self._expire_s]
        return sorted(known, key=lambda worker: worker.report.worker_id)

    def _forget(self, now: float) -> None:
        while self._workers:
            worker_id, worker = next(iter(self._workers.items()))
            if now - worker.heard_s <= self._expire_s:
                return
            del self._workers[worker_id]


def _check_fields(report: WorkerReport) -> None:
    if not report.worker_id:
        raise InvalidArgument("worker_id", report.worker_id, "a name of at least one character")
    if not report.address:
        raise InvalidArgument("address", report.address, "the address at which the worker can be reached")
    if report.role not in ("prefill", "decode"):
        raise InvalidArgument("role", report.role, "prefill or decode")
    if report.stats.block_size < 1 or report.stats.blocks_total < 1:
        size = f"{report.stats.blocks_total} blocks of {report.stats.block_size} tokens"
        raise InvalidArgument("blocks_total, block_size", size, "at least one block of at least one token")


def _check_successor(known: WorkerReport, report: WorkerReport) -> None:
    name = report.worker_id
    if report.incarnation < known.incarnation:
        raise Unavailable(
            f"worker {name!r} with incarnation {report.incarnation} was replaced by incarnation {known.incarnation}"
        )
    if report.model != known.model:
        raise InvalidArgument("model", report.model, f"{known.model!r}, which worker {name!r} serves already")
    # A role may change within one life (a flip); an address cannot: two live processes share a name.
    if report.incarnation == known.incarnation and report.address != known.address:
        raise InvalidArgument("worker_id", name, f"another name: the worker at {known.address} has this one")
