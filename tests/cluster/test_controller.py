"""The controller: it goes where the load is least, and no further."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from cluster.controller import Attained, ClusterState, Controller, Flip, WorkerState, by_burden
from cluster.controller_config import ControllerConfig
from tests.cluster.controller_plant import CONFIG, EVEN, IDLE, Plant, pools


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
