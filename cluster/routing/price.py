"""What a second of a pool's time is worth: the good that it could do for others.

A prompt that takes fifty times the work of others displaces fifty of them. So each request pays for the work that it
brings, and is served where it is worth more than that. The price of a second follows from how full the pool is:

    ln price  =  learned  +  STEEPNESS · (fill − target)        at most what makes the lightest pay MOST of a request

`fill` is the share of what can be promised that is promised already. The learned part rises while the pool is fuller
than its target and falls while it is emptier: it settles where what is let in is what can be done. That is the dual
price of the linear program "most requests in time within the pools' capacity", found by following its gradient (Low and
Lapsley, Optimization flow control, IEEE/ACM ToN 1999). The second part answers bursts, which no average sees coming.
While there is room for everybody the price is 0. It never rises so high that even the lightest are refused: where all
bring the same work, refusing one for the sake of the next would gain nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque

STEEPNESS = 4.0
# How fast the learned part moves: by 1 in this time for a pool that is fuller than its target by all of its capacity.
LEARN_S = 1.0
WINDOW = 256
# The heaviest and the lightest work that set the range of prices, as quantiles of what came.
HEAVY, LIGHT = 0.98, 0.05
# How often they are looked up again, in requests.
REFRESH = 16
# Of the price at which the heaviest would not be worth it, the part below which there is none.
FREE = 0.05
# What the lightest pay at most, in requests.
MOST = 0.1
LEAST_WORK_S = 1e-6


class ShadowPrice:
    """The price of one pool's time, in requests per second of work."""

    def __init__(self, target_fill: float) -> None:
        self._target = target_fill
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._seen = 0
        self._learned_at_s = -math.inf
        # In log price: the range, and how far above its floor the learned part is.
        self._floor = self._ceiling = self._excess = 0.0

    def saw(self, work_s: float, fill: float, now: float) -> None:
        """A request came that would take `work_s`, served or not, while the pool was this full. One that takes nothing
        says nothing of what work there is."""
        if work_s < LEAST_WORK_S:
            return
        if len(self._recent) == WINDOW:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(work_s)
        insort(self._sorted, work_s)
        if self._seen % REFRESH == 0:
            last = len(self._sorted) - 1
            self._floor = -math.log(self._sorted[int(HEAVY * last)] / FREE)
            self._ceiling = math.log(MOST / self._sorted[int(LIGHT * last)])
        self._seen += 1
        # A long pause teaches no more than the time that a pool remembers.
        passed_s = min(now - self._learned_at_s, LEARN_S) if self._seen > 1 else 0.0
        self._learned_at_s = now
        self._excess += (min(fill, 2.0) - self._target) * passed_s / LEARN_S
        self._excess = min(max(self._excess, 0.0), self._ceiling - self._floor)

    def of(self, work_s: float, fill: float) -> float:
        """Requests that this work displaces now."""
        excess = self._excess + STEEPNESS * (min(fill, 1.0) - self._target)
        if not self._seen or excess <= 0:
            return 0.0
        return work_s * math.exp(min(self._floor + excess, self._ceiling))
