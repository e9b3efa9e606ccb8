"""Arrival processes: their rate, their burstiness, and that a seed decides them."""

from __future__ import annotations

import random
import statistics

import pytest

from cluster.planning.arrivals import ArrivalKind, arrivals
from engine.errors import InvalidArgument


def gaps(kind: ArrivalKind, cv: float, rate: float = 4.0, count: int = 20_000) -> list[float]:
    times = arrivals(rate, count, kind, cv, random.Random(7))
    return [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]


@pytest.mark.parametrize(
    ("kind", "cv", "expected_cv"),
    [("poisson", 9.0, 1.0), ("gamma", 0.3, 0.3), ("gamma", 1.0, 1.0), ("gamma", 3.0, 3.0)],
)
def test_rate_and_variation_are_as_asked(kind: ArrivalKind, cv: float, expected_cv: float) -> None:
    found = gaps(kind, cv)
    # Standard errors: cv/√n of the mean; of the CV about √(kurtosis/4n), below 4 % for the burstiest here.
    assert statistics.fmean(found) == pytest.approx(0.25, rel=4 * expected_cv / len(found) ** 0.5)
    assert statistics.pstdev(found) / statistics.fmean(found) == pytest.approx(expected_cv, rel=0.12)


def test_fixed_gaps_are_all_the_same() -> None:
    assert arrivals(4.0, 5, "fixed", 1.0, random.Random(0)) == [0.25, 0.5, 0.75, 1.0, 1.25]


def test_times_only_grow_and_a_seed_decides_them() -> None:
    times = arrivals(10.0, 500, "gamma", 4.0, random.Random(3))
    assert times == sorted(times)
    assert times[0] > 0
    assert times == arrivals(10.0, 500, "gamma", 4.0, random.Random(3))
    assert times != arrivals(10.0, 500, "gamma", 4.0, random.Random(4))


@pytest.mark.parametrize(
    ("rate", "count", "kind", "cv", "field"),
    [
        (0.0, 1, "poisson", 1.0, "rate"),
        (float("inf"), 1, "fixed", 1.0, "rate"),
        (1.0, -1, "fixed", 1.0, "count"),
        (1.0, 1, "gamma", 0.0, "cv"),
        (1.0, 1, "uniform", 1.0, "kind"),
    ],
)
def test_what_cannot_be_is_named(rate: float, count: int, kind: ArrivalKind, cv: float, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        arrivals(rate, count, kind, cv, random.Random(0))
    assert caught.value.field == field
