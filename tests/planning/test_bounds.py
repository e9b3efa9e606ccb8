"""Bounds: what they are made of, and that nothing simulated passes them."""

from __future__ import annotations

import math

import pytest

from cluster.planning.arrangement import Arrangement, Parallel, Pool
from cluster.planning.bounds import (
    Lengths,
    arrangement_bound,
    colocated_bound,
    decode_bound,
    lengths_of,
    prefill_bound,
)
from cluster.planning.placement import Links
from cluster.planning.trace import Trace, TraceRequest
from engine.errors import ConfigError
from engine.objectives import Objectives
from tests.planning.linear_cost import LinearCost

EQUAL = Lengths(((1000, 1000, 101),) * 10)
COST = LinearCost(kv_capacity_tokens=1 << 30)


def test_prefix_blocks_seen_before_are_not_computed_again() -> None:
    trace = Trace(
        (
            TraceRequest(0.0, 1100, 10, (1, 2, 3)),
            TraceRequest(1.0, 1300, 20, (1, 2, 9)),
            TraceRequest(2.0, 512, 5, (1,)),
            TraceRequest(3.0, 40, 7),
        )
    )
    lengths = lengths_of(trace)
    assert lengths.rows == ((1100, 1100, 10), (276, 1300, 20), (1, 512, 5), (40, 40, 7))
    assert lengths.longest == 1320
    assert lengths.mean_kv == (1100 + 1300 + 512 + 40) / 4
    with pytest.raises(ConfigError, match="holds no request"):
        lengths_of(Trace(()))


def test_a_sample_keeps_the_mean() -> None:
    lengths = Lengths(tuple((length, length, 10) for length in range(1, 5001)))
    sample = lengths.sample(200)
    assert len(sample.rows) == 200
    assert sample.mean_prompt == pytest.approx(lengths.mean_prompt, rel=0.01)


def test_prefill_bound_by_hand() -> None:
    """A prompt takes 52 ms alone and 512 tokens at a time 27.6 ms: 53.9 us a token, which is more than alone."""
    bound = prefill_bound(COST, EQUAL, math.inf, 0.9)
    # Without an objective, waiting has no end: only capacity counts, and a tenth may miss.
    assert bound.rps == pytest.approx(1 / 0.052 / 0.9, rel=1e-2)
    assert prefill_bound(COST, EQUAL, math.inf, 0.9, count=4).rps == pytest.approx(4 * bound.rps, rel=1e-2)
    none = prefill_bound(COST, EQUAL, 0.05, 0.9)
    assert none.rps == 0.0
    assert none.reason == "M/D/1: too many prompts alone take longer than TTFT (the shortest 52 ms)"


def test_decode_bound_by_hand() -> None:
    """A step of b rows takes 2 + 0.31·b ms; of the batches looked at, 64 is the last within 25 ms."""
    bound = decode_bound(COST, EQUAL, 0.025, 0.9)
    assert bound.rps == pytest.approx(64 / (0.002 + 64 * 0.00031) / 100 / 0.9, rel=1e-2)
    assert decode_bound(COST, EQUAL, 0.002, 0.9).rps == 0.0
    assert decode_bound(COST, Lengths(((100, 100, 1),)), 0.002, 0.9).rps == math.inf


def test_memory_bounds_the_decode_batch() -> None:
    small = LinearCost(kv_capacity_tokens=10_500)
    assert decode_bound(small, EQUAL, 1.0, 1.0).rps == pytest.approx(10 / (0.002 + 10 * 0.00031) / 100, rel=1e-2)


def test_colocated_is_less_than_either_phase() -> None:
    objectives = Objectives(1.0, 0.03)
    both = colocated_bound(COST, EQUAL, objectives, 0.9)
    assert both.rps < prefill_bound(COST, EQUAL, 1.0, 0.9).rps
    assert both.rps < decode_bound(COST, EQUAL, 0.03, 0.9).rps
    assert both.reason == "prompts and rows on the same GPUs"
    assert colocated_bound(COST, EQUAL, Objectives(0.01, 0.03), 0.9).rps == 0.0


def test_the_tightest_of_pools_and_links_counts() -> None:
    costs = {Parallel(1): COST}
    arrangement = Arrangement(Pool(Parallel(1), 1), Pool(Parallel(1), 8))
    objectives = Objectives(1.0, 0.03)
    wide, narrow = Links(1e12, 1.0), Links(1.0, 1.0)
    assert arrangement_bound(arrangement, costs, EQUAL, objectives, wide, 0.9).reason.startswith("M/D/1 of prompts")
    slow = arrangement_bound(arrangement, costs, EQUAL, objectives, narrow, 0.9)
    assert (slow.rps, slow.reason) == (1.0, "KV over the links")
    more = Arrangement(Pool(Parallel(1), 9), Pool(Parallel(1), 1))
    assert arrangement_bound(more, costs, EQUAL, objectives, wide, 0.9).reason == "full decode batches"


def test_prompts_on_decode_workers_need_no_link_and_no_prefill_worker() -> None:
    arrangement = Arrangement(Pool(Parallel(1), 1), Pool(Parallel(1), 8))
    objectives, narrow = Objectives(1.0, 0.03), Links(1.0, 1.0)
    pure = arrangement_bound(arrangement, {Parallel(1): COST}, EQUAL, objectives, narrow, 0.9)
    mixed = arrangement_bound(arrangement, {Parallel(1): COST}, EQUAL, objectives, narrow, 0.9, allow_local=True)
    local = prefill_bound(COST, EQUAL, 1.0, 0.9, count=8)
    assert pure.rps == 1.0
    assert mixed.rps == pytest.approx(1.0 + local.rps)


def test_answers_of_one_token_take_no_decode_step() -> None:
    lengths = Lengths(((1000, 1000, 1),) * 10)
    objectives = Objectives(1.0, 0.05)
    assert decode_bound(COST, lengths, objectives.tpot_s, 0.9).rps == math.inf
    both = colocated_bound(COST, lengths, objectives, 0.9)
    assert 0 < both.rps <= prefill_bound(COST, lengths, objectives.ttft_s, 0.9).rps


def test_a_slow_prompt_that_is_not_the_longest_does_not_stand_for_all() -> None:
    """After 100,000 cached tokens 500 new ones take longer alone than 600 fresh ones: nine of ten are in time."""
    cost = LinearCost(token_s=1e-4, pair_s=1e-7, kv_capacity_tokens=1 << 30)
    rows = ((400, 400, 10),) * 8 + ((500, 100_500, 10), (600, 600, 10))
    assert prefill_bound(cost, Lengths(rows), 1.0, 0.9).rps > 0
    assert prefill_bound(cost, Lengths(rows), 1.0, 1.0).rps == 0.0
