"""What `kvtransfer/transport.py` promises, held by every transport."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import pytest

from engine.batch import KVLayout, Sampled
from engine.errors import (
    CorruptFrame,
    DeadlineExceeded,
    InvalidArgument,
    LayoutMismatch,
    Overloaded,
    TandemError,
    TransferFailed,
    Unavailable,
)
from engine.sampling import SamplingParams
from kvtransfer.frames import Begin, End, FirstToken, Frame, KVBlocks
from kvtransfer.grpc_transport import GrpcPrefillTransport
from kvtransfer.memory import Link, MemoryNetwork, MemoryPrefillTransport
from kvtransfer.rpc_server import RpcServer, start_server
from kvtransfer.transport import PrefillCall, PrefillService, PrefillTransport
from prefill_worker.server import prefill_service

LAYOUT = KVLayout("m", 4, 2, 8, "float32", 16, 100)
CALL = PrefillCall("r-1", tuple(range(40)), SamplingParams(temperature=0.5, n=2), 7, 16, LAYOUT, salt=b"tenant")
# What any cancel may take to arrive and to be cleaned up after.
PROMPT_S = 0.25


def kv(index: int, size_bytes: int = 4096) -> KVBlocks:
    return KVBlocks(16 * index, 1, 16, 0, 1, bytes([index % 251]) * size_bytes)


@dataclass
class Service:
    """Yields `frames`, then raises `error`, or hangs. Tells what it was asked and when it was cleaned up."""

    frames: list[Frame]
    error: TandemError | None = None
    hangs: bool = False
    calls: list[PrefillCall] = field(default_factory=list)
    yielded: int = 0
    called: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def prefill(self, call: PrefillCall) -> AsyncIterator[Frame]:
        self.calls.append(call)
        self.called.set()
        try:
            for frame in self.frames:
                self.yielded += 1
                yield frame
            if self.error is not None:
                raise self.error
            if self.hangs:
                await asyncio.Event().wait()
        finally:
            # Clean-up that has to wait, as a real one may: it must be waited for.
            await asyncio.sleep(0.001)
            self.closed.set()


class MemoryWire:
    def __init__(self) -> None:
        self.network: MemoryNetwork[PrefillService] = MemoryNetwork(Link(latency_s=0.001))
        self.transport: PrefillTransport = MemoryPrefillTransport(self.network)

    async def serve(self, service: PrefillService) -> str:
        self.network.register("prefill-0", service)
        return "prefill-0"

    async def kill(self, address: str) -> None:
        self.network.kill(address)

    async def close(self) -> None:
        await self.transport.close()


class FaultyMemoryWire(MemoryWire):
    """Every frame takes the way through its bytes, and nothing happens to it."""

    def __init__(self) -> None:
        super().__init__()
        self.transport = MemoryPrefillTransport(self.network, fault=lambda address, frame, wire: [wire])


class GrpcWire:
    def __init__(self) -> None:
        self.transport: PrefillTransport = GrpcPrefillTransport()
        self.servers: dict[str, RpcServer] = {}

    async def serve(self, service: PrefillService) -> str:
        server = await start_server("127.0.0.1:0", [prefill_service(service)])
        self.servers[server.address] = server
        return server.address

    async def kill(self, address: str) -> None:
        await self.servers.pop(address).stop()

    async def close(self) -> None:
        await self.transport.close()
        for address in list(self.servers):
            await self.kill(address)


Wire = MemoryWire | GrpcWire


@pytest.fixture(params=[MemoryWire, FaultyMemoryWire, GrpcWire])
async def wire(request: pytest.FixtureRequest) -> AsyncIterator[Wire]:
    made: Wire = request.param()
    yield made
    await made.close()


async def closes(service: Service) -> None:
    began = time.monotonic()
    async with asyncio.timeout(5):
        await service.closed.wait()
    assert time.monotonic() - began < PROMPT_S


async def read(wire: Wire, address: str, call: PrefillCall = CALL) -> list[Frame]:
    async with wire.transport.open(address, call) as frames:
        return [same(frame) async for frame in frames]


def same(frame: Frame) -> Frame:
    """With the payload as bytes: a view into a message and the bytes it was made from are the same content."""
    return replace(frame, payload=bytes(frame.payload)) if isinstance(frame, KVBlocks) else frame


async def test_frames_arrive_in_order_and_unchanged(wire: Wire):
    sent: list[Frame] = [
        Begin(40, 16, 16, LAYOUT),
        *(kv(index, size) for index, size in enumerate([1, 7, 4096, 300_000, 2 << 20] * 4)),
        FirstToken((Sampled(5, -0.5, ((5, -0.5), (6, -1.25))), Sampled(9)), 0.25, 1.5),
        kv(99),
        End(123, 45),
    ]
    service = Service(sent)
    assert await read(wire, await wire.serve(service)) == sent
    await closes(service)


async def test_the_call_arrives_unchanged(wire: Wire):
    service = Service([])
    address = await wire.serve(service)
    assert await read(wire, address) == []
    await read(wire, address, replace(CALL, deadline_s=9.0))
    assert service.calls[0] == CALL
    left_s = service.calls[1].deadline_s
    assert left_s is not None
    assert 8 < left_s < 9.1, "what is left of the deadline, seen from the server"


async def test_a_stalled_reader_stalls_the_sender_after_a_bounded_number_of_frames(wire: Wire):
    service = Service([kv(index, 512 << 10) for index in range(200)])
    address = await wire.serve(service)
    async with wire.transport.open(address, CALL) as frames:
        await anext(frames)
        await asyncio.sleep(0.2)
        stalled_at = service.yielded
        assert stalled_at <= 20
        await asyncio.sleep(0.1)
        assert service.yielded == stalled_at
        rest = [frame async for frame in frames]
        assert len(rest) == 199, "and it goes on when the reader does"


async def test_a_stalled_reader_stalls_nobody_else(wire: Wire):
    service = Service([kv(index, 256 << 10) for index in range(100)])
    address = await wire.serve(service)
    async with wire.transport.open(address, CALL) as frames:
        await anext(frames)
        assert len(await read(wire, address)) == 100


@pytest.mark.parametrize("read_count", [0, 1, 3])
async def test_leaving_closes_the_servers_generator(wire: Wire, read_count: int):
    service = Service([kv(index) for index in range(3)], hangs=True)
    address = await wire.serve(service)
    async with wire.transport.open(address, CALL) as frames:
        for _ in range(read_count):
            await anext(frames)
        await service.called.wait()
    await closes(service)


async def test_leaving_while_the_sender_is_stalled_closes_its_generator(wire: Wire):
    service = Service([kv(index, 512 << 10) for index in range(200)])
    address = await wire.serve(service)
    async with wire.transport.open(address, CALL) as frames:
        await anext(frames)
        await asyncio.sleep(0.05)
    await closes(service)
    assert service.yielded < 200


async def test_leaving_by_an_error_closes_the_generator_and_keeps_the_error(wire: Wire):
    service = Service([kv(0)], hangs=True)
    address = await wire.serve(service)

    async def fail() -> None:
        async with wire.transport.open(address, CALL) as frames:
            await anext(frames)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await fail()
    await closes(service)


async def test_cancelling_the_reader_closes_the_generator(wire: Wire):
    service = Service([kv(0)], hangs=True)
    task = asyncio.create_task(read(wire, await wire.serve(service)))
    await service.called.wait()
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await closes(service)


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("too many", 2.5),
        InvalidArgument("prompt", "no tokens", "at least one token"),
        LayoutMismatch("yours is not mine"),
        TransferFailed("lost"),
        CorruptFrame("flipped"),
        DeadlineExceeded("prefill"),
        Unavailable("draining"),
    ],
)
async def test_the_servers_error_arrives_as_itself_and_after_the_frames(wire: Wire, error: TandemError):
    service = Service([kv(0), kv(1)], error)
    seen: list[Frame] = []

    async def collect() -> None:
        async with wire.transport.open(address, CALL) as frames:
            async for frame in frames:
                seen.append(frame)

    address = await wire.serve(service)
    with pytest.raises(TandemError) as caught:
        await collect()
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)
    assert len(seen) == 2


async def test_nobody_there_is_unavailable(wire: Wire):
    address = await wire.serve(Service([]))
    await wire.kill(address)
    with pytest.raises(Unavailable):
        await read(wire, address)


async def test_a_peer_that_goes_away_is_unavailable_and_its_generator_closed(wire: Wire):
    service = Service([kv(0)], hangs=True)
    address = await wire.serve(service)
    task = asyncio.create_task(read(wire, address))
    await service.called.wait()
    await wire.kill(address)
    with pytest.raises(Unavailable):
        await task
    await closes(service)


@pytest.mark.parametrize("frame_count", [0, 2])
async def test_the_deadline_ends_the_call_at_both_ends(wire: Wire, frame_count: int):
    service = Service([kv(index) for index in range(frame_count)], hangs=True)
    address = await wire.serve(service)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await read(wire, address, replace(CALL, deadline_s=0.2))
    assert 0.15 < time.monotonic() - began < 0.2 + PROMPT_S
    await closes(service)


async def test_the_deadline_reaches_a_sender_whose_reader_has_stalled(wire: Wire):
    service = Service([kv(index, 512 << 10) for index in range(200)])
    address = await wire.serve(service)
    async with wire.transport.open(address, replace(CALL, deadline_s=0.2)) as frames:
        await anext(frames)
        await asyncio.sleep(0.3)
        await closes(service)

        async def drain() -> None:
            async for _ in frames:
                pass

        with pytest.raises(DeadlineExceeded):
            await drain()


async def test_many_streams_at_once_keep_apart(wire: Wire):
    def service_of(index: int) -> Service:
        return Service([kv(index, 1000 + step) for step in range(20)])

    services = [service_of(index) for index in range(4)]
    streams: dict[str, Callable[[PrefillCall], AsyncIterator[Frame]]] = {
        f"r-{index}": service.prefill for index, service in enumerate(services)
    }

    class Switch:
        def prefill(self, call: PrefillCall) -> AsyncIterator[Frame]:
            return streams[call.request_id](call)

    address = await wire.serve(Switch())
    results = await asyncio.gather(*(read(wire, address, replace(CALL, request_id=f"r-{i}")) for i in range(4)))
    assert results == [service.frames for service in services]
