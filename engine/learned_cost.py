"""What a cost model that learns from a worker's steps says of itself, for the worker's stats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from engine.step_cost import StepCost


class PredictionError(Protocol):
    """|predicted − actual| / actual over the last `count` steps: median and 90th percentile."""

    @property
    def median(self) -> float: ...

    @property
    def p90(self) -> float: ...

    @property
    def count(self) -> int: ...


@runtime_checkable
class LearnedCost(Protocol):
    """Offered by cost models beside engine.step_cost.StepCost; one that does not learn need not have it."""

    @property
    def scales(self) -> tuple[float, float]:
        """How many times longer than profiled this worker's steps take: those with prompts, those without."""
        ...

    def error(self) -> PredictionError: ...


@dataclass(frozen=True, slots=True)
class Learned:
    """As engine.stats.LoopStats has it."""

    prefill_scale: float = 1.0
    decode_scale: float = 1.0
    error_median: float = 0.0
    error_p90: float = 0.0


NOTHING_LEARNED = Learned()


def learner(cost: StepCost | None) -> LearnedCost | None:
    """`cost`, when it says what it has learned. To be asked once: the check takes longer than the answer."""
    return cost if isinstance(cost, LearnedCost) else None


def learned(cost: LearnedCost | None) -> Learned:
    if cost is None:
        return NOTHING_LEARNED
    error = cost.error()
    return Learned(*cost.scales, error.median, error.p90)
