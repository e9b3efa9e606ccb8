"""An HTTP server in the running loop: uvicorn, told where to listen and when to end.

server = await start_http("127.0.0.1:0", app)
print(server.address)
await server.stop(grace_s=0.5)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Generator
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from cluster.http.accepting import Accepting
from cluster.http.protocol import BoundedProtocol
from engine.errors import ConfigError
from kvtransfer.rpc_limits import max_connections
from kvtransfer.rpc_tls import Tls

# Clients keep connections for their next request.
KEEP_ALIVE_S = 75
BACKLOG = 1024
# What the kernel keeps of an answer that nobody reads; by itself it would grow to megabytes for each connection.
SEND_BUFFER_BYTES = 64 << 10
# How soon new certificates count.
CERTS_POLL_S = 1.0


class _Uvicorn(uvicorn.Server):
    """Takes connections itself, encrypted with `context`, and leaves the signals of the process to those who own it."""

    def __init__(self, config: uvicorn.Config, slow_reader_s: float, context: ssl.SSLContext | None) -> None:
        super().__init__(config)
        self._slow_reader_s = slow_reader_s
        self._context = context

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # With none: it would open connections as asyncio's own server does.
        await super().startup(sockets=[])
        state = self.server_state
        make_protocol = partial(BoundedProtocol, self.config, state, self.lifespan.state, self._slow_reader_s)
        for listener in sockets or ():
            accepting = Accepting(listener, make_protocol, self._context, max_connections(), state.connections)
            self.servers.append(accepting)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class HttpServer:
    """A running server. Made by `start_http`."""

    def __init__(self, server: uvicorn.Server, tasks: list[asyncio.Task[None]], address: str) -> None:
        self.address = address
        self._server = server
        self._tasks = tasks

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    async def stop(self, grace_s: float = 0.0) -> None:
        """Takes no new connections, lets requests that run end for `grace_s`, and breaks off the rest."""
        serving, *others = self._tasks
        for task in others:
            task.cancel()
        self._server.should_exit = True
        _, late = await asyncio.wait([serving], timeout=grace_s)
        if late:
            for connection in list(self._server.server_state.connections):
                connection.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def start_http(address: str, app: ASGIApp, *, slow_reader_s: float = 30.0, tls: Tls | None = None) -> HttpServer:
    """Serves `app` on `address` ("host:port", port 0 for any free one), encrypted with `tls`. `slow_reader_s`: how long
    one client may keep its answer waiting. Raises ConfigError naming the address when it cannot be listened on."""
    listener = _listen(address)
    config = uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        backlog=BACKLOG,
    )
    # What clients do wrong they are told themselves; for this side's log only what is wrong here counts.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config.load()
    context = _context(tls) if tls is not None else None
    server = _Uvicorn(config, slow_reader_s, context)
    tasks = [asyncio.create_task(server.serve([listener]), name="http")]
    if tls is not None and context is not None:
        tasks.append(asyncio.create_task(_renew(context, tls), name="http certificates"))
    host = address.rpartition(":")[0]
    return HttpServer(server, tasks, f"{host}:{listener.getsockname()[1]}")


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            listener.bind(where)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot listen on {address}: port {port}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


def _context(tls: Tls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load(context, tls)
    return context


def _load(context: ssl.SSLContext, tls: Tls) -> None:
    context.load_cert_chain(tls.folder / "tls.crt", tls.folder / "tls.key")


async def _renew(context: ssl.SSLContext, tls: Tls) -> None:
    """New connections get the certificate that is in force when they are made."""
    in_force = tls.files().stamp
    while True:
        await asyncio.sleep(CERTS_POLL_S)
        if tls.files().stamp == in_force:
            continue
        # Replaced once more at this very moment: the next time then.
        with contextlib.suppress(OSError, ssl.SSLError):
            _load(context, tls)
            in_force = tls.files().stamp
