"""What the controller decides while workers are on their way to another role."""

from __future__ import annotations

import math
from dataclasses import replace

from cluster.controller import ClusterState, Controller, Flip, Scale, WorkerState
from tests.cluster.controller_plant import CONFIG, EVEN, IDLE, Plant, pools


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
