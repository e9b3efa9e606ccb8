"""What this gateway has sent to workers and what has not ended yet: one booking per request, from its route to its end.

routed ──────── first token ──────── ended
prompt queued   row decodes          nothing

Every step is told to the view, which keeps each worker's sums, to the policy, which learns how far it was off, and to
the breakers, which learn who can be trusted again.
"""

from __future__ import annotations

from cluster.breakers import Breakers
from cluster.routing.booking import Booking
from cluster.routing.query import Route, RouteQuery, Router
from cluster.routing.view import ClusterView


class Ledger:
    """Bookings, each at most as long as its request runs."""

    def __init__(self, view: ClusterView, router: Router, breakers: Breakers) -> None:
        self._view = view
        self._router = router
        self._breakers = breakers
        self._bookings: set[Booking] = set()

    def book(self, query: RouteQuery, route: Route, now: float) -> Booking:
        """Counts a request on its route's workers until `end`."""
        booking = Booking(query, route, now)
        self._bookings.add(booking)
        self._view.book(booking, now)
        self._breakers.booked(booking)
        return booking

    def first_token(self, booking: Booking, now: float) -> None:
        """Its first token is here: nothing of its prompt is queued any more."""
        self._view.first_token(booking, now)
        self._router.learn_ttft(booking, now)
        self._breakers.succeeded(booking)

    def drew(self, booking: Booking, tokens: int, now: float) -> None:
        """So many more tokens of its answers have come."""
        booking.tokens_drawn += tokens
        drawn = booking.tokens_drawn // booking.query.rows
        if booking.drawn < 2 <= drawn:
            # The first comes ahead of the KV, the second from all of it.
            self._breakers.pulled(booking)
        self._view.answers.drew((drawn - booking.drawn) * booking.query.rows)
        booking.drawn, booking.drawn_s = drawn, now

    def answered(self, booking: Booking) -> None:
        """The last of its tokens has come. May be called again."""
        if not booking.is_answered:
            booking.is_answered = True
            self._breakers.pulled(booking)
            self._view.answers.ended(booking.query.rows)

    def finished(self, booking: Booking, tpot_s: float, answer_tokens: int) -> None:
        """It was answered whole."""
        self.answered(booking)
        self._router.learn_tpot(booking, tpot_s, answer_tokens)

    def end(self, booking: Booking, now: float) -> None:
        """It holds nothing any more. May be called again."""
        if booking not in self._bookings:
            return
        self._bookings.remove(booking)
        self._view.end(booking, now)
        self._breakers.ended(booking)

    def on_its_way(self, worker_id: str) -> int:
        """Requests that were sent to a worker and still have something to do there, as far as a gateway can see: a
        prompt to be computed, or an answer to be decoded."""
        return self._view.on_its_way(worker_id)

    def check_empty(self) -> None:
        """Asserts that nothing is booked."""
        booked = sorted({booking.route.decode_id for booking in self._bookings})
        assert not self._bookings, f"requests are still booked on {booked}"
