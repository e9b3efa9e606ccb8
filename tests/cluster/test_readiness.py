"""What a worker's health service says is so: ready once it has computed, not when it drains, not when it hangs."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.config import TandemConfig, load
from cluster.flexible_worker import FlexibleWorker
from cluster.gateway_process import has_route
from cluster.links import DecodeLinks
from cluster.registry import HeartbeatReply, Registry, WorkerReport
from cluster.registry_server import registry_service
from cluster.security.identity import WorkerIdentity
from cluster.security.security_config import SecurityConfig
from cluster.step_watch import Hung
from cluster.watchdog import Watchdog
from cluster.worker_process import HUNG_END_S, serve_worker
from cluster.worker_spec import WorkerSpec
from decode_worker.config import DecodeConfig
from decode_worker.grpc_transport import GrpcDecodeTransport
from decode_worker.stream import Delta, Event, Failed
from decode_worker.worker import DecodeWorker
from engine.batch import Batch, LayerListener, StepOutput
from engine.emulated_runner import EmulatedRunner
from engine.errors import Unavailable
from engine.pulse import Pulse
from engine.sampling import SamplingParams
from engine.stats import LoopStats
from kvtransfer.rpc_server import LIVENESS, start_server
from tests.decode_worker.scripted import ScriptedTransport
from tests.emulated import layout, submit

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
DECODE = "tandem.v1.DecodeWorker"
STEP_LIMIT_S = 1.0

IDENTITY = WorkerIdentity("w", 1, SecurityConfig())


class HeldRunner(EmulatedRunner):
    """Computes nothing before it is let go."""

    def __init__(self) -> None:
        super().__init__(layout(64), lambda batch: 0.002, layer_group=4)
        self.goes_on = asyncio.Event()

    async def run(self, batch: Batch, on_layers: LayerListener | None = None) -> StepOutput:
        await self.goes_on.wait()
        return await super().run(batch, on_layers)


class FakeWatchdog:
    """Ends nothing."""

    left_s = math.inf

    def end_within(self, seconds: float, why: str) -> None:
        self.left_s = min(self.left_s, seconds)


@dataclass
class Scene:
    """A decode worker on gRPC whose runner a test holds."""

    runner: HeldRunner
    worker: FlexibleWorker
    reports: list[WorkerReport] = field(default_factory=list)
    address: str = ""
    watchdog: FakeWatchdog = field(default_factory=FakeWatchdog)
    task: asyncio.Task[None] | None = None

    async def health(self, service: str = "") -> int:
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)).status

    async def until(self, service: str, status: int) -> None:
        async with asyncio.timeout(5):
            while await self.health(service) != status:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    runner, pulse = HeldRunner(), Pulse(0.2)

    def make_decode() -> DecodeWorker:
        return DecodeWorker(
            runner,
            DecodeConfig(),
            ScriptedTransport(),
            worker_id="d",
            eos_token_ids=frozenset({0}),
            max_context=256,
            pulse=pulse,
        )

    worker = FlexibleWorker(lambda: pytest.fail("no flip"), make_decode, "decode", worker_id="d", pulse=pulse)
    it = Scene(runner, worker)

    def take(report: WorkerReport) -> HeartbeatReply:
        it.reports.append(report)
        return HeartbeatReply(0.05)

    def serving(address: str) -> None:
        it.address = address

    gateway = await start_server("127.0.0.1:0", [registry_service(take)])
    spec = WorkerSpec("decode", "d", gateway.address)
    watchdog = cast(Watchdog, it.watchdog)
    it.task = asyncio.create_task(serve_worker(spec, config(), worker, "m", 1, IDENTITY, serving, watchdog))
    try:
        async with asyncio.timeout(5):
            while not it.address:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        yield it
    finally:
        runner.goes_on.set()
        if not it.task.cancelling():
            it.task.cancel()
        await asyncio.wait([it.task])
        await gateway.stop()


def config() -> TandemConfig:
    loaded = load()
    changes = {"drain_s": 2.0, "step_limit_s": STEP_LIMIT_S}
    return loaded.model_copy(update={"cluster": loaded.cluster.model_copy(update=changes)})


async def test_a_worker_is_ready_and_reports_once_it_has_computed():
    async with scene() as it:
        await asyncio.sleep(0.3)
        assert await it.health(LIVENESS) == SERVING
        assert await it.health("") == await it.health(DECODE) == NOT_SERVING
        assert it.reports == [], "nobody is to send anything to a worker that has not shown that it can"
        it.runner.goes_on.set()
        await it.until("", SERVING)
        assert await it.health(DECODE) == SERVING
        async with asyncio.timeout(5):
            while not it.reports:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert not it.reports[-1].stats.draining


async def test_a_draining_worker_lives_and_is_not_ready():
    async with scene() as it:
        it.runner.goes_on.set()
        await it.until("", SERVING)
        transport = GrpcDecodeTransport()
        links = DecodeLinks(transport)
        async with links.submit(it.address, submit(9, params=SamplingParams(max_tokens=200))) as events:
            await anext(events)
            assert it.task is not None
            it.task.cancel()
            await it.until("", NOT_SERVING)
            assert await it.health(DECODE) == NOT_SERVING
            assert await it.health(LIVENESS) == SERVING
            assert [event async for event in events], "what runs goes on"
        await links.close()
        await transport.close()


async def test_a_worker_whose_step_hangs_says_so_fails_its_requests_and_ends():
    async with scene() as it:
        it.runner.goes_on.set()
        await it.until("", SERVING)
        transport = GrpcDecodeTransport()
        links = DecodeLinks(transport)
        async with links.submit(it.address, submit(9, params=SamplingParams(max_tokens=200))) as mailbox:
            assert isinstance(await anext(mailbox), Delta)
            it.runner.goes_on.clear()
            began_s = asyncio.get_running_loop().time()
            events: list[Event] = [event async for event in mailbox]
            took_s = asyncio.get_running_loop().time() - began_s
        assert isinstance(events[-1], Failed)
        assert isinstance(events[-1].error, Unavailable)
        assert str(events[-1].error).startswith("d: a step of 1 tokens has not come back for ")
        assert took_s < STEP_LIMIT_S + 2.0
        assert it.watchdog.left_s == HUNG_END_S, "were the runner to hang for good, the process would end all the same"
        assert it.task is not None
        it.runner.goes_on.set()
        with pytest.raises(Hung):
            async with asyncio.timeout(5):
                await it.task
        assert it.reports[-1].stats.draining, "nothing more is sent there"
        await links.close()
        await transport.close()


# ── the gateway's own ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("names", "allow_local", "is_ready"),
    [
        ((), True, False),
        (("prefill-0",), True, False),
        (("decode-0",), True, True),
        (("decode-0",), False, False),
        (("decode-0", "prefill-0"), False, True),
        (("decode-0", "draining prefill-0"), False, False),
        (("draining decode-0", "prefill-0"), True, False),
        (("colocated-0",), False, True),
        (("silent decode-0", "prefill-0"), True, False),
    ],
)
def test_a_gateway_is_ready_when_a_request_has_somewhere_to_go(names: tuple[str, ...], allow_local: bool, is_ready):
    registry = Registry(fresh_s=3.0, expire_s=60.0)
    for name in names:
        role = "prefill" if "prefill" in name else "decode"
        stats = LoopStats(0, 0, 0, 8, 8, 0, 16, 0, draining="draining" in name, local_only="colocated" in name)
        heard_s = 0.0 if "silent" in name else 8.0
        registry.heartbeat(WorkerReport(name, role, f"{name}:1", 1, "m", stats), heard_s)
    assert has_route(registry, 10.0, allow_local=allow_local) is is_ready
