"""What `decode_worker/stream.py` promises of a token stream, held by every transport."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from decode_worker.grpc_transport import GrpcDecodeTransport
from decode_worker.memory import MemoryDecodeTransport
from decode_worker.server import decode_service
from decode_worker.stream import (
    Cancel,
    Command,
    DecodeService,
    DecodeTransport,
    Delta,
    Done,
    Failed,
    Submit,
    TokenFrame,
)
from engine.batch import Sampled
from engine.errors import Overloaded, TandemError, Unavailable
from engine.request import FinishReason, Receipt
from engine.sampling import SamplingParams
from kvtransfer.memory import Link, MemoryNetwork
from kvtransfer.rpc_server import RpcServer, start_server


def submit(name: str) -> Submit:
    return Submit(name, (1, 2, 3), SamplingParams(n=2, seed=4), 4, "prefill-0", 9.5, b"tenant")


def answer(step: int, name: str) -> TokenFrame:
    delta = Delta(name, 1, (Sampled(7, -0.5, ((7, -0.5),)), Sampled(9)), FinishReason.STOP, 9)
    return TokenFrame(
        step, (delta, Done(name, 16, Receipt(decode_s=0.5, kv_bytes=7)), Failed("x", Overloaded("full", 2.0)))
    )


@dataclass
class Echo:
    """Answers each Submit by a frame. Ends, or fails, at the Cancel of "end"."""

    error: TandemError | None = None
    flood: int = 0
    commands: list[Command] = field(default_factory=list)
    yielded: int = 0
    attached: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def attach(self, commands: AsyncIterator[Command]) -> AsyncIterator[TokenFrame]:
        self.attached.set()
        try:
            for _ in range(self.flood):
                self.yielded += 1
                yield TokenFrame(self.yielded, tuple(Delta("r" * 5000, i, (Sampled(i),)) for i in range(10)))
            async for command in commands:
                self.commands.append(command)
                if command == Cancel("end"):
                    break
                if isinstance(command, Submit):
                    yield answer(len(self.commands), command.request_id)
            if self.error is not None:
                raise self.error
        finally:
            await asyncio.sleep(0.001)
            self.closed.set()


class MemoryWire:
    def __init__(self) -> None:
        self.network: MemoryNetwork[DecodeService] = MemoryNetwork(Link(latency_s=0.001))
        self.transport: DecodeTransport = MemoryDecodeTransport(self.network)

    async def serve(self, service: DecodeService) -> str:
        self.network.register("decode-0", service)
        return "decode-0"

    async def kill(self, address: str) -> None:
        self.network.kill(address)

    async def close(self) -> None:
        await self.transport.close()


class GrpcWire:
    def __init__(self) -> None:
        self.transport: DecodeTransport = GrpcDecodeTransport()
        self.servers: dict[str, RpcServer] = {}

    async def serve(self, service: DecodeService) -> str:
        server = await start_server("127.0.0.1:0", [decode_service(service)])
        self.servers[server.address] = server
        return server.address

    async def kill(self, address: str) -> None:
        await self.servers.pop(address).stop()

    async def close(self) -> None:
        await self.transport.close()
        for address in list(self.servers):
            await self.kill(address)


Wire = MemoryWire | GrpcWire


@pytest.fixture(params=[MemoryWire, GrpcWire])
async def wire(request: pytest.FixtureRequest) -> AsyncIterator[Wire]:
    made: Wire = request.param()
    yield made
    await made.close()


async def closes(service: Echo) -> None:
    async with asyncio.timeout(1):
        await service.closed.wait()


def seen(frame: TokenFrame) -> str:
    """With the errors' classes, attributes and texts in place of the errors, which have no equality."""
    return repr(frame) + repr([vars(event.error) for event in frame.events if isinstance(event, Failed)])


async def test_commands_and_frames_arrive_in_order_and_unchanged(wire: Wire):
    service = Echo()
    names = [f"r{index}" for index in range(50)]
    async with wire.transport.attach(await wire.serve(service)) as session:
        sending = asyncio.gather(*(session.send(submit(name)) for name in names))
        frames = session.frames()
        read = [await anext(frames) for _ in names]
        await sending
        await session.send(Cancel("r3"))
        await session.send(Cancel("end"))
        assert [frame async for frame in frames] == [], "the worker has ended the stream"
    assert [seen(frame) for frame in read] == [seen(answer(step, name)) for step, name in enumerate(names, 1)]
    assert service.commands == [*(submit(name) for name in names), Cancel("r3"), Cancel("end")]
    await closes(service)


async def test_leaving_closes_the_workers_generator(wire: Wire):
    service = Echo()
    async with wire.transport.attach(await wire.serve(service)) as session:
        await session.send(submit("r0"))
        await anext(session.frames())
    await closes(service)


async def test_cancelling_the_gateway_closes_the_workers_generator(wire: Wire):
    service = Echo()
    address = await wire.serve(service)

    async def gateway() -> None:
        async with wire.transport.attach(address) as session:
            async for _ in session.frames():
                pass

    task = asyncio.create_task(gateway())
    await service.attached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await closes(service)


async def test_a_gateway_that_does_not_read_stalls_the_worker(wire: Wire):
    service = Echo(flood=400)
    async with wire.transport.attach(await wire.serve(service)) as session:
        frames = session.frames()
        await anext(frames)
        await asyncio.sleep(0.3)
        assert service.yielded < 200
        for step in range(2, 401):
            assert (await anext(frames)).step == step
    await closes(service)


async def test_a_worker_that_goes_away_is_unavailable_to_reader_and_writer(wire: Wire):
    service = Echo()
    address = await wire.serve(service)
    async with wire.transport.attach(address) as session:
        await session.send(submit("r0"))
        frames = session.frames()
        await anext(frames)
        await wire.kill(address)
        with pytest.raises(Unavailable):
            await anext(frames)
        with pytest.raises(Unavailable):
            await session.send(Cancel("r0"))
    await closes(service)


async def test_the_workers_error_arrives_as_itself(wire: Wire):
    service = Echo(error=Overloaded("too many gateways", 3.0))
    async with wire.transport.attach(await wire.serve(service)) as session:
        await session.send(Cancel("end"))
        with pytest.raises(Overloaded, match="too many gateways") as caught:
            await anext(session.frames())
        assert caught.value.retry_after_s == 3.0
    await closes(service)


async def test_nobody_there_is_unavailable(wire: Wire):
    address = await wire.serve(Echo())
    await wire.kill(address)

    async def use() -> None:
        async with wire.transport.attach(address) as session:
            await anext(session.frames())

    with pytest.raises(Unavailable):
        await use()
