"""Client channels: one per address, with the options that every Tandem connection uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import grpc.aio

# Far above any KV frame (2 MiB by default) and any prompt (a million token ids take some 4 MiB).
MAX_MESSAGE_BYTES = 64 << 20

Option = tuple[str, int]


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """How fast a dead peer is noticed on a silent connection: within `interval_s + timeout_s`, on both ends.

    The pings are answered by gRPC's own threads: a peer that is only busy or slow to read is not taken for dead.
    """

    interval_s: float = 3.0
    timeout_s: float = 5.0

    @classmethod
    def within(cls, bound_s: float) -> KeepAlive:
        """A dead peer is noticed within `bound_s`, and a fifth of that is left to act on it."""
        return cls(0.3 * bound_s, 0.5 * bound_s)

    @property
    def bound_s(self) -> float:
        """Longest time until every stream to a peer that is dead, frozen or cut off has ended."""
        return self.interval_s + self.timeout_s

    def options(self) -> Iterator[Option]:
        yield "grpc.keepalive_time_ms", round(self.interval_s * 1000)
        yield "grpc.keepalive_timeout_ms", round(self.timeout_s * 1000)
        # The one that counts on an otherwise silent connection; its default is a minute.
        yield "grpc.http2.ping_timeout_ms", round(self.timeout_s * 1000)
        yield "grpc.keepalive_permit_without_calls", 1
        yield "grpc.http2.max_pings_without_data", 0
        # How often the other end may ping; the default of five minutes would end our own connections.
        yield "grpc.http2.min_ping_interval_without_data_ms", 500


@dataclass(frozen=True, slots=True)
class Flow:
    """How much may be under way on one stream whose reader has stopped. `tests/kvtransfer/test_grpc_transport.py`
    holds the bound that the docstring of `kvtransfer/grpc_transport.py` gives.

    `window_bytes` is what gRPC accepts ahead of a reader that has not asked; a reader that waits for a message is
    always granted that whole message. `frame_bytes` is the size of one HTTP/2 frame.
    """

    window_bytes: int = 64 << 10
    frame_bytes: int = 1 << 20

    def options(self) -> Iterator[Option]:
        # Bandwidth probing would let the window grow up to 16 MiB, and with it what a stalled reader holds.
        yield "grpc.http2.bdp_probe", 0
        yield "grpc.http2.lookahead_bytes", self.window_bytes
        yield "grpc.http2.max_frame_size", self.frame_bytes


KEEP_ALIVE = KeepAlive()
FLOW = Flow()


def common_options(keepalive: KeepAlive, max_message_bytes: int, flow: Flow) -> list[Option]:
    """Options that both ends of a connection set."""
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        *keepalive.options(),
        *flow.options(),
    ]


class Channels:
    """One channel per address, opened on first use, kept until `close`. Belongs to one event loop.

    `connect_timeout_s` bounds a single attempt to connect. Calls fail at once while an address refuses connections,
    and a new attempt is made at most two seconds after the last.
    """

    def __init__(
        self,
        *,
        keepalive: KeepAlive = KEEP_ALIVE,
        flow: Flow = FLOW,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        connect_timeout_s: float = 5.0,
    ) -> None:
        self._options = [
            *common_options(keepalive, max_message_bytes, flow),
            # Connections are this object's own: closing one set of channels never touches another's.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.min_reconnect_backoff_ms", round(connect_timeout_s * 1000)),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        self._channels: dict[str, grpc.aio.Channel] = {}

    def get(self, address: str) -> grpc.aio.Channel:
        """The channel to `address` ("host:port"). Does not wait for a connection."""
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = grpc.aio.insecure_channel(address, options=self._options)
        return channel

    async def close(self) -> None:
        """Ends all calls that are still under way."""
        channels = list(self._channels.values())
        self._channels.clear()
        for channel in channels:
            await channel.close()
