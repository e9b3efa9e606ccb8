"""Client channels: one per address, with the options that every Tandem connection uses."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc.aio

from kvtransfer.rpc_tls import Stamp, Tls

# Far above any KV frame (2 MiB by default) and any prompt (a million token ids take some 4 MiB).
MAX_MESSAGE_BYTES = 64 << 20

# Channels that are kept. Workers that restart mostly have another address.
MAX_CHANNELS = 1024

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


def common_options(keepalive: KeepAlive, flow: Flow) -> list[Option]:
    """Options that both ends of a connection set."""
    return [("grpc.max_send_message_length", MAX_MESSAGE_BYTES), *keepalive.options(), *flow.options()]


@dataclass(slots=True, eq=False)
class _Open:
    """A channel, the certificates that it connects with, and how many calls are using it."""

    channel: grpc.aio.Channel
    stamp: Stamp | None
    calls: int = 0


class Channels:
    """One channel per address, opened on first use. Belongs to one event loop. Of those that nobody uses (`use`), the
    ones that were opened first go when there are more than `max_channels`; the others stay until `close`.

    `connect_timeout_s` bounds a single attempt to connect. Calls fail at once while an address refuses connections,
    and a new attempt is made at most two seconds after the last.

    With `tls` every connection is encrypted, shows this end's certificate, and is made only to those whose certificate
    of the same CA names `peer`. When the certificates change, new calls get a new channel; the one before is closed
    when the last of its calls has ended.
    """

    def __init__(
        self,
        *,
        keepalive: KeepAlive = KEEP_ALIVE,
        flow: Flow = FLOW,
        connect_timeout_s: float = 5.0,
        max_channels: int = MAX_CHANNELS,
        tls: Tls | None = None,
        peer: str = "",
    ) -> None:
        self._tls = tls
        self._options: list[tuple[str, int | str]] = [
            *common_options(keepalive, flow),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            # Connections are this object's own: closing one set of channels never touches another's.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.min_reconnect_backoff_ms", round(connect_timeout_s * 1000)),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        if peer:
            # Workers come and go under any address: a certificate says what its holder is, not where.
            self._options.append(("grpc.ssl_target_name_override", peer))
        self._channels: dict[str, _Open] = {}
        self._max_channels = max_channels
        self._closing: set[asyncio.Task[None]] = set()

    def get(self, address: str) -> grpc.aio.Channel:
        """The channel to `address` ("host:port"), for a short call. Does not wait for a connection."""
        return self._get(address).channel

    @contextmanager
    def use(self, address: str) -> Iterator[grpc.aio.Channel]:
        """As `get`, and the channel stays at least as long as the context lasts."""
        found = self._get(address)
        found.calls += 1
        try:
            yield found.channel
        finally:
            found.calls -= 1
            if self._channels.get(address) is not found:
                self._close_unused(found)
            self._clear_away()

    async def close(self) -> None:
        """Ends all calls that are still under way."""
        channels = [found.channel for found in self._channels.values()]
        self._channels.clear()
        for channel in channels:
            await channel.close()
        await asyncio.gather(*self._closing)

    def _get(self, address: str) -> _Open:
        stamp = self._tls.files().stamp if self._tls is not None else None
        found = self._channels.get(address)
        if found is None or found.stamp != stamp:
            before, found = found, _Open(self._open(address), stamp)
            self._channels[address] = found
            if before is not None:
                self._close_unused(before)
        return found

    def _clear_away(self) -> None:
        spare = max(0, len(self._channels) - self._max_channels)
        for address in [address for address, found in self._channels.items() if not found.calls][:spare]:
            self._close_unused(self._channels.pop(address))

    def _open(self, address: str) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(address, options=self._options)
        return grpc.aio.secure_channel(address, self._tls.channel_credentials(), options=self._options)

    def _close_unused(self, found: _Open) -> None:
        if found.calls == 0:
            task = asyncio.get_running_loop().create_task(found.channel.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
