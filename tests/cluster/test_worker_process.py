"""A worker's process around its loop: heartbeats, draining, and that a crash ends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from cluster.config import TandemConfig, load
from cluster.registry import HeartbeatReply, WorkerReport
from cluster.registry_server import registry_service
from cluster.worker_process import serve_worker
from cluster.worker_spec import WorkerSpec
from engine.errors import ConfigError
from engine.stats import LoopStats
from kvtransfer.frames import Frame
from kvtransfer.rpc_server import start_server
from kvtransfer.transport import PrefillCall
from prefill_worker.server import prefill_service


class FakeWorker:
    """A loop that does nothing until it is told to crash."""

    def __init__(self) -> None:
        self.running = 0
        self.crash = asyncio.Event()

    async def run(self) -> None:
        await self.crash.wait()
        raise AssertionError("block 3 is owned twice")

    def stats(self) -> LoopStats:
        return LoopStats(self.running, 0, 0, 8, 8, 0, 16, 0)

    async def prefill(self, call: PrefillCall) -> AsyncIterator[Frame]:
        raise AssertionError("nobody calls")
        yield


class Heard:
    """What a gateway heard. `more` is set by every report."""

    def __init__(self) -> None:
        self.reports: list[WorkerReport] = []
        self.more = asyncio.Event()

    def take(self, report: WorkerReport) -> HeartbeatReply:
        self.reports.append(report)
        self.more.set()
        return HeartbeatReply(0.05)


def config(stop_timeout_s: float = 5.0) -> TandemConfig:
    loaded = load()
    return loaded.model_copy(update={"cluster": loaded.cluster.model_copy(update={"stop_timeout_s": stop_timeout_s})})


@asynccontextmanager
async def running(worker: FakeWorker, stop_timeout_s: float = 5.0) -> AsyncIterator[tuple[Heard, asyncio.Task[None]]]:
    heard = Heard()
    gateway = await start_server("127.0.0.1:0", [registry_service(heard.take)])
    spec = WorkerSpec("prefill", "p", gateway.address)
    task = asyncio.create_task(
        serve_worker(spec, config(stop_timeout_s), worker, prefill_service(worker), "model", incarnation=7)
    )
    try:
        async with asyncio.timeout(10):
            await heard.more.wait()
        yield heard, task
    finally:
        task.cancel()
        await asyncio.wait([task])
        await gateway.stop()


async def test_it_reports_itself():
    async with running(FakeWorker()) as (heard, _):
        report = heard.reports[0]
        assert (report.worker_id, report.role, report.incarnation, report.model) == ("p", "prefill", 7, "model")
        assert report.address.startswith("127.0.0.1:")
        assert not report.stats.draining


async def test_a_crash_of_the_loop_ends_it():
    worker = FakeWorker()
    async with running(worker) as (heard, task):
        worker.crash.set()
        with pytest.raises(AssertionError, match="block 3 is owned twice"):
            async with asyncio.timeout(5):
                await task
        address = heard.reports[0].address
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*address.split(":"))


async def test_it_drains_before_it_ends():
    worker = FakeWorker()
    worker.running = 1
    async with running(worker) as (heard, task):
        task.cancel()
        async with asyncio.timeout(5):
            while not heard.reports[-1].stats.draining:
                heard.more.clear()
                await heard.more.wait()
        assert not task.done(), "what runs is finished first"
        worker.running = 0
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(5):
                await task


async def test_draining_is_bounded():
    worker = FakeWorker()
    worker.running = 1
    async with running(worker, stop_timeout_s=0.1) as (_, task):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(5):
                await task


async def test_a_taken_port_is_a_config_error():
    other = await start_server("127.0.0.1:0", [registry_service(Heard().take)])
    spec = WorkerSpec("prefill", "p", other.address, port=other.port)
    worker = FakeWorker()
    try:
        with pytest.raises(ConfigError, match="in use"):
            await serve_worker(spec, config(), worker, prefill_service(worker), "model", incarnation=1)
    finally:
        await other.stop()
