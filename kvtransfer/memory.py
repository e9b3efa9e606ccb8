"""The transport inside one process: links with latency, bandwidth and a bounded window, which can be cut.

    server's generator ──▶ pump task ──▶ in flight (at most `window` items, each due at some time) ──▶ reader

The pump asks the generator for an item only when the window has room, so a reader that stalls stalls the server. All
waiting is on the running loop's clock; on the virtual loop the same program gives the same run.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

from engine.errors import CorruptFrame, DeadlineExceeded, TandemError, Unavailable
from kvtransfer.frames import Arrival, Damaged, Frame, KVBlocks, decode, encode
from kvtransfer.transport import PrefillCall, PrefillService

Item = TypeVar("Item")
Service = TypeVar("Service")

# Given an address, a frame and its wire bytes: what arrives instead (nothing, changed, more than once).
FaultHook = Callable[[str, Frame, bytes], Sequence[bytes]]


@dataclass(frozen=True, slots=True)
class Link:
    """The way from one address to everybody. `window` items may be in flight per stream; the streams of an address
    share its bandwidth. A peer that a cut leaves unreachable for `keepalive_s` counts as gone."""

    latency_s: float = 0.0
    bandwidth_bytes_s: float = float("inf")
    window: int = 4
    keepalive_s: float = 0.0


class MemoryNetwork(Generic[Service]):
    """Who is reachable where, and how well."""

    def __init__(self, link: Link | None = None) -> None:
        self._default_link = link or Link()
        self._links: dict[str, Link] = {}
        self._services: dict[str, Service] = {}
        self._cut: dict[str, asyncio.Event] = {}
        self._line_free_at_s: dict[str, float] = {}
        self._streams: dict[MemoryStream[Any], str] = {}

    def register(self, address: str, service: Service, link: Link | None = None) -> None:
        assert address not in self._services, f"two services at {address}"
        self._services[address] = service
        self._links[address] = link or self._default_link

    def kill(self, address: str) -> None:
        """The process at `address` is gone: its generators are closed, its readers get Unavailable."""
        self._services.pop(address, None)
        self._break(address)

    def cut(self, address: str) -> None:
        """Nothing gets through to or from `address` until `heal`; after the link's `keepalive_s` streams are lost."""
        self._cut.setdefault(address, asyncio.Event())
        for stream in self._at(address):
            stream.check_link()

    def heal(self, address: str) -> None:
        cut = self._cut.pop(address, None)
        if cut is not None:
            cut.set()
        for stream in self._at(address):
            stream.check_link()

    def open_streams(self) -> Counter[str]:
        """Streams per address that have not been left."""
        return Counter(self._streams.values())

    def service(self, address: str) -> Service:
        """Raises Unavailable when nobody is there."""
        if address not in self._services:
            raise Unavailable(f"nobody answers at {address}")
        return self._services[address]

    def link(self, address: str) -> Link:
        return self._links.get(address, self._default_link)

    def is_cut(self, address: str) -> bool:
        return address in self._cut

    async def reachable(self, address: str) -> None:
        """Returns when nothing cuts `address` off."""
        while address in self._cut:
            await self._cut[address].wait()

    def due_at(self, address: str, size_bytes: int, now: float) -> float:
        """When `size_bytes` handed to the line now will have arrived. One after another, as on a wire."""
        link = self.link(address)
        start = max(now, self._line_free_at_s.get(address, now))
        self._line_free_at_s[address] = start + size_bytes / link.bandwidth_bytes_s
        return self._line_free_at_s[address] + link.latency_s

    def add(self, stream: MemoryStream[Any], address: str) -> None:
        self._streams[stream] = address

    def remove(self, stream: MemoryStream[Any]) -> None:
        self._streams.pop(stream, None)

    def _at(self, address: str) -> list[MemoryStream[Any]]:
        return [stream for stream, where in self._streams.items() if where == address]

    def _break(self, address: str) -> None:
        for stream in self._at(address):
            stream.break_off(Unavailable(f"{address} is gone"))


@dataclass(frozen=True, slots=True)
class _InFlight(Generic[Item]):
    """Something that arrives at `due_s`: an item, or the stream's end (`error` None: a normal one)."""

    due_s: float
    item: Item | None = None
    error: Exception | None = None
    is_end: bool = False


class MemoryStream(Generic[Item]):
    """One server-to-client stream: an async iterator for the reader, and the pump that feeds it."""

    def __init__(
        self,
        network: MemoryNetwork[Any],
        address: str,
        start: Callable[[], AsyncIterator[Item]],
        size_bytes: Callable[[Item], int],
        deadline_s: float | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._network: MemoryNetwork[Any] = network
        self._address = address
        self._start = start
        self._size_bytes = size_bytes
        self._on_end = on_end
        self._flight: deque[_InFlight[Item]] = deque()
        self._room = asyncio.Semaphore(network.link(address).window)
        self._changed = asyncio.Event()
        self._broken: BaseException | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._keepalive: asyncio.TimerHandle | None = None
        self._arrival: asyncio.TimerHandle | None = None
        if deadline_s is not None:
            error = DeadlineExceeded(f"the call to {address}")
            self._deadline = self._loop.call_later(deadline_s, self.break_off, error)
        self._network.add(self, address)
        self.check_link()
        self._pump_task = asyncio.create_task(self._pump(), name=f"pump from {address}")
        self._pump_task.add_done_callback(self._pump_ended)

    def __aiter__(self) -> AsyncIterator[Item]:
        return self

    async def __anext__(self) -> Item:
        while True:
            if self._broken is not None:
                raise self._broken
            is_here = self._flight and self._flight[0].due_s <= self._loop.time()
            if is_here and not self._network.is_cut(self._address):
                return self._arrive()
            self._changed.clear()
            await self._changed.wait()

    def break_off(self, error: Exception) -> None:
        """Ends the stream at both ends now: what is in flight is lost."""
        self._broken = self._broken or error
        self._stop_pump()
        self._changed.set()

    def check_link(self) -> None:
        """Starts or stops the keepalive's clock, as the link now is."""
        if self._keepalive is not None:
            self._keepalive.cancel()
            self._keepalive = None
        if self._network.is_cut(self._address):
            error = Unavailable(f"{self._address} cannot be reached")
            keepalive_s = self._network.link(self._address).keepalive_s
            self._keepalive = self._loop.call_later(keepalive_s, self.break_off, error)
        self._changed.set()

    async def aclose(self) -> None:
        """Closes the server's generator and waits for its clean-up. A bug that the server ran into is raised here."""
        self._broken = self._broken or Unavailable(f"the stream from {self._address} was left")
        for timer in (self._deadline, self._keepalive):
            if timer is not None:
                timer.cancel()
        if self._arrival is not None:
            self._arrival.cancel()
        self._stop_pump()
        self._network.remove(self)
        await asyncio.wait([self._pump_task])
        if not self._pump_task.cancelled():
            self._pump_task.result()

    def _arrive(self) -> Item:
        head = self._flight[0]
        if head.is_end:
            raise head.error or StopAsyncIteration
        self._flight.popleft()
        self._room.release()
        if self._flight:
            self._announce()
        return cast(Item, head.item)

    async def _pump(self) -> None:
        error: TandemError | None = None
        try:
            await asyncio.sleep(self._network.link(self._address).latency_s)
            await self._network.reachable(self._address)
            async with aclosing(cast(AsyncGenerator[Item, None], self._start())) as generator:
                while True:
                    await self._room.acquire()
                    item = await anext(generator)
                    self._put(_InFlight(self._due_s(self._size_bytes(item)), item))
        except StopAsyncIteration:
            pass
        except TandemError as raised:
            error = raised
        self._put(_InFlight(self._due_s(0), error=error, is_end=True))

    def _stop_pump(self) -> None:
        # Once only: a second cancel would interrupt the generator's clean-up.
        if not self._pump_task.cancelling():
            self._pump_task.cancel()
        if self._on_end is not None:
            self._on_end()

    def _pump_ended(self, pump: asyncio.Task[None]) -> None:
        if not pump.cancelled() and (bug := pump.exception()) is not None:
            # Not one of the errors that cross the wire: in one process the reader may as well see it as it is.
            self._broken = self._broken or bug
            self._changed.set()
        if self._on_end is not None:
            self._on_end()

    def _due_s(self, size_bytes: int) -> float:
        return self._network.due_at(self._address, size_bytes, self._loop.time())

    def _put(self, in_flight: _InFlight[Item]) -> None:
        self._flight.append(in_flight)
        if len(self._flight) == 1:
            self._announce()

    def _announce(self) -> None:
        """Wakes the reader when the first item in flight arrives, and not before."""
        due_s = self._flight[0].due_s
        if due_s <= self._loop.time():
            self._changed.set()
        else:
            self._arrival = self._loop.call_at(due_s, self._changed.set)


class MemoryPrefillTransport:
    """Implements kvtransfer.transport.PrefillTransport over a MemoryNetwork.

    With a `fault` hook every frame goes through its wire bytes, so that checksums meet what the hook did to them.
    """

    def __init__(self, network: MemoryNetwork[PrefillService], fault: FaultHook | None = None) -> None:
        self._network = network
        self._fault = fault
        self._open: dict[MemoryStream[Frame], None] = {}

    @asynccontextmanager
    async def open(self, address: str, call: PrefillCall) -> AsyncIterator[AsyncIterator[Arrival]]:
        """See PrefillTransport.open. Errors, a missing peer included, come with the first frame asked for."""
        loop = asyncio.get_running_loop()
        deadline = None if call.deadline_s is None else loop.time() + call.deadline_s

        def start() -> AsyncIterator[Frame]:
            left_s = None if deadline is None else deadline - loop.time()
            return self._network.service(address).prefill(replace(call, deadline_s=left_s))

        stream = MemoryStream(self._network, address, start, _frame_bytes, call.deadline_s)
        self._open[stream] = None
        try:
            if self._fault is None:
                yield stream
            else:
                async with aclosing(self._faulty(address, stream, self._fault, call.lease)) as frames:
                    yield frames
        finally:
            del self._open[stream]
            await stream.aclose()

    async def close(self) -> None:
        for stream in list(self._open):
            stream.break_off(Unavailable("the transport was closed"))

    @staticmethod
    async def _faulty(
        address: str, stream: AsyncIterator[Frame], fault: FaultHook, lease: int
    ) -> AsyncGenerator[Arrival, None]:
        async for frame in stream:
            for wire in fault(address, frame, b"".join(encode(frame, lease))):
                try:
                    arrival: Arrival = decode(wire, lease)
                except CorruptFrame as error:
                    arrival = Damaged(str(error))
                yield arrival


def _frame_bytes(frame: Frame) -> int:
    """About what the frame takes on the wire: the payload, and a header's worth."""
    return 64 + (len(frame.payload) if isinstance(frame, KVBlocks) else 0)
