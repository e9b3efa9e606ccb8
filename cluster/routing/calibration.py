"""How far predictions can be trusted: the spread of actual over predicted times, as it was lately.

P(actual <= limit) is the share of past ratios r with predicted * r <= limit: quantiles of residuals, not a fitted law,
since queues make tails that no normal distribution has. First tokens are split by kind, because local prefill errs
differently, and so does a request that waits at the gateway first: its ratio is that of the whole time since it came,
and the wait is most of it. The pace after them is that of the decode worker, wherever the prompt came from.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from typing import Literal

Kind = Literal["pair", "local"]
WINDOW = 256
# Before there are data: ratios spread evenly in the quantiles of a logistic law of this scale, around 1.
PRIOR_COUNT = 16
PRIOR_SCALE = 0.08
# How fast the probability falls beyond the largest ratio seen, in log ratio.
TAIL = 0.05
SMALLEST_S = 1e-6


class Residuals:
    """Log ratios of actual to predicted time. Each of the first data replaces one of the prior."""

    def __init__(self) -> None:
        ranks = [(index + 0.5) / PRIOR_COUNT for index in range(PRIOR_COUNT)]
        self._prior = [PRIOR_SCALE * math.log(rank / (1 - rank)) for rank in ranks]
        # From the outside in, so that few data already narrow or widen the whole.
        self._prior.sort(key=abs)
        self._recent: deque[float] = deque()
        self._sorted = sorted(self._prior)
        self.count = 0

    def add(self, predicted_s: float, actual_s: float) -> None:
        residual = math.log(max(actual_s, SMALLEST_S) / max(predicted_s, SMALLEST_S))
        oldest = None
        if self._prior:
            oldest = self._prior.pop()
        elif len(self._recent) >= WINDOW:
            oldest = self._recent.popleft()
        if oldest is not None:
            del self._sorted[bisect_left(self._sorted, oldest)]
        self._recent.append(residual)
        insort(self._sorted, residual)
        self.count += 1

    def probability(self, predicted_s: float, limit_s: float) -> float:
        """That an actual time is at most `limit_s`: rises with it everywhere, and is never quite 0 or 1."""
        if limit_s <= 0:
            return 0.0
        x = math.log(limit_s / max(predicted_s, SMALLEST_S))
        residuals = self._sorted
        count = len(residuals)
        place = bisect_left(residuals, x)
        if place == 0:
            return math.exp((x - residuals[0]) / TAIL) / (count + 1)
        if place == count:
            return 1.0 - math.exp((residuals[-1] - x) / TAIL) / (count + 1)
        below, above = residuals[place - 1], residuals[place]
        return (place + (x - below) / (above - below)) / (count + 1)

    @property
    def largest(self) -> float:
        """The largest ratio of actual to predicted, with room: what is within it is as good as certain."""
        return math.exp(self._sorted[-1] + 4.0 * TAIL)

    def quantile(self, share: float) -> float:
        """The ratio of actual to predicted that this share of requests stays under."""
        place = min(len(self._sorted) - 1, int(share * len(self._sorted)))
        return math.exp(self._sorted[place])


class Calibration:
    """TTFT of each kind of route from when it was taken, `promise`: that of requests that waited at the gateway first,
    from when they came; and TPOT."""

    def __init__(self) -> None:
        self.ttft: dict[Kind, Residuals] = {"pair": Residuals(), "local": Residuals()}
        self.promise = Residuals()
        self.tpot = Residuals()
