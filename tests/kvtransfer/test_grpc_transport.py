"""The KV stream over real gRPC: bytes on the wire, pull, cancel, deadlines, and peers that die or freeze."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.v1 import kv_pb2

from engine.batch import KVLayout, Sampled
from engine.errors import CorruptFrame, DeadlineExceeded, LayoutMismatch, NotFound, Unavailable
from engine.sampling import SamplingParams
from kvtransfer.frames import Begin, Damaged, End, FirstToken, Frame, KVBlocks, encode
from kvtransfer.grpc_transport import METHOD, GrpcPrefillTransport, frame_from_message, frame_to_message
from kvtransfer.rpc_channel import Channels, KeepAlive
from kvtransfer.rpc_server import start_server
from kvtransfer.transport import PrefillCall
from prefill_worker.server import prefill_service

ROOT = Path(__file__).parents[2]
LAYOUT = KVLayout("m", 30, 3, 64, "bfloat16", 16, 100)
CALL = PrefillCall(
    request_id="r-1",
    token_ids=tuple(range(300)),
    params=SamplingParams(temperature=0.7, logit_bias=((3, -1.5), (7, 0.1)), stop=("é", "\n\n"), logprobs=0, seed=-5),
    seed=-(1 << 63),
    have_tokens=32,
    layout=LAYOUT,
    salt=b"\x00\xff",
)
BIG = 2 << 20


def kv(size: int, index: int = 0) -> KVBlocks:
    return KVBlocks(16 * index, 1, 16, 0, 1, bytes([index % 251]) * size)


FRAMES: list[Frame] = [
    Begin(300, 32, 16, LAYOUT),
    kv(1000),
    FirstToken((Sampled(7, -0.25, ((7, -0.25), (9, -3.5))),), 0.125, 0.5),
    kv(BIG, 1),
    KVBlocks(2, 1, 16, 0, 1, b""),
    End(BIG + 1000, 1000),
]


class Service:
    """Yields `frames`, counts what it was asked for, and tells when its generator was closed and cleaned up."""

    def __init__(self, frames: list[Frame], error: Exception | None = None, hang: bool = False) -> None:
        self.frames = frames
        self.error = error
        self.hang = hang
        self.calls: list[PrefillCall] = []
        self.asked = 0
        self.called = asyncio.Event()
        self.closed = asyncio.Event()

    async def prefill(self, call: PrefillCall) -> AsyncIterator[Frame]:
        self.calls.append(call)
        self.called.set()
        try:
            for frame in self.frames:
                self.asked += 1
                yield frame
            if self.hang:
                await asyncio.Event().wait()
            if self.error is not None:
                raise self.error
        finally:
            await asyncio.sleep(0)
            self.closed.set()


@asynccontextmanager
async def serving(service, **options) -> AsyncIterator[tuple[str, GrpcPrefillTransport]]:
    server = await start_server("127.0.0.1:0", [prefill_service(service)], **options)
    transport = GrpcPrefillTransport()
    try:
        yield server.address, transport
    finally:
        await transport.close()
        await server.stop()


async def test_frames_and_the_call_arrive_unchanged():
    service = Service(FRAMES)
    async with serving(service) as (address, transport), transport.open(address, CALL) as frames:
        assert [frame async for frame in frames] == FRAMES
        with pytest.raises(StopAsyncIteration):
            await anext(frames)
    assert service.calls == [CALL]


async def test_a_payload_is_a_view_not_a_copy():
    async with serving(Service([kv(BIG)])) as (address, transport), transport.open(address, CALL) as frames:
        frame = await anext(frames)
    assert isinstance(frame, KVBlocks)
    assert isinstance(frame.payload, memoryview)
    assert len(frame.payload.obj) > BIG, "the view should look into the message as gRPC gave it"


async def test_a_foreign_client_reads_ordinary_protobuf():
    async with serving(Service(FRAMES)) as (address, _):
        channels = Channels()
        calls = channels.get(address).unary_stream(METHOD, response_deserializer=kv_pb2.KVFrame.FromString)(b"")
        received = [message.frame async for message in calls]
        await channels.close()
    assert received == [b"".join(encode(frame)) for frame in FRAMES]


@given(st.integers(0, 300_000) | st.sampled_from([127, 128, 16383, 16384, 2097151, 2097152]))
def test_messages_are_what_protobuf_writes(size):
    frame = kv(size)
    message = frame_to_message(frame)
    assert kv_pb2.KVFrame.FromString(message).frame == b"".join(encode(frame))
    assert frame_from_message(message) == frame


@given(st.binary(max_size=64))
def test_no_bytes_crash_the_reader(message):
    with pytest.raises(CorruptFrame):
        frame_from_message(message)


def test_a_truncated_or_stretched_message_is_corrupt():
    message = frame_to_message(kv(1000))
    for cut in range(0, len(message), 7):
        with pytest.raises(CorruptFrame):
            frame_from_message(message[:cut])
    for damaged in (message + b"\0", message[:-1] + b"x", b"\x0a" + b"\xff" * 12):
        with pytest.raises(CorruptFrame):
            frame_from_message(damaged)


async def test_a_reader_that_stops_stalls_the_generator_and_nobody_else():
    service = Service([kv(BIG, index) for index in range(20)])
    async with serving(service) as (address, transport), transport.open(address, CALL) as stalled:
        await anext(stalled)
        await asyncio.sleep(0.5)
        # The frame that was read, the one under way, and at most one more.
        assert service.asked <= 3
        async with transport.open(address, replace(CALL, request_id="r-2")) as others:
            assert [frame.first_token async for frame in others] == list(range(0, 320, 16))
        asked_by_now = service.asked - 20
        assert asked_by_now <= 3
        assert [frame.first_token async for frame in stalled] == list(range(16, 320, 16))


async def test_a_reader_that_never_reads_stalls_the_generator_too():
    service = Service([kv(1 << 20) for _ in range(50)])
    async with serving(service) as (address, transport), transport.open(address, CALL):
        await asyncio.sleep(0.5)
        assert 1 <= service.asked <= 4


@pytest.mark.parametrize("frames_read", [0, 1, 3])
async def test_leaving_closes_the_generator_at_once(frames_read):
    service = Service([kv(BIG) for _ in range(3)], hang=True)
    async with serving(service) as (address, transport):
        async with transport.open(address, CALL) as frames:
            for _ in range(frames_read):
                await anext(frames)
            await service.called.wait()
        async with asyncio.timeout(0.25):
            await service.closed.wait()


async def test_leaving_in_the_middle_of_a_blocked_write_closes_the_generator():
    service = Service([kv(BIG) for _ in range(50)])
    async with serving(service) as (address, transport):
        async with transport.open(address, CALL) as frames:
            await anext(frames)
            await asyncio.sleep(0.2)
        async with asyncio.timeout(0.25):
            await service.closed.wait()
        assert service.asked < 50


async def test_cancelling_the_reader_closes_the_generator():
    service = Service([kv(10)], hang=True)

    async def read(address, transport):
        async with transport.open(address, CALL) as frames:
            async for _ in frames:
                pass

    async with serving(service) as (address, transport):
        reading = asyncio.create_task(read(address, transport))
        await asyncio.sleep(0.1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        async with asyncio.timeout(0.25):
            await service.closed.wait()


async def test_the_deadline_travels_and_ends_the_call_on_both_sides():
    service = Service([kv(10)], hang=True)
    async with serving(service) as (address, transport):
        async with transport.open(address, replace(CALL, deadline_s=0.3)) as frames:
            await anext(frames)
            with pytest.raises(DeadlineExceeded):
                await anext(frames)
        async with asyncio.timeout(0.25):
            await service.closed.wait()
    assert service.calls[0].deadline_s == pytest.approx(0.3, abs=0.15)


async def test_an_error_after_frames_comes_after_them():
    service = Service([kv(BIG)] * 3, error=LayoutMismatch("30 layers, 32 expected"))
    async with serving(service) as (address, transport), transport.open(address, CALL) as frames:
        for _ in range(3):
            await anext(frames)
        for _ in range(2):
            with pytest.raises(LayoutMismatch, match="32 expected"):
                await anext(frames)


async def test_nobody_there_is_unavailable():
    transport = GrpcPrefillTransport()
    with pytest.raises(Unavailable):
        async with transport.open("127.0.0.1:1", CALL) as frames:
            await anext(frames)
    await transport.close()


async def test_one_connection_per_address_serves_many_calls():
    service = Service(FRAMES)
    async with serving(service) as (address, transport):

        async def read() -> int:
            async with transport.open(address, CALL) as frames:
                return len([frame async for frame in frames])

        assert await asyncio.gather(*(read() for _ in range(16))) == [len(FRAMES)] * 16


SERVER = """
import asyncio
from kvtransfer.frames import KVBlocks
from kvtransfer.rpc_channel import KeepAlive
from kvtransfer.rpc_server import start_server
from prefill_worker.server import prefill_service

class Endless:
    async def prefill(self, call):
        yield KVBlocks(0, 1, 16, 0, 1, b"x")
        await asyncio.Event().wait()

async def main():
    server = await start_server("127.0.0.1:0", [prefill_service(Endless())], keepalive=KeepAlive(1.0, 1.0))
    print(server.address, flush=True)
    await server.wait()

asyncio.run(main())
"""


CLIENT = """
import asyncio, sys
from engine.batch import KVLayout
from engine.sampling import SamplingParams
from kvtransfer.grpc_transport import GrpcPrefillTransport
from kvtransfer.transport import PrefillCall

async def main():
    call = PrefillCall("r", (1,), SamplingParams(), 0, 0, KVLayout("m", 1, 1, 1, "float32", 16, 1))
    async with GrpcPrefillTransport().open(sys.argv[1], call) as frames:
        await anext(frames)
        print("reading", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@contextmanager
def process(code: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A Python process, and the first line that it prints."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"}
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as peer:
        try:
            assert peer.stdout is not None
            yield peer, peer.stdout.readline().strip()
        finally:
            peer.kill()


@pytest.mark.parametrize(("how", "bound_s"), [(signal.SIGKILL, 1.0), (signal.SIGSTOP, 4.0)])
async def test_a_peer_that_dies_or_freezes_is_unavailable_in_bounded_time(how, bound_s):
    keepalive = KeepAlive(interval_s=1.0, timeout_s=1.0)
    with process(SERVER) as (peer, address):
        transport = GrpcPrefillTransport(Channels(keepalive=keepalive))
        async with transport.open(address, CALL) as frames:
            await anext(frames)
            if how is signal.SIGSTOP:
                # Longer than the keepalive: silence alone ends no stream.
                await asyncio.sleep(keepalive.bound_s + 0.5)
            peer.send_signal(how)
            async with asyncio.timeout(bound_s):
                with pytest.raises(Unavailable):
                    await anext(frames)
        await transport.close()


@pytest.mark.parametrize("frame_count", [1, 50], ids=["waiting", "blocked in a write"])
@pytest.mark.parametrize(("how", "bound_s"), [(signal.SIGKILL, 1.0), (signal.SIGSTOP, 4.0)])
async def test_a_reader_that_dies_or_freezes_costs_the_sender_bounded_time(how, bound_s, frame_count):
    service = Service([kv(BIG) for _ in range(frame_count)], hang=True)
    loop = asyncio.get_running_loop()
    async with serving(service, keepalive=KeepAlive(interval_s=1.0, timeout_s=1.0)) as (address, _):
        client = process(CLIENT, address)
        peer, line = await loop.run_in_executor(None, client.__enter__)
        assert line == "reading"
        peer.send_signal(how)
        async with asyncio.timeout(bound_s):
            await service.closed.wait()
        client.__exit__(None, None, None)


async def test_a_corrupt_frame_from_a_foreign_server_is_named():
    async def lie(request, context):
        yield b"\x0a\x03abc"

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handler = grpc.unary_stream_rpc_method_handler(lie)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(METHOD.split("/")[1], {"Prefill": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    transport = GrpcPrefillTransport()
    async with transport.open(f"127.0.0.1:{port}", CALL) as frames:
        assert await anext(frames) == Damaged("KV frame of 3 bytes is shorter than its prefix of 16")
    await transport.close()
    await server.stop(None)


async def test_a_call_refused_at_once_gives_the_servers_error():
    async with serving(Service([], error=NotFound("request", "r-1"))) as (address, transport):
        with pytest.raises(NotFound):
            async with transport.open(address, CALL) as frames:
                await anext(frames)
