"""The gateway as it runs: tokenizer, registry, links and gateway behind one gRPC server.

Ready (health: SERVING) means that at least one fresh decode worker is there that is not draining.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from cluster.config import TandemConfig
from cluster.gateway import Gateway
from cluster.inference_server import inference_service
from cluster.links import DecodeLinks
from cluster.registry import Registry
from cluster.registry_server import registry_service
from cluster.served_model import describe
from decode_worker.grpc_transport import GrpcDecodeTransport
from engine.model_source import ModelFiles
from engine.tokenizer import load as load_tokenizer
from kvtransfer.rpc_server import RpcServer, start_server

READY_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class RunningGateway:
    """`address` is where the server listens."""

    gateway: Gateway
    address: str


@asynccontextmanager
async def running_gateway(config: TandemConfig, files: ModelFiles, host: str) -> AsyncIterator[RunningGateway]:
    """Serves on `host` and the configured port while the context lasts. Leaving it lets running requests finish.

    Raises ModelFileError for files that cannot be used, ConfigError for a port that cannot be listened on.
    """
    tokenizer = await asyncio.to_thread(load_tokenizer, files)
    model = describe(config.engine, files, tokenizer)
    limits = config.gateway
    registry = Registry(limits.fresh_s, limits.expire_s)
    transport = GrpcDecodeTransport()
    links = DecodeLinks(transport)
    gateway = Gateway(tokenizer, model, registry, links, limits, random.Random())
    services = [
        inference_service(gateway, max_prompt_chars=limits.max_prompt_chars),
        registry_service(gateway.heartbeat),
    ]
    try:
        server = await start_server(f"{host}:{config.cluster.grpc_port}", services, ready=False)
        watch = asyncio.create_task(_watch_readiness(server, registry))
        try:
            yield RunningGateway(gateway, server.address)
        finally:
            watch.cancel()
            await asyncio.wait([watch])
            await _stop(server, gateway, config.cluster.stop_timeout_s)
    finally:
        await links.close()
        await transport.close()


async def _watch_readiness(server: RpcServer, registry: Registry) -> None:
    loop = asyncio.get_running_loop()
    was_ready = False
    while True:
        is_ready = any(not worker.report.stats.draining for worker in registry.fresh("decode", loop.time()))
        if is_ready != was_ready:
            await server.set_ready(is_ready)
            was_ready = is_ready
        await asyncio.sleep(READY_POLL_S)


async def _stop(server: RpcServer, gateway: Gateway, timeout_s: float) -> None:
    # Streams of health watchers never end by themselves: without requests there is nothing to wait for.
    status = gateway.status(asyncio.get_running_loop().time())
    await server.stop(timeout_s if status.requests_running + status.requests_waiting else 0.0)
