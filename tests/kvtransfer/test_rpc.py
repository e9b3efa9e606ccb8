"""Errors across a real connection: the same class with the same attributes arrives, and no bytes crash anything."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import KVLayout
from engine.errors import (
    Cancelled,
    ConfigError,
    CorruptFrame,
    DeadlineExceeded,
    InvalidArgument,
    LayoutMismatch,
    ModelFileError,
    NotFound,
    Overloaded,
    PermissionDenied,
    TandemError,
    TransferFailed,
    Unauthenticated,
    Unavailable,
)
from engine.sampling import SamplingParams
from kvtransfer import rpc
from kvtransfer.frames import Frame
from kvtransfer.grpc_transport import GrpcPrefillTransport
from kvtransfer.rpc_channel import Channels
from kvtransfer.rpc_limits import PortLimits
from kvtransfer.rpc_server import RpcServer, start_server
from kvtransfer.transport import PrefillCall
from prefill_worker.server import prefill_service

CALL = PrefillCall("r", (1, 2), SamplingParams(), 0, 0, KVLayout("m", 1, 1, 1, "float32", 16, 1))
PREFILL = "/tandem.v1.PrefillWorker/Prefill"

ERRORS = [
    (InvalidArgument("sampling_params.top_p", 7.5, "a number in (0, 1]"), grpc.StatusCode.INVALID_ARGUMENT),
    (NotFound("model", "gpt-9", "smollm2"), grpc.StatusCode.NOT_FOUND),
    (PermissionDenied("this is for operators"), grpc.StatusCode.PERMISSION_DENIED),
    (Overloaded("the prefill queue is full", 2.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineExceeded("prefill queue"), grpc.StatusCode.DEADLINE_EXCEEDED),
    (Cancelled("the client left"), grpc.StatusCode.CANCELLED),
    (Unavailable("worker p0 is draining"), grpc.StatusCode.UNAVAILABLE),
    (CorruptFrame("checksum mismatch"), grpc.StatusCode.DATA_LOSS),
    (LayoutMismatch("30 layers here, 32 there"), grpc.StatusCode.FAILED_PRECONDITION),
    (TransferFailed("half of it is missing"), grpc.StatusCode.ABORTED),
    (ModelFileError("/models/x.gguf", "truncated"), grpc.StatusCode.INTERNAL),
    (ConfigError("port 80 is taken"), grpc.StatusCode.INTERNAL),
    (TandemError("something else"), grpc.StatusCode.INTERNAL),
]


class Failing:
    """A PrefillService whose every call ends with `error`."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def prefill(self, call: PrefillCall) -> AsyncIterator[Frame]:
        raise self.error
        yield


@asynccontextmanager
async def serving(error: BaseException, **options) -> AsyncIterator[tuple[RpcServer, Channels]]:
    server = await start_server("127.0.0.1:0", [prefill_service(Failing(error))], **options)
    channels = Channels()
    try:
        yield server, channels
    finally:
        await channels.close()
        await server.stop()


async def call_error(server: RpcServer, channels: Channels, call: PrefillCall = CALL) -> TandemError:
    with pytest.raises(TandemError) as caught:
        async with GrpcPrefillTransport(channels).open(server.address, call) as frames:
            await anext(frames)
    return caught.value


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda value: type(value).__name__)
async def test_every_error_keeps_class_message_and_attributes(error, code):
    async with serving(error) as (server, channels):
        arrived = await call_error(server, channels)
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)
    assert isinstance(arrived.__cause__, grpc.aio.AioRpcError)
    assert arrived.__cause__.code() is code


async def test_why_a_caller_is_not_known_stays_on_this_side():
    async with serving(Unauthenticated("the key is not valid", "a wrong key of acme")) as (server, channels):
        arrived = await call_error(server, channels)
    assert type(arrived) is Unauthenticated
    assert (str(arrived), arrived.detail) == ("the key is not valid", "")
    assert arrived.__cause__.code() is grpc.StatusCode.UNAUTHENTICATED
    assert b"acme" not in rpc.error_to_bytes(Unauthenticated("the key is not valid", "a wrong key of acme"))


async def test_an_unknown_subclass_arrives_as_its_nearest_known_base():
    class PoolFull(Overloaded):
        pass

    async with serving(PoolFull("no blocks", 3.0)) as (server, channels):
        arrived = await call_error(server, channels)
    assert type(arrived) is Overloaded
    assert arrived.retry_after_s == 3.0


async def test_a_bug_is_logged_and_hidden_and_the_service_goes_on(caplog):
    async with serving(ZeroDivisionError("the secret is 42")) as (server, channels):
        for _ in range(2):
            arrived = await call_error(server, channels)
            assert str(arrived) == "INTERNAL: internal error"
    with_traceback = [record for record in caplog.records if record.exc_info and record.levelno == logging.ERROR]
    assert len(with_traceback) == 2


async def test_long_texts_and_odd_characters_fit_into_the_trailers():
    async with serving(InvalidArgument("ü" * 5000, "\ud800\n\0" * 50, "日" * 5000)) as (server, channels):
        arrived = await call_error(server, channels)
    assert isinstance(arrived, InvalidArgument)
    assert arrived.field == "ü" * (rpc.FIELD_BYTES_MAX // 2)


async def test_a_request_that_cannot_be_parsed_is_an_invalid_argument():
    async with serving(AssertionError("not reached")) as (server, channels):
        raw = channels.get(server.address).unary_stream(PREFILL)
        # Garbage; then a `request_id` (field 1) that is not UTF-8.
        for request in (b"\xff\xff\xff\xff", b"\x0a\x02\xff\xfe"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(raw(request)))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert isinstance(rpc.error_from_rpc(caught.value), InvalidArgument)


async def test_an_oversized_message_is_refused_and_the_service_goes_on():
    async with serving(NotFound("model", "m"), limits=PortLimits(request_bytes=1000)) as (server, channels):
        long = PrefillCall("r", tuple(range(100_000)), SamplingParams(), 0, 0, CALL.layout)
        assert isinstance(await call_error(server, channels, long), InvalidArgument)
        assert isinstance(await call_error(server, channels), NotFound)


async def test_too_many_calls_at_once_are_overload():
    async with serving(NotFound("model", "m"), limits=PortLimits(calls=1)) as (server, channels):
        watch = channels.get(server.address).unary_stream("/grpc.health.v1.Health/Watch")(b"")
        await anext(aiter(watch))
        assert isinstance(await call_error(server, channels), Overloaded)
        watch.cancel()


async def test_a_service_that_is_not_there_is_an_error_not_a_crash():
    async with serving(NotFound("model", "m")) as (server, channels):
        with pytest.raises(TandemError, match="UNIMPLEMENTED"):
            async with rpc.rpc_errors():
                await channels.get(server.address).unary_unary("/tandem.v1.Nothing/Nothing")(b"")


async def test_closing_the_channels_under_a_call_is_unavailable_not_a_cancelled_task():
    async with serving(NotFound("model", "m")) as (server, channels):
        watch = channels.get(server.address).unary_stream("/grpc.health.v1.Health/Watch")(b"")
        messages = rpc.MessageReader(watch, bytes)
        await anext(messages)
        reading = asyncio.create_task(anext(messages))
        await asyncio.sleep(0.05)
        await channels.close()
        with pytest.raises(Unavailable):
            await reading
        with pytest.raises(Unavailable):
            await anext(messages)


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\xc1",
        b"\xff" * 100,
        msgpack.packb([]),
        msgpack.packb({"class": "SystemExit", "message": "m", "fields": {}}),
        msgpack.packb({"class": ["list"], "message": "m", "fields": {}}),
        msgpack.packb({"class": "Overloaded", "message": "m", "fields": {"reason": 3, "retry_after_s": 1}}),
        msgpack.packb({"class": "Overloaded", "message": "m", "fields": {"reason": "r"}}),
        msgpack.packb({"class": "Overloaded", "message": "m", "fields": {"reason": "r", "retry_after_s": None}}),
        msgpack.packb({"class": "NotFound", "message": 5, "fields": None}),
    ],
)
def test_malformed_metadata_falls_back_to_the_status(packed):
    metadata = grpc.aio.Metadata((rpc.ERROR_KEY, packed))
    error = grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), metadata, "full")
    arrived = rpc.error_from_rpc(error)
    assert type(arrived) is Overloaded
    assert str(arrived) == "full"
    assert arrived.retry_after_s == 1.0


@given(
    st.binary()
    | st.dictionaries(st.text(), st.text() | st.integers(-(1 << 63), (1 << 64) - 1) | st.binary()).map(msgpack.packb)
)
def test_no_bytes_crash_the_reader(packed):
    assert isinstance(rpc.error_from_bytes(packed), TandemError | None)


@given(st.text(), st.text(), st.text())
def test_error_bytes_round_trip(field, value, expected):
    error = InvalidArgument(field, value, expected)
    packed = rpc.error_to_bytes(error)
    assert len(packed) < 4096
    arrived = rpc.error_from_bytes(packed)
    assert type(arrived) is InvalidArgument
    if max(map(len, (field, value, expected))) < 60:
        assert vars(arrived) == vars(error)


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_status_alone_gives_an_error(code):
    error = rpc.error_from_status(code, "text")
    assert isinstance(error, TandemError)
    assert "text" in str(error)
    assert type(rpc.error_from_parts(code.value[0], "text", b"")) is type(error)


def test_an_unknown_status_number_gives_an_error():
    assert str(rpc.error_from_parts(4711, "text", b"")) == "UNKNOWN: text"
