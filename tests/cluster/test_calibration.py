"""Probabilities that hold: of requests that were given a chance of 70 %, about 70 % are in time."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.routing.calibration import PRIOR_COUNT, WINDOW, Residuals

LAWS: dict[str, Callable[[random.Random], float]] = {
    "exact": lambda rng: 1.0,
    "twice as long": lambda rng: 2.0,
    "lognormal": lambda rng: rng.lognormvariate(0.1, 0.3),
    "a long tail": lambda rng: 1.0 + rng.paretovariate(1.5) * 0.1,
    "two kinds": lambda rng: rng.choice([0.9, 0.95, 1.0, 3.0]),
}


@pytest.mark.parametrize("law", list(LAWS))
def test_what_is_said_to_be_likely_is_as_likely(law: str) -> None:
    rng = random.Random(1)
    residuals, said, held = Residuals(), [0.0] * 10, [0] * 10
    counts = [0] * 10
    for number in range(20_000):
        predicted_s = rng.uniform(0.01, 2.0)
        actual_s = predicted_s * LAWS[law](rng)
        limit_s = predicted_s * rng.lognormvariate(0.3, 0.5)
        probability = residuals.probability(predicted_s, limit_s)
        if number > WINDOW:
            bucket = min(9, int(10 * probability))
            said[bucket] += probability
            held[bucket] += actual_s <= limit_s
            counts[bucket] += 1
        residuals.add(predicted_s, actual_s)
    for bucket, count in enumerate(counts):
        if count > 500:
            assert held[bucket] / count == pytest.approx(said[bucket] / count, abs=0.07), f"bucket {bucket}"


def test_before_any_data_predictions_are_taken_for_about_right() -> None:
    residuals = Residuals()
    assert residuals.probability(1.0, 1.0) == pytest.approx(0.5, abs=0.05)
    assert residuals.probability(1.0, 2.0) > 0.95
    assert residuals.probability(1.0, 0.5) < 0.05


def test_each_datum_replaces_one_of_the_prior_and_old_data_go() -> None:
    residuals = Residuals()
    for _ in range(PRIOR_COUNT):
        residuals.add(1.0, 3.0)
    assert residuals.quantile(0.0) == residuals.quantile(1.0) == pytest.approx(3.0)
    for _ in range(WINDOW):
        residuals.add(1.0, 0.5)
    assert residuals.quantile(1.0) == pytest.approx(0.5)
    assert residuals.count == PRIOR_COUNT + WINDOW


def test_a_limit_that_has_passed_cannot_be_met() -> None:
    assert Residuals().probability(0.1, 0.0) == 0.0
    assert Residuals().probability(0.1, -1.0) == 0.0
    assert Residuals().probability(0.0, 1.0) > 0.99


@given(st.lists(st.floats(0.01, 100), max_size=60), st.floats(0.01, 10), st.floats(0.001, 50), st.floats(1.0, 3.0))
def test_a_later_limit_is_never_less_likely(
    ratios: list[float], predicted_s: float, limit_s: float, factor: float
) -> None:
    residuals = Residuals()
    for ratio in ratios:
        residuals.add(1.0, ratio)
    early = residuals.probability(predicted_s, limit_s)
    late = residuals.probability(predicted_s, limit_s * factor)
    assert 0.0 <= early <= late <= 1.0
    assert residuals.quantile(0.1) <= residuals.quantile(0.9)
