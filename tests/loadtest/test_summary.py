"""Percentiles, shares and rates of hand-made records."""

from __future__ import annotations

import pytest

from cluster.loadtest.record import Record
from cluster.loadtest.summary import percentile, summarise
from engine.objectives import Objectives

GOAL = Objectives(0.5, 0.05)


def record(index: int, **changes: object) -> Record:
    fields = {"ttft_s": 0.1, "tpot_s": 0.02, "output_tokens": 3, "asked_tokens": 3, "prompt_tokens": 10}
    return Record(index, float(index), 0.001, "answered", 0.2, **{**fields, **changes})


def missing(index: int, ending: str, error: str) -> Record:
    return Record(index, float(index), 0.0, ending, 0.03, asked_tokens=3, error=error)


def test_percentiles_are_interpolated() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 0.5) == 3.0
    assert percentile([1.0, 2.0], 0.9) == pytest.approx(1.9)
    assert percentile([7.0], 0.99) == 7.0


def test_every_request_counts_and_every_reject_is_a_miss() -> None:
    run = [
        record(0),
        record(1, ttft_s=0.6),
        record(2, tpot_s=0.06),
        missing(3, "rejected", "full; retry after 1 s"),
        missing(4, "timed_out", "no end after 9 s"),
        missing(5, "failed", "Unavailable: gone"),
        record(6, tpot_s=None, output_tokens=1),
        record(7, cached_tokens=5),
    ]
    summary = summarise([run], GOAL)
    assert summary.requests == 8
    assert summary.ending == {"answered": 5, "failed": 1, "rejected": 1, "timed_out": 1}
    assert summary.attainment == 3 / 8
    assert summary.attainment_ttft == 4 / 8
    assert summary.attainment_tpot == 4 / 8
    assert summary.as_json()["rejected"] == 1
    # From the first arrival at 0 to the last end at 7 + 1 ms late + 200 ms.
    assert summary.duration_s == pytest.approx(7.201)
    assert summary.goodput_rps == pytest.approx(3 / 7.201)
    assert summary.achieved_rps == pytest.approx(5 / 7.201)
    assert summary.offered_rps == pytest.approx(1.0)
    assert summary.reject_ms is not None
    assert summary.reject_ms.p50 == pytest.approx(30.0)
    assert summary.ttft_ms is not None
    assert (summary.ttft_ms.p50, summary.ttft_ms.max, summary.ttft_ms.count) == (100.0, 600.0, 5)
    assert summary.tpot_ms is not None
    assert summary.tpot_ms.count == 4
    assert summary.short_answers == 1
    assert summary.cached_share == pytest.approx(0.1)
    assert summary.itl_ms is None


def test_gaps_of_all_answers_are_pooled() -> None:
    summary = summarise([[record(0, gaps_s=(0.01, 0.03)), record(1, gaps_s=(0.02,))]], GOAL)
    assert summary.itl_ms is not None
    assert (summary.itl_ms.p50, summary.itl_ms.max, summary.itl_ms.count) == (20.0, 30.0, 3)


def test_seeds_are_pooled_by_their_own_times() -> None:
    runs = [[record(0), record(1)], [record(0), record(1, ttft_s=0.6)]]
    summary = summarise(runs, GOAL)
    assert summary.attainment == 3 / 4
    assert summary.duration_s == pytest.approx(2 * 1.201)
    assert summary.offered_rps == pytest.approx(1.0)


def test_requests_that_were_given_up_are_misses_and_take_no_time() -> None:
    summary = summarise([[record(0), missing(1, "given_up", "")]], GOAL)
    assert summary.attainment == 0.5
    assert summary.duration_s == pytest.approx(0.201)
    assert summary.late_ms is not None
    assert summary.late_ms.count == 1


def test_nothing_answered() -> None:
    summary = summarise([[missing(0, "rejected", "full")]], GOAL)
    assert summary.attainment == 0.0
    assert summary.ttft_ms is None
    assert summary.output_tokens_mean == 0.0
