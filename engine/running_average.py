"""An exponentially weighted average of a worker's own measurements."""

from __future__ import annotations


class RunningAverage:
    """`value` is 0.0 before the first sample, and follows a lasting change within about 1 / `weight` samples."""

    def __init__(self, weight: float = 0.1) -> None:
        self._weight = weight
        self._value: float | None = None

    @property
    def value(self) -> float:
        return 0.0 if self._value is None else self._value

    def add(self, sample: float) -> None:
        self._value = sample if self._value is None else self._value + self._weight * (sample - self._value)
