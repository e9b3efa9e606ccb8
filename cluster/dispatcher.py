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
    """One request that waits: `wait_s` for a worker, where there is none for it; `timer` runs then. `until_s` and
    `for_all` are those of its last Defer."""

    query: RouteQuery
    booked: asyncio.Future[Booking]
    wait_s: float
    until_s: float
    for_all: bool
    timer: asyncio.TimerHandle | None = None


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
        # Until when those in front wait for any worker at all to become free.
        self._all_are_busy_until_s = -math.inf
        # Asked for in this round, and no worker with room for it is there.
        self._too_long: RouteQuery | None = None
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
        waiter = _Waiter(query, booked, wait_s, defer.until_s, defer.for_all)
        self._waiters[ticket] = waiter
        self._view.waiting.enter(ticket, defer.latest_start_s, defer.work_s)
        if math.isinf(defer.until_s):
            self._lacks_a_worker(ticket, waiter)
        else:
            if defer.for_all and not now < self._all_are_busy_until_s < defer.until_s:
                self._all_are_busy_until_s = defer.until_s
            self._arm(min(defer.until_s, _latest_s(defer)), now)
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
        # Asking costs much more than to see that it could give no other answer than the last time.
        if now < self._all_are_busy_until_s and self._view.shortest_queue_s(now) > self._lead_s:
            self._round.clear()
            self._arm(self._all_are_busy_until_s, now)
            return
        self._all_are_busy_until_s = -math.inf
        if not self._round:
            self._round.extend(self._view.waiting.first(len(self._view.waiting)))
            self._too_long = None
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
            if waiter.timer is not None and self._too_long is not None and _is_as_long(waiter.query, self._too_long):
                continue
            defer = self._ask(ticket, waiter, now)
            if defer is None:
                continue
            if math.isfinite(defer.until_s):
                next_s = min(next_s, defer.until_s, _latest_s(defer, now))
            if defer.for_all:
                self._none_can_start(defer)
                break
            if math.isinf(defer.until_s):
                # Only those that ask for no more than it can be placed now. It is ahead of nobody.
                self._too_long = waiter.query
                self._move(ticket, math.inf, 0.0)
        if self._round:
            # Whoever is behind those is looked at in the next turn of the loop.
            self.news()
        self._arm(next_s, now)

    def _none_can_start(self, defer: Defer) -> None:
        """Every worker is busy, or there is none."""
        self._round.clear()
        if math.isfinite(defer.until_s):
            self._all_are_busy_until_s = defer.until_s
            return
        for ticket, waiter in self._waiters.items():
            self._lacks_a_worker(ticket, waiter)

    def _ask(self, ticket: int, waiter: _Waiter, now: float) -> Defer | None:
        """None where it waits no longer."""
        answer = self._router.route(waiter.query, self._view, now, self._rng)
        if isinstance(answer, Route):
            self._settle(ticket, self._ledger.book(waiter.query, answer, now))
            return None
        if not isinstance(answer, Defer):
            self._settle(ticket, _error(answer))
            return None
        if math.isinf(answer.until_s):
            self._lacks_a_worker(ticket, waiter)
        else:
            self._put_off(ticket, waiter, answer)
        return answer

    def _put_off(self, ticket: int, waiter: _Waiter, defer: Defer) -> None:
        """The router knows more of the request than when it came: its place in the order follows."""
        waiter.query = _promised(waiter.query, defer)
        waiter.until_s, waiter.for_all = defer.until_s, defer.for_all
        if waiter.timer is not None:
            waiter.timer.cancel()
            waiter.timer = None
        self._move(ticket, defer.latest_start_s, defer.work_s)

    def _move(self, ticket: int, latest_start_s: float, work_s: float) -> None:
        self._view.waiting.leave(ticket)
        self._view.waiting.enter(ticket, latest_start_s, work_s)

    def _lacks_a_worker(self, ticket: int, waiter: _Waiter) -> None:
        waiter.until_s, waiter.for_all = math.inf, False
        if waiter.timer is None and not waiter.booked.done():
            waiter.timer = asyncio.get_running_loop().call_later(waiter.wait_s, self._give_up, ticket, waiter)

    def _give_up(self, ticket: int, waiter: _Waiter) -> None:
        """For one that has waited for a worker for too long, and for which there still is none."""
        if waiter.booked.done():
            return
        now = asyncio.get_running_loop().time()
        self._view.expire(now)
        defer = self._ask(ticket, waiter, now)
        if defer is None:
            return
        if math.isinf(defer.until_s):
            self._settle(ticket, Unavailable(f"{defer.reason}; waited {waiter.wait_s:g} s for one"))
        else:
            self._arm(min(defer.until_s, _latest_s(defer, now)), now)

    def _settle(self, ticket: int, result: Booking | TandemError) -> None:
        waiter = self._waiters[ticket]
        self._forget(ticket)
        if isinstance(result, Booking):
            waiter.booked.set_result(result)
        else:
            waiter.booked.set_exception(result)

    def _forget(self, ticket: int) -> None:
        waiter = self._waiters.pop(ticket, None)
        if waiter is not None:
            self._view.waiting.leave(ticket)
            if waiter.timer is not None:
                waiter.timer.cancel()
        if not self._waiters:
            self._all_are_busy_until_s = -math.inf
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


def _is_as_long(query: RouteQuery, other: RouteQuery) -> bool:
    return query.prompt_tokens >= other.prompt_tokens and query.total_tokens >= other.total_tokens


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
