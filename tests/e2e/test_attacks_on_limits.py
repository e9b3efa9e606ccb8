"""More than fits, and less than comes: each is refused with a status of its own or cut off, told once, and nobody else
notices. Real gRPC on every hop, emulated forward passes, and clients that speak HTTP/2 by hand."""

from __future__ import annotations

import asyncio

import pytest
from tandem.v1 import inference_pb2

from bench.raw_http2 import (
    CANCEL,
    END_HEADERS,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    RawConnection,
    RawFrame,
    call_headers,
    literal,
)
from cluster.intake import MAX_REQUEST_ID_CHARS, MAX_SALT_BYTES
from tests.e2e.attacked import (
    DEADLINE_EXCEEDED,
    GENERATE,
    INVALID_ARGUMENT,
    PORT,
    REFUSED_STREAM,
    RESOURCE_EXHAUSTED,
    Scene,
    lines,
    memory_mib,
    raw,
    request,
    sampling,
    scene,
)
from tests.eventually import eventually

# ── more than fits ───────────────────────────────────────────────────────────────────────────────────────────────────

OVERSIZED = [
    (request(text="x" * 500_000), "text: got '500000 tokens'"),
    (request(token_ids=inference_pb2.TokenIds(ids=[1] * 300_000)), "token_ids: got '300000 tokens'"),
    (request(messages=inference_pb2.Messages(messages=[inference_pb2.Message()] * 20_000)), "messages: got '20000 "),
    (request(request_id="x" * (MAX_REQUEST_ID_CHARS + 1)), "request_id"),
    (request(cache_salt="x" * (MAX_SALT_BYTES + 1)), "cache_salt"),
    (request(slo_class="x" * 100_000), "slo_class"),
    (sampling(stop=["x"] * 20_000), "sampling_params.stop: got '20000 entries'"),
    (sampling(stop=["x" * 100_000]), "sampling_params.stop"),
    (sampling(stop_token_ids=[1] * 20_000), "sampling_params.stop_token_ids: got '20000 entries'"),
    (sampling(logit_bias=dict.fromkeys(range(20_000), 1.0)), "sampling_params.logit_bias: got '20000 entries'"),
    (sampling(n=65), "sampling_params.n"),
    (sampling(max_tokens=(1 << 32) - 1), "sampling_params.max_tokens"),
    (sampling(logprobs=21), "sampling_params.logprobs"),
]


async def test_oversized_fields_are_invalid_arguments(caplog: pytest.LogCaptureFixture) -> None:
    async with scene() as stage:
        for _ in range(3):
            for message, text in OVERSIZED:
                error = await stage.refused(message)
                assert error.startswith(f"INVALID_ARGUMENT: {text}"), error
    assert len(lines(caplog)) == 1
    assert f"{GENERATE} was refused: text: expected at most 1023: the model's context is 1024" in lines(caplog)[0]


async def test_an_oversized_message_is_refused_before_it_is_here() -> None:
    async with scene() as stage:
        error = await stage.refused(request(text="x" * (PORT.request_bytes + 1)))
        assert error.startswith("RESOURCE_EXHAUSTED: SERVER: Received message larger than max")
        before = memory_mib()
        async with raw(stage) as connection:
            stream = connection.call(GENERATE, None)
            # It says that 4 GiB follow.
            connection.send(RawFrame(0, 0, stream, b"\0" + b"\xff" * 4 + bytes(1000)))
            await eventually(lambda: connection.status(stream) is not None)
            assert connection.status(stream) == RESOURCE_EXHAUSTED
        assert memory_mib() - before < 50


@pytest.mark.parametrize("acknowledges", [True, False])
async def test_headers_that_are_too_long_are_refused(acknowledges: bool) -> None:
    """gRPC holds only those to its limit who have said that they know of it."""
    async with scene() as stage:
        await refuses_headers(stage, PORT.metadata_bytes + 1, acknowledges)
        await refuses_headers(stage, 1 << 20, acknowledges)


async def refuses_headers(stage: Scene, size: int, acknowledges: bool) -> None:
    async with raw(stage, answers=acknowledges) as connection:
        await asyncio.sleep(0.05)
        stream = connection.call(GENERATE, request().SerializeToString(), [("x-long", "x" * size)])
        await eventually(lambda: connection.status(stream) is not None or connection.is_closed.is_set())
        assert connection.status(stream) in (INVALID_ARGUMENT, RESOURCE_EXHAUSTED, None)
        assert connection.status(stream) is not None or connection.is_closed.is_set()


async def test_few_bytes_that_stand_for_many_headers_are_refused() -> None:
    async with scene() as stage, raw(stage) as connection:
        await asyncio.sleep(0.05)
        before = memory_mib()
        entry = literal("x-bomb", "x" * 4000, first=0x40)
        connection.send(RawFrame(HEADERS, END_HEADERS, 1, call_headers(GENERATE) + entry))
        # Entry 62 of the table, once for each byte: 48 MB of headers in a frame.
        connection.send(RawFrame(HEADERS, END_HEADERS, 3, call_headers(GENERATE) + b"\xbe" * 12_000))
        await eventually(lambda: connection.of(3, HEADERS) or connection.is_closed.is_set())
        assert connection.status(3) in (RESOURCE_EXHAUSTED, None)
        assert memory_mib() - before < 50


# ── less than comes ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        PREFACE[:10],
        PREFACE,
        PREFACE + RawFrame(SETTINGS, 0, 0, bytes(6)).to_bytes()[:11],
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["nothing", "half a preface", "no settings", "half of the settings", "http/1.1"],
)
async def test_who_never_gets_to_speak_http2_is_cut_off(sent: bytes) -> None:
    async with scene() as stage:
        connections = [await RawConnection.open(stage.service.address, silent=True, answers=False) for _ in range(10)]
        for connection in connections:
            connection.send_bytes(sent)
        await eventually(lambda: all(connection.is_closed.is_set() for connection in connections), within_s=5.0)
        for connection in connections:
            await connection.close()


@pytest.mark.parametrize("half", ["frame", "block"])
async def test_half_a_header_costs_its_connection(half: str) -> None:
    """Nothing else can be said in between, not even that the other end is alive."""
    block = call_headers(GENERATE)
    async with scene() as stage, raw(stage, answers=False) as connection:
        frame = RawFrame(HEADERS, 0, 1, block)
        connection.send_bytes(frame.to_bytes() if half == "block" else frame.to_bytes()[:30])
        await eventually(connection.is_closed.is_set, within_s=5.0)


async def test_requests_that_never_come_are_given_up(caplog: pytest.LogCaptureFixture) -> None:
    async with scene() as stage, raw(stage) as connection:
        streams = [connection.call(GENERATE, None) for _ in range(80)]
        await eventually(lambda: all(connection.of(stream, HEADERS) for stream in streams))
        assert connection.status(streams[0]) == DEADLINE_EXCEEDED
        assert connection.says(streams[0], b"the request's arrival")
    assert len(lines(caplog)) == 1
    assert "was cut off" in lines(caplog)[0]


async def test_answers_that_nobody_reads_are_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    async with scene(write_s=0.5) as stage, raw(stage, window=0) as connection:
        ask = request(
            token_ids=inference_pb2.TokenIds(ids=[1]),
            sampling_params=inference_pb2.SamplingParams(max_tokens=50, ignore_eos=True),
        )
        streams = [connection.call(GENERATE, ask.SerializeToString()) for _ in range(80)]
        await eventually(lambda: sum(bool(connection.of(each, RST_STREAM)) for each in streams) >= 78, within_s=15.0)
    assert len(lines(caplog)) == 1
    assert "was not read for 0.5 s" in lines(caplog)[0]


# ── too many ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def refusals(connection: RawConnection) -> list[RawFrame]:
    return [frame for frame in connection.frames if frame.kind == RST_STREAM and frame.payload == REFUSED_STREAM]


async def test_a_flood_of_streams_on_one_connection_is_refused_beyond_its_share() -> None:
    async with scene() as stage, raw(stage) as connection:
        await asyncio.sleep(0.05)
        for _ in range(2000):
            connection.call(GENERATE, None)
        await eventually(lambda: len(refusals(connection)) >= 2000 - PORT.streams, within_s=10.0)


async def test_a_flood_of_calls_is_refused_with_a_time_to_come_again(caplog: pytest.LogCaptureFixture) -> None:
    async with scene(comes_again=True, calls=60) as stage, raw(stage) as connection:
        streams = [connection.call(GENERATE, None) for _ in range(90)]
        await eventually(lambda: any(connection.says(stream, b"60 calls are open") for stream in streams))
        assert any(connection.says(stream, b"grpc-retry-pushback-ms") for stream in streams)
        await eventually(lambda: all(connection.of(stream, HEADERS) for stream in streams))
    told = [line.split(": ")[1] for line in lines(caplog) if GENERATE in line]
    assert told == [f"{GENERATE} was refused", f"{GENERATE} was cut off"]


async def test_a_flood_of_connections_is_turned_away_and_those_that_are_there_stay() -> None:
    async with scene() as stage:
        connections = [await RawConnection.open(stage.service.address) for _ in range(200)]
        await asyncio.sleep(0.3)
        held = [connection for connection in connections if not connection.is_closed.is_set()]
        assert len(held) < PORT.connections
        for connection in connections:
            await connection.close()
        await eventually(lambda: stage.answers, within_s=5.0)


async def test_streams_that_are_reset_as_soon_as_they_begin_leave_nothing() -> None:
    async with scene() as stage, raw(stage, keeps=False) as connection:
        before = memory_mib()
        ask = request(token_ids=inference_pb2.TokenIds(ids=[1]), sampling_params=None).SerializeToString()
        for index in range(5000):
            stream = connection.call(GENERATE, ask)
            connection.send(RawFrame(RST_STREAM, 0, stream, CANCEL))
            if index % 100 == 0:
                await connection.drain()
                await asyncio.sleep(0)
            if connection.is_closed.is_set():
                break
        await asyncio.sleep(0.2)
        assert memory_mib() - before < 100


async def test_a_flood_of_pings_ends_its_connection() -> None:
    async with scene() as stage, raw(stage) as connection:
        connection.send(*(RawFrame(PING, 0, 0, bytes(8)) for _ in range(1000)))
        await eventually(connection.is_closed.is_set, within_s=5.0)
        assert any(frame.kind == GOAWAY and b"too_many_pings" in frame.payload for frame in connection.frames)
