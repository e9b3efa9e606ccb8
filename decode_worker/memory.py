"""The token stream inside one process: commands up, token frames down, over the links of kvtransfer/memory.py."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from decode_worker.stream import Command, DecodeService, DecodeSession, TokenFrame
from engine.errors import Unavailable
from kvtransfer.memory import MemoryNetwork, MemoryStream

# About what an event takes on the wire.
EVENT_BYTES = 64


class _Uplink:
    """Commands on their way to the worker, each due at some time, at most `window` of them. The worker iterates."""

    def __init__(self, network: MemoryNetwork[DecodeService], address: str) -> None:
        self._network = network
        self._address = address
        self._loop = asyncio.get_running_loop()
        self._flight: deque[tuple[float, Command]] = deque()
        self._first_come = asyncio.Lock()
        self._changed = asyncio.Event()
        self._closed = False

    async def send(self, command: Command) -> None:
        """Raises Unavailable when the stream has ended, also while it waits for room."""
        link = self._network.link(self._address)
        async with self._first_come:
            while len(self._flight) >= link.window and not self._closed:
                await self._change()
        if self._closed:
            raise Unavailable(f"the token stream to {self._address} is gone")
        self._flight.append((self._loop.time() + link.latency_s, command))
        self._changed.set()

    def close(self) -> None:
        self._closed = True
        self._changed.set()

    def __aiter__(self) -> AsyncIterator[Command]:
        return self

    async def __anext__(self) -> Command:
        while not self._flight and not self._closed:
            await self._change()
        if self._closed:
            raise StopAsyncIteration
        await asyncio.sleep(self._flight[0][0] - self._loop.time())
        await self._network.reachable(self._address)
        if self._closed:
            raise StopAsyncIteration
        _, command = self._flight.popleft()
        self._changed.set()
        return command

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class MemoryDecodeSession:
    """Implements decode_worker.stream.DecodeSession."""

    def __init__(self, network: MemoryNetwork[DecodeService], address: str) -> None:
        self._uplink = _Uplink(network, address)
        self.stream: MemoryStream[TokenFrame] = MemoryStream(
            network,
            address,
            lambda: network.service(address).attach(self._uplink),
            lambda frame: EVENT_BYTES * (1 + len(frame.events)),
            on_end=self._uplink.close,
        )

    async def send(self, command: Command) -> None:
        """Raises Unavailable when the stream is gone."""
        await self._uplink.send(command)

    def frames(self) -> AsyncIterator[TokenFrame]:
        return self.stream


class MemoryDecodeTransport:
    """Implements decode_worker.stream.DecodeTransport over a MemoryNetwork."""

    def __init__(self, network: MemoryNetwork[DecodeService]) -> None:
        self._network = network
        self._open: dict[MemoryStream[TokenFrame], None] = {}

    @asynccontextmanager
    async def attach(self, address: str) -> AsyncIterator[DecodeSession]:
        """See DecodeTransport.attach. A missing peer shows in the first frame asked for, or the next command sent."""
        session = MemoryDecodeSession(self._network, address)
        self._open[session.stream] = None
        try:
            yield session
        finally:
            del self._open[session.stream]
            await session.stream.aclose()

    async def close(self) -> None:
        for stream in list(self._open):
            stream.break_off(Unavailable("the transport was closed"))
