"""Prompts that wait to be computed at one worker: how long they keep it busy, as far as the gateway can know.

    report        what the worker says is queued, and what is still on its way there
    book          work is added at the end
    first token   that prompt is done: what is left is what was booked and has no first token yet

`busy_until_s` needs no updating while time passes, so an order by it stays right.
"""

from __future__ import annotations

from cluster.routing.booking import Booking

# A report may have been made before what was sent within this time arrived.
TRANSIT_S = 0.05


class Backlog:
    """One worker's."""

    __slots__ = ("_has_others", "bookings", "busy_until_s", "own_tokens", "own_work_s")

    def __init__(self) -> None:
        self.bookings: dict[Booking, None] = {}
        self.busy_until_s = 0.0
        self.own_work_s = 0.0
        self.own_tokens = 0
        # True when the worker has prompts that this gateway did not send.
        self._has_others = False

    def wait_s(self, now: float) -> float:
        """Until what is here now has been computed."""
        return max(0.0, self.busy_until_s - now)

    def report(self, queued_tokens: int, queued_s: float, now: float) -> None:
        self._has_others = queued_tokens > self.own_tokens
        if self._has_others:
            self.busy_until_s = now + queued_s
            return
        on_its_way_s = 0.0
        for booking in reversed(self.bookings):
            if booking.routed_s < now - TRANSIT_S:
                break
            on_its_way_s += booking.work_s
        # Both are at least what is left: a worker does not know yet what it will find in its cache, and a booking is
        # not made smaller by what was computed of it.
        self.busy_until_s = now + min(queued_s + on_its_way_s, self.own_work_s)

    def book(self, booking: Booking, now: float) -> None:
        """Who has more slack is passed."""
        for other in self.bookings:
            if other.latest_start_s > booking.latest_start_s:
                other.delayed_s += booking.work_s
        self.bookings[booking] = None
        self.own_work_s += booking.work_s
        self.own_tokens += booking.query.prompt_tokens
        self.busy_until_s = max(now, self.busy_until_s) + booking.work_s

    def first_token(self, booking: Booking, now: float) -> None:
        if booking not in self.bookings:
            return
        self._drop(booking)
        if self._has_others:
            return
        left_s = now + self.own_work_s
        self.busy_until_s = left_s if self.busy_until_s <= now else min(self.busy_until_s, left_s)

    def leave(self, booking: Booking, now: float) -> None:
        """It will not be computed here, or not to its end."""
        # Booked in the worker's last life.
        if booking not in self.bookings:
            return
        for other in self.bookings:
            if other is booking:
                break
            if other.latest_start_s > booking.latest_start_s:
                other.delayed_s = max(0.0, other.delayed_s - booking.work_s)
        self._drop(booking)
        self.busy_until_s = max(now, self.busy_until_s - booking.work_s)

    def _drop(self, booking: Booking) -> None:
        del self.bookings[booking]
        # Sums of floats drift: an empty backlog is exactly empty.
        self.own_work_s = max(0.0, self.own_work_s - booking.work_s) if self.bookings else 0.0
        self.own_tokens -= booking.query.prompt_tokens
