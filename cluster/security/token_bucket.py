"""How much may be taken over time: a bucket that fills up evenly, and so much at once as it holds. Pure."""

from __future__ import annotations

import math

# What rounding may make of nothing.
ROUNDING_S = 1e-6


class TokenBucket:
    """Holds `size` and gets `per_s` in a second; full at first. Times are of any one clock."""

    def __init__(self, size: float, per_s: float) -> None:
        assert min(size, per_s) > 0, f"a bucket of {size}, {per_s} a second, is never of use"
        self.size = size
        self._per_s = per_s
        # When it will be full again.
        self._full_s = -math.inf

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount`, at most `size`, can be taken if nobody else takes any; 0.0 when it can be now."""
        assert amount <= self.size, f"{amount} never fit into {self.size}"
        wait_s = self._full_s - now - (self.size - amount) / self._per_s
        return wait_s if wait_s > ROUNDING_S else 0.0

    def take(self, amount: float, now: float) -> None:
        """To be asked for with `wait_s` first."""
        self._full_s = max(self._full_s, now) + amount / self._per_s

    def give_back(self, amount: float) -> None:
        """Of what was taken."""
        self._full_s -= amount / self._per_s
