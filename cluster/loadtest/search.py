"""Finds the highest rate at which attainment is high enough: doubling or halving until the rate is between a pass and a
failure, then bisection. Pure: rates out, attainments in."""

from __future__ import annotations

from dataclasses import dataclass, field

# How far below the first rate is looked, before the answer is "none".
LOWEST_SHARE = 1 / 64


@dataclass(slots=True)
class GoodputSearch:
    """`tolerance` is how close, relatively, the lowest failure must come to the highest pass. Should attainment fall
    and rise again with the rate, the answer is a pass with a failure close above it, not the highest pass of all."""

    start_rps: float
    target: float = 0.9
    tolerance: float = 0.05
    max_probes: int = 12
    passed_rps: float = 0.0
    failed_rps: float | None = None
    probes: list[tuple[float, float]] = field(default_factory=list)

    def next_rps(self) -> float | None:
        """The rate to try; None when the search is over."""
        if len(self.probes) >= self.max_probes:
            return None
        if not self.probes:
            return self.start_rps
        if self.failed_rps is None:
            return _rounded(2 * self.passed_rps)
        if not self.passed_rps:
            lower = self.failed_rps / 2
            return None if lower < LOWEST_SHARE * self.start_rps else _rounded(lower)
        if self.failed_rps <= self.passed_rps * (1 + self.tolerance):
            return None
        middle = _rounded((self.passed_rps + self.failed_rps) / 2)
        return middle if self.passed_rps < middle < self.failed_rps else None

    def add(self, rate_rps: float, attainment: float) -> None:
        """What the rate tried last attained."""
        self.probes.append((rate_rps, attainment))
        if attainment >= self.target:
            self.passed_rps = max(self.passed_rps, rate_rps)
        elif self.failed_rps is None or rate_rps < self.failed_rps:
            self.failed_rps = rate_rps

    @property
    def is_bracketed(self) -> bool:
        """Whether a failure was seen close above the highest pass: else the answer is a bound, or coarse."""
        return self.failed_rps is not None and self.failed_rps <= self.passed_rps * (1 + self.tolerance) + 1e-9


def _rounded(rate_rps: float) -> float:
    return float(f"{rate_rps:.4g}")
