"""Fleets that grow and shrink: real worker processes, told to come and to leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cluster.cluster_config import ClusterConfig
from cluster.config import TandemConfig
from cluster.fleet import Fleet
from cluster.processes import ProcessFleet
from cluster.registry import HeartbeatReply, Registry, WorkerReport
from cluster.registry_server import registry_service
from engine.config import EngineConfig
from engine.errors import NotFound
from kvtransfer.rpc_server import start_server
from tests.tiny_models import save_model

START_S = 90.0


class Gateway:
    """Hears who is there, with their last words."""

    def __init__(self) -> None:
        self.registry = Registry(2.0, 30.0)
        self.last: dict[str, WorkerReport] = {}

    def take(self, report: WorkerReport) -> HeartbeatReply:
        self.registry.heartbeat(report, asyncio.get_running_loop().time())
        self.last[report.worker_id] = report
        return HeartbeatReply(0.1)

    async def until(self, holds: Callable[[], bool], fleet: Fleet) -> None:
        async with asyncio.timeout(START_S):
            while not holds():
                fleet.check()
                await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder = save_model("llama", tmp_path_factory.mktemp("llama"))
    # Part of a complete folder; workers do not read it.
    (folder / "tokenizer.json").write_text("{}")
    return EngineConfig(model=str(folder), block_size=4, kv_cache_bytes=1 << 20, device="cpu", threads=1)


@asynccontextmanager
async def started(fleet: Fleet) -> AsyncIterator[Gateway]:
    gateway = Gateway()
    server = await start_server("127.0.0.1:0", [registry_service(gateway.take)])
    try:
        await fleet.open()
        await fleet.start(server.address)
        yield gateway
    finally:
        await fleet.close()
        await server.stop()


async def grow_and_shrink(fleet: Fleet, log: list[str]) -> None:
    async with started(fleet) as gateway:
        assert await fleet.add("prefill") == "prefill-0"
        assert await fleet.add("prefill") == "prefill-1"
        await gateway.until(lambda: {"decode-0", "prefill-0", "prefill-1"} <= set(gateway.last), fleet)
        assert gateway.last["prefill-1"].role == "prefill"
        await fleet.remove("prefill-1")
        assert gateway.last["prefill-1"].stats.draining, "it said that it leaves"
        assert any("worker prefill-1 has left" in line for line in log), log
        with pytest.raises(NotFound, match="prefill-1"):
            await fleet.remove("prefill-1")
        assert await fleet.add("prefill") == "prefill-2", "a name is not given twice"
        fleet.check()
        assert not gateway.last["decode-0"].stats.draining
        assert not any("starting it again" in line for line in log), log
        before = gateway.last["decode-0"].incarnation
        assert fleet.worker_ids() == ["decode-0", "prefill-0", "prefill-2"]
        await fleet.restart("decode-0")
        assert gateway.last["decode-0"].stats.draining, "it said that it leaves"
        await gateway.until(lambda: gateway.last["decode-0"].incarnation > before, fleet)
        assert not gateway.last["decode-0"].stats.draining
        with pytest.raises(NotFound, match="prefill-1"):
            await fleet.restart("prefill-1")
        fleet.check()
    assert not any("died" in line or "ended" in line for line in log), log


async def test_processes_come_and_leave(engine: EngineConfig):
    log: list[str] = []
    cluster = ClusterConfig(prefill=0, decode=1, address="none", drain_s=2)
    await grow_and_shrink(ProcessFleet(TandemConfig(engine=engine, cluster=cluster), log.append), log)


@pytest.mark.nightly
async def test_one_more_that_cannot_run_costs_only_itself(engine: EngineConfig, tmp_path: Path):
    """Its configuration asks for a split that the model does not allow; those that are there go on."""
    log: list[str] = []
    cluster = ClusterConfig(prefill=0, decode=1, address="none", drain_s=2, prefill_parallel=(7, 1))
    fleet = ProcessFleet(TandemConfig(engine=engine, cluster=cluster), log.append)
    async with started(fleet) as gateway:
        await fleet.add("prefill")
        await gateway.until(lambda: any("going on without it" in line for line in log), fleet)
        await gateway.until(lambda: "decode-0" in gateway.last, fleet)
        fleet.check()
