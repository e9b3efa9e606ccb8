"""Requests that wait at the gateway for a worker to become free, in order of slack: who must start first comes first.

Late binding: a request that is kept here can still go to whichever worker frees up first, and one with less slack that
comes later can still pass it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import accumulate


class WaitingRoom:
    """Latest starts and works in seconds, by ticket, kept as parallel lists in order of (latest start, ticket)."""

    def __init__(self) -> None:
        self._order: list[tuple[float, int]] = []
        self._starts: list[float] = []
        self._works: list[float] = []
        self._places: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._order)

    def enter(self, ticket: int, latest_start_s: float, work_s: float) -> None:
        assert ticket not in self._places, f"ticket {ticket} waits already"
        place = bisect_left(self._order, (latest_start_s, ticket))
        self._order.insert(place, (latest_start_s, ticket))
        self._starts.insert(place, latest_start_s)
        self._works.insert(place, work_s)
        self._places[ticket] = latest_start_s

    def leave(self, ticket: int) -> bool:
        """False for a ticket that is not here."""
        latest_start_s = self._places.pop(ticket, None)
        if latest_start_s is None:
            return False
        place = bisect_left(self._order, (latest_start_s, ticket))
        del self._order[place], self._starts[place], self._works[place]
        return True

    def first(self, count: int) -> list[int]:
        """The tickets of least slack, least first."""
        return [ticket for _, ticket in self._order[:count]]

    def ahead_s(self, latest_start_s: float) -> float:
        """Work of those that come before a newcomer of this latest start."""
        return sum(self._works[: bisect_right(self._starts, latest_start_s)])

    def late_after(self, latest_start_s: float, work_s: float, servers: int, now: float) -> int:
        """How many of those behind a newcomer can start in time now, with `servers` serving all, and could not with
        `work_s` before them. Counts as Moore's rule for the fewest late jobs does (Moore, Management Science 1968)."""
        first = bisect_right(self._starts, latest_start_s)
        delay_s = work_s / servers
        start_s = now + sum(self._works[:first]) / servers
        late = 0
        waits = accumulate(self._works[first:-1], initial=0.0) if first < len(self._works) else ()
        for latest_s, wait_s in zip(self._starts[first:], waits, strict=True):
            begins_s = start_s + wait_s / servers
            late += begins_s <= latest_s < begins_s + delay_s
        return late
