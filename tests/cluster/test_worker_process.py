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
from cluster.security.identity import WorkerIdentity
from cluster.security.security_config import SecurityConfig
from cluster.worker_process import serve_worker
from cluster.worker_spec import WorkerSpec
from decode_worker.stream import Command, TokenFrame
from engine.errors import ConfigError, HandedBack, TandemError
from engine.kv_events import KVEventBatch
from engine.stats import LoopStats
from kvtransfer.frames import Frame
from kvtransfer.rpc_server import start_server
from kvtransfer.transport import PrefillCall

IDENTITY = WorkerIdentity("p", 7, SecurityConfig())


class FakeLoop:
    """A loop that does nothing until it is told to crash. Stands in for either role's."""

    def __init__(self) -> None:
        self.running = 0
        self.crash = asyncio.Event()
        self.let_go_with: TandemError | None = None

    @property
    def is_idle(self) -> bool:
        return not self.running

    async def run(self) -> None:
        await self.crash.wait()
        raise AssertionError("block 3 is owned twice")

    def drain(self) -> None:
        """Nothing waits here."""

    def resume(self) -> None:
        """Nothing was drained."""

    def let_go(self, error: TandemError) -> None:
        self.let_go_with, self.running = error, 0

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


def config(drain_s: float = 5.0) -> TandemConfig:
    loaded = load()
    return loaded.model_copy(update={"cluster": loaded.cluster.model_copy(update={"drain_s": drain_s})})


@asynccontextmanager
async def running(
    loop: FakeLoop, drain_s: float = 5.0, name: str = "p"
) -> AsyncIterator[tuple[Heard, asyncio.Task[None]]]:
    heard = Heard()
    gateway = await start_server("127.0.0.1:0", [registry_service(heard.take)])
    spec = WorkerSpec("prefill", name, gateway.address)
    worker = FlexibleWorker(lambda: loop, FakeLoop, "prefill", worker_id=name)
    settings = config(drain_s)
    task = asyncio.create_task(serve_worker(spec, settings, worker, "model", 7, IDENTITY))
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


async def ends(task: asyncio.Task[None]) -> None:
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(5):
            await task


async def test_it_drains_before_it_ends():
    loop = FakeLoop()
    loop.running = 1
    async with running(loop) as (heard, task):
        task.cancel()
        await heard.until(lambda report: report.stats.draining)
        assert not task.done(), "what runs is finished first"
        loop.running = 0
        await ends(task)
        assert loop.let_go_with is None


async def test_it_stays_as_long_as_something_is_on_its_way_to_it():
    async with running(FakeLoop()) as (heard, task):
        heard.reply = HeartbeatReply(0.05, on_its_way=1)
        task.cancel()
        await heard.until(lambda report: report.stats.draining)
        count = len(heard.reports)
        await heard.until(lambda _: len(heard.reports) > count + 2)
        assert not task.done(), "a request that its gateway has sent may not have come yet"
        heard.reply = HeartbeatReply(0.05)
        await ends(task)


async def test_a_crash_while_it_drains_leaves_nothing_to_wait_for():
    loop = FakeLoop()
    loop.running = 1
    async with running(loop, drain_s=60.0) as (heard, task):
        task.cancel()
        await heard.until(lambda report: report.stats.draining)
        loop.crash.set()
        await ends(task)


async def test_what_is_not_done_in_time_is_handed_back():
    loop = FakeLoop()
    loop.running = 1
    async with running(loop, drain_s=0.2) as (_, task):
        task.cancel()
        await ends(task)
        assert isinstance(loop.let_go_with, HandedBack)
        assert str(loop.let_go_with) == "p leaves, and had 0.2 s to finish what it had"


async def test_a_taken_port_is_a_config_error():
    other = await start_server("127.0.0.1:0", [registry_service(Heard().take)])
    spec = WorkerSpec("prefill", "p", other.address, port=other.port)
    worker = FlexibleWorker(FakeLoop, FakeLoop, "prefill", worker_id="p")
    try:
        with pytest.raises(ConfigError, match="in use"):
            await serve_worker(spec, config(), worker, "model", 1, IDENTITY)
    finally:
        await other.stop()
