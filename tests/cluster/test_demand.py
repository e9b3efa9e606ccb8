"""What the arrivals ask of each pool, and what a pool bears."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest

from cluster.demand import ANSWERS_MIN, MOST_BUSY, Demand, DemandMeter, bearable_decode, bearable_prefill
from engine.objectives import NO_OBJECTIVES, Objectives
from tests.planning.linear_cost import LinearCost

# 1 ms a prompt token; a decode step takes 10 ms and 1 ms a row, whatever the context.
COST = LinearCost(fixed_s=0.0, token_s=1e-3, row_s=1e-3, context_s=0.0)
DECODE = replace(COST, fixed_s=10e-3)


def meter(window_s: float = 10.0, max_rows: int = 1024) -> DemandMeter:
    """One that knows that answers are as long as they may be, and that nothing is cached."""
    demands = DemandMeter(COST, DECODE, window_s, max_rows)
    for _ in range(ANSWERS_MIN):
        demands.ended(prompt_tokens=200, cached_tokens=0, max_tokens=100, answer_tokens=100)
    return demands


def fill(meter: DemandMeter, per_s: int, prompt: int, answer: int, objectives: Objectives, end_s: float = 20.0):
    for index in range(round(end_s * per_s)):
        meter.arrived(prompt, answer, objectives, index / per_s)


def test_workers_worth_of_a_steady_stream():
    """10 prompts of 200 ms a second are two workers' worth. At TPOT 50 ms (45 planned) a batch has 35 rows and 45 ms
    a step, so 10 answers of 70 more tokens a second are 700 · 45 ms / 35 = 0.9 of a worker."""
    demands = meter()
    fill(demands, 10, 200, 71, Objectives(1.0, 0.05))
    demand = demands.demand(20.0)
    assert demand.requests == pytest.approx(100, abs=1)
    assert demand.prefill == pytest.approx(2.0, rel=0.02)
    assert demand.rows == 35
    assert demand.decode == pytest.approx(0.9, rel=0.02)
    assert demand.prompt_s == pytest.approx(0.2)
    assert demand.residual_s == pytest.approx(0.2), "all prompts are alike"
    assert demand.ttft_s == pytest.approx(1.0)


def test_arrivals_are_forgotten_though_nobody_asks():
    demands = meter(window_s=1.0)
    tracemalloc.start()
    try:
        fill(demands, 100, 200, 71, NO_OBJECTIVES, end_s=2.0)
        before = tracemalloc.get_traced_memory()[0]
        fill(demands, 100, 200, 71, NO_OBJECTIVES, end_s=100.0)
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert after < 1.5 * before
    assert demands.demand(100.0).requests == pytest.approx(100, abs=1)


def test_a_prompt_on_a_decode_worker_rides_on_steps_that_are_made_anyway():
    """200 tokens in chunks of 100 add 2 · 100 ms: the 10 ms of a step are paid already, and its one row's 1 ms is not
    of the prompt."""
    demands = DemandMeter(COST, DECODE, 10.0, local_chunk_tokens=100, has_local=True)
    for _ in range(ANSWERS_MIN):
        demands.ended(prompt_tokens=200, cached_tokens=0, max_tokens=100, answer_tokens=100)
    fill(demands, 10, 200, 71, NO_OBJECTIVES)
    demand = demands.demand(20.0)
    assert demand.has_local
    assert demand.local_cost == pytest.approx((0.22 - 2 * 0.011) / 0.2)


def test_memory_bounds_the_batch():
    demands = meter()
    fill(demands, 10, 200, 101, Objectives(1.0, 0.05))
    assert demands.demand(20.0, kv_tokens=2500).rows == 10, "250 tokens a row on average"
    limited = meter(max_rows=4)
    fill(limited, 10, 200, 101, NO_OBJECTIVES)
    assert limited.demand(20.0).rows == 4
    assert limited.demand(20.0).ttft_s is None


def test_a_worker_that_is_slower_than_its_profile_is_asked_for_more():
    demands = meter()
    fill(demands, 10, 200, 71, NO_OBJECTIVES)
    plain, slow = demands.demand(20.0), demands.demand(20.0, scales=(2.0, 3.0))
    assert slow.prefill == pytest.approx(2 * plain.prefill)
    assert slow.decode == pytest.approx(3 * plain.decode)
    assert slow.mix == plain.mix, "what workers learn of themselves is no turn of the arrivals"


def test_answers_and_cached_prompts_are_learned_from_those_that_ended():
    demands = meter()
    for _ in range(2000):
        demands.ended(prompt_tokens=200, cached_tokens=100, max_tokens=100, answer_tokens=50)
    fill(demands, 10, 200, 100, NO_OBJECTIVES)
    demand = demands.demand(20.0)
    assert demand.prompt_s == pytest.approx(0.1, rel=0.05)
    assert demand.answer_s == pytest.approx(49 * DECODE.decode_s(1024, 0) / 1024, rel=0.05)


def test_before_there_were_answers_nothing_is_known():
    demands = DemandMeter(COST, DECODE, 10.0)
    fill(demands, 10, 200, 71, NO_OBJECTIVES)
    assert demands.demand(20.0).requests == 0
    for _ in range(ANSWERS_MIN):
        demands.ended(prompt_tokens=200, cached_tokens=0, max_tokens=71, answer_tokens=8)
    demand = demands.demand(20.0)
    assert demand.requests == pytest.approx(100, abs=1)
    assert demand.answer_s == pytest.approx(7 * DECODE.decode_s(1024, 0) / 1024, rel=0.05), "of those that came before"


def test_the_window_forgets():
    demands = meter()
    fill(demands, 10, 200, 71, NO_OBJECTIVES)
    assert demands.demand(29.0).requests < 15
    nothing = demands.demand(40.0)
    assert (nothing.requests, nothing.prefill, nothing.decode) == (0, 0.0, 0.0)


DEMAND = Demand(requests=100, prefill=4.0, decode=4.0, prompt_s=0.1, residual_s=0.1, answer_s=0.1, rows=32, ttft_s=0.3)


def test_a_pool_bears_more_per_worker_the_larger_it_is():
    shares = [bearable_prefill(DEMAND, count, 0.9) / count for count in (1, 2, 8, 64)]
    assert shares == sorted(shares)
    assert shares[0] < 0.7
    assert shares[-1] > 0.94
    decode = [bearable_decode(DEMAND, count) / count for count in (1, 2, 8, 64)]
    assert decode == sorted(decode)
    assert decode[0] == pytest.approx(1 - 1.28 / 32**0.5)


def test_a_tight_objective_leaves_room():
    def share(ttft_s: float | None) -> float:
        return bearable_prefill(replace(DEMAND, ttft_s=ttft_s), 4, 0.9) / 4

    assert share(None) == MOST_BUSY
    assert share(10.0) == pytest.approx(MOST_BUSY, abs=1e-5)
    assert share(0.15) < share(0.2) < share(0.5)
    assert share(0.05) == pytest.approx(0.5, abs=1e-5), "cannot be met: balanced as if half busy"
