"""A gateway that ends: nothing new, what runs runs on for its time, and what is cut is told why."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest

from cluster.messages import Chunk, Complete
from cluster.text_queue import SHORT_CHARS
from engine.errors import Unavailable
from tests.cluster.fake_decode import STEP_S, FakeDecode, on_virtual_time
from tests.cluster.serving import ANSWER, CONFIG, STATS, TO_THE_END, collect, report, serving, start


def text_of(parts: tuple[list[Chunk], Complete]) -> str:
    return parts[1].choices[0].text


@on_virtual_time
async def test_what_is_there_is_served_and_nothing_new_is_taken() -> None:
    async with serving(FakeDecode(ANSWER)) as gateway:
        # Two run, as many as there are places; two wait for theirs.
        tasks = [start(gateway, f"r{index}", params=TO_THE_END.params) for index in range(4)]
        await asyncio.sleep(2.5 * STEP_S)
        drain = asyncio.create_task(gateway.drain(60.0))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match=r"^the gateway is shutting down$"):
            await collect(gateway, replace(TO_THE_END, request_id="late"))
        gateway.heartbeat(report("d"))
        assert [text_of(parts) for parts in await asyncio.gather(*tasks)] == ["One, two, three."] * 4
        began_s = asyncio.get_running_loop().time()
        await drain
        assert asyncio.get_running_loop().time() - began_s < STEP_S, "it ends when the last of them has"


async def test_a_request_whose_text_is_being_tokenized_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on = threading.Event(), threading.Event()

    def tokenize(*args: Any) -> tuple[int, ...]:
        began.set()
        assert go_on.wait(10.0)
        return (1, 2, 3)

    monkeypatch.setattr("cluster.gateway.prompt_token_ids", tokenize)
    async with serving(FakeDecode(ANSWER)) as gateway:
        long = start(gateway, "r", prompt="a" * (SHORT_CHARS + 1), params=TO_THE_END.params)
        await asyncio.to_thread(began.wait, 10.0)
        drain = asyncio.create_task(gateway.drain(10.0))
        await asyncio.sleep(10 * STEP_S)
        assert not drain.done()
        go_on.set()
        assert text_of(await long) == "One, two, three."
        await drain


@on_virtual_time
async def test_what_is_not_done_in_time_is_cut_and_told() -> None:
    config = CONFIG.model_copy(update={"max_running": 3})
    # Without an end, and the second worker is about to go.
    async with serving(FakeDecode(), ("p", "d"), config) as gateway:
        running = [start(gateway, f"r{index}") for index in range(2)]
        await asyncio.sleep(2 * STEP_S)
        gateway.heartbeat(report("d", stats=replace(STATS, draining=True)))
        # One has a place and waits for a worker, one waits for a place.
        waiting = [start(gateway, f"w{index}") for index in range(2)]
        await asyncio.sleep(STEP_S)
        began_s = asyncio.get_running_loop().time()
        await gateway.drain(1.0)
        assert asyncio.get_running_loop().time() - began_s == pytest.approx(1.0)
        for task in (*running, *waiting):
            with pytest.raises(Unavailable, match=r"^the gateway is shutting down$"):
                await task


@on_virtual_time
async def test_an_idle_gateway_ends_at_once() -> None:
    async with serving(FakeDecode(ANSWER)) as gateway:
        began_s = asyncio.get_running_loop().time()
        await gateway.drain(60.0)
        assert asyncio.get_running_loop().time() == began_s
