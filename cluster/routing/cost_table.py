"""A cost model's answers, kept on a grid and interpolated: a decision asks for dozens, and each must take about a
microsecond. Grid points are a quarter of an octave apart; between them a step's time is close to linear."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable

POINTS_PER_OCTAVE = 4
MOST = 1 << 40
# 0, 1, 2, 3, … and then so many to an octave.
GRID = tuple(sorted({0, *(round(2 ** (point / POINTS_PER_OCTAVE)) for point in range(40 * POINTS_PER_OCTAVE + 1))}))


class CostTable:
    """f(count, context) for whole counts and any context, linear between grid points of the context; with `is_coarse`
    also between those of the count. Answers at grid points are exact."""

    def __init__(self, function: Callable[[int, int], float], is_coarse: bool) -> None:
        self._function = function
        self._is_coarse = is_coarse
        self._known: dict[tuple[int, int], float] = {}

    def __call__(self, count: int, context: float) -> float:
        assert 0 <= count <= MOST, f"{count} is no count"
        if not self._is_coarse:
            return self._along(count, context)
        place = bisect_right(GRID, count)
        below = GRID[place - 1]
        low = self._along(below, context)
        if below == count:
            return low
        above = GRID[place]
        return low + (self._along(above, context) - low) * (count - below) / (above - below)

    def _along(self, count: int, context: float) -> float:
        place = bisect_right(GRID, context)
        below = GRID[place - 1]
        low = self._at(count, below)
        if below == context:
            return low
        above = GRID[place]
        return low + (self._at(count, above) - low) * (context - below) / (above - below)

    def _at(self, count: int, context: int) -> float:
        value = self._known.get((count, context))
        if value is None:
            value = self._known[count, context] = self._function(count, context)
            assert math.isfinite(value), f"the cost of {count} with context {context} is {value}"
        return value
