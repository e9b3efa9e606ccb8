"""The gateway as it runs: tokenizer, registry, links and gateway behind one gRPC server.

Ready (health: SERVING) means that a request that comes now has workers to go to, fresh ones that are not draining.

told to end ─▶ NOT_SERVING, new requests are refused ─▶ those that run end, for `drain_s` ─▶ the rest is cut ─▶ all ends
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

from cluster.config import TandemConfig
from cluster.controller_loop import ControllerLoop, Scaling, sight_of
from cluster.demand import Cost, DemandMeter
from cluster.gateway import Gateway
from cluster.gateway_config import GatewayConfig
from cluster.gateway_cost import role_cost
from cluster.inference_server import inference_service
from cluster.links import DecodeLinks
from cluster.registry import Registry
from cluster.registry_server import registry_service
from cluster.routing.costs import RoleCosts
from cluster.security.clear_text import warn_of_clear_text
from cluster.security.clients import Clients
from cluster.security.identity import read_certs
from cluster.security.names import WORKER_NAME
from cluster.security.tenant_salts import tenant_salts
from cluster.security.ticket_office import TicketOffice
from cluster.served_model import describe
from decode_worker.grpc_transport import GrpcDecodeTransport
from engine.model_source import ModelFiles
from engine.tokenizer import load as load_tokenizer
from kvtransfer.rpc_channel import Channels, KeepAlive
from kvtransfer.rpc_limits import CallLimits, PortLimits
from kvtransfer.rpc_server import RpcServer, start_server

READY_POLL_S = 0.1
# For the last words of streams that were cut.
CLOSE_GRACE_S = 0.5
# How soon a change of the files of keys counts.
CLIENTS_POLL_S = 1.0
# Connections of clients that have nothing to say are closed after this.
IDLE_S = 300.0
# What may come beside a prompt in a request.
REQUEST_BYTES = 1 << 20
UTF8_BYTES_MAX = 4
# Several times what a worker's report may hold.
REPORT_BYTES = 1 << 20
# A request's own deadline, which names the phase, comes before the end of its call's time.
AGE_SLACK_S = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunningGateway:
    """`address` is where clients call, `registry_address` where workers report. `controller` None: roles and numbers of
    workers stay as configured."""

    gateway: Gateway
    address: str
    registry_address: str
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
    gateway = Gateway(tokenizer, model, registry, links, limits, rng, costs, controller, tickets, salts)
    inference = inference_service(gateway, clients, max_prompt_chars=limits.max_prompt_chars)
    reports = replace(registry_service(gateway.heartbeat), caller=WORKER_NAME)
    try:
        # Two ports: clients cannot report as workers, and need no certificate where workers do.
        reports_to = await start_server(
            f"{host}:{config.cluster.reports_to_port}",
            [reports],
            keepalive=keepalive,
            limits=PortLimits(request_bytes=REPORT_BYTES),
            tls=tls,
        )
        server = await start_server(
            f"{host}:{config.cluster.grpc_port}",
            [inference.within(call_limits(limits))],
            ready=False,
            keepalive=keepalive,
            limits=port_limits(limits),
            tls=read_certs(security.client_certs),
            mutual=False,
        )
        tasks = [asyncio.create_task(_watch_readiness(server, registry, allow_local=limits.router.allow_local))]
        if clients is not None:
            tasks.append(asyncio.create_task(_watch_clients(clients)))
            tasks[-1].add_done_callback(partial(_tell_of_crash, "what reads files of keys has crashed: they stay"))
        if controller is not None:
            tasks.append(asyncio.create_task(controller.run(sight_of(gateway, registry)), name="controller"))
            tasks[-1].add_done_callback(partial(_tell_of_crash, "the controller has crashed: roles stay"))
        try:
            yield RunningGateway(gateway, server.address, reports_to.address, controller)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await server.set_ready(False)
            await gateway.drain(config.cluster.drain_s)
            # Not for long: streams of health watchers never end by themselves.
            await server.stop(CLOSE_GRACE_S)
            await reports_to.stop()
    finally:
        await links.close()
        await transport.close()


def call_limits(limits: GatewayConfig) -> CallLimits:
    """Of clients' calls."""
    return CallLimits(write_s=limits.slow_reader_s, age_s=limits.max_stream_s + AGE_SLACK_S)


def port_limits(limits: GatewayConfig) -> PortLimits:
    """Of the port for clients."""
    return PortLimits(request_bytes=UTF8_BYTES_MAX * limits.max_prompt_chars + REQUEST_BYTES, idle_s=IDLE_S)


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


def _tell_of_crash(what: str, task: asyncio.Task[None]) -> None:
    """Requests are served without them too: a bug is told, and ends nothing else."""
    if not task.cancelled() and (bug := task.exception()) is not None:
        _log.error("%s as they are", what, exc_info=bug)


async def _watch_readiness(server: RpcServer, registry: Registry, *, allow_local: bool) -> None:
    loop = asyncio.get_running_loop()
    was_ready = False
    while True:
        is_ready = has_route(registry, loop.time(), allow_local=allow_local)
        if is_ready != was_ready:
            await server.set_ready(is_ready)
            was_ready = is_ready
        await asyncio.sleep(READY_POLL_S)


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
