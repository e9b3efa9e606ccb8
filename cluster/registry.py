"""Who is there: the workers' last reports, and which of them are recent enough to act on. Pure: `now` is an argument.

    unknown ── heartbeat ──▶ FRESH ── silent for fresh_s ──▶ STALE ── silent for expire_s ──▶ unknown
                               ▲                               │
                               └────────── heartbeat ──────────┘

A worker that restarts keeps its id and reports a larger incarnation: its predecessor is replaced, and what that one may
still send is refused. As long as a worker is fresh, and nobody knows of its end, its id and its address are its own:
who reports them meanwhile is refused, whatever incarnation it says it has.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from cluster.report_checks import check_kv_names, check_links, check_name, check_stats
from engine.errors import InvalidArgument, Overloaded, Unavailable
from engine.stats import LoopStats

Role = Literal["prefill", "decode"]
MAX_WORKERS = 4096
# Of one worker. They come every `interval_s`, and at once after a change.
REPORTS_PER_S = 20.0
REPORTS_BURST = 100.0


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
    `public_key`: what it signs its calls of prefill workers with.
    """

    worker_id: str
    role: Role
    address: str
    incarnation: int
    model: str
    stats: LoopStats
    links: tuple[tuple[str, float], ...] = ()
    kv_events: KVEvents | None = None
    public_key: bytes = b""


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """What the gateway asks of a worker: to report again after `interval_s` seconds, to take `role` where that differs
    from its own ("": as it is), and with `kv_resync` to send a snapshot of its prefix cache. `on_its_way`: requests
    that were sent to a worker that drains, and are not over there; those may not have reached it yet. `ticket_key` is
    what it signs tickets with, `now_s` its clock."""

    interval_s: float
    role: Role | Literal[""] = ""
    kv_resync: bool = False
    on_its_way: int = 0
    ticket_key: bytes = b""
    now_s: float = 0.0


@dataclass(frozen=True, slots=True)
class KnownWorker:
    """A report and when it came, in seconds of the gateway's clock. `allowance`: reports that it may send at once."""

    report: WorkerReport
    heard_s: float
    allowance: float = REPORTS_BURST


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
        self._ids: dict[str, str] = {}  # by address

    def heartbeat(self, report: WorkerReport, now: float, *, is_lost: bool = False) -> None:
        """Takes a report. `is_lost`: the worker of this name has failed what it was given last, and may be gone; so may
        one that has said that it drains.

        Raises Unavailable for one from a predecessor, InvalidArgument where a field is wrong or contradicts what is
        known of the worker or of others, Overloaded when too many workers are known already, or its reports come too
        often. A refused report changes nothing.
        """
        self._forget(now)
        _check_fields(report)
        known = self._workers.get(report.worker_id)
        allowance = REPORTS_BURST
        if known is not None:
            is_there = self.is_fresh(known, now) and not (known.report.stats.draining or is_lost)
            _check_successor(known.report, report, is_there=is_there)
            allowance = min(allowance, known.allowance + REPORTS_PER_S * (now - known.heard_s))
            if allowance < 1:
                raise Overloaded(f"worker {report.worker_id!r} reports too often", 1 / REPORTS_PER_S)
        elif len(self._workers) >= self._max_workers:
            raise Overloaded(f"{len(self._workers)} workers are registered already", self._expire_s)
        self._check_address(report, now)
        self.remove(report.worker_id)
        self._workers[report.worker_id] = KnownWorker(report, now, allowance - 1)
        self._ids[report.address] = report.worker_id

    def report_of(self, worker_id: str) -> WorkerReport | None:
        """A worker's last report, None for one that is not known."""
        known = self._workers.get(worker_id)
        return None if known is None else known.report

    def remove(self, worker_id: str) -> None:
        """Forgets a worker at once. Unknown ids are ignored."""
        known = self._workers.pop(worker_id, None)
        if known is not None and self._ids.get(known.report.address) == worker_id:
            del self._ids[known.report.address]

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
            self.remove(worker_id)

    def _check_address(self, report: WorkerReport, now: float) -> None:
        holder = self._ids.get(report.address, report.worker_id)
        if holder == report.worker_id or self._workers[holder].report.stats.draining:
            return
        if self.is_fresh(self._workers[holder], now):
            raise InvalidArgument("address", report.address, f"one that no other worker has: {holder!r} reports it")


def _check_fields(report: WorkerReport) -> None:
    check_name("worker_id", report.worker_id)
    check_name("address", report.address)
    if report.role not in ("prefill", "decode"):
        raise InvalidArgument("role", report.role, "prefill or decode")
    check_stats(report.stats)
    check_links(report.links)
    if report.kv_events is not None:
        check_kv_names(len(report.kv_events.stored) + len(report.kv_events.evicted))


def _check_successor(known: WorkerReport, report: WorkerReport, *, is_there: bool) -> None:
    name = report.worker_id
    if report.incarnation < known.incarnation:
        raise Unavailable(
            f"worker {name!r} with incarnation {report.incarnation} was replaced by incarnation {known.incarnation}"
        )
    if report.model != known.model:
        raise InvalidArgument("model", report.model, f"{known.model!r}, which worker {name!r} serves already")
    # A role may change within one life (a flip); an address cannot: two live processes share a name.
    if (is_there or report.incarnation == known.incarnation) and report.address != known.address:
        raise InvalidArgument("worker_id", name, f"another name: the worker at {known.address} has this one")
