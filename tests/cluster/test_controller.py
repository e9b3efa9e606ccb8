"""The controller: it goes where the load is least, stays there, and never turns round while the demand is the same."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cluster.controller import Attained, ClusterState, Controller, Flip, Scale, WorkerState, by_burden
from cluster.controller_config import ControllerConfig
from cluster.demand import ANSWERS_MIN, Demand, DemandMeter
from cluster.registry import Role
from engine.objectives import Objectives
from engine.stats import LoopStats
from tests.planning.linear_cost import LinearCost

CONFIG = ControllerConfig(enabled=True)
UNKNOWN = Attained()
IDLE = LoopStats(
    running=0, waiting=0, queued_tokens=0, blocks_total=100, blocks_free=100, blocks_cached=0, block_size=16, steps=0
)
# Four workers' worth of each; large pools bear nearly all of it.
EVEN = Demand(requests=500, prefill=4.0, decode=4.0, prompt_s=0.01, residual_s=0.01, answer_s=0.1, rows=256, ttft_s=1.0)


def pools(prefill: int, decode: int, stats: LoopStats = IDLE) -> tuple[WorkerState, ...]:
    names: list[tuple[str, Role]] = [(f"p{index}", "prefill") for index in range(prefill)]
    names += [(f"d{index}", "decode") for index in range(decode)]
    return tuple(WorkerState(name, role, stats) for name, role in names)


class Plant:
    """Workers that do as they are told at once, or as `after` more decisions say."""

    def __init__(self, prefill: int, decode: int, config: ControllerConfig = CONFIG) -> None:
        self.config = config
        self.controller = Controller(config, prefill + decode)
        self.workers = {worker.worker_id: worker for worker in pools(prefill, decode)}
        self.now = 0.0
        self.actions: list[tuple[float, Flip | Scale]] = []
        self._new = 0

    def count(self, role: Role) -> int:
        return sum(worker.role == role for worker in self.workers.values())

    def decide(self, demand: Demand, attained: Attained = UNKNOWN, stats: LoopStats = IDLE) -> list[Flip | Scale]:
        self.now += self.config.interval_s
        workers = tuple(replace(worker, stats=stats) for worker in self.workers.values())
        actions = self.controller.decide(ClusterState(workers, demand, attained), self.now)
        assert len({type(action) for action in actions}) <= 1, "flips, or a change of the number"
        assert len({action.role for action in actions}) <= 1, "all in one direction"
        for action in actions:
            self.actions.append((self.now, action))
            self.do(action)
        return actions

    def do(self, action: Flip | Scale) -> None:
        if isinstance(action, Flip):
            worker = self.workers[action.worker_id]
            assert worker.role != action.role
            self.workers[action.worker_id] = replace(worker, role=action.role)
        elif action.count > 0:
            self._new += 1
            self.workers[f"n{self._new}"] = WorkerState(f"n{self._new}", action.role, IDLE)
        else:
            del self.workers[by_burden(tuple(self.workers.values()), action.role)[0]]


def test_it_marches_to_the_best_split_and_stays():
    plant = Plant(14, 2)
    for _ in range(100):
        plant.decide(replace(EVEN, prefill=7.0, decode=7.0))
    assert plant.count("prefill") == 8
    assert len(plant.actions) == 6
    times = [when for when, _ in plant.actions]
    flips = [times.count(when) for when in dict.fromkeys(times)]
    assert flips == [3, 2, 1], "half of the way at a time: 6, then 3 and 1 to go"
    rest_s = CONFIG.cooldown_s
    assert all(later - earlier >= rest_s for earlier, later in pairwise(dict.fromkeys(times)))


def test_it_confirms_before_it_acts():
    plant = Plant(8, 8)
    unbalanced = replace(EVEN, prefill=2.0, decode=9.0)
    acted = [bool(plant.decide(unbalanced)) for _ in range(3)]
    assert acted == [False, False, True]
    plant = Plant(8, 8)
    for index in range(60):
        plant.decide(EVEN if index % 3 == 2 else unbalanced)
    assert not plant.actions, "two windows of three are no confirmation"


def test_there_must_be_need():
    idle = replace(EVEN, prefill=0.4, decode=2.0)
    plant = Plant(8, 8)
    for _ in range(50):
        plant.decide(idle)
    assert not plant.actions, "the present split bears it"
    for _ in range(20):
        plant.decide(idle, Attained(requests=100, ttft=1.0, tpot=0.7, total=0.7))
    assert plant.count("decode") > 8, "it does not, say those that missed"


def test_too_few_requests_say_nothing():
    plant = Plant(8, 8)
    for _ in range(50):
        plant.decide(replace(EVEN, prefill=1.0, decode=9.0, requests=CONFIG.min_requests - 1))
    assert not plant.actions


@pytest.mark.parametrize(("minimum", "left"), [(1, 1), (0, 0), (3, 3)])
def test_never_below_the_fewest(minimum: int, left: int):
    plant = Plant(4, 4, ControllerConfig(enabled=True, min_prefill=minimum))
    for _ in range(100):
        plant.decide(replace(EVEN, prefill=0.001, decode=7.9))
    assert plant.count("prefill") == left
    plant = Plant(4, 4, ControllerConfig(enabled=True, min_decode=2))
    for _ in range(100):
        plant.decide(replace(EVEN, prefill=7.9, decode=0.001))
    assert plant.count("decode") == 2


def test_a_turn_of_the_arrivals_and_back():
    plant = Plant(8, 8)
    early = replace(EVEN, prefill=10.0, decode=3.0, mix=math.log(10 / 3))
    late = replace(EVEN, prefill=3.0, decode=10.0, mix=math.log(3 / 10))
    counts = []
    for demand in (early, late, early):
        for _ in range(100):
            plant.decide(demand)
        counts.append(plant.count("prefill"))
    assert counts == [12, 4, 12]
    assert len(plant.actions) == 4 + 8 + 8, "no step too many"


def test_what_changes_is_left_to_come_to_rest():
    controller = Controller(CONFIG, 16)
    demand = replace(EVEN, prefill=1.0, decode=9.0)
    changing = (*pools(8, 7), WorkerState("d7", "decode", IDLE, is_changing=True))
    for step in range(20):
        assert controller.decide(ClusterState(changing, demand), 5.0 * step) == []
        assert controller.decide(ClusterState(pools(8, 8), demand, is_held=True), 5.0 * step) == []
    # Asked every second from then on: three must agree, and the rest counts from the last change.
    acted = [bool(controller.decide(ClusterState(pools(8, 8), demand), 96.0 + step)) for step in range(12)]
    assert acted.index(True) == CONFIG.cooldown_s - 1


def test_a_march_does_not_wait_for_those_on_their_way():
    """The answers that they still have may be long. What they still hold counts for nothing, for it will be over."""
    controller = Controller(CONFIG, 16)
    demand = replace(EVEN, prefill=1.0, decode=9.0)
    workers = list(pools(8, 8))
    flips: list[list[str]] = []
    for step in range(40):
        actions = controller.decide(ClusterState(tuple(workers), demand), 5.0 * step)
        if actions:
            flips.append([action.worker_id for action in actions if isinstance(action, Flip)])
        workers = [
            replace(worker, is_changing=True, becomes="decode", stats=replace(worker.stats, queued_s=1000.0))
            if flips and worker.worker_id in flips[-1]
            else worker
            for worker in workers
        ]
    asked = [worker_id for names in flips for worker_id in names]
    at_once = Plant(8, 8)
    for _ in range(40):
        at_once.decide(demand)
    assert len(asked) == len(set(asked)) == len(at_once.actions), "as many as when each is there at once"
    assert len(flips) > 1


def test_a_queue_that_those_on_their_way_will_shorten_takes_no_more_of_them():
    """What waits at the workers that stay grows for as long as the others drain."""
    controller = Controller(CONFIG, 16)
    demand = replace(EVEN, prefill=7.0, decode=6.0)
    workers, count = list(pools(4, 12)), 0
    for step in range(60):
        stats = replace(IDLE, queued_s=2.0 * step)
        now_there = tuple(replace(each, stats=stats) if each.role == "prefill" else each for each in workers)
        for action in controller.decide(ClusterState(now_there, demand), 5.0 * step):
            assert isinstance(action, Flip)
            count += 1
            workers = [
                replace(each, is_changing=True, becomes="prefill") if each.worker_id == action.worker_id else each
                for each in workers
            ]
    assert 4 + count <= controller.best_prefill(demand, 16, 4)


def test_a_turn_while_workers_change_waits_for_them():
    controller = Controller(CONFIG, 16)
    early = replace(EVEN, prefill=1.0, decode=9.0, mix=math.log(1 / 9))
    late = replace(EVEN, prefill=9.0, decode=1.0, mix=math.log(9))
    now, actions = 0.0, list[Flip | Scale]()
    while not actions:
        now += CONFIG.interval_s
        actions = controller.decide(ClusterState(pools(8, 8), early), now)
    names = {action.worker_id for action in actions if isinstance(action, Flip)}
    workers = tuple(
        replace(worker, is_changing=True, becomes="decode") if worker.worker_id in names else worker
        for worker in pools(8, 8)
    )
    for _ in range(20):
        now += CONFIG.interval_s
        assert controller.decide(ClusterState(workers, late), now) == []
    there = tuple(replace(worker, role=worker.next_role, is_changing=False, becomes=None) for worker in workers)
    turned = [controller.decide(ClusterState(there, late), now + (index + 1) * CONFIG.interval_s) for index in range(5)]
    assert any(turned), "now it turns"


def test_where_prompts_go_to_decode_workers_too_both_pools_fill_alike():
    controller = Controller(CONFIG, 16)
    demand = replace(EVEN, prefill=9.0, decode=3.0)
    assert controller.load(demand, 4, 12) > 2.0
    shared = replace(demand, has_local=True, local_cost=1.0)
    assert controller.load(shared, 4, 12) == pytest.approx(controller.load(shared, 8, 8), rel=0.05)
    assert controller.load(shared, 4, 12) == pytest.approx(12 / (16 * 0.95), rel=0.05)
    idle = replace(EVEN, prefill=1.0, decode=3.0, has_local=True)
    assert controller.load(idle, 8, 8) == controller.load(replace(idle, has_local=False), 8, 8), "no need"


@pytest.mark.parametrize(("local_cost", "prefill"), [(0.5, 1), (2.0, 12)])
def test_prompts_are_left_to_decode_workers_where_they_are_cheap_there(local_cost: float, prefill: int):
    controller = Controller(CONFIG, 16)
    demand = replace(EVEN, prefill=12.0, decode=4.0, has_local=True, local_cost=local_cost)
    assert controller.best_prefill(demand, 16, 8) == prefill


def test_local_workers_are_left_alone():
    local = tuple(
        replace(worker, worker_id=f"c-{worker.worker_id}", stats=replace(IDLE, local_only=True))
        for worker in pools(0, 8)
    )
    controller = Controller(CONFIG, 4)
    for step in range(50):
        for action in controller.decide(
            ClusterState((*local, *pools(2, 2)), replace(EVEN, prefill=2.8, decode=0.4)), 5.0 * step
        ):
            assert isinstance(action, Flip)
            assert not action.worker_id.startswith("c-")
    assert by_burden(local, "decode") == []


def test_the_least_busy_goes():
    workers = (
        WorkerState("a", "decode", replace(IDLE, running=5)),
        WorkerState("b", "decode", replace(IDLE, running=2, blocks_free=50)),
        WorkerState("c", "decode", replace(IDLE, running=1, waiting=1, blocks_free=60)),
        WorkerState("d", "prefill", IDLE),
    )
    assert by_burden(workers, "decode")[0] == "c"
    assert by_burden(workers, "prefill")[0] == "d"


def test_queues_and_full_pools_are_felt():
    """Twice the same arrivals; what waits decides where the need is."""
    busy = replace(EVEN, prefill=5.0, decode=5.0)
    felt = (
        (replace(IDLE, queued_s=20.0), "prefill"),
        (replace(IDLE, blocks_free=0), "decode"),
        (replace(IDLE, running=EVEN.rows), "decode"),
        (replace(IDLE, waiting=500), "decode"),
    )
    for stats, role in felt:
        plant = Plant(8, 8)
        for _ in range(8):
            plant.decide(busy, stats=stats)
        assert {action.role for _, action in plant.actions} == {role}


def test_it_grows_when_no_split_is_good_enough_and_shrinks_when_fewer_would_do():
    config = ControllerConfig(enabled=True, min_workers=4, max_workers=24)
    plant = Plant(8, 8, config)
    heavy = replace(EVEN, prefill=10.0, decode=10.0)
    for _ in range(300):
        plant.decide(heavy)
    grown = len(plant.workers)
    assert 21 <= grown <= 24
    quiet = len(plant.actions)
    for _ in range(100):
        plant.decide(heavy)
    assert len(plant.actions) == quiet
    for _ in range(600):
        plant.decide(replace(EVEN, prefill=1.5, decode=1.5))
    assert 4 <= len(plant.workers) <= 8
    assert min(plant.count("prefill"), plant.count("decode")) >= 1


def test_without_limits_nothing_is_scaled():
    plant = Plant(8, 8)
    for _ in range(100):
        plant.decide(replace(EVEN, prefill=100.0, decode=100.0))
    assert not plant.actions


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
