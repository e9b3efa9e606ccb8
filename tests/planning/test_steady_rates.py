"""Steady rates: the arithmetic of AIConfigurator, against numbers worked out by hand and against everything."""

from __future__ import annotations

import math

import pytest

from cluster.planning.arrangement import Parallel
from cluster.planning.steady_rates import (
    PLAIN,
    SteadyAssumptions,
    SteadyLoad,
    aiconfigurator,
    best_of,
    colocated_points,
    decode_points,
    prefill_worker,
    rank,
)
from engine.objectives import Objectives
from tests.planning.linear_cost import LinearCost

LOAD = SteadyLoad(1000, 101, Objectives(0.5, 0.03))
# A prompt takes 0.002 + 0.05 s; a step of b rows 0.002 + b · (0.0001 + 1050 · 2e-7) = 0.002 + 0.00031·b.
COST = LinearCost()


def test_one_worker_of_each_phase() -> None:
    rate_rps, ttft_s = prefill_worker(LOAD, COST, aiconfigurator(10))
    assert rate_rps == pytest.approx(1 / (1.1 * 0.052))
    assert ttft_s == pytest.approx(1.8 * 1.1 * 0.052)
    points = list(decode_points(LOAD, COST, PLAIN))
    batch, rate_rps, tpot_s = points[-1]
    # 0.002 + 0.00031·b < 0.03 for b <= 90; the grid has 88.
    assert batch == 88
    assert tpot_s == pytest.approx(0.002 + 0.00031 * 88)
    assert rate_rps == pytest.approx(88 / (100 * tpot_s))


def test_memory_ends_the_batches() -> None:
    small = LinearCost(kv_capacity_tokens=11_010)
    assert [batch for batch, _, _ in decode_points(LOAD, small, PLAIN)] == list(range(1, 11))
    assert max(point.batch for point in colocated_points(LOAD, Parallel(1), small, PLAIN)) == 10


def test_a_colocated_worker_by_hand() -> None:
    """Batch 10, one prompt a step: 10 mixed steps with 9 rows, then 91 steps of 10 rows."""
    points = {(p.batch, p.ttft_s): p for p in colocated_points(LOAD, Parallel(1), COST, aiconfigurator(10))}
    mixed_s, alone_s = 0.002 + 0.05 + 9 * 0.00031, 0.002 + 10 * 0.00031
    total_s = 10 * mixed_s + 91 * alone_s
    ttft_s = (mixed_s + 0.008) * (1 + math.log2(10) / 8)
    point = min((p for (batch, _), p in points.items() if batch == 10), key=lambda p: p.ttft_s)
    assert point.ttft_s == pytest.approx(ttft_s)
    assert point.tpot_s == pytest.approx(total_s / 101)
    assert point.rate_rps == pytest.approx(10 / max(total_s, ttft_s + 100 * total_s / 101))


def test_rate_matching_finds_the_best_counts() -> None:
    """Against every pair of counts and every batch."""
    assumptions = SteadyAssumptions("test", prefill_share=0.9, decode_share=0.92, decode_batches=(1, 8, 32, 64, 88))
    pair = best_of(rank(LOAD, 12, [Parallel(1)], lambda _: COST, assumptions), "disaggregated")
    assert pair is not None
    prefill_rps, _ = prefill_worker(LOAD, COST, assumptions)
    best = 0.0
    for _, decode_rps, _ in decode_points(LOAD, COST, assumptions):
        for prefills in range(1, 12):
            for decodes in range(1, 13 - prefills):
                copies = 12 // (prefills + decodes)
                best = max(best, copies * min(0.9 * prefills * prefill_rps, 0.92 * decodes * decode_rps))
    assert pair.rate_rps == pytest.approx(best)
    assert pair.arrangement.gpus <= 12


def test_objectives_rule_arrangements_out() -> None:
    strict = SteadyLoad(1000, 101, Objectives(0.05, 0.03))
    assert rank(strict, 4, [Parallel(1)], lambda _: COST) == []
    # TPOT below what one row takes: nothing decodes in time, colocated or not.
    assert rank(SteadyLoad(1000, 101, Objectives(1.0, 0.002)), 4, [Parallel(1)], lambda _: COST) == []


def test_a_loose_tpot_favours_colocated_workers_and_a_strict_one_does_not() -> None:
    """Steps that carry a prompt are long: with TPOT near a decode step's own time few of them may be mixed in."""

    def better(tpot_s: float) -> str:
        load = SteadyLoad(2000, 200, Objectives(2.0, tpot_s))
        return rank(load, 8, [Parallel(1)], lambda _: LinearCost(row_s=2e-4), PLAIN)[0].arrangement.kind

    assert better(0.2) == "colocated"
    assert better(0.01) == "disaggregated"


def test_parallelisms_that_do_not_fit_are_left_out() -> None:
    ranked = rank(LOAD, 4, [Parallel(1), Parallel(2)], lambda parallel: COST if parallel.tp == 1 else None)
    assert ranked
    assert "tp2" not in " ".join(point.arrangement.label for point in ranked)


def test_ties_go_to_the_faster_for_users() -> None:
    """Limited by prefill, more ranks for decode carry the same and answer faster."""
    slow_prompts = LinearCost(token_s=1e-3)
    fast = LinearCost(token_s=1e-3, row_s=5e-5, context_s=1e-7)
    load = SteadyLoad(200, 101, Objectives(2.0, 0.1))
    ranked = rank(load, 16, [Parallel(1), Parallel(2)], lambda p: slow_prompts if p.tp == 1 else fast, PLAIN)
    pairs = [p for p in ranked if p.arrangement.kind == "disaggregated"]
    assert pairs[0].rate_rps >= pairs[1].rate_rps
    tied = [p for p in pairs if p.rate_rps == pytest.approx(pairs[0].rate_rps, rel=1e-6)]
    assert len(tied) > 1
    assert pairs[0].tpot_s == min(p.tpot_s for p in tied)
