"""Workers in order of load, kept up to date one worker at a time."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator


class LoadOrder:
    """A sorted list of (load, id): a change moves one entry, O(log n) comparisons and one move of memory, which for a
    few thousand workers is quicker than any tree; the least loaded are a slice."""

    def __init__(self) -> None:
        self._loads: dict[str, float] = {}
        self._order: list[tuple[float, str]] = []
        self._ids: list[str] = []

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, worker_id: str) -> bool:
        return worker_id in self._loads

    def put(self, worker_id: str, load: float) -> None:
        """Adds a worker or moves it."""
        before = self._loads.get(worker_id)
        if before is None:
            insort(self._ids, worker_id)
        elif before == load:
            return
        else:
            del self._order[bisect_left(self._order, (before, worker_id))]
        self._loads[worker_id] = load
        insort(self._order, (load, worker_id))

    def discard(self, worker_id: str) -> None:
        load = self._loads.pop(worker_id, None)
        if load is not None:
            del self._order[bisect_left(self._order, (load, worker_id))]
            del self._ids[bisect_left(self._ids, worker_id)]

    def __iter__(self) -> Iterator[str]:
        """Ids, the least loaded first. The order must not change meanwhile."""
        return (worker_id for _, worker_id in self._order)

    def load(self, worker_id: str) -> float:
        return self._loads[worker_id]

    def least(self, count: int) -> list[str]:
        """The ids of the `count` least loaded, least first; equals in order of id."""
        return [worker_id for _, worker_id in self._order[:count]]

    @property
    def ids(self) -> list[str]:
        """All ids, sorted. Not to be changed."""
        return self._ids
