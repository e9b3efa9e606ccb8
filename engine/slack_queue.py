"""A queue ordered by slack: who must start first to be in time goes first.

Least slack first is the classic rule for deadlines; here an entry's latest start is its deadline less its expected
work. An entry without a deadline is given `patience_s` from its arrival, so that it is never starved by those that have
one. Equal entries leave in order of arrival.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class SlackQueue(Generic[Item]):
    """Items under unique keys; push, peek and pop cost O(log n), removal O(1) until the entry surfaces."""

    def __init__(self, patience_s: float = 30.0) -> None:
        self._patience_s = patience_s
        self._heap: list[tuple[float, int, str]] = []
        self._items: dict[str, tuple[int, Item]] = {}
        self._pushed_count = 0

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return (item for _, item in self._items.values())

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def push(self, key: str, item: Item, now: float, deadline: float | None, work_s: float = 0.0) -> None:
        """`deadline` is an absolute time of the same clock as `now`; `work_s` is what the item still needs."""
        assert key not in self._items, f"{key} is queued already"
        latest_start = (now + self._patience_s if deadline is None else deadline) - work_s
        self._pushed_count += 1
        heapq.heappush(self._heap, (latest_start, self._pushed_count, key))
        self._items[key] = (self._pushed_count, item)

    def peek(self) -> Item | None:
        """The item with the least slack, left in place."""
        while self._heap:
            _, serial, key = self._heap[0]
            entry = self._items.get(key)
            if entry is not None and entry[0] == serial:
                return entry[1]
            heapq.heappop(self._heap)
        return None

    def pop(self) -> Item:
        """Takes the item with the least slack."""
        item = self.peek()
        assert item is not None, "pop from an empty queue"
        del self._items[heapq.heappop(self._heap)[2]]
        return item

    def remove(self, key: str) -> Item | None:
        """Takes one item out of turn; None when it is not here."""
        entry = self._items.pop(key, None)
        return entry[1] if entry else None
