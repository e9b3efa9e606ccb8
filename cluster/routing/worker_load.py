"""What is known of one worker: its last report, and what this gateway sent it and heard of it since.

A prefill worker has a backlog of prompts. A decode worker has running rows, rows that will join once their prompt is
computed, and a backlog of the prompts that it computes itself.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass

from cluster.registry import WorkerReport
from cluster.routing.backlog import Backlog
from cluster.routing.booking import Booking

# How far back the share of time that a decode worker spends on prompts looks.
LOCAL_SHARE_S = 3.0


@dataclass(slots=True)
class PrefillLoad:
    """A worker of the prefill pool."""

    report: WorkerReport
    backlog: Backlog

    @property
    def capacity_tokens(self) -> int:
        return self.report.stats.blocks_total * self.report.stats.block_size


@dataclass(frozen=True, slots=True)
class DecodeState:
    """Rows in a decode step and the KV tokens that they read, at some moment."""

    rows: float
    context_tokens: float


class DecodeLoad:
    """A worker of the decode pool, or a colocated one."""

    __slots__ = (
        "_bookings",
        "_first_sum_s",
        "_joining",
        "_joining_rows",
        "_joining_tokens",
        "_local_share",
        "_local_share_s",
        "_other_rows",
        "_other_tokens",
        "_prompt_tokens",
        "_running",
        "backlog",
        "links",
        "report",
    )

    def __init__(self, report: WorkerReport) -> None:
        self.report = report
        self.backlog = Backlog()
        self.links: dict[str, float] = {}
        self._bookings: dict[Booking, None] = {}
        # Rows with a first token: their number, prompts and start times, as sums.
        self._running = 0
        self._prompt_tokens = 0
        self._first_sum_s = 0.0
        # Requests without: when each is expected to have one, in order.
        self._joining: list[float] = []
        self._joining_rows = 0
        self._joining_tokens = 0
        # Rows that other gateways sent here.
        self._other_rows = 0
        self._other_tokens = 0
        self._local_share = 0.0
        self._local_share_s = 0.0

    @property
    def capacity_tokens(self) -> int:
        return self.report.stats.blocks_total * self.report.stats.block_size

    @property
    def booking_count(self) -> int:
        return len(self._bookings)

    @property
    def row_count(self) -> int:
        """Rows that run or will join."""
        return self._running + self._other_rows + self._joining_rows

    @property
    def token_count(self) -> int:
        """Their prompts' tokens."""
        return self._prompt_tokens + self._other_tokens + self._joining_tokens

    def heard(self, report: WorkerReport) -> None:
        self.report = report
        if report.links:
            self.links = dict(report.links)
        stats = report.stats
        self._other_rows = max(0, stats.running - self._running)
        self._other_tokens = stats.context_tokens * self._other_rows // stats.running if self._other_rows else 0

    def book(self, booking: Booking, now: float) -> None:
        self._bookings[booking] = None
        insort(self._joining, booking.expected_first_s)
        self._joining_rows += booking.query.rows
        self._joining_tokens += booking.tokens
        if booking.route.is_local:
            self.backlog.book(booking, now)
            self._local_share = self.local_share(now) + booking.route.taken_s / LOCAL_SHARE_S
            self._local_share_s = now

    def first_token(self, booking: Booking, now: float) -> None:
        """Bookings that this load never knew are passed over, here and in `end`: the worker has started anew since."""
        if booking not in self._bookings:
            return
        if booking.route.is_local:
            self.backlog.first_token(booking, now)
        self._unjoin(booking)
        rows = booking.query.rows
        self._running += rows
        self._prompt_tokens += booking.tokens
        self._first_sum_s += rows * now

    def end(self, booking: Booking, now: float) -> None:
        if booking not in self._bookings:
            return
        del self._bookings[booking]
        if booking.route.is_local:
            self.backlog.leave(booking, now)
        rows = booking.query.rows
        if booking.first_s is None:
            self._unjoin(booking)
            return
        self._running -= rows
        self._prompt_tokens -= booking.tokens
        self._first_sum_s = self._first_sum_s - rows * booking.first_s if self._running else 0.0

    def state_at(self, then: float, now: float, step_s: float, answer_tokens: float) -> DecodeState:
        """Rows and context at the later moment `then`: those that run now, less those that will have finished, and
        those on their way whose prompt will be computed. `answer_tokens` is the mean length of an answer."""
        life_s = step_s * answer_tokens
        # Answers whose length nobody knows end at a constant rate.
        alive = math.exp(min(0.0, now - then) / life_s)
        rows = (self._running + self._other_rows) * alive
        context = self._running_tokens(now, step_s, answer_tokens) * alive
        waiting = len(self._joining)
        if waiting:
            joined = bisect_right(self._joining, then) / waiting
            rows += joined * self._joining_rows
            context += joined * self._joining_tokens
        return DecodeState(rows, context)

    def free_tokens(self, now: float, step_s: float, answer_tokens: float) -> float:
        """Slots that are left for a prompt once all that is on its way has its blocks. The worker takes a prompt in
        when it fits and each row has room for one block more, whatever the rows will need later."""
        held = self._running_tokens(now, step_s, answer_tokens) + self._joining_tokens
        return self.capacity_tokens - held - self.report.stats.block_size * self.row_count

    def sample(self, count: int) -> list[Booking]:
        """Own requests: all, or about `count` of them, evenly picked in order of their booking."""
        bookings = list(self._bookings)
        return bookings[:: -(-len(bookings) // count)] if len(bookings) > count else bookings

    def local_share(self, now: float) -> float:
        """Share of its time that the worker lately spent on prompts of its own."""
        return self._local_share * math.exp(min(0.0, self._local_share_s - now) / LOCAL_SHARE_S)

    def _running_tokens(self, now: float, step_s: float, answer_tokens: float) -> float:
        drawn = min((self._running * now - self._first_sum_s) / step_s, self._running * answer_tokens)
        return self._prompt_tokens + self._other_tokens + max(0.0, drawn)

    def _unjoin(self, booking: Booking) -> None:
        del self._joining[bisect_left(self._joining, booking.expected_first_s)]
        self._joining_rows -= booking.query.rows
        self._joining_tokens -= booking.tokens
