"""Restarts all workers of a service without losing a request: one at a time, the next when the last serves again."""

from __future__ import annotations

import asyncio

from cluster.fleet import Fleet, Log
from cluster.gateway import Gateway
from engine.errors import NotFound, Unavailable

POLL_S = 0.05


async def restart_workers(fleet: Fleet, gateway: Gateway, start_timeout_s: float, log: Log) -> None:
    """Each drains, ends and starts anew, in order of id. Raises Unavailable when one does not serve again within
    `start_timeout_s`: those after it go on as they are."""
    for worker_id in sorted(fleet.worker_ids()):
        before = _incarnation(gateway, worker_id)
        log(f"restarting worker {worker_id}")
        try:
            await fleet.restart(worker_id)
        except NotFound:
            # It was removed meanwhile.
            continue
        await _serves_again(fleet, gateway, worker_id, before, start_timeout_s)
    log("all workers have been restarted")


async def _serves_again(fleet: Fleet, gateway: Gateway, worker_id: str, before: int, start_timeout_s: float) -> None:
    try:
        async with asyncio.timeout(start_timeout_s):
            while fleet.has(worker_id) and _incarnation(gateway, worker_id) <= before:
                fleet.check()
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise Unavailable(
            f"worker {worker_id} does not serve again within {start_timeout_s:g} s; the others are not restarted"
        ) from None


def _incarnation(gateway: Gateway, worker_id: str) -> int:
    """Of a worker that serves; 0 where it does not."""
    workers = gateway.status(asyncio.get_running_loop().time()).workers
    return next((worker.incarnation for worker in workers if worker.worker_id == worker_id), 0)
