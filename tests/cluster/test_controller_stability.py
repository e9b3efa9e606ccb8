"""The controller never turns round while the demand is the same, and keeps its limits whatever comes."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cluster.controller import Attained, Flip, Scale
from cluster.controller_config import ControllerConfig
from cluster.demand import ANSWERS_MIN, Demand, DemandMeter
from engine.objectives import Objectives
from engine.stats import LoopStats
from tests.cluster.controller_plant import CONFIG, IDLE, Plant
from tests.planning.linear_cost import LinearCost


@pytest.mark.parametrize("prefill", [2, 6, 13])
def test_random_arrivals_of_constant_mean(prefill: int):
    """Half an hour of Poisson arrivals with widely spread lengths: as many flips as it takes, and none of them back."""
    rng = random.Random(prefill)
    cost = LinearCost(fixed_s=0.0, token_s=1e-3, row_s=1e-3, context_s=0.0)
    meter = DemandMeter(cost, replace(cost, fixed_s=10e-3), CONFIG.window_s)
    for _ in range(ANSWERS_MIN):
        meter.ended(200, 0, 100, 100)
    plant = Plant(prefill, 16 - prefill)
    arrived_s = 0.0
    while plant.now < 1800.0:
        while arrived_s < plant.now + CONFIG.interval_s:
            arrived_s += rng.expovariate(20.0)
            prompt, answer = (max(2, round(mean * rng.lognormvariate(-0.32, 0.8))) for mean in (250, 300))
            meter.arrived(prompt, answer, Objectives(2.0, 0.05), arrived_s)
        plant.decide(meter.demand(plant.now + CONFIG.interval_s))
    actions = [action for _, action in plant.actions]
    assert turns(actions) == 0
    best = plant.controller.best_prefill(meter.demand(plant.now), 16, prefill)
    assert abs(plant.count("prefill") - best) <= 1
    assert len(actions) <= abs(prefill - best) + 1


worth = st.floats(0.0, 40.0)
demands = st.builds(
    Demand,
    requests=st.integers(20, 1000),
    prefill=worth,
    decode=worth,
    prompt_s=st.floats(1e-3, 2.0),
    residual_s=st.floats(1e-3, 4.0),
    answer_s=st.floats(1e-3, 5.0),
    rows=st.integers(1, 512),
    ttft_s=st.none() | st.floats(0.01, 10.0),
)
shares = st.floats(0.0, 1.0)
attainments = st.builds(Attained, requests=st.integers(0, 500), ttft=shares, tpot=shares, total=shares)
loads = st.builds(
    lambda running, waiting, queued_s, free: replace(
        IDLE, running=running, waiting=waiting, queued_s=queued_s, blocks_free=free
    ),
    st.integers(0, 200),
    st.integers(0, 200),
    st.floats(0, 100),
    st.integers(0, 100),
)


def turns(actions: list[Flip | Scale]) -> int:
    """How often an action undid the kind of step before it."""
    flips = [action.role for action in actions if isinstance(action, Flip)]
    scales = [action.count for action in actions if isinstance(action, Scale)]
    return sum(a != b for steps in (flips, scales) for a, b in pairwise(steps))


@settings(max_examples=40, deadline=None)
@given(
    demands,
    st.integers(0, 12),
    st.integers(1, 12),
    st.booleans(),
    st.data(),
)
def test_constant_demand_never_makes_it_turn_round(demand: Demand, prefill: int, decode: int, scales: bool, data):
    """Whatever the workers report, and whatever became of the requests, in whatever order: the same arrivals give
    steps in one direction only, so there are finitely many."""
    limits = {"min_workers": 1, "max_workers": prefill + decode + 6} if scales else {}
    plant = Plant(
        prefill, decode, ControllerConfig(enabled=True, min_prefill=0, confirmations=1, cooldown_s=0, **limits)
    )
    felt = data.draw(st.lists(st.tuples(attainments, loads), min_size=1, max_size=4))
    for step in range(120):
        plant.decide(demand, *felt[step % len(felt)])
    actions = [action for _, action in plant.actions]
    assert turns(actions) == 0
    assert len(actions) <= 2 * (prefill + decode + 6)
    # And with nothing but the arrivals to go by, it has come to rest.
    for _ in range(80):
        plant.decide(demand)
    rest = len(plant.actions)
    for _ in range(40):
        plant.decide(demand)
    assert len(plant.actions) == rest


@settings(max_examples=40, deadline=None)
@given(demands, st.integers(1, 12), st.integers(1, 12))
def test_every_flip_lowers_the_load_it_was_made_for(demand: Demand, prefill: int, decode: int):
    plant = Plant(prefill, decode, ControllerConfig(enabled=True, confirmations=1, cooldown_s=0))
    load = plant.controller.load(demand, prefill, decode)
    for _ in range(40):
        if plant.decide(demand):
            now = plant.controller.load(demand, plant.count("prefill"), plant.count("decode"))
            assert now <= load
            load = now
    best = plant.controller.best_prefill(demand, prefill + decode, plant.count("prefill"))
    least = plant.controller.load(demand, best, prefill + decode - best)
    assert load < CONFIG.busy or least >= load * (1 - CONFIG.min_gain) or load == least


class Traffic(RuleBasedStateMachine):
    """Any demand after any other, any reports, workers that come and go: the limits hold at all times."""

    @initialize(prefill=st.integers(1, 6), decode=st.integers(1, 6))
    def start(self, prefill: int, decode: int) -> None:
        self.limits = ControllerConfig(
            enabled=True, confirmations=2, cooldown_s=5, min_workers=2, max_workers=prefill + decode + 3
        )
        self.plant = Plant(prefill, decode, self.limits)
        self.steps = 0

    @rule(demand=demands, attained=attainments, stats=loads, count=st.integers(1, 8))
    def traffic(self, demand: Demand, attained: Attained, stats: LoopStats, count: int) -> None:
        for _ in range(count):
            before = self.plant.actions[-1][0] if self.plant.actions else None
            if self.plant.decide(demand, attained, stats) and before is not None:
                assert self.plant.now - before >= self.limits.cooldown_s

    @invariant()
    def the_limits_hold(self) -> None:
        if hasattr(self, "plant"):
            assert self.plant.count("prefill") >= 1
            assert self.plant.count("decode") >= 1
            assert 2 <= len(self.plant.workers) <= self.limits.max_workers  # type: ignore[operator]


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
