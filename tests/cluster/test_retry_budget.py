"""Retries come at most so fast, all requests together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.retry_budget import RetryBudget


def test_a_burst_is_free_and_then_they_come_at_the_rate():
    budget = RetryBudget(10.0, 3)
    assert [budget.take(0.0) for _ in range(5)] == pytest.approx([0.0, 0.0, 0.0, 0.1, 0.2])
    assert budget.take(100.0) == 0.0


@given(st.floats(0.1, 100), st.integers(1, 20), st.lists(st.floats(0, 2), min_size=1, max_size=100))
def test_no_window_has_more_than_a_burst_and_the_rate(per_s: float, burst: int, pauses: list[float]):
    budget, now, turns = RetryBudget(per_s, burst), 0.0, []
    for pause in pauses:
        now += pause
        turns.append(now + budget.take(now))
    assert turns == sorted(turns)
    for index, first in enumerate(turns):
        for count, last in enumerate(turns[index:], start=1):
            assert count <= burst + (last - first) * per_s + 1e-6
