"""The line between a chaos run and its workers: orders go one way, notes of what happens there come back.

    worker ── "decode-0" ──▶ hub        who it is, first of all
    worker ── note, note … ─▶ hub       one JSON object a line: {"flips": 3}, {"held": 17}, {"opened": …}
    worker ◀── order ──────── hub       {"corrupt": 1000}, {"jump_s": 30, "rate": 1}

A Unix socket: no fault of the network reaches it, not even that of another network namespace. A note's time is that of
its arrival here, on one clock for all.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

# A line's JSON object.
Note: TypeAlias = Mapping[str, Any]


class Hub:
    """The run's end. `noted` gets every note, and {} when a worker's line has ended."""

    def __init__(self, path: Path, noted: Callable[[str, Note], None]) -> None:
        self.path = path
        self._noted = noted
        self._writers: dict[str, asyncio.StreamWriter] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def tell(self, worker_id: str, order: Note) -> bool:
        """False where nobody hears it."""
        writer = self._writers.get(worker_id)
        if writer is None:
            return False
        writer.write(_line(order))
        return True

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """For asyncio.start_unix_server."""
        task = asyncio.create_task(self._listen(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            hello = await reader.readline()
        except ConnectionError:
            hello = b""
        if not hello:
            writer.close()
            return
        worker_id = json.loads(hello)
        self._writers[worker_id] = writer
        try:
            with suppress(ConnectionError):
                while line := await reader.readline():
                    self._noted(worker_id, json.loads(line))
        finally:
            # Its successor may be there already.
            if self._writers.get(worker_id) is writer:
                del self._writers[worker_id]
            writer.close()
            self._noted(worker_id, {})


@asynccontextmanager
async def running_hub(folder: Path, noted: Callable[[str, Note], None]) -> AsyncIterator[Hub]:
    """Listens in `folder` while the context lasts."""
    hub = Hub(folder / "hub", noted)
    server = await asyncio.start_unix_server(hub.accept, hub.path)
    try:
        yield hub
    finally:
        server.close()
        await hub.close()


class HubLine:
    """A worker's end; made by `connected`."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    def note(self, note: Note) -> None:
        self._writer.write(_line(note))


@asynccontextmanager
async def connected(path: Path, worker_id: str, obey: Callable[[Note], None]) -> AsyncIterator[HubLine]:
    """`obey` gets each order while the context lasts."""
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(_line(worker_id))

    async def listen() -> None:
        with suppress(ConnectionError):
            while line := await reader.readline():
                obey(json.loads(line))

    listening = asyncio.create_task(listen(), name=f"orders to {worker_id}")
    try:
        yield HubLine(writer)
    finally:
        listening.cancel()
        writer.close()
        await asyncio.gather(listening, return_exceptions=True)


def _line(content: object) -> bytes:
    return json.dumps(content).encode() + b"\n"
