"""How often values of which size came: what a histogram shows. Pure.

Plain lists, and no lock: one task counts, thousands of times a second.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


class Tally:
    """Counts values by classes. `bounds` are the upper ends of all but the last, rising; the last has no end."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self._counts)

    def cumulative(self) -> list[tuple[float, int]]:
        """(upper end, how many values are at most that), the last for all."""
        return list(zip((*self._bounds, math.inf), accumulate(self._counts), strict=True))
