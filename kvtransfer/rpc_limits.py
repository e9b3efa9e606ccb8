"""What a port takes at most, and how long one call may take: so that a caller who sends too much, or stops, costs a
bounded amount for a bounded time. `docs/limits.md` lists every bound.

gRPC itself holds the limits of connections, streams, metadata and message sizes; RpcHandlers those of calls.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass

from kvtransfer.rpc_channel import MAX_MESSAGE_BYTES, Option

MAX_CONNECTIONS = 4096


@dataclass(frozen=True, slots=True)
class CallLimits:
    """How long the calls of one service may take, in seconds; None for no bound.

    `request_s`: until the whole request of a call that has one is here. `write_s`: how long the reader of an answer may
    keep it waiting in all, beyond what a slow link takes. `age_s`: from a call's first byte to its last.
    """

    request_s: float | None = 20.0
    write_s: float | None = None
    age_s: float | None = None


CALL_LIMITS = CallLimits()


@dataclass(frozen=True, slots=True)
class PortLimits:
    """What one port takes at most. `calls` at once, `streams` of them on one connection, `request_bytes` in one message
    that comes in, `metadata_bytes` of headers in one call. `connections` None: half of the files that this process may
    open, MAX_CONNECTIONS at most.

    A connection without a call is closed after `idle_s`; None: never. A new one has `handshake_s` to say that it speaks
    HTTP/2, and as long again to take note of these limits: before that gRPC holds it to none of them."""

    calls: int = 4096
    streams: int = 1024
    request_bytes: int = MAX_MESSAGE_BYTES
    metadata_bytes: int = 16 << 10
    connections: int | None = None
    idle_s: float | None = None
    handshake_s: float = 10.0

    def options(self) -> Iterator[Option]:
        yield "grpc.max_receive_message_length", self.request_bytes
        yield "grpc.max_concurrent_streams", self.streams
        # Both alike: between the two, gRPC refuses at random.
        yield "grpc.max_metadata_size", self.metadata_bytes
        yield "grpc.absolute_max_metadata_size", self.metadata_bytes
        yield "grpc.max_allowed_incoming_connections", self.connections or max_connections()
        yield "grpc.server_handshake_timeout_ms", round(self.handshake_s * 1000)
        yield "grpc.http2.settings_timeout", round(self.handshake_s * 1000)
        if self.idle_s is not None:
            yield "grpc.max_connection_idle_ms", round(self.idle_s * 1000)


def max_connections() -> int:
    """Of one port: half of the files that this process may open, MAX_CONNECTIONS at most."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if files == resource.RLIM_INFINITY else max(1, min(MAX_CONNECTIONS, files // 2))
