"""Outcomes: what counts as in time, and for how long it counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.outcomes import Attainment, Outcome, Outcomes
from engine.objectives import NO_OBJECTIVES, Objectives

BOTH = Objectives(0.5, 0.05)
GOOD = Outcome(0.0, BOTH, 0.5, 0.05, was_local=False, reason="finished")


@pytest.mark.parametrize(
    ("outcome", "met"),
    [
        (GOOD, (True, True)),
        (replace(GOOD, ttft_s=0.51), (False, True)),
        (replace(GOOD, tpot_s=0.051), (True, False)),
        (replace(GOOD, ttft_s=9.0, tpot_s=9.0, objectives=NO_OBJECTIVES), (True, True)),
        (replace(GOOD, ttft_s=9.0, objectives=Objectives(tpot_s=0.05)), (True, True)),
        (replace(GOOD, reason="rejected", ttft_s=None, tpot_s=None), (False, False)),
        (replace(GOOD, reason="rejected", ttft_s=None, tpot_s=None, objectives=NO_OBJECTIVES), (False, False)),
        (replace(GOOD, reason="expired", tpot_s=None), (False, False)),
        (replace(GOOD, reason="failed"), (False, False)),
    ],
)
def test_in_time_is_only_what_finished_within_its_objectives(outcome: Outcome, met: tuple[bool, bool]) -> None:
    assert (outcome.met_ttft, outcome.met_tpot) == met


def test_shares_are_of_all_that_ended_within_the_window() -> None:
    outcomes = Outcomes(window_s=10.0)
    assert outcomes.attainment(0.0) == Attainment(0.0, 0.0, 0.0, 0.0, 0)
    outcomes.add(GOOD)
    outcomes.add(replace(GOOD, ended_s=1.0, was_local=True, ttft_s=0.6))
    outcomes.add(replace(GOOD, ended_s=2.0, tpot_s=0.06))
    outcomes.add(replace(GOOD, ended_s=3.0, reason="rejected"))
    assert outcomes.attainment(10.0) == Attainment(both=0.25, ttft=0.5, tpot=0.5, local=0.25, count=4)
    assert outcomes.attainment(11.5) == Attainment(both=0.0, ttft=0.5, tpot=0.0, local=0.0, count=2)
    assert [outcome.ended_s for outcome in outcomes.recent(12.5)] == [3.0]
    assert outcomes.attainment(99.0).count == 0
    assert (outcomes.finished_count, outcomes.rejected_count) == (3, 1)


@given(st.lists(st.tuples(st.floats(0, 3), st.sampled_from([0.4, 0.6]), st.sampled_from([0.04, 0.06])), max_size=60))
def test_running_counts_are_what_a_walk_over_the_window_gives(ends: list[tuple[float, float, float]]) -> None:
    outcomes, now, all_of_them = Outcomes(window_s=5.0), 0.0, []
    for pause_s, ttft_s, tpot_s in ends:
        now += pause_s
        outcome = replace(GOOD, ended_s=now, ttft_s=ttft_s, tpot_s=tpot_s)
        outcomes.add(outcome)
        all_of_them.append(outcome)
        recent = [each for each in all_of_them if now - each.ended_s <= 5.0]
        share = sum(each.met_ttft and each.met_tpot for each in recent) / len(recent)
        assert outcomes.attainment(now).both == share
        assert outcomes.attainment(now).count == len(recent)
