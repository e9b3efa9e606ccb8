"""The loops' small parts: inbox, slack queue, chunks, averages."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.planning import virtual_loop
from engine.chunking import next_chunk
from engine.errors import Overloaded
from engine.inbox import Inbox
from engine.running_average import RunningAverage
from engine.slack_queue import SlackQueue


def test_an_inbox_refuses_new_work_when_full_but_never_news() -> None:
    inbox: Inbox[str] = Inbox(2)
    inbox.offer("a")
    inbox.offer("b")
    with pytest.raises(Overloaded, match="2 messages wait"):
        inbox.offer("c")
    inbox.put("news")
    seen: list[str] = []
    inbox.drain(seen.append)
    assert seen == ["a", "b", "news"]


def test_mail_is_read_while_a_step_runs_and_the_step_s_result_comes_back() -> None:
    async def main() -> None:
        inbox: Inbox[str] = Inbox(9)
        read_at: list[float] = []
        loop = asyncio.get_running_loop()
        loop.call_later(1.0, inbox.put, "hello")

        async def step() -> str:
            await asyncio.sleep(3)
            return "done"

        assert await inbox.serve_while(step(), lambda _: read_at.append(loop.time())) == "done"
        assert (read_at, loop.time()) == ([1.0], 3.0)

    virtual_loop.run(main())


def test_cancelling_waits_for_the_step() -> None:
    async def main() -> None:
        inbox: Inbox[str] = Inbox(9)
        ended: list[str] = []

        async def step() -> None:
            try:
                await asyncio.sleep(10)
            finally:
                await asyncio.sleep(1)
                ended.append("step")

        serving = asyncio.create_task(inbox.serve_while(step(), print))
        await asyncio.sleep(1)
        serving.cancel()
        await asyncio.wait([serving])
        assert ended == ["step"]

    virtual_loop.run(main())


def test_a_step_s_error_is_the_loop_s_error() -> None:
    async def main() -> None:
        async def step() -> None:
            raise ValueError("bad step")

        with pytest.raises(ValueError, match="bad step"):
            await Inbox[str](9).serve_while(step(), print)

    virtual_loop.run(main())


def test_least_slack_first_then_first_come() -> None:
    queue: SlackQueue[str] = SlackQueue(patience_s=30)
    queue.push("patient", "patient", now=0, deadline=None)
    queue.push("soon", "soon", now=0, deadline=10)
    queue.push("long work", "long work", now=0, deadline=12, work_s=5)
    queue.push("soon too", "soon too", now=0, deadline=10)
    assert [queue.pop() for _ in range(len(queue))] == ["long work", "soon", "soon too", "patient"]


def test_patience_runs_out() -> None:
    """A request without a deadline is not starved by a stream of urgent ones."""
    queue: SlackQueue[str] = SlackQueue(patience_s=30)
    queue.push("patient", "patient", now=0, deadline=None)
    queue.push("urgent", "urgent", now=29, deadline=31)
    assert queue.pop() == "patient"


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=40))
def test_a_removed_entry_never_comes_back(moves: list[tuple[int, bool]]) -> None:
    queue: SlackQueue[int] = SlackQueue()
    inside: set[int] = set()
    for number, (key, remove) in enumerate(moves):
        if remove:
            assert queue.remove(str(key)) == (key if key in inside else None)
            inside.discard(key)
        elif key not in inside:
            queue.push(str(key), key, now=number, deadline=None)
            inside.add(key)
        assert set(queue) == inside
        assert queue.peek() in (inside or {None})


@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 64), st.sampled_from([1, 2, 4, 16]))
def test_chunks_cover_the_prompt_and_end_on_blocks(start: int, length: int, budget: int, block_size: int) -> None:
    position, end = start, start + length
    while position < end:
        count = next_chunk(position, end, budget, block_size)
        assert 0 < count <= budget
        position += count
        assert position == end or position % block_size == 0 or budget < block_size
    assert position == end
    assert next_chunk(start, end, 0, block_size) == 0


def test_an_average_starts_with_its_first_sample_and_follows_change() -> None:
    average = RunningAverage()
    assert average.value == 0.0
    average.add(8.0)
    assert average.value == 8.0
    for _ in range(60):
        average.add(2.0)
    assert average.value == pytest.approx(2.0, abs=0.05)
