"""The network of a chaos run: every connection between its processes passes here, and may be held up.

    gateway ─────── CONNECT decode worker ──▶ ┌───────┐ ──▶ decode worker     token streams
    decode worker ─ CONNECT prefill worker ─▶ │ relay │ ──▶ prefill worker    KV streams
    each worker ─── CONNECT gateway ────────▶ └───────┘ ──▶ gateway           heartbeats

It is an HTTP proxy, which gRPC is told to use by its environment: nobody is reached under another address than without
it, and what goes through is never looked at, TLS or not. Who connects says so as the proxy's user. So a link is known
by both of its ends, and a fault of a worker finds all of its links, whoever opened them.

What a cut link was given is kept, a bounded amount, and goes on its way when the cut is over, ends of connections too:
as in a network that loses packets until it is mended, where TCP sends them again.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

from cluster.chaos.plan import POOLS

CHUNK_BYTES = 64 << 10
# Of one connection and direction, beside the buffers of the sockets.
CHUNKS_UNDER_WAY = 64
ACCEPTED = b"HTTP/1.1 200 OK\r\n\r\n"
NOBODY_THERE = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Weather:
    """What happens to bytes on their way. `bytes_per_s` is of each connection and direction."""

    is_cut: bool = False
    delay_s: float = 0.0
    bytes_per_s: float = float("inf")


@dataclass(frozen=True, slots=True, eq=False)
class _Fault:
    worker_id: str
    peer: str
    weather: Weather

    def is_on(self, one: str, other: str) -> bool:
        return (one == self.worker_id and self._is_peer(other)) or (other == self.worker_id and self._is_peer(one))

    def _is_peer(self, name: str) -> bool:
        return self.peer in ("any", name) or (self.peer in POOLS and name.startswith(f"{self.peer}-"))


@dataclass(frozen=True, slots=True)
class _Link:
    """Who opened a connection, and to which address: who is there is known when the gateway has heard of them."""

    source: str
    host: str
    port: int

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


class Relay:
    """Made by `running_relay`. `name_of` says who listens at an address, "" where that is not known."""

    def __init__(self, name_of: Callable[[str], str]) -> None:
        self.address = ""
        self._name_of = name_of
        self._faults: list[_Fault] = []
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @contextmanager
    def disturbed(self, worker_id: str, peer: str, weather: Weather) -> Iterator[None]:
        """While the context lasts, `weather` is on the worker's links to `peer` (see plan.OfLinks)."""
        fault = _Fault(worker_id, peer, weather)
        self._faults.append(fault)
        try:
            yield
        finally:
            self._faults.remove(fault)
            self._changed.set()
            self._changed = asyncio.Event()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """For asyncio.start_server."""
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Breaks all connections off."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _weather(self, link: _Link) -> Weather:
        name = self._name_of(link.address)
        found = [fault.weather for fault in self._faults if fault.is_on(link.source, name)]
        return Weather(
            any(each.is_cut for each in found),
            sum(each.delay_s for each in found),
            min((each.bytes_per_s for each in found), default=float("inf")),
        )

    async def _passable(self, link: _Link) -> None:
        while self._weather(link).is_cut:
            await self._changed.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            link = await _read_head(reader)
            if link is None:
                return
            # Whoever connects to a peer that is cut off waits for an answer, as for that of a packet that was lost.
            await self._passable(link)
            try:
                there_reader, there_writer = await asyncio.open_connection(link.host, link.port)
            except OSError:
                writer.write(NOBODY_THERE)
                return
            try:
                writer.write(ACCEPTED)
                await self._carry_both(link, (reader, writer), (there_reader, there_writer))
            finally:
                there_writer.close()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def _carry_both(
        self,
        link: _Link,
        here: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        there: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        """Until one end closes: gRPC never goes on in one direction alone."""
        ways = [
            asyncio.create_task(self._carry(link, here[0], there[1])),
            asyncio.create_task(self._carry(link, there[0], here[1])),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _carry(self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Returns when the reader's end has been carried over, or the writer's peer is gone."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS_UNDER_WAY)
        reading = asyncio.create_task(self._read(link, reader, under_way))
        try:
            await self._deliver(link, under_way, writer)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(
        self, link: _Link, reader: asyncio.StreamReader, under_way: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        """Puts what comes, and when it is due at the other end; b"" is the end."""
        loop = asyncio.get_running_loop()
        line_free_s, data = 0.0, b"-"
        while data:
            try:
                data = await reader.read(CHUNK_BYTES)
            except ConnectionError:
                data = b""
            weather = self._weather(link)
            line_free_s = max(loop.time(), line_free_s) + len(data) / weather.bytes_per_s
            await under_way.put((line_free_s + weather.delay_s, data))

    async def _deliver(
        self, link: _Link, under_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        loop = asyncio.get_running_loop()
        with suppress(ConnectionError):
            while True:
                due_s, data = await under_way.get()
                if due_s > loop.time():
                    await asyncio.sleep(due_s - loop.time())
                await self._passable(link)
                if not data:
                    return
                writer.write(data)
                await writer.drain()


@asynccontextmanager
async def running_relay(name_of: Callable[[str], str]) -> AsyncIterator[Relay]:
    """Listens on a port of this machine's own network while the context lasts."""
    relay = Relay(name_of)
    server = await asyncio.start_server(relay.accept, "127.0.0.1", 0, limit=CHUNK_BYTES)
    relay.address = "{}:{}".format(*server.sockets[0].getsockname())
    try:
        yield relay
    finally:
        server.close()
        await relay.close()


async def _read_head(reader: asyncio.StreamReader) -> _Link | None:
    """The request to connect, `CONNECT HOST:PORT HTTP/1.1` with the asking process's name as user; None for anything
    else."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return None
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split()
    host, _, port = words[1].rpartition(":") if len(words) == 3 and words[0] == "CONNECT" else ("", "", "")
    if not host or not port.isdecimal():
        return None
    source = ""
    for line in lines[1:]:
        name, _, value = line.partition(":")
        if name.lower() == "proxy-authorization":
            with suppress(binascii.Error, UnicodeDecodeError):
                source = base64.b64decode(value.split()[-1]).decode().partition(":")[0]
    return _Link(source, host, int(port))
