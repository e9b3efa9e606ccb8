"""`tandem worker`: one worker as a plain process, without Ray. Loads torch, so it is imported only where it runs."""

from __future__ import annotations

import asyncio
import sys

from cluster.collector import set_aside_what_is_loaded
from cluster.config import TandemConfig
from cluster.watchdog import Watchdog
from cluster.worker_process import EDGES, Edges, run_worker
from cluster.worker_spec import WorkerSpec


async def work(
    spec: WorkerSpec, config: TandemConfig, *, incarnation: int, has_lifeline: bool, edges: Edges = EDGES
) -> None:
    """Runs the worker until cancelled, or until its lifeline ends: stdin, whose other end the parent process holds.
    Then drains it, within `cluster.drain_s` and a little more, whatever hangs."""
    watchdog, is_serving = Watchdog(), asyncio.Event()

    def serving(address: str) -> None:
        set_aside_what_is_loaded()
        is_serving.set()
        _say(f"at {address}")

    worker = asyncio.create_task(
        run_worker(
            spec,
            config,
            incarnation=incarnation,
            report=_say,
            serving=serving,
            watchdog=watchdog,
            edges=edges,
        )
    )
    lifeline = asyncio.create_task(_parent_gone() if has_lifeline else asyncio.Event().wait())
    try:
        await asyncio.wait([worker, lifeline], return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            worker.result()
    finally:
        if not worker.done():
            watchdog.end_worker_within(config.cluster.drain_s, is_serving=is_serving.is_set())
        for task in (worker, lifeline):
            task.cancel()
        await asyncio.gather(worker, lifeline, return_exceptions=True)


async def _parent_gone() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        while await reader.read(1024):
            pass
    finally:
        transport.close()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
