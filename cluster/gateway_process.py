"""The gateway as it runs: tokenizer, registry, links and gateway behind one gRPC server.

Ready (health: SERVING) means that at least one fresh decode worker is there that is not draining.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from cluster.config import TandemConfig
from cluster.controller_loop import ControllerLoop, Scaling, sight_of
from cluster.demand import Cost, DemandMeter
from cluster.gateway import Gateway
from cluster.gateway_cost import role_cost
from cluster.inference_server import inference_service
from cluster.links import DecodeLinks
from cluster.registry import Registry
from cluster.registry_server import registry_service
from cluster.routing.costs import RoleCosts
from cluster.served_model import describe
from decode_worker.grpc_transport import GrpcDecodeTransport
from engine.model_source import ModelFiles
from engine.tokenizer import load as load_tokenizer
from kvtransfer.rpc_channel import Channels, KeepAlive
from kvtransfer.rpc_server import RpcServer, start_server

READY_POLL_S = 0.1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunningGateway:
    """`address` is where the server listens. `controller` None: roles and numbers of workers stay as configured."""

    gateway: Gateway
    address: str
    controller: ControllerLoop | None = None


@asynccontextmanager
async def running_gateway(
    config: TandemConfig, files: ModelFiles, host: str, fleet: Scaling | None = None
) -> AsyncIterator[RunningGateway]:
    """Serves on `host` and the configured port while the context lasts. Leaving it lets running requests finish.

    `fleet` is what a controller that is enabled asks for more or fewer workers.
    Raises ModelFileError for files that cannot be used, ConfigError for a port that cannot be listened on, or a profile
    that is none.
    """
    tokenizer = await asyncio.to_thread(load_tokenizer, files)
    model = describe(config.engine, files, tokenizer)
    prefill_cost, decode_cost = role_cost(config, files, "prefill"), role_cost(config, files, "decode")
    limits = config.gateway
    registry = Registry(limits.fresh_s, limits.expire_s)
    keepalive = KeepAlive.within(config.cluster.lease_s)
    transport = GrpcDecodeTransport(Channels(keepalive=keepalive))
    links = DecodeLinks(transport)
    controller = make_controller(config, prefill_cost, decode_cost, fleet)
    costs = RoleCosts(prefill_cost, decode_cost)
    gateway = Gateway(tokenizer, model, registry, links, limits, random.Random(), costs, controller)
    services = [
        inference_service(gateway, max_prompt_chars=limits.max_prompt_chars),
        registry_service(gateway.heartbeat),
    ]
    try:
        address = f"{host}:{config.cluster.grpc_port}"
        server = await start_server(address, services, ready=False, keepalive=keepalive)
        tasks = [asyncio.create_task(_watch_readiness(server, registry))]
        if controller is not None:
            tasks.append(asyncio.create_task(controller.run(sight_of(gateway, registry)), name="controller"))
            tasks[-1].add_done_callback(_tell_of_crash)
        try:
            yield RunningGateway(gateway, server.address, controller)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await _stop(server, gateway, config.cluster.stop_timeout_s)
    finally:
        await links.close()
        await transport.close()


def make_controller(
    config: TandemConfig, prefill_cost: Cost, decode_cost: Cost, fleet: Scaling | None
) -> ControllerLoop | None:
    """None where it is not enabled."""
    cluster = config.cluster
    if not cluster.controller.enabled:
        return None
    meter = DemandMeter(
        prefill_cost,
        decode_cost,
        cluster.controller.window_s,
        config.decode.max_batch,
        local_chunk_tokens=config.gateway.router.local_chunk_tokens,
        has_local=config.gateway.router.has_local,
    )
    return ControllerLoop(cluster.controller, meter, cluster.prefill + cluster.decode, fleet)


def _tell_of_crash(task: asyncio.Task[None]) -> None:
    """Requests are served without a controller too: a bug in it is told, and ends nothing else."""
    if not task.cancelled() and (bug := task.exception()) is not None:
        _log.error("the controller has crashed: roles stay as they are", exc_info=bug)


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
