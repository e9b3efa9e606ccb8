"""The planner's arithmetic beside AIConfigurator's: the same answers, from the packaged device file alone."""

from __future__ import annotations

import pytest

from bench.aiconfigurator_check import ALLOWED, CASES, Theirs, compare, crossover


@pytest.mark.parametrize("case", CASES, ids=["4000 in, 500 out", "1000 in, 200 out"])
def test_same_choice_same_workers_rates_within_15_percent(case: Theirs) -> None:
    colocated, disaggregated = compare(case)
    for row in (colocated, disaggregated):
        assert abs(row.ratio - 1) <= ALLOWED, row
        assert row.is_same, row
    # Both of its cases say: do not disaggregate.
    assert (colocated.ours_rps > disaggregated.ours_rps) == (colocated.theirs_rps > disaggregated.theirs_rps)


def test_disaggregation_is_ahead_for_fast_users() -> None:
    speed = crossover(CASES[0].load)
    assert speed is not None
    assert 40 <= speed <= 75
