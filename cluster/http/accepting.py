"""Connections to an HTTP server from the moment when they are accepted.

    accepted ─▶ TLS handshake ─▶ connection (protocol.py)
             └── request_s ───┘

asyncio's own server tells of a connection with TLS only when its handshake is done. One that stays silent would be in
no limit until then.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Collection
from functools import partial

from cluster.background import tell_of_crash
from cluster.http.protocol import REQUEST_S

# Accepted before others have their turn.
ACCEPTS_MAX = 100
# Where the process may open no more files.
PAUSE_S = 1.0


class Accepting:
    """Takes connections from `listener`, encrypted with `context`. Each gets a protocol of `make_protocol`'s, which is
    among `connections` as long as it is open, and calls what it was made with when it is. What goes beyond
    `max_connections`, handshakes and all, is closed.

    To uvicorn it is an asyncio.Server: to close it leaves `connections` as they are."""

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[Callable[[], None]], asyncio.Protocol],
        context: ssl.SSLContext | None,
        max_connections: int,
        connections: Collection[object],
    ) -> None:
        self._listener = listener
        self._make_protocol = make_protocol
        self._context = context
        self._max_connections = max_connections
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[None]] = set()
        self._resume: asyncio.TimerHandle | None = None
        self._listen()

    def close(self) -> None:
        if self._resume is not None:
            self._resume.cancel()
        self._loop.remove_reader(self._listener)
        for task in self._opening:
            task.cancel()

    async def wait_closed(self) -> None:
        await asyncio.gather(*self._opening, return_exceptions=True)

    def _listen(self) -> None:
        self._resume = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_MAX):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                self._loop.remove_reader(self._listener)
                self._resume = self._loop.call_later(PAUSE_S, self._listen)
                return
            if len(self._opening) + len(self._connections) >= self._max_connections:
                connection.close()
                continue
            connection.setblocking(False)
            task = asyncio.create_task(self._open(connection))
            self._opening.add(task)
            task.add_done_callback(partial(self._opened, connection))

    async def _open(self, connection: socket.socket) -> None:
        make_protocol = partial(self._make_protocol, partial(self._opening.discard, asyncio.current_task()))
        handshake_s = REQUEST_S if self._context is not None else None
        try:
            await self._loop.connect_accepted_socket(
                make_protocol, connection, ssl=self._context, ssl_handshake_timeout=handshake_s
            )
        except OSError:
            # It went away, or its handshake failed or took too long.
            connection.close()

    def _opened(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        self._opening.discard(task)
        if task.cancelled():
            connection.close()
        tell_of_crash("a connection could not be opened", task)
