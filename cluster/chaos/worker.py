"""A worker of a chaos run: the ordinary one (cluster/worker_process.py), with what makes faults at its edges.

    python -m cluster.chaos.worker --hub SOCKET [--relay HOST:PORT] [--warped] prefill --id … --gateway …

Its options from the role on are those of `tandem worker`. The hub's orders damage what it sends and warp its clock; the
hub is told of each stream that opens and closes here, of the blocks that are held, and of each bit that is flipped.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, cast

import typer
import uvloop

from cluster.chaos.corruption import Corruption
from cluster.chaos.hub import HubLine, Note, connected
from cluster.chaos.warped_loop import WarpedLoop
from cluster.cli import WorkerRole, app, run_command
from cluster.commands.running import Stopped, run
from cluster.config import TandemConfig, load
from cluster.environment import use_relay
from cluster.flexible_worker import FlexibleWorker
from cluster.logs.lines import set_up_logs
from cluster.worker_process import Edges, Served
from cluster.worker_spec import WorkerSpec
from decode_worker.stream import Received, TokenFrame
from kvtransfer.frames import Arrival, End, Frame
from kvtransfer.transport import PrefillCall, PrefillTransport

COMMAND = "chaos-worker"
POLL_S = 0.05


@dataclass(slots=True)
class _Lease:
    """One stream; whole once it has come to its proper end."""

    is_whole: bool = False


class _Leases:
    """Tells the hub of each stream that opens and closes."""

    def __init__(self, line: HubLine) -> None:
        self._line = line
        self._numbers = count()

    @contextmanager
    def lease(self, request_id: str = "", peer: str = "") -> Iterator[_Lease]:
        number, lease = next(self._numbers), _Lease()
        self._line.note({"opened": number, "request": request_id, "peer": peer})
        try:
            yield lease
        finally:
            self._line.note({"closed": number, "is_broken": not lease.is_whole})


class _WatchedWorker:
    """Implements PrefillService and DecodeService: a worker, and a lease around each of its streams."""

    def __init__(self, worker: FlexibleWorker, leases: _Leases, corruption: Corruption, line: HubLine) -> None:
        self._worker = worker
        self._leases = leases
        self._corruption = corruption
        self._line = line

    async def prefill(self, call: PrefillCall) -> AsyncIterator[Frame]:
        has_ended = False
        try:
            with self._leases.lease(request_id=call.request_id) as lease:
                async with aclosing(cast(AsyncGenerator[Frame, None], self._worker.prefill(call))) as frames:
                    async for frame in frames:
                        has_ended = isinstance(frame, End)
                        yield frame
                lease.is_whole = True
        finally:
            if not has_ended and self._corruption.has_hit(call.lease):
                # Who has left may not have read as far as that.
                self._line.note({"unread": 1})

    async def attach(self, commands: AsyncIterator[Received]) -> AsyncIterator[TokenFrame]:
        with self._leases.lease(peer="gateway") as lease:
            async with aclosing(cast(AsyncGenerator[TokenFrame, None], self._worker.attach(commands))) as frames:
                async for frame in frames:
                    yield frame
            lease.is_whole = True


class _WatchedTransport:
    """Implements PrefillTransport: another one, and a lease around each of its streams."""

    def __init__(self, inner: PrefillTransport, leases: _Leases) -> None:
        self._inner = inner
        self._leases = leases

    @asynccontextmanager
    async def open(self, address: str, call: PrefillCall) -> AsyncIterator[AsyncIterator[Arrival]]:
        with self._leases.lease(call.request_id, address) as lease:
            async with self._inner.open(address, call) as frames:
                yield frames
            lease.is_whole = True

    async def close(self) -> None:
        await self._inner.close()


class ChaosEdges(Edges):
    """Between a worker and the wire: damage where it was ordered, and an eye on the leases."""

    def __init__(self, corruption: Corruption, line: HubLine) -> None:
        self._corruption = corruption
        self._line = line
        self._leases = _Leases(line)
        self._watch: asyncio.Task[None] | None = None

    def worker(self, worker: FlexibleWorker) -> Served:
        self._watch = asyncio.create_task(self._tell_of_blocks(worker), name=f"blocks of {worker.worker_id}")
        return _WatchedWorker(worker, self._leases, self._corruption, self._line)

    def encode(self, frame: Frame, lease: int) -> bytes:
        return self._corruption.encode(frame, lease)

    def transport(self, transport: PrefillTransport) -> PrefillTransport:
        return _WatchedTransport(transport, self._leases)

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])

    async def _tell_of_blocks(self, worker: FlexibleWorker) -> None:
        told = -1
        while True:
            stats = worker.stats()
            held = stats.blocks_total - stats.blocks_free
            if not stats.running and not stats.waiting:
                # One may be a canary's (engine/pulse.py).
                held = max(0, held - 1)
            if held != told:
                told = held
                self._line.note({"held": held})
            await asyncio.sleep(POLL_S)


async def work_in_chaos(spec: WorkerSpec, config: TandemConfig, hub: Path, incarnation: int) -> None:
    """Runs the worker until cancelled, or until its lifeline ends."""
    from cluster.commands.worker import work

    def obey(order: Note) -> None:
        match order:
            case {"corrupt": every_frames}:
                corruption.set(every_frames)
            case {"jump_s": jump_s, "rate": rate}:
                loop = asyncio.get_running_loop()
                assert isinstance(loop, WarpedLoop), "a plan with clock faults starts its workers on such loops"
                loop.warp(jump_s, rate)

    corruption = Corruption(random.Random(incarnation), lambda: line.note({"flip": 1}))
    async with connected(hub, spec.worker_id, obey) as line:
        edges = ChaosEdges(corruption, line)
        try:
            await work(spec, config, incarnation=incarnation, has_lifeline=True, edges=edges)
        finally:
            await edges.close()


@app.command(COMMAND, hidden=True)
def chaos_worker(
    role: WorkerRole,
    hub: Annotated[Path, typer.Option()],
    gateway: Annotated[str, typer.Option()],
    worker_id: Annotated[str, typer.Option("--id")],
    config: Annotated[Path, typer.Option()],
    lifeline: Annotated[bool, typer.Option("--lifeline")],
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    relay: Annotated[str, typer.Option()] = "",
    warped: Annotated[bool, typer.Option("--warped")] = False,
) -> None:
    """One worker of a chaos run."""
    assert lifeline, "a chaos run's workers end with it"
    if relay:
        use_relay(worker_id, relay)
    spec = WorkerSpec(role.value, worker_id, gateway, host)
    loaded = load(config)
    set_up_logs(loaded.logging, worker_id)
    main = work_in_chaos(spec, loaded, hub, incarnation=time.time_ns())
    try:
        run(main, WarpedLoop if warped else uvloop.new_event_loop)
    except Stopped:
        raise typer.Exit from None


if __name__ == "__main__":
    sys.exit(run_command([COMMAND, *sys.argv[1:]]))
