"""The gateway as it runs: tokenizer, registry, links and gateway behind gRPC and HTTP servers, in one process.

Ready (health: SERVING) means that a request that comes now has workers to go to, fresh ones that are not draining.
The ports, and how it ends: gateway_ports.py.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from cluster.background import tell_of_crash
from cluster.config import TandemConfig
from cluster.controller_loop import ControllerLoop, Scaling, sight_of
from cluster.demand import Cost, DemandMeter
from cluster.gateway import Gateway
from cluster.gateway_cost import role_cost
from cluster.gateway_ports import gateway_ports
from cluster.links import DecodeLinks
from cluster.logs.access_log import AccessLog
from cluster.metrics.exposition import Metrics
from cluster.registry import Registry
from cluster.routing.costs import RoleCosts
from cluster.security.clear_text import warn_of_clear_text
from cluster.security.clients import Clients
from cluster.security.identity import read_certs
from cluster.security.names import WORKER_NAME
from cluster.security.tenant_salts import tenant_salts
from cluster.security.ticket_office import TicketOffice
from cluster.served_model import describe
from cluster.tracing.gateway_spans import GatewaySpans
from cluster.tracing.opening import make_sampler, open_sink
from decode_worker.grpc_transport import GrpcDecodeTransport
from engine.model_source import ModelFiles
from engine.tokenizer import load as load_tokenizer
from kvtransfer.rpc_channel import Channels, KeepAlive
from kvtransfer.rpc_server import RpcServer

READY_POLL_S = 0.1
# How soon a change of the files of keys counts.
CLIENTS_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class RunningGateway:
    """`address` is where clients call, `registry_address` where workers report. `http_address` "": no HTTP is served.
    `controller` None: roles and numbers of workers stay as configured."""

    gateway: Gateway
    address: str
    registry_address: str
    http_address: str = ""
    controller: ControllerLoop | None = None


@asynccontextmanager
async def running_gateway(
    config: TandemConfig, files: ModelFiles, host: str, fleet: Scaling | None = None
) -> AsyncIterator[RunningGateway]:
    """Serves on `host` and the configured ports while the context lasts. Leaving it lets running requests finish, for
    `drain_s`; workers' heartbeats are answered meanwhile.

    `fleet` is what a controller that is enabled asks for more or fewer workers.
    Raises ModelFileError for files that cannot be used, ConfigError for a port that cannot be listened on, a profile
    that is none, or files of keys that cannot be used.
    """
    tokenizer = await asyncio.to_thread(load_tokenizer, files)
    model = describe(config.engine, files, tokenizer)
    prefill_cost, decode_cost = role_cost(config, files, "prefill"), role_cost(config, files, "decode")
    limits = config.gateway
    clients = Clients(limits.auth) if limits.auth.is_required else None
    warn_of_clear_text(config, host)
    salts = tenant_salts(limits.auth.salt_file) if clients is not None else None
    registry = Registry(limits.fresh_s, limits.expire_s)
    keepalive = KeepAlive.within(config.cluster.lease_s)
    security = config.security
    tls = read_certs(security.gateway_certs)
    transport = GrpcDecodeTransport(Channels(keepalive=keepalive, tls=tls, peer=WORKER_NAME if tls else ""))
    links = DecodeLinks(transport)
    controller = make_controller(config, prefill_cost, decode_cost, fleet)
    costs = RoleCosts(prefill_cost, decode_cost)
    tickets = TicketOffice(registry)
    # Of the system: what clients see of it tells them nothing of what others get.
    rng = random.SystemRandom()
    sampler = make_sampler(config.tracing, rng)
    gateway = Gateway(tokenizer, model, registry, links, limits, rng, costs, controller, tickets, salts, sampler)
    tasks: list[asyncio.Task[None]] = []
    is_ready = partial(_has_route_now, registry, allow_local=limits.router.allow_local)
    try:
        metrics = Metrics(gateway, controller)
        async with (
            _observed(gateway, config),
            gateway_ports(config, host, gateway, clients, tls, metrics, is_ready) as ports,
        ):
            tasks.append(asyncio.create_task(_watch_readiness(ports.grpc, is_ready)))
            if clients is not None:
                tasks.append(asyncio.create_task(_watch_clients(clients)))
                tasks[-1].add_done_callback(
                    partial(tell_of_crash, "what reads files of keys has crashed: they stay as they are")
                )
            if controller is not None:
                tasks.append(asyncio.create_task(controller.run(sight_of(gateway, registry)), name="controller"))
                tasks[-1].add_done_callback(
                    partial(tell_of_crash, "the controller has crashed: roles stay as they are")
                )
            try:
                yield RunningGateway(gateway, ports.grpc.address, ports.reports_to, ports.http, controller)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        await links.close()
        await transport.close()


@asynccontextmanager
async def _observed(gateway: Gateway, config: TandemConfig) -> AsyncIterator[None]:
    """Has written down how requests end, as the configuration asks for."""
    async with open_sink(config.tracing, "gateway") as spans:
        if spans is not None:
            gateway.endings.observe(GatewaySpans(spans, gateway.model.name))
        if config.logging.access:
            gateway.endings.observe(AccessLog())
        yield


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


async def _watch_readiness(server: RpcServer, is_ready: Callable[[], bool]) -> None:
    was_ready = False
    while True:
        if (now_ready := is_ready()) != was_ready:
            await server.set_ready(now_ready)
            was_ready = now_ready
        await asyncio.sleep(READY_POLL_S)


def _has_route_now(registry: Registry, *, allow_local: bool) -> bool:
    return has_route(registry, asyncio.get_running_loop().time(), allow_local=allow_local)


def has_route(registry: Registry, now: float, *, allow_local: bool) -> bool:
    """Whether there is a worker to decode, and one to compute prompts; with `allow_local` whoever decodes can."""
    decodes = [worker.report.stats for worker in registry.fresh("decode", now) if not worker.report.stats.draining]
    if allow_local or any(stats.local_only for stats in decodes):
        return bool(decodes)
    prefills = [worker for worker in registry.fresh("prefill", now) if not worker.report.stats.draining]
    return bool(decodes and prefills)


async def _watch_clients(clients: Clients) -> None:
    while True:
        await asyncio.sleep(CLIENTS_POLL_S)
        await asyncio.to_thread(clients.refresh)
