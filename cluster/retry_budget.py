"""How fast requests may be tried again, all together: a token bucket, so that a lost pool is not stormed. Pure."""

from __future__ import annotations

import math


class RetryBudget:
    """`burst` at once, `per_s` in the long run. Who comes beyond that waits for its turn, in order of coming."""

    def __init__(self, per_s: float, burst: int) -> None:
        self._interval_s = 1.0 / per_s
        self._tolerance_s = (burst - 1) * self._interval_s
        # When the bucket will be full again.
        self._full_s = -math.inf

    def take(self, now: float) -> float:
        """Takes the next turn; returns how many seconds it is away."""
        full_s = max(self._full_s, now)
        self._full_s = full_s + self._interval_s
        return max(0.0, full_s - self._tolerance_s - now)
