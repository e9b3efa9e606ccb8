"""The token stream over real gRPC."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from tandem.v1 import worker_pb2

from decode_worker.config import DecodeConfig
from decode_worker.convert import frame_from_bytes
from decode_worker.grpc_transport import GrpcDecodeTransport
from decode_worker.server import decode_service
from decode_worker.stream import Cancel, Command, Delta, Done, Event, Failed, Submit, TokenFrame
from decode_worker.worker import DecodeWorker
from engine.batch import Sampled
from engine.errors import CorruptFrame, InvalidArgument, Overloaded, TandemError, TransferFailed, Unavailable
from engine.request import FinishReason, Receipt
from engine.sampling import SamplingParams
from kvtransfer.rpc_channel import Channels
from kvtransfer.rpc_server import start_server
from tests.decode_worker.scripted import ScriptedTransport
from tests.emulated import runner, running
from tests.eventually import eventually

METHOD = "/tandem.v1.DecodeWorker/Attach"
SUBMIT = Submit("r-1", (1, 2, 3), SamplingParams(top_p=0.9, seed=4), -7, "10.0.0.1:5000", 2.5, b"salt\xff")
FRAMES = [
    TokenFrame(0, ()),
    TokenFrame(
        1 << 40,
        (
            Delta("a", 0, (Sampled(5, -0.5, ((5, -0.5), (6, -1.5))), Sampled(6)), None, None),
            Delta("b", 3, (), FinishReason.LENGTH, None),
            Delta("b", 0, (Sampled(0),), FinishReason.STOP, 0),
            Done("b", 64, Receipt(prefill_s=0.25, kv_bytes=12345, preemptions=2, decode_worker="d0")),
        ),
    ),
]
ERRORS = [
    Overloaded("no blocks", 2.5),
    InvalidArgument("sampling_params.n", 99, "at most 64"),
    CorruptFrame("checksum"),
    TransferFailed("cut"),
    TandemError("other"),
]


class Service:
    """A DecodeService that records commands and, for each, yields all of `frames`; with an `error`, yields them once
    and fails."""

    def __init__(self, frames: list[TokenFrame] = FRAMES, error: Exception | None = None) -> None:
        self.frames = frames
        self.error = error
        self.commands: list[Command] = []
        self.commands_ended = asyncio.Event()
        self.closed = asyncio.Event()

    async def attach(self, commands: AsyncIterator[Command]) -> AsyncIterator[TokenFrame]:
        try:
            if self.error is not None:
                for frame in self.frames:
                    yield frame
                raise self.error
            async for command in commands:
                self.commands.append(command)
                for frame in self.frames:
                    yield frame
            self.commands_ended.set()
        finally:
            await asyncio.sleep(0)
            self.closed.set()


class Reading:
    """A DecodeService as a real worker is: a task of its own reads the commands."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.closed = asyncio.Event()

    async def attach(self, commands: AsyncIterator[Command]) -> AsyncIterator[TokenFrame]:
        async def read() -> None:
            async for command in commands:
                self.commands.append(command)

        reading = asyncio.create_task(read())
        try:
            yield TokenFrame(1, ())
            await asyncio.Event().wait()
        finally:
            reading.cancel()
            await asyncio.wait([reading])
            self.closed.set()


@asynccontextmanager
async def serving(service) -> AsyncIterator[tuple[str, GrpcDecodeTransport]]:
    server = await start_server("127.0.0.1:0", [decode_service(service)])
    transport = GrpcDecodeTransport()
    try:
        yield server.address, transport
    finally:
        await transport.close()
        await server.stop()


async def test_commands_and_frames_arrive_unchanged():
    service = Service()
    sent = [SUBMIT, Cancel("r-1"), Submit("r-2", (9,), SamplingParams(), 0)]
    async with serving(service) as (address, transport), transport.attach(address) as session:
        frames = session.frames()
        for command in sent:
            await session.send(command)
            assert [await anext(frames) for _ in FRAMES] == FRAMES
    assert service.commands == sent


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_a_failed_request_carries_its_error(error):
    service = Service([TokenFrame(1, (Failed("r-1", error),))])
    async with serving(service) as (address, transport), transport.attach(address) as session:
        await session.send(SUBMIT)
        (failed,) = (await anext(session.frames())).events
    assert isinstance(failed, Failed)
    assert failed.request_id == "r-1"
    assert type(failed.error) is type(error)
    assert str(failed.error) == str(error)
    assert vars(failed.error) == vars(error)


async def test_a_bugs_words_stay_on_the_worker():
    service = Service([TokenFrame(1, (Failed("r-1", KeyError("secret")),))])
    async with serving(service) as (address, transport), transport.attach(address) as session:
        await session.send(SUBMIT)
        (failed,) = (await anext(session.frames())).events
    assert isinstance(failed, Failed)
    assert str(failed.error) == "internal error"


async def test_many_tasks_send_at_once_and_one_that_gives_up_harms_nobody():
    service = Service([])
    async with serving(service) as (address, transport), transport.attach(address) as session:
        sends = [asyncio.create_task(session.send(Cancel(f"r-{index}"))) for index in range(200)]
        await asyncio.sleep(0)
        for send in sends[::3]:
            send.cancel()
        results = await asyncio.gather(*sends, return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
        await session.send(SUBMIT)
        await eventually(lambda: SUBMIT in service.commands)
    kept = [f"r-{index}" for index in range(200) if index % 3]
    order = [command.request_id for command in service.commands[:-1] if command.request_id in kept]
    assert order == kept


@pytest.mark.parametrize("make", [Service, Reading])
async def test_leaving_closes_the_service(make):
    service = make()
    async with serving(service) as (address, transport):
        async with transport.attach(address) as session:
            await session.send(SUBMIT)
            await anext(session.frames())
        async with asyncio.timeout(0.25):
            await service.closed.wait()
        with pytest.raises(Unavailable):
            await session.send(SUBMIT)
        with pytest.raises(Unavailable):
            await anext(session.frames())


async def test_a_gateway_that_is_cancelled_closes_the_service():
    service = Reading()

    async def gateway(address, transport):
        async with transport.attach(address) as session:
            async for _ in session.frames():
                pass

    async with serving(service) as (address, transport):
        task = asyncio.create_task(gateway(address, transport))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(0.25):
            await service.closed.wait()


async def test_a_stopping_worker_ends_the_stream_with_unavailable():
    service = Reading()
    server = await start_server("127.0.0.1:0", [decode_service(service)])
    transport = GrpcDecodeTransport()
    async with transport.attach(server.address) as session:
        await anext(session.frames())
        reading = asyncio.create_task(anext(session.frames()))
        await server.stop()
        assert service.closed.is_set()
        with pytest.raises(Unavailable):
            await reading
        with pytest.raises(Unavailable):
            await session.send(SUBMIT)
    await transport.close()


async def test_nobody_there_is_unavailable_on_entering():
    transport = GrpcDecodeTransport()
    with pytest.raises(Unavailable):
        async with transport.attach("127.0.0.1:1"):
            pytest.fail("there is nobody to attach to")
    await transport.close()


async def test_somebody_who_never_answers_is_unavailable_in_bounded_time():
    taken = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await taken.wait()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    transport = GrpcDecodeTransport(connect_timeout_s=0.3)
    async with asyncio.timeout(1):
        with pytest.raises(Unavailable, match="did not answer"):
            async with transport.attach(f"127.0.0.1:{port}"):
                pytest.fail("there is nobody to attach to")
    taken.set()
    await transport.close()
    server.close()
    await server.wait_closed()


async def test_a_worker_that_comes_back_is_found_again():
    first = await start_server("127.0.0.1:0", [decode_service(Reading())])
    transport = GrpcDecodeTransport()
    async with transport.attach(first.address) as session:
        await anext(session.frames())
    await first.stop()
    with pytest.raises(Unavailable):
        async with transport.attach(first.address):
            pytest.fail("there is nobody to attach to")
    second = await start_server(first.address, [decode_service(Reading())])
    async with asyncio.timeout(5):
        while True:
            try:
                async with transport.attach(first.address) as session:
                    await anext(session.frames())
                break
            except Unavailable:
                await asyncio.sleep(0.1)
    await transport.close()
    await second.stop()


async def test_a_service_that_refuses_says_why():
    """While it is attached to or with the first frame: whichever is earlier, the call's end or its metadata."""
    async with serving(Service([], Overloaded("draining", 9.0))) as (address, transport):
        with pytest.raises(Overloaded, match="draining"):
            async with transport.attach(address) as session:
                await anext(session.frames())


async def test_a_service_that_fails_says_why_in_the_frames_and_no_more_is_sent_to_it():
    service = Service(FRAMES, Overloaded("draining", 9.0))
    async with serving(service) as (address, transport), transport.attach(address) as session:
        frames = session.frames()
        assert [await anext(frames) for _ in FRAMES] == FRAMES
        with pytest.raises(Overloaded, match="draining"):
            await anext(frames)

        async def send_on() -> None:
            # What is sent before the end of the call is known here is lost, as on any link.
            while True:
                await session.send(SUBMIT)
                await asyncio.sleep(0.005)

        with pytest.raises(Unavailable):
            await asyncio.wait_for(send_on(), 5)


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff", b"", b"\x12\x03\x0a\x01\xff"])
async def test_a_command_that_cannot_be_read_ends_its_stream_and_no_other(garbage):
    service = Service()
    async with serving(service) as (address, transport):
        channels = Channels()
        rpc = channels.get(address).stream_stream(METHOD)(iter([garbage]))
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            await anext(aiter(rpc))
        await channels.close()
        async with transport.attach(address) as session:
            await session.send(SUBMIT)
            assert await anext(session.frames()) == FRAMES[0]


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff",
        worker_pb2.TokenFrame(events=[worker_pb2.Event(request_id="r")]).SerializeToString(),
        worker_pb2.TokenFrame(
            events=[worker_pb2.Event(delta=worker_pb2.Delta(finish_reason="tired"))]
        ).SerializeToString(),
    ],
)
def test_a_frame_that_cannot_be_read_is_corrupt(raw):
    with pytest.raises(CorruptFrame):
        frame_from_bytes(raw)


async def test_a_command_that_cannot_be_read_ends_nobody_elses_request():
    """The stream is a whole gateway's."""
    worker = DecodeWorker(
        runner(64), DecodeConfig(), ScriptedTransport(), worker_id="d", eos_token_ids=frozenset(), max_context=256
    )
    long = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    too_many = SamplingParams(stop=tuple(map(str, range(20))))
    async with running(worker.run()), serving(worker) as (address, transport), transport.attach(address) as session:
        await session.send(Submit("good", (1, 2, 3), long, 0))
        await session.send(Submit("bad", (1, 2, 3), too_many, 0))
        ended: list[Event] = []
        async for frame in session.frames():
            ended += [event for event in frame.events if isinstance(event, Done | Failed)]
            if len(ended) == 2:
                break
        # What is no command at all is nobody's request.
        await session._rpc.write(b"no command")
        with pytest.raises(InvalidArgument):
            await anext(session.frames())
    assert {event.request_id for event in ended if isinstance(event, Done)} == {"good"}
    [failed] = [event for event in ended if isinstance(event, Failed)]
    assert failed.request_id == "bad"
    assert str(failed.error) == "sampling_params.stop: got '20 entries', expected at most 16"
