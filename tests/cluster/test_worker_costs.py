"""What the router reckons with: a cost model through its tables, or the rates that workers report."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway_config import RouterConfig
from cluster.planning.cost_model import cost_model
from cluster.routing.cost_table import GRID, CostTable
from cluster.routing.costs import MeasuredCosts, ModelCosts, RoleCosts, worker_costs
from tests.cluster.routing_bench import COST, IDLE, prefill_s


def test_a_table_is_exact_on_its_grid_and_asks_once() -> None:
    asked: list[tuple[int, int]] = []

    def cost(count: int, context: int) -> float:
        asked.append((count, context))
        return count**2 + context**2

    table = CostTable(cost, is_coarse=True)
    assert GRID[:6] == (0, 1, 2, 3, 4, 5)
    assert table(5, 1024) == 25 + 1024**2
    assert table(5, 1024.0) == table(5, 1024)
    assert asked == [(5, 1024)]
    fine = CostTable(cost, is_coarse=False)
    assert fine(77, 0) == 77**2


@given(st.integers(0, 100_000), st.floats(0, 1e6), st.booleans())
def test_what_is_linear_stays_exact_between_grid_points(count: int, context: float, is_coarse: bool) -> None:
    table = CostTable(lambda count, context: 1e-3 + 5e-5 * count + 2e-7 * context, is_coarse=is_coarse)
    assert table(count, context) == pytest.approx(1e-3 + 5e-5 * count + 2e-7 * context)


def test_a_real_cost_model_is_followed_closely() -> None:
    model, rng = cost_model("h200", "llama-3.1-8b"), random.Random(1)
    costs = ModelCosts(RoleCosts(model, model), prefill_chunk_tokens=4096)
    for _ in range(60):
        new, cached = rng.randint(1, 30_000), rng.choice([0, rng.randint(0, 30_000)])
        assert costs.prefill_s(IDLE, new, cached) == pytest.approx(model.prefill_s(new, cached, 4096), rel=0.05)
        rows, context = rng.randint(1, 200), rng.randint(0, 400_000)
        assert costs.decode_s(IDLE, rows, context) == pytest.approx(model.decode_s(rows, context), rel=0.02)


def test_a_workers_own_scales_correct_its_profile() -> None:
    costs = worker_costs(COST, RouterConfig())
    slow = replace(IDLE, prefill_scale=2.0, decode_scale=3.0)
    assert costs.prefill_s(slow, 1000, 0) == pytest.approx(2 * prefill_s(1000))
    assert costs.local_s(slow, 1000, 0) == pytest.approx(2 * costs.local_s(IDLE, 1000, 0))
    assert costs.decode_s(slow, 4, 1000) == pytest.approx(3 * costs.decode_s(IDLE, 4, 1000))
    assert costs.kv_bytes(10) == 10 * COST.token_bytes


def test_a_queue_is_what_the_worker_says_or_what_its_tokens_take() -> None:
    costs = worker_costs(COST, RouterConfig())
    assert costs.queued_s(replace(IDLE, queued_tokens=1000, queued_s=0.7)) == 0.7
    assert costs.queued_s(replace(IDLE, queued_tokens=1000)) == pytest.approx(prefill_s(1000))
    assert costs.queued_s(IDLE) == 0.0


def test_without_a_model_the_reported_rates_are_taken_and_guesses_before_them() -> None:
    config = RouterConfig(default_prefill_tokens_per_s=1000.0, default_decode_step_s=0.05)
    costs = worker_costs(None, config)
    assert isinstance(costs, MeasuredCosts)
    assert not costs.knows_mixed_steps
    assert costs.prefill_s(IDLE, 500, 0) == 0.5
    assert costs.prefill_s(replace(IDLE, prefill_tokens_per_s=250.0), 500, 0) == 2.0
    assert costs.decode_s(IDLE, 1, 0) == 0.05
    half_full = IDLE.blocks_total * IDLE.block_size / 2
    assert costs.decode_s(replace(IDLE, decode_step_s=0.01), 1, half_full) == pytest.approx(0.015)
    assert costs.queued_s(replace(IDLE, queued_tokens=500)) == 0.5
    assert costs.kv_bytes(1000) == 0
