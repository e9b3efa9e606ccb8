"""Workers that failed a request get no new ones for some time, and then one to show that they can.

    CLOSED ── failure ──▶ OPEN ── shun time ──▶ HALF-OPEN ── a request is booked ──▶ PROBED ── first token ──▶ CLOSED
                           ▲                        ▲ ◀── it ends without either ─────┤
                           └──────────────── its failure, twice the time ─────────────┘

A worker that has restarted (a new incarnation) begins as CLOSED. One breaker per worker that failed lately; the view is
told who is to be shunned.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

from cluster.registry import WorkerReport
from cluster.routing.booking import Booking
from cluster.routing.view import ClusterView


@dataclass(slots=True, eq=False)
class _Breaker:
    """`incarnation` of the worker that failed, None where it was not known. `timer` runs while OPEN."""

    incarnation: int | None
    failures: int = 0
    opened_s: float = 0.0
    timer: asyncio.TimerHandle | None = None
    probe: Booking | None = None


class Breakers:
    """`readmitted` is called when a worker may have requests again."""

    def __init__(
        self,
        view: ClusterView,
        rng: random.Random,
        shun_s: float,
        max_shun_s: float,
        readmitted: Callable[[], None],
    ) -> None:
        self._view = view
        self._rng = rng
        self._shun_s = shun_s
        self._max_shun_s = max_shun_s
        self._readmitted = readmitted
        self._breakers: dict[str, _Breaker] = {}

    def failed(self, worker_id: str, booking: Booking) -> None:
        """A request failed there. One that was sent before the breaker opened says nothing new."""
        loop = asyncio.get_running_loop()
        breaker = self._breakers.get(worker_id)
        if breaker is None:
            breaker = self._breakers[worker_id] = _Breaker(self._view.incarnation(worker_id))
        elif breaker.timer is not None or booking.routed_s < breaker.opened_s:
            return
        breaker.opened_s = loop.time()
        breaker.failures += 1
        breaker.probe = None
        longest_s = min(self._max_shun_s, self._shun_s * 2.0 ** min(breaker.failures - 1, 60))
        # Gateways that lost a worker together do not come back together.
        shun_s = longest_s * self._rng.uniform(0.5, 1.0)
        breaker.timer = loop.call_later(shun_s, self._half_open, worker_id, breaker)
        self._view.shun(worker_id)

    def suspects(self, worker_id: str) -> bool:
        """Whether it has failed, and not shown since that it can."""
        return worker_id in self._breakers

    def heard(self, report: WorkerReport) -> None:
        """Call before the view takes the report."""
        breaker = self._breakers.get(report.worker_id)
        if breaker is not None and breaker.incarnation != report.incarnation:
            self._close(report.worker_id)

    def booked(self, booking: Booking) -> None:
        for worker_id, breaker in self._of(booking):
            if breaker.timer is None and breaker.probe is None:
                breaker.probe = booking
                # Where there is nobody else, waiting for the probe would only keep everybody from trying.
                if not self._view.is_alone(worker_id):
                    self._view.shun(worker_id)

    def succeeded(self, booking: Booking) -> None:
        """Its first token is here: both of its workers can."""
        for worker_id, breaker in self._of(booking):
            # A request that was sent there before it failed says nothing of what it can now.
            if breaker.probe is booking:
                self._close(worker_id)

    def ended(self, booking: Booking) -> None:
        for worker_id, breaker in self._of(booking):
            if breaker.probe is booking:
                self._half_open(worker_id, breaker)

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _of(self, booking: Booking) -> list[tuple[str, _Breaker]]:
        if not self._breakers:
            return []
        ids = dict.fromkeys((booking.route.prefill_id, booking.route.decode_id))
        return [(worker_id, self._breakers[worker_id]) for worker_id in ids if worker_id in self._breakers]

    def _half_open(self, worker_id: str, breaker: _Breaker) -> None:
        breaker.timer = breaker.probe = None
        if self._view.incarnation(worker_id) is None:
            del self._breakers[worker_id]
        self._view.readmit(worker_id)
        self._readmitted()

    def _close(self, worker_id: str) -> None:
        breaker = self._breakers.pop(worker_id)
        if breaker.timer is not None:
            breaker.timer.cancel()
        self._view.readmit(worker_id)
        self._readmitted()
