"""Workers that failed a request get no new ones for some time, and then one to show that they can.

    CLOSED ── failure ──▶ OPEN ── shun time ──▶ HALF-OPEN ── a request is booked ──▶ PROBED ── first token ──▶ CLOSED
                           ▲                        ▲ ◀── it ends without either ─────┤
                           └──────────────── its failure, twice the time ─────────────┘

One breaker per worker that failed lately, as long as the view knows it: one that has restarted begins as CLOSED. The
view is told who is to be shunned. Where a pull has failed, complaints.py says whose failure it was.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

from cluster.complaints import Complaints
from cluster.routing.booking import Booking
from cluster.routing.view import ClusterView


@dataclass(slots=True, eq=False)
class _Breaker:
    """`timer` runs while OPEN."""

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
        self._complaints = Complaints()
        view.on_removed = self._forget

    def failed(self, worker_id: str, booking: Booking) -> None:
        """A request failed there. One that was sent before the breaker opened says nothing new."""
        if not self._view.knows(worker_id):
            return
        loop = asyncio.get_running_loop()
        breaker = self._breakers.get(worker_id)
        if breaker is None:
            breaker = self._breakers[worker_id] = _Breaker()
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

    def pull_failed(self, booking: Booking) -> None:
        """The prompt's KV did not come from the prefill worker to the decode worker."""
        route = booking.route
        if not (self._view.knows(route.decode_id) and self._view.knows(route.prefill_id)):
            return
        alone_against = self._complaints.add(route.decode_id, route.prefill_id)
        # Without another decode worker there is nobody to compare it with, and nobody who could serve instead.
        if len(alone_against) < 2 or self._view.is_alone(route.decode_id):
            self.failed(route.prefill_id, booking)
            return
        self.failed(route.decode_id, booking)
        for worker_id in alone_against:
            if worker_id in self._breakers:
                self._close(worker_id)

    def pulled(self, booking: Booking) -> None:
        """Its decode worker has had all that it needs of the prefill worker."""
        if not booking.route.is_local:
            self._complaints.pulled(booking.route.decode_id, booking.route.prefill_id)

    def suspects(self, worker_id: str) -> bool:
        """Whether it has failed, and not shown since that it can."""
        return worker_id in self._breakers

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
        self._view.readmit(worker_id)
        self._readmitted()

    def _close(self, worker_id: str) -> None:
        breaker = self._breakers.pop(worker_id)
        if breaker.timer is not None:
            breaker.timer.cancel()
        self._view.readmit(worker_id)
        self._readmitted()

    def _forget(self, worker_id: str) -> None:
        self._complaints.forget(worker_id)
        if worker_id in self._breakers:
            self._close(worker_id)
