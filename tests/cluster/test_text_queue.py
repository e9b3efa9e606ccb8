"""Long texts are tokenized one at a time beside everything else; short ones at once."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from cluster.text_queue import SHORT_CHARS, WAITING_MAX, TextQueue
from engine.errors import InvalidArgument, Overloaded

LONG = SHORT_CHARS + 1


class Work:
    """Notes in which thread it ran, takes `seconds` of it, and how many of its kind ran at once."""

    running = 0
    most = 0

    def __init__(self, seconds: float = 0.0, error: Exception | None = None) -> None:
        self.seconds = seconds
        self.error = error
        self.thread: threading.Thread | None = None

    def __call__(self) -> str:
        self.thread = threading.current_thread()
        Work.running += 1
        Work.most = max(Work.most, Work.running)
        time.sleep(self.seconds)
        Work.running -= 1
        if self.error is not None:
            raise self.error
        return "done"


async def test_short_texts_are_done_at_once_and_so_is_what_will_be_refused() -> None:
    queue = TextQueue(max_chars=10 * LONG)
    for chars in (0, SHORT_CHARS, 10 * LONG + 1):
        work = Work()
        assert await queue.run(chars, work) == "done"
        assert work.thread is threading.current_thread()


async def test_what_takes_long_whatever_its_text_takes_its_turn_too() -> None:
    queue = TextQueue(max_chars=10 * LONG)
    for chars in (0, 10 * LONG, 10 * LONG + 1):
        work = Work()
        assert await queue.run(chars, work, is_long=True) == "done"
        assert work.thread is not threading.current_thread()


async def test_long_texts_take_turns_in_a_thread_and_the_loop_goes_on() -> None:
    queue, works = TextQueue(LONG), [Work(0.05) for _ in range(4)]
    Work.most = 0
    tasks = [asyncio.create_task(queue.run(LONG, work)) for work in works]
    ticks = 0
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0.001)
        ticks += 1
    assert ticks > 20
    assert Work.most == 1
    assert all(work.thread is not threading.current_thread() for work in works)


async def test_errors_come_out() -> None:
    with pytest.raises(InvalidArgument):
        await TextQueue(LONG).run(LONG, Work(error=InvalidArgument("text", "", "another")))


async def test_more_than_may_wait_is_refused_and_there_is_room_again_afterwards() -> None:
    queue = TextQueue(LONG)
    tasks = [asyncio.create_task(queue.run(LONG, Work(0.02))) for _ in range(WAITING_MAX)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="wait to be tokenized"):
        await queue.run(LONG, Work())
    await asyncio.gather(*tasks)
    assert await queue.run(LONG, Work()) == "done"


async def test_who_goes_away_waits_no_more_and_a_thread_under_way_keeps_its_turn() -> None:
    queue, works = TextQueue(LONG), [Work(0.1), Work(0.1), Work()]
    Work.most = 0
    tasks = [asyncio.create_task(queue.run(LONG, work)) for work in works]
    await asyncio.sleep(0.02)
    for task in tasks[:2]:
        task.cancel()
    assert await tasks[2] == "done"
    assert Work.most == 1
    assert works[1].thread is None
