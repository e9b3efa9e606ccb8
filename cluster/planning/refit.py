"""Learns from steps that were really run how far the predictions are off, and says how large the error still is.

    prediction of a step = decode scale · its decode part + prefill scale · the rest

A scale is the median of actual / predicted over the last steps of its phase. A median does not care how wrong a few
steps are (a garbage collection, a kernel compiled at first use), and needs neither a step size nor a forgetting factor.
The window starts with a few copies of the scale it starts from, so the very first steps cannot throw it either.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass

# Steps whose ratios the median is of: enough against noise, few enough to follow a worker that slows down.
SCALE_STEPS = 63
# How many ratios the starting scale counts for.
START_WEIGHT = 5
# A profile that is further off than this is of another device: rather wrong than absurd.
LEAST_SCALE, LARGEST_SCALE = 1 / 64, 64.0
# Steps that the reported error is of.
ERROR_STEPS = 256


@dataclass(frozen=True, slots=True)
class CostError:
    """Median and 90th percentile of |predicted − actual| / actual over the last `count` steps; 0.0 before the first."""

    median: float
    p90: float
    count: int


class RunningMedian:
    """Of the last `SCALE_STEPS` ratios. O(log n) comparisons and one short move of memory per ratio."""

    def __init__(self, start: float) -> None:
        assert start > 0, f"a scale is positive, not {start}"
        self._order = deque([start] * START_WEIGHT)
        self._sorted = list(self._order)
        self._value = start

    @property
    def value(self) -> float:
        return self._value

    def add(self, ratio: float) -> None:
        ratio = min(max(ratio, LEAST_SCALE), LARGEST_SCALE)
        if len(self._order) == SCALE_STEPS:
            self._sorted.pop(bisect_left(self._sorted, self._order.popleft()))
        self._order.append(ratio)
        insort(self._sorted, ratio)
        self._value = self._sorted[len(self._sorted) // 2]


class RunningError:
    """Of predictions that were made before the step they are about was learned from."""

    def __init__(self) -> None:
        self._errors: deque[float] = deque(maxlen=ERROR_STEPS)

    def add(self, predicted_s: float, actual_s: float) -> None:
        self._errors.append(abs(predicted_s - actual_s) / actual_s)

    def summary(self) -> CostError:
        count = len(self._errors)
        if not count:
            return CostError(0.0, 0.0, 0)
        ordered = sorted(self._errors)
        return CostError(ordered[count // 2], ordered[min(count - 1, count * 9 // 10)], count)


class Refit:
    """The two scales and the error of one worker's predictions."""

    def __init__(self, prefill: float = 1.0, decode: float = 1.0) -> None:
        self._prefill = RunningMedian(prefill)
        self._decode = RunningMedian(decode)
        self._error = RunningError()
        self.prefill, self.decode = prefill, decode

    def predicted_s(self, decode_s: float, rest_s: float) -> float:
        """Of a step that takes so long before correction: its decode rows alone, and what its prompts add."""
        return self.decode * decode_s + self.prefill * rest_s

    def learn(self, decode_s: float, rest_s: float, actual_s: float) -> None:
        """Takes a step. One with both kinds of rows teaches the phase that is the larger part of it."""
        if actual_s <= 0 or decode_s + rest_s <= 0:
            return
        decode_part_s, rest_part_s = self.decode * decode_s, self.prefill * rest_s
        self._error.add(decode_part_s + rest_part_s, actual_s)
        if rest_part_s > decode_part_s:
            self._prefill.add((actual_s - decode_part_s) / rest_s)
            self.prefill = self._prefill.value
        else:
            self._decode.add((actual_s - rest_part_s) / decode_s)
            self.decode = self._decode.value

    def error(self) -> CostError:
        return self._error.summary()
