"""The gateway's queue: at most so many requests run, at most so many wait. Whose first token is due first goes first;
one without an objective counts as due `PATIENCE_S` after it came, so that nobody starves."""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from cluster.deadline import within
from engine.errors import DeadlineExceeded, Overloaded
from engine.running_average import RunningAverage
from engine.slack_queue import PATIENCE_S

# Before the first request has finished, nothing is known of how long one takes.
FIRST_GUESS_S = 1.0
MIN_RETRY_S = 0.1
MAX_RETRY_S = 60.0
# Entries of those that left are cleared away when there are so many.
TIDY_AT_LEAST = 64

Ticket = asyncio.Future[None]


class Place:
    """One of the places to run."""

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave: Callable[[], None] | None = leave

    def give_back(self) -> None:
        """It is for the next one now. May be called again."""
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


class Admission:
    """Hands out `max_running` places to run; a place goes directly from one request to the next that waits."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        # In order of (due, number of its entry). Those that left stay until their turn, or until there are too many.
        self._order: list[tuple[float, int, Ticket]] = []
        self._waiting: set[Ticket] = set()
        self._entered = 0
        self._held_s = RunningAverage()
        self.running_count = 0

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def place(self, deadline_s: float | None, due_s: float = math.inf) -> AsyncIterator[Place]:
        """Waits for a place and holds it, until it is given back or the context is left. Raises Overloaded when too
        many wait already, or at `due_s`, from when on the place is of no use; DeadlineExceeded at `deadline_s`. Times
        are of the loop's clock. Whoever stops waiting, for whatever reason, leaves the queue at once."""
        if self.running_count < self._max_running:
            self.running_count += 1
        else:
            await self._wait(deadline_s, due_s)
        loop = asyncio.get_running_loop()
        entered_s = loop.time()

        def leave() -> None:
            self._held_s.add(loop.time() - entered_s)
            self._leave()

        place = Place(leave)
        try:
            yield place
        finally:
            place.give_back()

    async def _wait(self, deadline_s: float | None, due_s: float) -> None:
        limit_s = due_s if deadline_s is None else min(due_s, deadline_s)
        try:
            await within(limit_s if math.isfinite(limit_s) else None, "gateway queue", self._enter(due_s))
        except DeadlineExceeded:
            if limit_s == deadline_s:
                raise
            reason = "the objective for the first token passed in the gateway's queue"
            raise Overloaded(reason, self._retry_after_s()) from None

    async def _enter(self, due_s: float) -> None:
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests wait at the gateway already", self._retry_after_s())
        loop = asyncio.get_running_loop()
        ticket = loop.create_future()
        self._entered += 1
        heapq.heappush(self._order, (min(due_s, loop.time() + PATIENCE_S), self._entered, ticket))
        self._waiting.add(ticket)
        called = False
        try:
            await ticket
            called = True
        finally:
            if not called:
                self._waiting.discard(ticket)
                self._tidy()
                # Called and cancelled in the same moment: the place is ours and must go on to the next.
                if ticket.done() and not ticket.cancelled():
                    self._leave()

    def _leave(self) -> None:
        while self._order:
            _, _, ticket = heapq.heappop(self._order)
            if ticket in self._waiting and not ticket.done():
                self._waiting.remove(ticket)
                ticket.set_result(None)
                return
            self._waiting.discard(ticket)
        self.running_count -= 1
        assert self.running_count >= 0, "a place was given back twice"

    def _tidy(self) -> None:
        """While all places are taken, whoever comes and goes would otherwise stay in the order."""
        if len(self._order) > TIDY_AT_LEAST + 2 * len(self._waiting):
            self._order = [entry for entry in self._order if entry[2] in self._waiting]
            heapq.heapify(self._order)

    def _retry_after_s(self) -> float:
        """Until all that wait now have got a place, at the pace of the last requests."""
        held_s = self._held_s.value or FIRST_GUESS_S
        return min(max(MIN_RETRY_S, round(len(self._waiting) * held_s / self._max_running, 1)), MAX_RETRY_S)
