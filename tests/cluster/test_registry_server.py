"""Heartbeats over real gRPC."""

import asyncio
import random
from dataclasses import replace
from functools import partial

import pytest
from tandem.v1 import worker_pb2

from cluster.heartbeat import report_forever
from cluster.registry import HeartbeatReply, KVEvents, Registry, WorkerReport
from cluster.registry_server import (
    registry_service,
    reply_from_proto,
    report_from_proto,
    report_to_proto,
    send_heartbeat,
)
from engine.errors import InvalidArgument, Unavailable
from engine.stats import COUNTS, LoopStats
from kvtransfer.rpc_channel import Channels
from kvtransfer.rpc_server import start_server
from tests.eventually import eventually

STATS = LoopStats(3, 4, 5000, 64, 32, 16, 16, 1 << 40, 1234.5, 0.025, draining=True)
REPORT = WorkerReport("d0", "decode", "10.0.0.1:7000", 1 << 60, "smollm2", STATS)


def test_a_report_comes_out_as_it_went_in():
    assert report_from_proto(report_to_proto(REPORT)) == REPORT


async def test_a_heartbeat_reaches_the_registry_and_brings_the_interval_back():
    registry = Registry(fresh_s=3, expire_s=60)

    def take(report: WorkerReport) -> HeartbeatReply:
        registry.heartbeat(report, now=7.0)
        return HeartbeatReply(0.25)

    server = await start_server("127.0.0.1:0", [registry_service(take)])
    channels = Channels()
    assert await send_heartbeat(channels, server.address, REPORT) == HeartbeatReply(0.25)
    assert [worker.report for worker in registry.all(7.0)] == [REPORT]
    with pytest.raises(InvalidArgument, match="role"):
        await send_heartbeat(channels, server.address, WorkerReport("x", "cook", "a:1", 1, "smollm2", STATS))
    await channels.close()
    await server.stop()


@pytest.mark.parametrize("interval_s", [0.0, -1.0, float("nan"), float("inf")])
async def test_an_interval_that_makes_no_sense_is_an_error(interval_s):
    server = await start_server("127.0.0.1:0", [registry_service(lambda report: HeartbeatReply(interval_s))])
    channels = Channels()
    with pytest.raises(Unavailable):
        await send_heartbeat(channels, server.address, REPORT)
    await channels.close()
    await server.stop()


async def test_a_clock_that_makes_no_sense_is_an_error():
    # Tickets would never expire by it.
    with pytest.raises(Unavailable, match="says that it is nan s"):
        reply_from_proto(worker_pb2.HeartbeatReply(interval_s=1.0, now_s=float("nan")))


async def test_nobody_there_is_unavailable():
    channels = Channels()
    with pytest.raises(Unavailable):
        await send_heartbeat(channels, "127.0.0.1:1", REPORT)
    await channels.close()


async def test_reports_go_on_until_cancelled():
    heard: list[WorkerReport] = []

    def take(report: WorkerReport) -> HeartbeatReply:
        heard.append(report)
        return HeartbeatReply(0.05)

    server = await start_server("127.0.0.1:0", [registry_service(take)])
    channels = Channels()
    send = partial(send_heartbeat, channels, server.address)
    reporting = asyncio.create_task(report_forever(lambda: REPORT, send, changed=asyncio.Event(), rng=random.Random(1)))
    await eventually(lambda: len(heard) >= 3)
    reporting.cancel()
    await asyncio.wait([reporting])
    await channels.close()
    await server.stop()
    assert heard[0] == REPORT


async def test_load_links_and_kv_events_arrive_as_they_were_sent():
    events = KVEvents(3, False, stored=(1, (1 << 64) - 1), evicted=(7,))
    stats = replace(STATS, queued_s=1.5, context_tokens=9, prefill_scale=1.25, decode_scale=0.5, local_only=True)
    stats = replace(stats, **{name: 7 + index for index, name in enumerate(COUNTS)})
    sent = replace(REPORT, stats=stats, links=(("p:1", 2.5e9),), kv_events=events)
    heard: list[WorkerReport] = []

    def take(report: WorkerReport) -> HeartbeatReply:
        heard.append(report)
        return HeartbeatReply(0.5, "decode", kv_resync=True)

    server = await start_server("127.0.0.1:0", [registry_service(take)])
    channels = Channels()
    assert await send_heartbeat(channels, server.address, sent) == HeartbeatReply(0.5, "decode", kv_resync=True)
    assert heard == [sent]
    await channels.close()
    await server.stop()
