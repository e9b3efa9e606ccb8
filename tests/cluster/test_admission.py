"""The gateway's queue: places, order, and who leaves early."""

from __future__ import annotations

import asyncio
import math
import random

import pytest

from cluster.admission import Admission
from engine.errors import DeadlineExceeded, Overloaded
from engine.slack_queue import PATIENCE_S
from tests.cluster.fake_decode import on_virtual_time


class Visitors:
    """Requests that note when they got their place."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.entered: list[str] = []

    async def visit(
        self, name: str, stay_s: float = 10.0, deadline_s: float | None = None, due_s: float = math.inf
    ) -> None:
        async with self.admission.place(deadline_s, due_s):
            self.entered.append(name)
            await asyncio.sleep(stay_s)

    def start(self, name: str, **how: float) -> asyncio.Task[None]:
        return asyncio.create_task(self.visit(name, **how))


def counts(admission: Admission) -> tuple[int, int]:
    return admission.running_count, admission.waiting_count


@on_virtual_time
async def test_first_come_first_served() -> None:
    visitors = Visitors(Admission(max_running=2, max_waiting=3))
    tasks = [visitors.start(name) for name in "abcde"]
    await asyncio.sleep(1)
    assert visitors.entered == ["a", "b"]
    assert counts(visitors.admission) == (2, 3)
    await asyncio.gather(*tasks)
    assert visitors.entered == list("abcde")
    assert counts(visitors.admission) == (0, 0)


@on_virtual_time
async def test_one_too_many_is_told_when_to_come_again() -> None:
    visitors = Visitors(Admission(max_running=2, max_waiting=4))
    await visitors.visit("first", stay_s=3.0)
    tasks = [visitors.start(name) for name in "abcdef"]
    await asyncio.sleep(1)
    with pytest.raises(Overloaded, match="4 requests wait at the gateway already; retry after 6 s"):
        await visitors.visit("g")
    await asyncio.gather(*tasks)


@on_virtual_time
async def test_who_stops_waiting_leaves_the_queue() -> None:
    visitors = Visitors(Admission(max_running=1, max_waiting=3))
    first, second, third = (visitors.start(name) for name in "abc")
    await asyncio.sleep(0)
    with pytest.raises(DeadlineExceeded, match="gateway queue"):
        await visitors.visit("d", deadline_s=2.0)
    assert asyncio.get_running_loop().time() == 2.0
    second.cancel()
    await asyncio.sleep(1)
    assert counts(visitors.admission) == (1, 1)
    await asyncio.gather(first, third)
    assert visitors.entered == ["a", "c"]


@on_virtual_time
async def test_a_place_given_to_one_that_leaves_in_the_same_moment_goes_on() -> None:
    visitors = Visitors(Admission(max_running=1, max_waiting=3))
    first, second, third = (visitors.start(name) for name in "abc")
    await asyncio.sleep(1)
    first.cancel()
    await asyncio.sleep(0)  # `first` has left now: `second` is called but does not run yet
    second.cancel()
    await third
    assert visitors.entered == ["a", "c"]
    assert counts(visitors.admission) == (0, 0)
    await asyncio.wait([first, second])


@pytest.mark.parametrize("seed", range(20))
@on_virtual_time
async def test_no_place_is_lost_whoever_is_cancelled_when(seed: int) -> None:
    rng = random.Random(seed)
    admission = Admission(max_running=3, max_waiting=100)
    visitors = Visitors(admission)
    tasks = []
    for number in range(60):
        tasks.append(visitors.start(str(number), stay_s=rng.choice([0.0, 1.0, 2.0])))
        if rng.random() < 0.5:
            rng.choice(tasks).cancel()
        if rng.random() < 0.5:
            await asyncio.sleep(rng.choice([0.0, 0.5, 1.0]))
        assert admission.running_count <= 3
    await asyncio.wait(tasks)
    assert counts(admission) == (0, 0)


@on_virtual_time
async def test_whose_first_token_is_due_first_goes_first_and_nobody_starves() -> None:
    visitors = Visitors(Admission(max_running=1, max_waiting=9))
    tasks = [visitors.start("first", stay_s=PATIENCE_S - 1.0), visitors.start("patient", stay_s=1.0)]
    await asyncio.sleep(0.5)
    tasks += [visitors.start("lax", stay_s=1.0, due_s=90.0), visitors.start("urgent", stay_s=1.0, due_s=29.5)]
    await asyncio.gather(*tasks)
    assert visitors.entered == ["first", "urgent", "patient", "lax"]


@on_virtual_time
async def test_those_that_come_and_go_while_all_places_are_taken_leave_nothing() -> None:
    admission = Admission(max_running=1, max_waiting=4)
    visitors = Visitors(admission)
    running, waiting = visitors.start("runs", stay_s=1000.0), visitors.start("waits", stay_s=1.0)
    for number in range(2000):
        passing = visitors.start(f"{number}")
        await asyncio.sleep(0.01)
        passing.cancel()
        await asyncio.wait([passing])
    assert counts(admission) == (1, 1)
    assert len(admission._order) < 100
    await asyncio.gather(running, waiting)
    assert visitors.entered == ["runs", "waits"]
