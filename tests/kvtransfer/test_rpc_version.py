"""Releases side by side agree on a version, or refuse and say why; fields that one of them adds change nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc.aio
import msgpack
import pytest
import xxhash
from google.protobuf.message import Message
from tandem.v1 import prefill_pb2, worker_pb2

from cluster.registry import HeartbeatReply, WorkerReport
from cluster.registry_server import registry_service, report_from_proto, report_to_proto, send_heartbeat
from decode_worker.convert import command_from_bytes, command_to_bytes, frame_from_bytes, frame_to_bytes
from decode_worker.grpc_transport import GrpcDecodeTransport
from decode_worker.server import decode_service
from decode_worker.stream import Command, Delta, TokenFrame
from engine.batch import Sampled
from engine.errors import HandedBack, VersionMismatch
from engine.stats import LoopStats
from kvtransfer import frames
from kvtransfer.frames import Begin, End, FirstToken, Frame, KVBlocks
from kvtransfer.grpc_transport import GrpcPrefillTransport, call_to_proto
from kvtransfer.rpc import error_from_bytes, error_to_bytes
from kvtransfer.rpc_channel import Channels
from kvtransfer.rpc_server import RpcService, start_server
from kvtransfer.rpc_version import KEY, SPOKEN, Versions
from kvtransfer.transport import PrefillCall
from prefill_worker.server import call_from_proto, prefill_service
from tests.emulated import call, layout, submit

OLD, NEXT, NEW = Versions(1, 1), Versions(1, 2), Versions(2, 3)


@pytest.mark.parametrize(
    ("own", "said", "common"),
    [
        (OLD, "1-1", 1),
        (NEXT, "1-1", 1),
        (NEXT, "2-3", 2),
        (NEW, "1-9", 3),
        (Versions(4, 4), "4-4", 4),
        (OLD, None, 1),
        (NEXT, None, 1),
    ],
)
def test_the_highest_version_that_both_know_is_agreed_on(own: Versions, said: str | None, common: int):
    metadata = (("user-agent", "grpc"), *(((KEY, said),) if said is not None else ()))
    assert own.agree(metadata, "the caller", "the server") == common


@pytest.mark.parametrize(
    ("own", "said", "problem"),
    [
        (OLD, "2-3", "the caller speaks versions 2-3 of Tandem's protocol, the server 1-1: upgrade the server"),
        (NEW, "1-1", "the caller speaks versions 1-1 of Tandem's protocol, the server 2-3: upgrade the caller"),
        (NEW, None, "the caller speaks versions 1-1 of Tandem's protocol, the server 2-3: upgrade the caller"),
        (NEW, "two", "the caller speaks 'two' of the protocol, which is no range of versions"),
        (NEW, "-2", "the caller speaks '-2' of the protocol, which is no range of versions"),
    ],
)
def test_nothing_in_common_is_said_and_what_to_do(own: Versions, said: str | None, problem: str):
    with pytest.raises(VersionMismatch) as caught:
        own.agree(((KEY, said),) if said is not None else None, "the caller", "the server")
    assert str(caught.value).startswith(problem)


# ── over gRPC ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Answering:
    """A worker of either role that has one thing to say."""

    async def prefill(self, call: PrefillCall) -> AsyncIterator[Frame]:
        yield End(0, 0)

    async def attach(self, commands: AsyncIterator[Command]) -> AsyncIterator[TokenFrame]:
        yield TokenFrame(1, ())


async def ask_prefill(address: str, channels: Channels, spoken: Versions) -> object:
    async with GrpcPrefillTransport(channels, spoken=spoken).open(address, call(3)) as stream:
        return await anext(stream)


async def ask_decode(address: str, channels: Channels, spoken: Versions) -> object:
    async with GrpcDecodeTransport(channels, spoken=spoken).attach(address) as session:
        return await anext(aiter(session.frames()))


async def beat(address: str, channels: Channels, spoken: Versions) -> object:
    report = WorkerReport("w", "decode", "w:1", 1, "m", LoopStats(0, 0, 0, 8, 8, 0, 16, 0))
    return await send_heartbeat(channels, address, report, spoken=spoken)


Ask = Callable[[str, Channels, Versions], Awaitable[object]]
CALLS: dict[Ask, tuple[Callable[[], RpcService], str]] = {
    ask_prefill: (lambda: prefill_service(Answering()), "prefill worker"),
    ask_decode: (lambda: decode_service(Answering()), "decode worker"),
    beat: (lambda: registry_service(lambda report: HeartbeatReply(1.0)), "gateway"),
}


@asynccontextmanager
async def serving(service: RpcService, spoken: Versions = SPOKEN) -> AsyncIterator[tuple[str, Channels]]:
    server = await start_server("127.0.0.1:0", [service], spoken=spoken)
    channels = Channels()
    try:
        yield server.address, channels
    finally:
        await channels.close()
        await server.stop()


@pytest.mark.parametrize("ask", CALLS)
@pytest.mark.parametrize(("caller", "server"), [(OLD, OLD), (OLD, NEXT), (NEXT, OLD), (NEXT, NEW), (NEW, NEXT)])
async def test_releases_with_a_version_in_common_work_together(ask: Ask, caller: Versions, server: Versions):
    async with serving(CALLS[ask][0](), server) as (address, channels):
        assert await ask(address, channels, caller) is not None


@pytest.mark.parametrize("ask", CALLS)
@pytest.mark.parametrize(("caller", "server", "older"), [(OLD, NEW, "the caller of"), (NEW, OLD, "the server")])
async def test_releases_without_one_refuse_each_other(ask: Ask, caller: Versions, server: Versions, older: str):
    async with serving(CALLS[ask][0](), server) as (address, channels):
        for _ in range(2):
            with pytest.raises(VersionMismatch) as caught:
                await ask(address, channels, caller)
            text = str(caught.value)
            assert f"speaks versions {caller} of Tandem's protocol, the server {server}: upgrade {older}" in text


@pytest.mark.parametrize("ask", CALLS)
async def test_a_server_from_before_versions_counts_as_the_first(ask: Ask):
    async with serving(replace(CALLS[ask][0](), is_internal=False)) as (address, channels):
        assert await ask(address, channels, NEXT) is not None
        problem = rf"{CALLS[ask][1]}.* speaks versions 1-1 of Tandem's protocol, its caller 2-3: upgrade the"
        with pytest.raises(VersionMismatch, match=problem):
            await ask(address, channels, NEW)


@pytest.mark.parametrize(("server", "is_served"), [(OLD, True), (NEXT, True), (NEW, False)])
async def test_a_caller_from_before_versions_counts_as_the_first(server: Versions, is_served: bool):
    async with serving(prefill_service(Answering()), server) as (address, channels):
        rpc = channels.get(address).unary_stream("/tandem.v1.PrefillWorker/Prefill")
        stream = aiter(rpc(call_to_proto(call(3)).SerializeToString()))
        if is_served:
            assert len([message async for message in stream]) == 1
        else:
            with pytest.raises(grpc.aio.AioRpcError, match="speaks versions 1-1 of Tandem's protocol, the server 2-3"):
                await anext(stream)


async def test_a_worker_reports_on_once_its_gateway_has_been_upgraded():
    """A refused heartbeat is tried again, like any other that fails."""
    service = registry_service(lambda report: HeartbeatReply(1.0))
    async with serving(service, OLD) as (address, channels):
        with pytest.raises(VersionMismatch):
            await beat(address, channels, NEW)
    port = address.rpartition(":")[2]
    server = await start_server(f"127.0.0.1:{port}", [service], spoken=NEW)
    channels = Channels()
    async with asyncio.timeout(10):
        assert await beat(address, channels, NEW) == HeartbeatReply(1.0)
    await channels.close()
    await server.stop()


# ── fields that a later release may add ──────────────────────────────────────────────────────────────────────────────


def with_unknown(message: Message) -> bytes:
    """The message with a varint, a double and a string in fields that nobody knows, before and after the known ones."""
    number = bytes([0x80 | (1000 << 3) & 0x7F, (1000 << 3) >> 7, 42])
    double = bytes([0x81 | (1001 << 3) & 0x7F, (1001 << 3) >> 7]) + b"12345678"
    text = bytes([0x82 | (1002 << 3) & 0x7F, (1002 << 3) >> 7, 3]) + b"new"
    return number + double + message.SerializeToString() + text


def test_a_report_with_more_fields_is_the_same_report():
    report = WorkerReport("w", "decode", "w:1", 1, "m", LoopStats(1, 2, 3, 8, 8, 0, 16, 9), (("p:1", 1e9),))
    raw = with_unknown(report_to_proto(report))
    assert len(worker_pb2.WorkerStats.FromString(raw).SerializeToString()) == len(raw), "they are there, and kept"
    assert report_from_proto(worker_pb2.WorkerStats.FromString(raw)) == report


def test_a_reply_with_more_fields_is_the_same_reply():
    reply = worker_pb2.HeartbeatReply(interval_s=1.0, role="decode", on_its_way=3)
    read = worker_pb2.HeartbeatReply.FromString(with_unknown(reply))
    assert (read.interval_s, read.role, read.on_its_way) == (1.0, "decode", 3)


def test_a_prefill_call_with_more_fields_is_the_same_call():
    asked = call(9)
    raw = with_unknown(call_to_proto(asked))
    assert call_from_proto(prefill_pb2.PrefillRequest.FromString(raw), None) == asked


def test_commands_and_token_frames_with_more_fields_are_the_same():
    asked = submit(9)
    command = worker_pb2.Command.FromString(command_to_bytes(asked))
    inner = worker_pb2.Submit.FromString(with_unknown(command.submit))
    assert command_from_bytes(with_unknown(worker_pb2.Command(submit=inner))) == asked
    frame = TokenFrame(7, (Delta("r", 0, (Sampled(5),)),))
    message = worker_pb2.TokenFrame.FromString(frame_to_bytes(frame))
    assert frame_from_bytes(with_unknown(message)) == frame


@pytest.mark.parametrize(
    "frame",
    [
        Begin(9, 0, 0, layout()),
        KVBlocks(0, 1, 4, 0, 2, b"12345678"),
        FirstToken((Sampled(5, -0.5),), 0.1, 0.2),
        End(8, 0),
    ],
    ids=lambda frame: type(frame).__name__,
)
def test_a_kv_frame_with_more_in_its_header_is_the_same_frame(frame: Frame):
    wire = b"".join(frames.encode(frame, lease=7))
    _, size, _ = frames.PREFIX.unpack_from(wire)
    header, payload = msgpack.unpackb(wire[frames.PREFIX.size :][:size]), wire[frames.PREFIX.size + size :]
    header["codec"] = {"name": "new", "level": 3}
    if "layout" in header:
        header["layout"]["more"] = 1
    packed = msgpack.packb(header)
    checksum = xxhash.xxh3_64_intdigest(packed + payload)
    assert frames.decode(frames.PREFIX.pack(frames.MAGIC, len(packed), checksum) + packed + payload, lease=7) == frame


def test_an_error_with_more_attributes_is_the_same_error():
    content = msgpack.unpackb(error_to_bytes(HandedBack("it leaves")))
    content["new"] = 1
    content["fields"]["more"] = "yes"
    error = error_from_bytes(msgpack.packb(content))
    assert type(error) is HandedBack
    assert str(error) == "it leaves"
