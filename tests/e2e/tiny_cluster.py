"""A gateway in this process over workers in processes of their own, with a tiny model: faster than a whole service."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from cluster.cluster_config import ClusterConfig
from cluster.config import TandemConfig
from cluster.gateway import Gateway
from cluster.gateway_config import GatewayConfig, RouterConfig
from cluster.links import DecodeLinks
from cluster.messages import Chunk, Complete, GenerateRequest, ModelInfo
from cluster.processes import ProcessFleet
from cluster.registry import Registry
from cluster.registry_server import registry_service
from cluster.security.ticket_office import TicketOffice
from decode_worker.grpc_transport import GrpcDecodeTransport
from engine.config import EngineConfig
from engine.model_source import ModelFiles
from engine.sampling import SamplingParams
from kvtransfer.rpc_server import start_server
from tests.tiny_models import generate, make_runner, prompt_of, save_model

LENGTHS = (9, 40, 75)
TOKENS = 60
START_S = 120.0


def save(folder: Path) -> Path:
    """A model's folder in `folder`."""
    saved = save_model("llama", folder)
    # Part of a complete folder; workers do not read it.
    (saved / "tokenizer.json").write_text("{}")
    return saved


async def answers(folder: Path, tokens: int = TOKENS) -> dict[int, list[int]]:
    """The right answer to each prompt, by its length."""
    runner = make_runner(ModelFiles("hf", folder))
    found = {length: await generate(runner, prompt_of(length), tokens) for length in LENGTHS}
    await runner.close()
    return found


class Load:
    """Clients that ask one prompt after the other, and compare every token."""

    def __init__(self, gateway: Gateway, expected: dict[int, list[int]]) -> None:
        self.gateway = gateway
        self.expected = expected
        self.completes: list[Complete] = []
        self.is_over = False

    async def client(self, number: int) -> None:
        count = 0
        while not self.is_over:
            length = LENGTHS[(count + number) % len(LENGTHS)]
            params = SamplingParams(temperature=0.0, max_tokens=TOKENS)
            seen: list[int] = []
            async for part in self.gateway.generate(GenerateRequest("", tuple(prompt_of(length)), params)):
                if isinstance(part, Chunk):
                    seen += [token.token_id for token in part.tokens]
                else:
                    self.completes.append(part)
            assert seen == self.expected[length], "none twice, none missing, none other"
            count += 1


@asynccontextmanager
async def cluster(
    folder: Path, log: list[str], each: int = 2, **limits: float
) -> AsyncIterator[tuple[Gateway, ProcessFleet]]:
    """So many workers of each role, with `limits` of the cluster's configuration. All serve when the context begins."""
    engine = EngineConfig(
        model=str(folder), block_size=4, kv_cache_bytes=1 << 20, dtype="float32", device="cpu", threads=1
    )
    config = TandemConfig(
        engine=engine,
        cluster=ClusterConfig.model_validate({"prefill": each, "decode": each, "address": "none", **limits}),
    )
    router = RouterConfig(policy="random")
    at_gateway = GatewayConfig(heartbeat_interval_s=0.2, fresh_s=5.0, expire_s=30.0, route_wait_s=120.0, router=router)
    transport = GrpcDecodeTransport()
    links = DecodeLinks(transport)
    registry = Registry(at_gateway.fresh_s, at_gateway.expire_s)
    model, rng, tickets = ModelInfo(folder.name, 97, 160), random.Random(1), TicketOffice(registry)
    gateway = Gateway(None, model, registry, links, at_gateway, rng, tickets=tickets)
    server = await start_server("127.0.0.1:0", [registry_service(gateway.heartbeat)])
    fleet = ProcessFleet(config, log.append)
    try:
        await fleet.open()
        await fleet.start(server.address)
        async with asyncio.timeout(START_S):
            while len(lives(gateway)) < 2 * each:
                fleet.check()
                await asyncio.sleep(0.05)
        yield gateway, fleet
        gateway.check_empty()
    finally:
        await links.close()
        await fleet.close()
        await transport.close()
        await server.stop()


def lives(gateway: Gateway) -> dict[str, int]:
    """The incarnation of every worker that serves."""
    workers = gateway.status(asyncio.get_running_loop().time()).workers
    return {worker.worker_id: worker.incarnation for worker in workers if worker.fresh and not worker.draining}
