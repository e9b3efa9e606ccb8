"""The load of a chaos run, from its first request to the last block that is given back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass

from tandem.client import Client
from tandem.v1.inference_pb2 import WorkerStatus

from cluster.chaos.clients import Asked, Reference, keep_asking
from cluster.chaos.plan import ChaosPlan

# Requests that were under way when the faults stopped must end within this.
REST_S = 120.0
# Workers that were killed last must be there again within this, and hold nothing.
EMPTY_S = 60.0
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Load:
    """What a load was answered. `leaks`: what did not end, or was not given back, in words."""

    asked: tuple[Asked, ...]
    leaks: tuple[str, ...]
    seconds: float


async def load_while(
    faults: Coroutine[None, None, None],
    client: Client,
    url: str,
    plan: ChaosPlan,
    known: Sequence[Reference],
    worker_ids: Sequence[str],
) -> Load:
    """Keeps the plan's streams asking while `faults` runs; then waits until all is over, and each worker is there and
    holds nothing."""
    loop = asyncio.get_running_loop()
    asked: list[Asked] = []
    began_s, is_over = loop.time(), asyncio.Event()
    streams = [
        asyncio.create_task(keep_asking(client, url, asked, known, random.Random(plan.seed + 1 + index), is_over))
        for index in range(plan.streams)
    ]
    try:
        await faults
        seconds = loop.time() - began_s
        is_over.set()
        _, hanging = await asyncio.wait(streams, timeout=REST_S)
    finally:
        for stream in streams:
            stream.cancel()
        for error in await asyncio.gather(*streams, return_exceptions=True):
            if isinstance(error, Exception):
                raise error
    leaks = [f"{len(hanging)} requests did not end within {REST_S:g} s"] if hanging else []
    leaks += await _left(client, worker_ids)
    return Load(tuple(asked), tuple(leaks), seconds)


async def _left(client: Client, worker_ids: Sequence[str]) -> list[str]:
    """What workers hold though nobody asks for anything, and who is not there, after some time for both."""
    give_up_s = asyncio.get_running_loop().time() + EMPTY_S
    while True:
        workers = {worker.worker_id: worker for worker in (await client.status()).workers if worker.fresh}
        left = [_words(worker) for worker in workers.values() if not _is_empty(worker)]
        left += [f"{name} does not report any more" for name in worker_ids if name not in workers]
        if not left or asyncio.get_running_loop().time() > give_up_s:
            return left
        await asyncio.sleep(POLL_S)


def _is_empty(worker: WorkerStatus) -> bool:
    return not worker.running and not worker.waiting and worker.blocks_free == worker.blocks_total


def _words(worker: WorkerStatus) -> str:
    blocks = worker.blocks_total - worker.blocks_free
    return f"{worker.worker_id} holds {blocks} blocks, {worker.running} running and {worker.waiting} waiting requests"
