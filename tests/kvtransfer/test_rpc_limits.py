"""What one call may cost: readers that stop, calls that last, requests that never come, more than fits."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from bench.raw_http2 import HEADERS, RST_STREAM, WINDOW_UPDATE, RawConnection, RawFrame
from engine.errors import Overloaded
from kvtransfer import rpc
from kvtransfer.frames import Frame, KVBlocks
from kvtransfer.rpc_channel import Channels
from kvtransfer.rpc_limits import CallLimits, PortLimits
from kvtransfer.rpc_server import RpcServer, start_server
from prefill_worker.server import prefill_service
from tests.eventually import eventually

PREFILL = "/tandem.v1.PrefillWorker/Prefill"
HEALTH = "/grpc.health.v1.Health/Check"
OK, INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED = 0, 3, 4, 8
LIMIT_S = 0.3


class Service:
    """Yields `count` frames of 1,000 bytes, then hangs or fails. Counts the calls whose cleanup has begun and ended."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.count = count
        self.error = error
        self.began = self.ended = 0

    async def prefill(self, call) -> AsyncIterator[Frame]:
        self.began += 1
        try:
            for index in range(self.count):
                yield KVBlocks(16 * index, 1, 16, 0, 1, bytes(1000))
            if self.error is not None:
                raise self.error
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            self.ended += 1


@asynccontextmanager
async def serving(service: Service, limits: CallLimits, port: PortLimits | None = None) -> AsyncIterator[RpcServer]:
    server = await start_server("127.0.0.1:0", [prefill_service(service).within(limits)], limits=port or PortLimits())
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def connected(server: RpcServer, **options) -> AsyncIterator[RawConnection]:
    connection = await RawConnection.open(server.address, **options)
    try:
        yield connection
    finally:
        await connection.close()


def tasks_of_calls() -> int:
    return sum(task.get_name() == "rpc_task" for task in asyncio.all_tasks())


def cut_off(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "cut off" in record.getMessage()]


async def test_a_reader_that_stops_loses_its_call_and_one_that_reads_on_learns_why(caplog):
    service = Service(100)
    async with serving(service, CallLimits(write_s=LIMIT_S)) as server, connected(server, window=2500) as connection:
        stream = connection.call(PREFILL, b"")
        await eventually(lambda: service.ended == 1)
        assert connection.status(stream) is None
        connection.send(RawFrame(WINDOW_UPDATE, 0, stream, struct.pack(">I", 100_000)))
        await eventually(lambda: connection.status(stream) is not None)
        assert connection.status(stream) == RESOURCE_EXHAUSTED
        assert connection.says(stream, b"the answer was not read for 0.3 s")
        assert connection.says(stream, rpc.PUSHBACK_KEY.encode())
    assert len(cut_off(caplog)) == 1
    assert "127.0.0.1: /tandem.v1.PrefillWorker/Prefill was cut off: the answer was not read" in cut_off(caplog)[0]


@pytest.mark.parametrize("window", [0, 2500])
async def test_the_call_of_a_reader_that_never_reads_on_is_reset_and_its_neighbours_are_not(window, caplog):
    """gRPC by itself would keep such calls for as long as their connection lives."""
    service = Service(100)
    async with (
        serving(service, CallLimits(write_s=LIMIT_S)) as server,
        connected(server, window=window) as connection,
    ):
        streams = [connection.call(PREFILL, b"") for _ in range(20)]
        # gRPC itself holds on to a server's first call and to its last.
        await eventually(lambda: all(connection.of(stream, RST_STREAM) for stream in streams[1:-1]))
        await eventually(lambda: tasks_of_calls() == 0)
        assert service.began == service.ended == 20
        healthy = connection.call(HEALTH, b"")
        connection.send(RawFrame(WINDOW_UPDATE, 0, healthy, struct.pack(">I", 1000)))
        await eventually(lambda: len(connection.of(healthy, HEADERS)) == 2)
        assert not connection.is_closed.is_set()
    assert len(cut_off(caplog)) == 1


@pytest.mark.parametrize(("step", "is_cut"), [(1100, False), (20, True)], ids=["slowly", "a word now and then"])
async def test_a_slow_reader_has_its_time_and_one_that_stalls_has_not(step, is_cut):
    service = Service(5, Overloaded("that is all"))
    async with serving(service, CallLimits(write_s=0.4)) as server, connected(server, window=2500) as connection:
        stream = connection.call(PREFILL, b"")
        for _ in range(10):
            await asyncio.sleep(0.15)
            connection.send(RawFrame(WINDOW_UPDATE, 0, stream, struct.pack(">I", step)))
        connection.send(RawFrame(WINDOW_UPDATE, 0, stream, struct.pack(">I", 10_000)))
        await eventually(lambda: connection.status(stream) is not None)
        assert connection.says(stream, b"that is all") != is_cut
        assert connection.says(stream, b"was not read") == is_cut


@pytest.mark.parametrize("frames", [0, 100], ids=["waiting", "writing"])
async def test_a_call_that_lasts_too_long_is_ended_whatever_it_does(frames):
    service = Service(frames)
    async with serving(service, CallLimits(age_s=LIMIT_S)) as server:
        channels = Channels()
        call = channels.get(server.address).unary_stream(PREFILL)(b"")
        await eventually(lambda: service.ended == 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "the call, which may take 0.3 s" in str(caught.value.details())
        await channels.close()
        await eventually(lambda: tasks_of_calls() == 0)


async def test_a_request_that_never_comes_holds_its_call_for_a_bounded_time():
    service = Service(1)
    async with serving(service, CallLimits(request_s=LIMIT_S)) as server, connected(server) as connection:
        stream = connection.call(PREFILL, None)
        await eventually(lambda: connection.status(stream) is not None)
        assert connection.status(stream) == DEADLINE_EXCEEDED
        assert connection.says(stream, b"the request's arrival, which may take 0.3 s")
        assert service.began == 0


async def test_a_call_without_a_request_is_an_invalid_argument():
    async with serving(Service(1), CallLimits()) as server:
        channels = Channels()
        call = channels.get(server.address).stream_stream(PREFILL)()
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        await channels.close()


async def test_a_full_port_refuses_calls_with_a_time_to_come_again_and_still_says_that_it_lives(caplog):
    service = Service(1)
    async with serving(service, CallLimits(), PortLimits(calls=2)) as server:
        channels = Channels()
        channel = channels.get(server.address)
        held = [channel.unary_stream(PREFILL)(b"") for _ in range(2)]
        for call in held:
            await call.read()
        for _ in range(3):
            refused = channel.unary_stream(PREFILL)(b"")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await refused.read()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert isinstance(rpc.error_from_rpc(caught.value), Overloaded)
            assert (rpc.PUSHBACK_KEY, "1000") in list(caught.value.trailing_metadata())
        check = channel.unary_unary(HEALTH, response_deserializer=health_pb2.HealthCheckResponse.FromString)
        assert (await check(b"")).status == health_pb2.HealthCheckResponse.SERVING
        assert service.began == 2
        for call in held:
            call.cancel()
        await channels.close()
    assert sum("was refused" in record.getMessage() for record in caplog.records) == 1


async def test_channels_of_workers_that_are_gone_do_not_pile_up():
    channels = Channels(max_channels=3)
    with channels.use("127.0.0.1:1") as held:
        for port in range(2, 100):
            with channels.use(f"127.0.0.1:{port}"):
                pass
        assert len(channels._channels) == 3
        assert channels.get("127.0.0.1:1") is held
    await channels.close()
