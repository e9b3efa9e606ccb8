"""`tandem chaos`: a local cluster under load, faults on its workers, and what its clients saw."""

from __future__ import annotations

import asyncio
import json
import random

from rich.console import Console
from tandem.client import Client
from tandem.v1.inference_pb2 import WorkerStatus

from cluster.calls import service_errors
from cluster.chaos.clients import Asked, keep_asking, references
from cluster.chaos.faults import Injector
from cluster.chaos.plan import ChaosPlan
from cluster.chaos.report import ChaosReport, make_report
from cluster.config import TandemConfig
from cluster.processes import ProcessFleet
from cluster.progress import Progress
from cluster.service import Service, running_service

# Requests that were under way when the faults stopped must end within this.
REST_S = 120.0
# Worker heartbeats tell of what is held.
EMPTY_S = 30.0
POLL_S = 0.2


async def chaos(config: TandemConfig, plan: ChaosPlan, *, as_json: bool) -> bool:
    """Prints the report; returns whether all is as it should be. Raises TandemErrors for what cannot be started."""
    console = Console(highlight=False, stderr=as_json)
    async with running_service(config, Progress(console)) as service:
        report = await _run(service, plan, console)
    if as_json:
        print(json.dumps(report.as_json()))
    else:
        for line in report.lines():
            print(line)
    return report.is_clean


async def _run(service: Service, plan: ChaosPlan, console: Console) -> ChaosReport:
    assert isinstance(service.fleet, ProcessFleet), "faults are signals to processes of this machine"
    loop = asyncio.get_running_loop()
    asked: list[Asked] = []
    async with service_errors(service.address), Client(service.address) as client:
        console.print(f"asking {plan.prompts} prompts without faults")
        known = await references(client, plan.prompts, plan.prompt_tokens, plan.answer_tokens, plan.seed)
        console.print(f"{plan.streams} streams and faults for {plan.seconds:g} s")
        injector, began_s = Injector(service.fleet, random.Random(plan.seed)), loop.time()
        is_over = asyncio.Event()
        streams = [
            asyncio.create_task(
                keep_asking(client, service.address, asked, known, random.Random(plan.seed + 1 + index), is_over)
            )
            for index in range(plan.streams)
        ]
        try:
            await injector.run(plan.faults, plan.seconds)
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
        leaks += await _held(client)
    return make_report(asked, injector.happened, leaks, seconds)


async def _held(client: Client) -> list[str]:
    """What workers hold though nobody asks for anything, after some time to give it back."""
    give_up_s = asyncio.get_running_loop().time() + EMPTY_S
    while True:
        workers = (await client.status()).workers
        held = [_words(worker) for worker in workers if worker.fresh and not _is_empty(worker)]
        if not held or asyncio.get_running_loop().time() > give_up_s:
            return held
        await asyncio.sleep(POLL_S)


def _is_empty(worker: WorkerStatus) -> bool:
    return not worker.running and not worker.waiting and worker.blocks_free == worker.blocks_total


def _words(worker: WorkerStatus) -> str:
    blocks = worker.blocks_total - worker.blocks_free
    return f"{worker.worker_id} holds {blocks} blocks, {worker.running} running and {worker.waiting} waiting requests"
