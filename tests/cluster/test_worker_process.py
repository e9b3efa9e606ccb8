"""A worker's process around its loop: heartbeats, draining, and that a crash ends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from cluster.config import TandemConfig, load
from cluster.flexible_worker import FlexibleWorker
from cluster.registry import HeartbeatReply, KVEvents, WorkerReport
from cluster.registry_server import registry_service
from cluster.worker_process import serve_worker
from cluster.worker_spec import WorkerSpec
from decode_worker.stream import Command, TokenFrame
from engine.errors import ConfigError
from engine.kv_events import KVEventBatch
from engine.stats import LoopStats
from kvtransfer.frames import Frame
from kvtransfer.rpc_server import start_server
from kvtransfer.transport import PrefillCall


class FakeLoop:
    """A loop that does nothing until it is told to crash. Stands in for either role's."""

    def __init__(self) -> None:
        self.running = 0
        self.crash = asyncio.Event()

    @property
    def is_idle(self) -> bool:
        return not self.running

    async def run(self) -> None:
        await self.crash.wait()
        raise AssertionError("block 3 is owned twice")

    def stats(self) -> LoopStats:
        return LoopStats(self.running, 0, 0, 8, 8, 0, 16, 0)

    def kv_events(self) -> KVEventBatch | None:
        return None

    def kv_snapshot(self) -> KVEventBatch:
        return KVEventBatch((7,), is_snapshot=True)

    def link_rates(self) -> tuple[tuple[str, float], ...]:
        return (("p:1", 1e9),)

    def check_empty(self) -> None:
        assert self.is_idle

    async def prefill(self, call: PrefillCall) -> AsyncIterator[Frame]:
        raise AssertionError("nobody calls")
        yield

    async def attach(self, commands: AsyncIterator[Command]) -> AsyncIterator[TokenFrame]:
        raise AssertionError("nobody calls")
        yield


class Heard:
    """What a gateway heard, and what it answers. `more` is set by every report."""

    def __init__(self) -> None:
        self.reports: list[WorkerReport] = []
        self.more = asyncio.Event()
        self.reply = HeartbeatReply(0.05)

    def take(self, report: WorkerReport) -> HeartbeatReply:
        self.reports.append(report)
        self.more.set()
        return self.reply

    async def until(self, holds: Callable[[WorkerReport], bool]) -> WorkerReport:
        """The first report for which that is so."""
        async with asyncio.timeout(5):
            while not self.reports or not holds(self.reports[-1]):
                self.more.clear()
                await self.more.wait()
        return self.reports[-1]


def config(stop_timeout_s: float = 5.0) -> TandemConfig:
    loaded = load()
    return loaded.model_copy(update={"cluster": loaded.cluster.model_copy(update={"stop_timeout_s": stop_timeout_s})})


@asynccontextmanager
async def running(
    loop: FakeLoop, stop_timeout_s: float = 5.0, name: str = "p", leave: asyncio.Event | None = None
) -> AsyncIterator[tuple[Heard, asyncio.Task[None]]]:
    heard = Heard()
    gateway = await start_server("127.0.0.1:0", [registry_service(heard.take)])
    spec = WorkerSpec("prefill", name, gateway.address)
    worker = FlexibleWorker(lambda: loop, FakeLoop, "prefill", worker_id=name)
    settings = config(stop_timeout_s)
    task = asyncio.create_task(serve_worker(spec, settings, worker, "model", incarnation=7, leave=leave))
    try:
        async with asyncio.timeout(10):
            await heard.more.wait()
        yield heard, task
    finally:
        task.cancel()
        await asyncio.wait([task])
        await gateway.stop()


async def test_it_reports_itself():
    async with running(FakeLoop()) as (heard, _):
        report = heard.reports[0]
        assert (report.worker_id, report.role, report.incarnation, report.model) == ("p", "prefill", 7, "model")
        assert report.address.startswith("127.0.0.1:")
        assert not report.stats.draining
        assert not report.stats.local_only
        assert report.kv_events == KVEvents(1, is_snapshot=True, stored=(7,))
        assert report.links == ()


async def test_a_colocated_worker_says_so():
    async with running(FakeLoop(), name="colocated-0") as (heard, _):
        assert heard.reports[0].stats.local_only


async def test_it_takes_the_role_that_it_is_asked_to_take():
    async with running(FakeLoop()) as (heard, _):
        heard.reply = HeartbeatReply(0.05, role="decode")
        await heard.until(lambda report: report.stats.draining and report.role == "prefill")
        report = await heard.until(lambda report: report.role == "decode")
        assert not report.stats.draining
        assert report.address == heard.reports[0].address
        assert report.incarnation == 7
        assert report.links == (("p:1", 1e9),)
        assert report.kv_events is not None
        assert report.kv_events.is_snapshot, "another loop has another pool"


async def test_a_gateway_that_missed_something_gets_a_snapshot():
    async with running(FakeLoop()) as (heard, _):
        await heard.until(lambda report: report.kv_events is not None and not report.kv_events.is_snapshot)
        heard.reply = HeartbeatReply(0.05, kv_resync=True)
        report = await heard.until(lambda report: report.kv_events is not None and report.kv_events.is_snapshot)
        assert report.kv_events.stored == (7,)


async def test_a_crash_of_the_loop_ends_it():
    loop = FakeLoop()
    async with running(loop) as (heard, task):
        loop.crash.set()
        with pytest.raises(AssertionError, match="block 3 is owned twice"):
            async with asyncio.timeout(5):
                await task
        address = heard.reports[0].address
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*address.split(":"))


async def test_it_drains_before_it_ends():
    loop = FakeLoop()
    loop.running = 1
    async with running(loop) as (heard, task):
        task.cancel()
        await heard.until(lambda report: report.stats.draining)
        assert not task.done(), "what runs is finished first"
        loop.running = 0
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(5):
                await task


async def test_one_that_is_to_leave_drains_for_as_long_as_it_takes():
    loop, leave = FakeLoop(), asyncio.Event()
    loop.running = 1
    async with running(loop, stop_timeout_s=0.1, leave=leave) as (heard, task):
        leave.set()
        await heard.until(lambda report: report.stats.draining)
        count = len(heard.reports)
        await heard.until(lambda _: len(heard.reports) > count + 3)
        assert not task.done(), "the stop's limit is not its limit"
        loop.running = 0
        async with asyncio.timeout(5):
            await task


async def test_draining_is_bounded():
    loop = FakeLoop()
    loop.running = 1
    async with running(loop, stop_timeout_s=0.1) as (_, task):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(5):
                await task


async def test_a_taken_port_is_a_config_error():
    other = await start_server("127.0.0.1:0", [registry_service(Heard().take)])
    spec = WorkerSpec("prefill", "p", other.address, port=other.port)
    worker = FlexibleWorker(FakeLoop, FakeLoop, "prefill", worker_id="p")
    try:
        with pytest.raises(ConfigError, match="in use"):
            await serve_worker(spec, config(), worker, "model", incarnation=1)
    finally:
        await other.stop()
