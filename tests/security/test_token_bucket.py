"""A bucket: never more than it may give, and exactly when it says so."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cluster.security.token_bucket import ROUNDING_S, TokenBucket

SIZES = st.integers(1, 100_000)
RATES = st.floats(0.001, 10_000)
# A machine's clock may have run for years.
STARTS = st.sampled_from([0.0, 12.5, 1e8])
EVENTS = st.lists(st.tuples(st.floats(0, 50), st.integers(0, 100_000), st.floats(0, 1)), max_size=30)


def test_it_is_full_at_first_and_then_fills_evenly() -> None:
    bucket = TokenBucket(10, 2.0)
    assert bucket.wait_s(10, 100.0) == 0.0
    bucket.take(10, 100.0)
    assert bucket.wait_s(1, 100.0) == pytest.approx(0.5)
    assert bucket.wait_s(10, 101.0) == pytest.approx(4.0)
    assert bucket.wait_s(2, 101.0) == 0.0
    bucket.take(2, 101.0)
    assert bucket.wait_s(10, 106.0) == 0.0


def test_what_is_given_back_can_be_taken_again_at_once_and_fills_nothing_above_the_brim() -> None:
    bucket = TokenBucket(10, 1.0)
    bucket.take(10, 0.0)
    bucket.give_back(7)
    assert bucket.wait_s(7, 0.0) == 0.0
    bucket.give_back(3)
    bucket.take(10, 100.0)
    assert bucket.wait_s(1, 100.0) == pytest.approx(1.0)


@given(SIZES, RATES, STARTS, EVENTS)
def test_net_of_what_came_back_no_more_is_taken_than_size_and_rate_allow(
    size: int, per_s: float, start_s: float, events: list[tuple[float, int, float]]
) -> None:
    bucket, now, taken = TokenBucket(size, per_s), start_s, 0.0
    for pause_s, amount, used in events:
        now += pause_s
        amount = min(amount, size)
        if bucket.wait_s(amount, now) > 0:
            continue
        bucket.take(amount, now)
        taken += amount
        # Rounding: of the clock, and the microsecond that it is forgiven each time.
        allowed = size + per_s * (now - start_s)
        assert taken <= allowed + len(events) * per_s * 2 * ROUNDING_S + 1e-6 * size
        unused = int(amount * used)
        bucket.give_back(unused)
        taken -= unused


@given(SIZES, RATES, STARTS, EVENTS, st.integers(1, 100_000))
def test_who_waits_as_long_as_it_says_is_served_and_not_a_moment_before(
    size: int, per_s: float, start_s: float, events: list[tuple[float, int, float]], wanted: int
) -> None:
    bucket, now, wanted = TokenBucket(size, per_s), start_s, min(wanted, size)
    for pause_s, amount, _ in events:
        now += pause_s
        if not bucket.wait_s(min(amount, size), now):
            bucket.take(min(amount, size), now)
    wait_s = bucket.wait_s(wanted, now)
    assert bucket.wait_s(wanted, now + wait_s) == 0.0
    assume(wait_s > 0.001)
    assert bucket.wait_s(wanted, now + 0.99 * wait_s) > 0
