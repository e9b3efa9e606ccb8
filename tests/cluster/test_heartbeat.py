"""A worker's reports: regular, prompt after a change, patient when the gateway is away."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable

import pytest

from cluster.heartbeat import report_forever
from cluster.registry import HeartbeatReply, WorkerReport
from engine.errors import Unavailable
from engine.stats import LoopStats
from tests.cluster.fake_decode import on_virtual_time

STATS = LoopStats(
    running=0, waiting=0, queued_tokens=0, blocks_total=8, blocks_free=8, blocks_cached=0, block_size=16, steps=0
)
REPORT = WorkerReport("w", "decode", "host:1", incarnation=1, model="m", stats=STATS)
Send = Callable[[WorkerReport], Awaitable[HeartbeatReply]]


async def reports_within(seconds: float, send: Send, changed: asyncio.Event | None = None) -> None:
    """Runs the reporter for so long, then cancels it."""
    reporter = report_forever(lambda: REPORT, send, changed=changed or asyncio.Event(), rng=random.Random(1))
    task = asyncio.create_task(reporter)
    await asyncio.sleep(seconds)
    assert not task.done(), "the reporter gave up"
    task.cancel()
    await asyncio.wait([task])


@on_virtual_time
async def test_reports_at_about_the_interval_that_the_gateway_asks_for() -> None:
    times: list[float] = []

    async def send(report: WorkerReport) -> HeartbeatReply:
        assert report is REPORT
        times.append(asyncio.get_running_loop().time())
        return HeartbeatReply(2.0)

    await reports_within(100.0, send)
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert times[0] == 0.0
    assert 46 <= len(times) <= 55
    assert all(1.8 <= pause <= 2.2 for pause in pauses)
    assert len(set(pauses)) > 1


@on_virtual_time
async def test_a_change_is_reported_at_once() -> None:
    times: list[float] = []
    changed = asyncio.Event()

    async def send(report: WorkerReport) -> HeartbeatReply:
        times.append(asyncio.get_running_loop().time())
        return HeartbeatReply(60.0)

    asyncio.get_running_loop().call_later(5.0, changed.set)
    await reports_within(10.0, send, changed)
    assert times == [0.0, 5.0]
    assert not changed.is_set()


@on_virtual_time
async def test_a_gateway_that_is_away_is_tried_again_with_growing_pauses(caplog: pytest.LogCaptureFixture) -> None:
    times: list[float] = []

    async def send(report: WorkerReport) -> HeartbeatReply:
        times.append(asyncio.get_running_loop().time())
        if times[-1] < 60.0:
            raise Unavailable("connection refused")
        return HeartbeatReply(1.0)

    await reports_within(70.0, send)
    pauses = [after - before for before, after in itertools.pairwise(times) if before < 60.0]
    assert 0.18 <= pauses[0] <= 0.22
    assert 4.5 <= max(pauses) <= 5.5
    assert 16 <= len(pauses) <= 19
    assert len([at for at in times if at >= 60.0]) >= 5
    assert [record.message for record in caplog.records] == [
        "heartbeat: connection refused",
        "heartbeat: the gateway answers again",
    ]


@on_virtual_time
async def test_a_gateway_that_does_not_answer_is_left_after_a_while() -> None:
    count = 0

    async def send(report: WorkerReport) -> HeartbeatReply:
        nonlocal count
        count += 1
        await asyncio.Event().wait()
        return HeartbeatReply(1.0)

    await reports_within(21.0, send)
    assert count == 4


@on_virtual_time
async def test_no_answer_makes_a_worker_flood_the_gateway() -> None:
    count = 0

    async def send(report: WorkerReport) -> HeartbeatReply:
        nonlocal count
        count += 1
        return HeartbeatReply(0.0)

    await reports_within(1.0, send)
    assert count <= 23
