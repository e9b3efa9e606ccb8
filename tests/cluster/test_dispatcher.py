"""Requests that wait to be routed: who is asked for, when, and who gives up."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable

import pytest
import uvloop

from cluster.breakers import Breakers
from cluster.dispatcher import BATCH, Dispatcher
from cluster.ledger import Ledger
from cluster.routing.booking import Booking
from cluster.routing.query import Answer, Defer, Route, RouteQuery
from cluster.routing.view import ClusterView
from engine.errors import Unavailable
from tests.cluster.fake_decode import on_virtual_time
from tests.cluster.routing_bench import Bench, query

WAIT_S = 10.0


class Scripted:
    """A policy that answers as it is told, and notes whom it was asked for."""

    name = "scripted"
    refuses = True

    def __init__(self, answer: Callable[[RouteQuery, float], Answer]) -> None:
        self.answer = answer
        self.asked: list[tuple[float, float]] = []

    def route(self, query: RouteQuery, view: ClusterView, now: float, rng: random.Random) -> Answer:
        self.asked.append((now, query.arrived_s))
        return self.answer(query, now)

    def learn_ttft(self, booking: Booking, now: float) -> None:
        """Nothing."""

    def learn_tpot(self, booking: Booking, tpot_s: float, answer_tokens: int) -> None:
        """Nothing."""


def dispatcher_of(router: Scripted) -> tuple[Dispatcher, Ledger]:
    view = Bench().view
    ledger = Ledger(view, router, Breakers(view, random.Random(0), 0.5, 8.0, lambda: None))
    return Dispatcher(view, router, ledger, random.Random(0), 0.1), ledger


def route() -> Route:
    return Route("p", "p:1", "d", "d:1")


@on_virtual_time
async def test_a_long_room_is_asked_through_and_nobody_twice_before_the_time() -> None:
    """More wait than are asked for in one go, none of them is told to wait for all: then the first must not be asked
    again and again while time stands still, and the last must be asked too."""
    count = 3 * BATCH + 5
    opened_s = 7.0

    def answer(query: RouteQuery, now: float) -> Answer:
        if now >= opened_s:
            return route()
        return Defer("others would miss", now + 0.5, 100.0 + query.arrived_s, 1.0)

    router = Scripted(answer)
    dispatcher, ledger = dispatcher_of(router)
    tasks = [asyncio.create_task(dispatcher.place(query(arrived_s=float(n)), None, WAIT_S)) for n in range(count)]
    for _ in range(20):
        await asyncio.sleep(0.3)
        dispatcher.news()
    # One question at its coming, and one for each half second.
    assert count <= len(router.asked) <= count * 14
    assert {arrived_s for now, arrived_s in router.asked if now > 0} == set(map(float, range(count)))
    for booking in await asyncio.gather(*tasks):
        ledger.end(booking, 0.0)
    dispatcher.check_empty()


@on_virtual_time
async def test_without_a_worker_all_give_up_after_their_time_and_one_question_a_round_is_enough() -> None:
    router = Scripted(lambda query, now: Defer("no prefill worker is available", for_all=True))
    dispatcher, _ = dispatcher_of(router)
    count = 2 * BATCH
    tasks = [asyncio.create_task(dispatcher.place(query(), None, WAIT_S)) for _ in range(count)]
    await asyncio.sleep(0)
    for _ in range(10):
        dispatcher.news()
        await asyncio.sleep(0.1)
    assert len(router.asked) == count + 10
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(error, Unavailable) for error in ended)
    assert asyncio.get_running_loop().time() == pytest.approx(WAIT_S, abs=0.2)
    dispatcher.check_empty()


@on_virtual_time
async def test_the_order_follows_the_last_answer_and_nothing_was_promised_without_a_worker() -> None:
    """Who came when there was no worker is not behind everybody for ever."""
    phase = "none"
    promised: dict[float, bool] = {}

    def answer(query: RouteQuery, now: float) -> Answer:
        promised[query.arrived_s] = query.was_deferred
        if phase == "none":
            return Defer("no prefill worker is available", for_all=True)
        if phase == "busy":
            # The earlier it came, the sooner it must start.
            return Defer("others would miss", now + 1.0, 50.0 + query.arrived_s, 1.0)
        return route()

    router = Scripted(answer)
    dispatcher, ledger = dispatcher_of(router)
    early = [asyncio.create_task(dispatcher.place(query(arrived_s=float(n)), None, WAIT_S)) for n in range(3)]
    await asyncio.sleep(0.1)
    assert promised == {0.0: False, 1.0: False, 2.0: False}
    phase = "busy"
    late = asyncio.create_task(dispatcher.place(query(arrived_s=9.0), None, WAIT_S))
    await asyncio.sleep(0)
    dispatcher.news()
    await asyncio.sleep(0.1)
    phase = "free"
    router.asked.clear()
    await asyncio.sleep(1.5)
    dispatcher.news()
    bookings = await asyncio.gather(*early, late)
    assert [arrived_s for _, arrived_s in router.asked] == [0.0, 1.0, 2.0, 9.0]
    assert all(promised.values())
    for booking in bookings:
        ledger.end(booking, 0.0)
    assert math.isinf(Defer("").until_s)


@on_virtual_time
async def test_who_waits_for_a_worker_with_room_is_alone_in_that() -> None:
    """Long requests whose only worker drains are no reason to keep those behind from a worker that is free."""
    is_there = has_room = False

    def answer(query: RouteQuery, now: float) -> Answer:
        if not is_there:
            return Defer("no decode worker is available", for_all=True)
        if query.total_tokens > 2000 and not has_room:
            return Defer("no worker with room for it is available")
        return route()

    router = Scripted(answer)
    dispatcher, ledger = dispatcher_of(router)

    def place(tokens: int) -> asyncio.Task[Booking]:
        return asyncio.create_task(dispatcher.place(query(tokens, total_tokens=2 * tokens), None, WAIT_S))

    long, short = [place(1500) for _ in range(2 * BATCH)], [place(500) for _ in range(3)]
    await asyncio.sleep(1.0)
    is_there = True
    dispatcher.news()
    await asyncio.sleep(0.1)
    assert [task.done() for task in short] == [True] * 3
    late = [place(3000), place(1200)]
    await asyncio.sleep(0)
    router.asked.clear()
    for _ in range(5):
        dispatcher.news()
        await asyncio.sleep(0.1)
    # One of the long ones, who then stands for all that are as long, and the one that is shorter.
    assert len(router.asked) == 5 * 2
    await asyncio.sleep(WAIT_S - 1.0)
    gone = await asyncio.gather(*long, return_exceptions=True)
    assert {str(error) for error in gone} == {"no worker with room for it is available; waited 10 s for one"}
    assert not any(task.done() for task in late)
    has_room = True
    dispatcher.news()
    for booking in await asyncio.gather(*short, *late):
        ledger.end(booking, 0.0)
    dispatcher.check_empty()


@on_virtual_time
async def test_nobody_gives_up_who_has_a_worker_by_then() -> None:
    phase = "none"

    def answer(query: RouteQuery, now: float) -> Answer:
        if phase == "none":
            return Defer("no decode worker is available", for_all=True)
        return route() if now >= WAIT_S + 3.0 else Defer("busy", WAIT_S + 3.0, 50.0, 1.0, for_all=True)

    dispatcher, ledger = dispatcher_of(Scripted(answer))
    task = asyncio.create_task(dispatcher.place(query(), None, WAIT_S))
    await asyncio.sleep(1.0)
    # Whatever has become of it, nobody has told the dispatcher.
    phase = "busy"
    ledger.end(await task, 0.0)
    assert asyncio.get_running_loop().time() == WAIT_S + 3.0
    dispatcher.check_empty()


def test_who_is_to_be_asked_again_at_once_is_asked_on_uvloop_too() -> None:
    """Its handles for what is due at once do not know for when they are."""

    async def main() -> None:
        asked = 0

        def answer(query: RouteQuery, now: float) -> Answer:
            nonlocal asked
            asked += 1
            return route() if asked > 2 else Defer("others would miss", 0.0, 0.0, 1.0)

        dispatcher, ledger = dispatcher_of(Scripted(answer))
        bookings = await asyncio.gather(*(dispatcher.place(query(), None, WAIT_S) for _ in range(2)))
        for booking in bookings:
            ledger.end(booking, 0.0)
        dispatcher.check_empty()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(main(), 5.0))
