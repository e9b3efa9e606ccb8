"""`tandem worker`: one worker as a plain process, without Ray. Loads torch, so it is imported only where it runs."""

from __future__ import annotations

import asyncio
import sys

from cluster.config import TandemConfig
from cluster.fleet import LEAVE
from cluster.worker_process import run_worker
from cluster.worker_spec import WorkerSpec


async def work(spec: WorkerSpec, config: TandemConfig, *, incarnation: int, has_lifeline: bool) -> None:
    """Runs the worker until cancelled, or until its lifeline ends: stdin, whose other end the parent process holds.
    The parent may also ask by it that the worker leaves in good order."""
    leave = asyncio.Event()
    worker = asyncio.create_task(
        run_worker(
            spec,
            config,
            incarnation=incarnation,
            report=_say,
            serving=lambda address: _say(f"at {address}"),
            leave=leave,
        )
    )
    lifeline = asyncio.create_task(_parent_gone(leave) if has_lifeline else asyncio.Event().wait())
    try:
        await asyncio.wait([worker, lifeline], return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            worker.result()
    finally:
        for task in (worker, lifeline):
            task.cancel()
        await asyncio.gather(worker, lifeline, return_exceptions=True)


async def _parent_gone(leave: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        while line := await reader.readline():
            if line == LEAVE:
                leave.set()
    finally:
        transport.close()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
