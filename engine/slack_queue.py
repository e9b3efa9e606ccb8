"""A queue ordered by slack: who must start first to be in time goes first.

Least slack first is the classic rule for deadlines; here an entry's latest start is its deadline less its expected
work. An entry without a deadline is given `patience_s` from its arrival, so that it is never starved by those that have
one. Equal entries leave in order of arrival.

An entry may have an objective besides: as long as it can be met, the entry goes before those that have none, the
earliest first (engine/urgency.py).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

# How long an entry without a deadline is patient, and a request without an objective wherever one waits.
PATIENCE_S = 30.0

Item = TypeVar("Item")
# Key of the order, serial number of the entry, its key.
Heap = list[tuple[float, int, str]]


@dataclass(frozen=True, slots=True)
class _Entry(Generic[Item]):
    serial: int
    item: Item
    latest_start_s: float
    late_after_s: float


class SlackQueue(Generic[Item]):
    """Items under unique keys; push, peek and pop cost O(log n), removal O(1) until the entry surfaces."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._timely: Heap = []
        self._patient: Heap = []
        self._entries: dict[str, _Entry[Item]] = {}
        self._pushed_count = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Item]:
        return (entry.item for entry in self._entries.values())

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def push(
        self,
        key: str,
        item: Item,
        now: float,
        deadline: float | None,
        work_s: float = 0.0,
        *,
        objective_s: float = math.inf,
        late_after_s: float = -math.inf,
    ) -> None:
        """`deadline` is an absolute time of the same clock as `now`; `work_s` is what the item still needs. Until
        `late_after_s` the item can be done by `objective_s`."""
        assert key not in self._entries, f"{key} is queued already"
        latest_start = (now + self._patience_s if deadline is None else deadline) - work_s
        self._pushed_count += 1
        self._entries[key] = _Entry(self._pushed_count, item, latest_start, late_after_s)
        if now <= late_after_s:
            heapq.heappush(self._timely, (objective_s, self._pushed_count, key))
        else:
            heapq.heappush(self._patient, (latest_start, self._pushed_count, key))

    def peek(self, now: float = -math.inf, *, is_late_turn: bool = False) -> Item | None:
        """The item whose turn it is, left in place. With `is_late_turn`, one whose latest start has passed goes before
        those that can meet their objectives."""
        heap = self._next(now, is_late_turn)
        return self._entries[heap[0][2]].item if heap else None

    def pop(self, now: float = -math.inf, *, is_late_turn: bool = False) -> Item:
        """Takes the item that `peek` shows."""
        heap = self._next(now, is_late_turn)
        assert heap, "pop from an empty queue"
        return self._entries.pop(heapq.heappop(heap)[2]).item

    def remove(self, key: str) -> Item | None:
        """Takes one item out of turn; None when it is not here."""
        entry = self._entries.pop(key, None)
        return entry.item if entry else None

    def _next(self, now: float, is_late_turn: bool) -> Heap | None:
        """The heap whose first entry is next, None when there is no entry."""
        while self._drop_removed(self._timely):
            _, serial, key = self._timely[0]
            entry = self._entries[key]
            if now <= entry.late_after_s:
                break
            heapq.heappop(self._timely)
            heapq.heappush(self._patient, (entry.latest_start_s, serial, key))
        if not self._drop_removed(self._patient):
            return self._timely or None
        is_turn = is_late_turn and self._patient[0][0] <= now
        return self._patient if is_turn or not self._timely else self._timely

    def _drop_removed(self, heap: Heap) -> bool:
        """Drops entries that were removed; False when none is left."""
        while heap:
            _, serial, key = heap[0]
            entry = self._entries.get(key)
            if entry is not None and entry.serial == serial:
                return True
            heapq.heappop(heap)
        return False
