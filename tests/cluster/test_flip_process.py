"""Real engines behind real gRPC change their roles while requests run: every answer is the right one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest

from cluster.config import TandemConfig
from cluster.controller_loop import sight_of
from cluster.gateway import Gateway
from cluster.gateway_config import GatewayConfig, RouterConfig
from cluster.links import DecodeLinks
from cluster.messages import Complete, GenerateRequest, ModelInfo
from cluster.registry import Registry, Role
from cluster.registry_server import registry_service
from cluster.security.ticket_office import TicketOffice
from cluster.worker_process import run_worker
from cluster.worker_spec import WorkerSpec
from decode_worker.grpc_transport import GrpcDecodeTransport
from engine.config import EngineConfig
from engine.model_source import ModelFiles
from engine.objectives import Objectives
from engine.sampling import SamplingParams
from kvtransfer.rpc_server import start_server
from tests.tiny_models import generate, make_runner, prompt_of, save_model

WORKERS: dict[str, Role] = {"a": "prefill", "b": "decode", "c": "decode"}
TOKENS = 24
LIMIT_S = 60.0


class Roles:
    """A controller that wants what it is told to; it names a role again only when nothing is on its way any more."""

    def __init__(self) -> None:
        self.wanted: dict[str, Role] = {}
        self.gateway: Gateway | None = None
        self.registry = Registry(5.0, 30.0)

    def wanted_role(self, worker_id: str) -> Role | Literal[""]:
        assert self.gateway is not None
        wanted = self.wanted.get(worker_id, "")
        is_draining = {worker.report.worker_id: worker.report.stats.draining for worker in self.registry.all(now())}
        on_its_way = sight_of(self.gateway, self.registry).on_its_way(worker_id)
        return "" if is_draining[worker_id] and on_its_way else wanted

    def arrived(self, prompt_tokens: int, max_tokens: int, objectives: Objectives) -> None:
        """Of no interest here."""

    def answered(self, prompt_tokens: int, cached_tokens: int, max_tokens: int, answer_tokens: int) -> None:
        """Of no interest here."""

    async def until(self, worker_id: str, role: Role) -> None:
        """Waits until a worker serves in `role`."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                for worker in self.registry.fresh(role, now()):
                    if worker.report.worker_id == worker_id and not worker.report.stats.draining:
                        return
                await asyncio.sleep(0.02)


def now() -> float:
    return asyncio.get_running_loop().time()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model("llama", tmp_path_factory.mktemp("llama"))
    # Part of a complete folder; workers do not read it.
    (folder / "tokenizer.json").write_text("{}")
    return folder


@asynccontextmanager
async def cluster(folder: Path) -> AsyncIterator[tuple[Gateway, Roles]]:
    """A gateway and three workers in this process, all on gRPC."""
    engine = EngineConfig(model=str(folder), block_size=4, kv_cache_bytes=1 << 20, dtype="float32", device="cpu")
    roles = Roles()
    transport = GrpcDecodeTransport()
    links = DecodeLinks(transport)
    config = GatewayConfig(
        heartbeat_interval_s=0.1, fresh_s=5.0, expire_s=30.0, router=RouterConfig(policy="round_robin")
    )
    model = ModelInfo(folder.name, 97, 160)
    gateway = roles.gateway = Gateway(
        None, model, roles.registry, links, config, random.Random(1), None, roles, TicketOffice(roles.registry)
    )
    server = await start_server("127.0.0.1:0", [registry_service(gateway.heartbeat)])
    workers = [
        asyncio.create_task(
            run_worker(WorkerSpec(role, name, server.address), TandemConfig(engine=engine), incarnation=1)
        )
        for name, role in WORKERS.items()
    ]
    try:
        for name, role in WORKERS.items():
            await roles.until(name, role)
        yield gateway, roles
        gateway.check_empty()
    finally:
        for worker in workers:
            worker.cancel()
        ended = await asyncio.gather(*workers, return_exceptions=True)
        await links.close()
        await transport.close()
        await server.stop()
        for error in ended:
            if not isinstance(error, asyncio.CancelledError):
                raise AssertionError("a worker ended by itself") from (error if error else None)


async def test_flips_under_traffic_lose_nothing(folder: Path):
    lengths = [9, 40, 75, 100]
    plain = make_runner(ModelFiles("hf", folder))
    expected = {length: await generate(plain, prompt_of(length), TOKENS) for length in lengths}
    await plain.close()
    routes: set[tuple[str, str]] = set()
    is_over = False

    async def client(gateway: Gateway, number: int) -> int:
        count = 0
        while not is_over:
            length = lengths[(count + number) % len(lengths)]
            request = GenerateRequest("", tuple(prompt_of(length)), SamplingParams(temperature=0.0, max_tokens=TOKENS))
            parts = [part async for part in gateway.generate(request)]
            complete = parts[-1]
            assert isinstance(complete, Complete)
            assert [token.token_id for token in complete.choices[0].tokens] == expected[length]
            routes.add((complete.receipt.prefill_worker, complete.receipt.decode_worker))
            count += 1
        return count

    async with cluster(folder) as (gateway, roles):
        clients = [asyncio.create_task(client(gateway, number)) for number in range(6)]
        for name, role in (("c", "prefill"), ("a", "decode"), ("c", "decode"), ("a", "prefill")):
            roles.wanted = {name: role}
            await roles.until(name, role)
            roles.wanted = {}
            await asyncio.sleep(0.2)
        is_over = True
        async with asyncio.timeout(LIMIT_S):
            counts = await asyncio.gather(*clients)
    assert min(counts) > 0
    prefills, decodes = {prefill for prefill, _ in routes}, {decode for _, decode in routes}
    assert {"a", "c"} <= prefills, routes
    assert {"a", "b", "c"} <= decodes, routes
