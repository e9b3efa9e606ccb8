"""Learning from real steps: the true scales are found through noise, and lone outliers change nothing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.planning.refit import LARGEST_SCALE, LEAST_SCALE, SCALE_STEPS, START_WEIGHT, Refit, RunningMedian


def test_median_of_the_last_ratios() -> None:
    median = RunningMedian(1.0)
    for ratio in range(1, 2 * SCALE_STEPS + 1):
        median.add(ratio / SCALE_STEPS)
    # The last SCALE_STEPS ratios are those above 1.
    assert median.value == pytest.approx(1 + (SCALE_STEPS // 2 + 1) / SCALE_STEPS)


@given(
    ratios=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=300),
    start=st.floats(0.1, 10.0),
)
def test_median_agrees_with_sorting(ratios: list[float], start: float) -> None:
    median = RunningMedian(start)
    for ratio in ratios:
        median.add(ratio)
    held = [min(max(ratio, LEAST_SCALE), LARGEST_SCALE) for ratio in ratios]
    window = sorted(([start] * START_WEIGHT + held)[-SCALE_STEPS:])
    assert median.value == window[len(window) // 2]


@given(
    prefill=st.floats(0.1, 10.0),
    decode=st.floats(0.1, 10.0),
    seed=st.integers(0, 1 << 30),
    outliers=st.floats(0.0, 0.2),
)
def test_converges_to_the_true_scales(prefill: float, decode: float, seed: int, outliers: float) -> None:
    """Of every kind of step, with 5 % noise, and up to a fifth of them ten times as long as they should be."""
    rng, refit = random.Random(seed), Refit()
    for number in range(300):
        decode_s = rng.uniform(0.01, 0.03) if number % 3 else 0.0
        rest_s = rng.uniform(0.05, 0.5) if number % 3 != 1 else 0.0
        actual_s = (decode * decode_s + prefill * rest_s) * rng.uniform(0.95, 1.05)
        refit.learn(decode_s, rest_s, actual_s * (10.0 if rng.random() < outliers else 1.0))
    assert refit.decode == pytest.approx(decode, rel=0.05)
    assert refit.prefill == pytest.approx(prefill, rel=0.05)


def test_follows_a_worker_that_slows_down() -> None:
    refit = Refit()
    for _ in range(500):
        refit.learn(0.02, 0.0, 0.02)
    for _ in range(SCALE_STEPS // 2 + 1):
        refit.learn(0.02, 0.0, 0.05)
    assert refit.decode == pytest.approx(2.5)
    assert refit.prefill == 1.0


def test_first_steps_and_lone_outliers_change_nothing() -> None:
    """A step that compiles a kernel comes first of all."""
    refit = Refit()
    for _ in range(START_WEIGHT - 1):
        refit.learn(0.0, 0.1, 30.0)
        assert refit.prefill == 1.0
    for _ in range(50):
        refit.learn(0.0, 0.1, 0.1)
    refit.learn(0.0, 0.1, 12.0)
    assert refit.prefill == pytest.approx(1.0)
    assert refit.decode == 1.0


def test_a_mixed_step_teaches_its_larger_part() -> None:
    refit = Refit()
    for _ in range(100):
        refit.learn(0.01, 0.09, 0.01 + 2 * 0.09)
        refit.learn(0.09, 0.0, 0.09)
    assert (refit.prefill, refit.decode) == pytest.approx((2.0, 1.0))


def test_error_is_judged_before_a_step_is_learned_from() -> None:
    refit = Refit()
    assert refit.error().count == 0
    for _ in range(100):
        refit.learn(0.01, 0.0, 0.02)
    error = refit.error()
    # While the starting scale held the median, each prediction was half of what came.
    assert error.count == 100
    assert error.median == 0.0
    assert [refit.predicted_s(0.01, 0.0)] == pytest.approx([0.02])
    refit = Refit()
    for actual_s in (0.01,) * 8 + (0.02,) * 2:
        refit.learn(0.01, 0.0, actual_s)
    assert refit.error().median == 0.0
    assert refit.error().p90 == pytest.approx(0.5)


def test_a_scale_stays_within_reason() -> None:
    refit = Refit()
    for _ in range(SCALE_STEPS):
        refit.learn(1e-6, 0.0, 10.0)
    assert refit.decode == LARGEST_SCALE
    refit.learn(0.0, 0.0, 1.0)
    refit.learn(0.01, 0.0, 0.0)
    assert refit.error().count == SCALE_STEPS
