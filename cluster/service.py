"""A whole service, from nothing to serving and back: model files, workers' home, gateway, workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from cluster.config import TandemConfig
from cluster.environment import prepare_ray
from cluster.fleet import Fleet, Log
from cluster.gateway import Gateway
from cluster.gateway_process import running_gateway
from cluster.host_port import EVERYWHERE
from cluster.processes import ProcessFleet
from cluster.progress import Progress
from cluster.worker_spec import worker_names
from engine.errors import Unavailable
from engine.model_source import resolve

HEARTBEAT_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Service:
    """`address` is where clients on this machine reach it, `http_address` those of its HTTP interface ("": none),
    `registry_address` where workers report."""

    gateway: Gateway
    address: str
    registry_address: str
    fleet: Fleet
    http_address: str = ""


@asynccontextmanager
async def running_service(
    config: TandemConfig, progress: Progress, fleet_of: Callable[[TandemConfig, Log], Fleet] | None = None
) -> AsyncIterator[Service]:
    """Starts everything and waits until every worker has reported; ends everything when the context is left.
    `fleet_of` makes the workers' home, None for the one that the configuration asks for.

    Raises TandemErrors that say what cannot be had: the model, the port, Ray, a worker.
    """
    async with AsyncExitStack() as stack:
        async with progress.step("model files") as say:
            files = await asyncio.to_thread(resolve, config.engine.model, say)
        fleet = (fleet_of or make_fleet)(config, progress.line)
        stack.push_async_callback(fleet.close)
        async with progress.step(_home(config)):
            reached_at = await fleet.open()
        async with progress.step("gateway"):
            host = config.cluster.grpc_host or reached_at
            running = await stack.enter_async_context(running_gateway(config, files, host, fleet))
            port, registry_port = (at.rpartition(":")[2] for at in (running.address, running.registry_address))
        count = len(worker_names(config.cluster))
        async with progress.step(f"{count} worker{'s' if count > 1 else ''}, each loading the model"):
            registry_address = f"{reached_at if host in EVERYWHERE else host}:{registry_port}"
            await fleet.start(registry_address)
            await _all_report(config, running.gateway, fleet)
        here = "127.0.0.1" if host in EVERYWHERE else host
        http_address = f"{here}:{running.http_address.rpartition(':')[2]}" if running.http_address else ""
        yield Service(running.gateway, f"{here}:{port}", registry_address, fleet, http_address)


def make_fleet(config: TandemConfig, log: Log) -> Fleet:
    """The workers' home that the configuration asks for."""
    if config.cluster.address == "none":
        return ProcessFleet(config, log)
    prepare_ray(is_local=config.cluster.address == "ray")
    # Imported here: Ray takes half a second, reads its settings at once, and who does without it should not need it.
    from cluster.launcher import RayFleet

    return RayFleet(config, log)


def _home(config: TandemConfig) -> str:
    address = config.cluster.address
    homes = {"none": "plain processes", "ray": "local Ray", "auto": "Ray cluster of this node"}
    return homes.get(address, f"Ray cluster at {address}")


async def _all_report(config: TandemConfig, gateway: Gateway, fleet: Fleet) -> None:
    """Waits for every worker's first heartbeat. Raises what keeps a worker from ever sending one."""
    loop = asyncio.get_running_loop()
    expected = {worker_id for _, worker_id in worker_names(config.cluster)}
    try:
        async with asyncio.timeout(config.cluster.start_timeout_s):
            while True:
                fleet.check()
                there = {worker.worker_id for worker in gateway.status(loop.time()).workers if worker.fresh}
                if expected <= there:
                    return
                await asyncio.sleep(HEARTBEAT_POLL_S)
    except TimeoutError:
        missing = ", ".join(sorted(expected - there))
        raise Unavailable(f"no report from {missing} within {config.cluster.start_timeout_s:g} s") from None
