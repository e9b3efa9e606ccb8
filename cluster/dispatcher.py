"""Requests on their way from admission to a worker: each is routed at once, or waits here until it can be.

    place() ─▶ ask the policy ─ Route ──▶ booked, goes on at once
                              ─ Reject ─▶ Overloaded, at once
                              ─ Defer ──▶ waiting room ─ news of a worker, or the time that Defer named ─▶ ask again

Those that wait are asked for in order of slack. A decision and its booking are one step, so the next decision sees it.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from dataclasses import dataclass, replace
from itertools import count

from cluster.deadline import within
from cluster.ledger import Ledger
from cluster.routing.booking import Booking
from cluster.routing.query import Answer, Defer, Impossible, Reject, Route, RouteQuery, Router
from cluster.routing.view import ClusterView
from engine.errors import InvalidArgument, Overloaded, TandemError, Unavailable

# Requests that are asked for in one go. Those after them have more slack.
BATCH = 32


@dataclass(slots=True, eq=False)
class _Waiter:
    """One request that waits. `wait_s`: how long for a worker where there is none, `give_up_s`: until when. `until_s`
    and `for_all` are those of its last Defer."""

    query: RouteQuery
    booked: asyncio.Future[Booking]
    wait_s: float
    give_up_s: float
    until_s: float
    for_all: bool


class Dispatcher:
    """Places requests on workers. `news` is to be called whenever a worker's load may have become less."""

    def __init__(self, view: ClusterView, router: Router, ledger: Ledger, rng: random.Random, lead_s: float) -> None:
        self._view = view
        self._router = router
        self._ledger = ledger
        self._rng = rng
        self._lead_s = lead_s
        self._waiters: dict[int, _Waiter] = {}
        self._tickets = count()
        # Those that are still to be asked for in this round.
        self._round: deque[int] = deque()
        # With the time that it is set for: uvloop's handles for what is due at once cannot say.
        self._timer: tuple[float, asyncio.TimerHandle] | None = None
        self._is_called = False
        # True while those in front wait for any worker at all to become free.
        self._all_are_busy = False
        self._closed: TandemError | None = None

    async def place(self, query: RouteQuery, deadline_s: float | None, wait_s: float) -> Booking:
        """Books the request on a route. Whoever calls this ends the booking.

        Raises InvalidArgument for what no worker could take, Overloaded for what is refused, Unavailable when no worker
        came within `wait_s`, DeadlineExceeded at `deadline_s`, and what `close` was given.
        """
        if self._closed is not None:
            raise self._closed
        now = asyncio.get_running_loop().time()
        self._view.expire(now)
        answer = self._router.route(query, self._view, now, self._rng)
        if isinstance(answer, Route):
            return self._ledger.book(query, answer, now)
        if not isinstance(answer, Defer):
            raise _error(answer)
        # Without a worker nothing was promised.
        query = _promised(query, answer) if math.isfinite(answer.until_s) else query
        return await self._wait(query, answer, deadline_s, wait_s, now)

    def news(self) -> None:
        """Something has changed at a worker."""
        if self._waiters and not self._is_called:
            self._is_called = True
            asyncio.get_running_loop().call_soon(self._ask_again)

    def close(self, error: TandemError) -> None:
        """Whoever waits, or still comes, gets `error`."""
        self._closed = error
        for ticket, waiter in list(self._waiters.items()):
            if not waiter.booked.done():
                self._settle(ticket, error)

    def check_empty(self) -> None:
        """Asserts that nobody waits."""
        assert not self._waiters, f"requests still wait to be routed: {len(self._waiters)}"
        assert not len(self._view.waiting), "somebody waits whom nobody knows"

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _wait(
        self, query: RouteQuery, defer: Defer, deadline_s: float | None, wait_s: float, now: float
    ) -> Booking:
        ticket = next(self._tickets)
        booked: asyncio.Future[Booking] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(query, booked, wait_s, now + wait_s, defer.until_s, defer.for_all)
        self._waiters[ticket] = waiter
        self._view.waiting.enter(ticket, defer.latest_start_s, defer.work_s)
        self._all_are_busy = self._all_are_busy or defer.for_all
        self._arm(min(defer.until_s, _latest_s(defer), waiter.give_up_s), now)
        is_taken = False
        try:
            booking = await within(deadline_s, "routing", booked)
            is_taken = True
            return booking
        finally:
            self._forget(ticket)
            # Booked and cancelled in the same moment.
            if not is_taken and booked.done() and not booked.cancelled() and booked.exception() is None:
                self._ledger.end(booked.result(), asyncio.get_running_loop().time())

    def _ask_again(self) -> None:
        """Asks for those that wait, least slack first, some of them in a turn of the loop."""
        self._is_called = False
        now = asyncio.get_running_loop().time()
        self._view.expire(now)
        if self._all_are_busy and not self._may_start(now):
            self._round.clear()
            self._arm(self._waiters[self._view.waiting.first(1)[0]].until_s, now)
            return
        self._all_are_busy = False
        if not self._round:
            self._round.extend(self._view.waiting.first(len(self._view.waiting)))
        next_s = math.inf
        for _ in range(min(BATCH, len(self._round))):
            ticket = self._round.popleft()
            waiter = self._waiters.get(ticket)
            # Settled or cancelled since; or told to come again at a time that no news of a worker brings nearer.
            if waiter is None or waiter.booked.done():
                continue
            if not waiter.for_all and now < waiter.until_s < math.inf:
                next_s = min(next_s, waiter.until_s)
                continue
            answer = self._router.route(waiter.query, self._view, now, self._rng)
            if isinstance(answer, Route):
                self._settle(ticket, self._ledger.book(waiter.query, answer, now))
            elif not isinstance(answer, Defer):
                self._settle(ticket, _error(answer))
            elif math.isinf(answer.until_s):
                # There is no worker, for nobody.
                next_s = self._wait_for_a_worker(answer.reason, now)
                self._round.clear()
                break
            else:
                self._put_off(ticket, waiter, answer)
                next_s = min(next_s, answer.until_s, _latest_s(answer, now))
                if answer.for_all:
                    self._all_are_busy = True
                    self._round.clear()
                    break
        if self._round:
            # Whoever is behind those is looked at in the next turn of the loop.
            self.news()
        self._arm(next_s, now)

    def _put_off(self, ticket: int, waiter: _Waiter, defer: Defer) -> None:
        """The router knows more of the request than when it came: its place in the order follows."""
        waiter.query = _promised(waiter.query, defer)
        waiter.until_s, waiter.for_all = defer.until_s, defer.for_all
        self._view.waiting.leave(ticket)
        self._view.waiting.enter(ticket, defer.latest_start_s, defer.work_s)

    def _wait_for_a_worker(self, reason: str, now: float) -> float:
        """Gives up for those that have waited for one for too long; when the next will have."""
        next_s = math.inf
        for ticket, waiter in list(self._waiters.items()):
            if waiter.booked.done():
                continue
            if waiter.until_s < math.inf:
                # There was one when it was asked for last.
                waiter.until_s, waiter.for_all = math.inf, False
                waiter.give_up_s = now + waiter.wait_s
            if now >= waiter.give_up_s:
                self._settle(ticket, Unavailable(f"{reason}; waited {waiter.wait_s:g} s for one"))
            else:
                next_s = min(next_s, waiter.give_up_s)
        return next_s

    def _may_start(self, now: float) -> bool:
        """Whether asking could give another answer than the last time: it costs much more than this."""
        first = self._view.waiting.first(1)
        if not first or now >= self._waiters[first[0]].until_s:
            return True
        return self._view.shortest_queue_s(now) <= self._lead_s

    def _settle(self, ticket: int, result: Booking | TandemError) -> None:
        waiter = self._waiters[ticket]
        self._forget(ticket)
        if isinstance(result, Booking):
            waiter.booked.set_result(result)
        else:
            waiter.booked.set_exception(result)

    def _forget(self, ticket: int) -> None:
        if self._waiters.pop(ticket, None) is not None:
            self._view.waiting.leave(ticket)
        if not self._waiters:
            self._all_are_busy = False
            if self._timer is not None:
                self._timer[1].cancel()
                self._timer = None

    def _arm(self, when_s: float, now: float) -> None:
        """Has `_ask_again` called at the time, or earlier."""
        if not self._waiters or math.isinf(when_s):
            return
        if self._timer is not None:
            set_for_s, handle = self._timer
            if set_for_s <= when_s:
                return
            handle.cancel()
        when_s = max(when_s, now)
        self._timer = when_s, asyncio.get_running_loop().call_at(when_s, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._ask_again()


def _promised(query: RouteQuery, defer: Defer) -> RouteQuery:
    """What the first Defer said is what counts."""
    return query if query.was_deferred else replace(query, was_deferred=True, promised_s=defer.predicted_ttft_s)


def _latest_s(defer: Defer, now: float = -math.inf) -> float:
    """When the request must start; never, where that is past."""
    return defer.latest_start_s if defer.latest_start_s > now else math.inf


def _error(answer: Answer) -> TandemError:
    match answer:
        case Reject():
            return Overloaded(answer.reason, answer.retry_after_s)
        case Impossible():
            return InvalidArgument(answer.field, answer.value, answer.expected)
    raise AssertionError(f"{answer} is no refusal")
