"""More than fits, and less than comes: each is refused with a status of its own or cut off, told once, and nobody else
notices. Real gRPC on every hop, emulated forward passes, and clients that speak HTTP/2 by hand."""

from __future__ import annotations

import asyncio
import os
import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from tandem.client import Client
from tandem.v1 import inference_pb2, worker_pb2

from bench.one_process import Service, serving
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
from cluster.gateway_config import GatewayConfig, RouterConfig
from cluster.intake import MAX_REQUEST_ID_CHARS, MAX_SALT_BYTES
from cluster.messages import ModelInfo
from decode_worker.config import DecodeConfig
from engine.batch import KVLayout
from engine.emulated_runner import EmulatedRunner
from engine.sampling import SamplingParams
from kvtransfer.rpc_limits import CallLimits, PortLimits
from tests.engine.tiny_tokenizers import build, byte_level_metadata
from tests.eventually import eventually

GENERATE = "/tandem.v1.Inference/Generate"
HEARTBEAT = "/tandem.v1.Registry/Heartbeat"
INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED = 3, 4, 8
REFUSED_STREAM = struct.pack(">I", 7)
TOKENIZER = build(byte_level_metadata())
MODEL = ModelInfo("m", TOKENIZER.vocab_size, 1024, "llama", "uint64", (0,), False)
LAYOUT = KVLayout("m", 2, 1, 1, "uint64", 16, 1024)
STEP_S = 0.005
ANSWER_TOKENS = 20
# No honest stream may ever pause for so long. A busy machine pauses too.
PAUSE_S = 15.0
LIMITS = CallLimits(request_s=0.5, age_s=60.0)
PORT = PortLimits(request_bytes=1 << 20, streams=100, connections=40, handshake_s=0.5)


@dataclass
class Scene:
    """A service, and clients that use it as they should."""

    service: Service
    runner: EmulatedRunner
    client: Client
    answers: int = 0
    longest_s: float = 0.0

    async def ask(self, rng: random.Random) -> None:
        """One honest request; its answer must be the right one."""
        loop = asyncio.get_running_loop()
        prompt = [rng.randrange(1, MODEL.vocab_size) for _ in range(20)]
        start_s = loop.time()
        answer = await self.client.complete(
            prompt, temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True, timeout_s=30.0
        )
        params = SamplingParams(temperature=0.0)
        assert list(answer.choices[0].token_ids) == self.runner.expected_tokens(prompt, params, 0, 0, ANSWER_TOKENS)
        self.longest_s = max(self.longest_s, loop.time() - start_s)
        self.answers += 1

    async def refused(self, request: Message, path: str = GENERATE, more: tuple[tuple[str, str], ...] = ()) -> str:
        """What a call that must fail fails with: its status and text."""
        channel = grpc.aio.insecure_channel(self.service.address)
        try:
            call = channel.unary_stream(path)(request.SerializeToString(), metadata=more)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in call:
                    pass
            return f"{caught.value.code().name}: {caught.value.details()}"
        finally:
            await channel.close()


@asynccontextmanager
async def scene(write_s: float = 10.0, comes_again: bool = False, **port: int) -> AsyncIterator[Scene]:
    """Honest clients ask all the time; each of them gets the right answers, and soon, and at the end nothing is left.
    With `comes_again` they may be refused in between."""
    runner = EmulatedRunner(LAYOUT, lambda _: STEP_S, 2, vocab_size=MODEL.vocab_size)
    config = GatewayConfig(heartbeat_interval_s=0.1, fresh_s=1.0, router=RouterConfig(policy="least_loaded"))
    prefill = EmulatedRunner(LAYOUT, lambda _: STEP_S, 2, vocab_size=MODEL.vocab_size)
    service = serving(
        MODEL,
        TOKENIZER,
        [prefill],
        [runner],
        gateway_config=config,
        decode_config=DecodeConfig(schedule_ahead=False),
        limits=replace(LIMITS, write_s=write_s),
        port=replace(PORT, **port),
    )
    async with service as running, Client(running.address) as client:
        stage = Scene(running, runner, client)

        async def ask_on(seed: int) -> None:
            rng = random.Random(seed)
            while True:
                try:
                    await stage.ask(rng)
                except grpc.aio.AioRpcError as error:
                    if not comes_again or error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                        raise
                    await asyncio.sleep(0.05)

        await stage.ask(random.Random(-1))
        tasks = [asyncio.create_task(ask_on(seed)) for seed in range(4)]
        try:
            yield stage
            before = stage.answers
            await eventually(lambda: stage.answers >= before + 8, within_s=20.0)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [end for end in ends if not isinstance(end, asyncio.CancelledError)] == []
        assert stage.longest_s < PAUSE_S + ANSWER_TOKENS * STEP_S
        await eventually(lambda: is_empty(running))


def is_empty(service: Service) -> bool:
    with suppress(AssertionError):
        service.check_empty()
        return True
    return False


@asynccontextmanager
async def raw(stage: Scene, **how: bool | int) -> AsyncIterator[RawConnection]:
    connection = await RawConnection.open(stage.service.address, **how)
    try:
        yield connection
    finally:
        await connection.close()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith(("kvtransfer", "cluster"))]


def memory_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def request(**fields: object) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(**{"text": "hello", **fields})


def sampling(**fields: object) -> inference_pb2.GenerateRequest:
    return request(sampling_params=inference_pb2.SamplingParams(**fields))


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


# ── workers that lie ─────────────────────────────────────────────────────────────────────────────────────────────────


def lie(**fields: object) -> worker_pb2.WorkerStats:
    truth = {
        "worker_id": "liar",
        "role": "decode",
        "address": "127.0.0.1:1",
        "incarnation": 1,
        "model": MODEL.name,
        "blocks_total": 1024,
        "blocks_free": 1024,
        "block_size": 16,
    }
    return worker_pb2.WorkerStats(**{**truth, **fields})


LIES = {
    "nan": ({"queued_s": float("nan")}, "queued_s: got nan"),
    "infinite": ({"decode_step_s": float("inf")}, "decode_step_s: got inf"),
    "negative": ({"prefill_tokens_per_s": -1.0}, "prefill_tokens_per_s: got -1.0"),
    "absurd": ({"context_tokens": (1 << 64) - 1}, "context_tokens"),
    "more free than there are": ({"blocks_free": 1025}, "blocks_free"),
    "from the future": ({"incarnation": (1 << 64) - 1}, "incarnation"),
    "another's id": (
        {"worker_id": "decode-0", "incarnation": 10**18},
        "worker_id: got 'decode-0', expected another name",
    ),
    "long name": ({"worker_id": "x" * 1000}, "worker_id"),
    "lines of the log": ({"worker_id": "x\nERROR all is lost"}, "worker_id"),
    "links": ({"links": [worker_pb2.LinkRate(prefill_address="p", bytes_per_s=float("nan"))]}, "links"),
    "kv names": (
        {"kv_events": worker_pb2.KVEvents(sequence=1, stored=range(100_000))},
        "kv_events: got '100000 names'",
    ),
    "another model": ({"model": "n"}, "model"),
}


@pytest.mark.parametrize("name", LIES)
async def test_a_heartbeat_that_cannot_be_true_is_refused(name: str, caplog: pytest.LogCaptureFixture) -> None:
    fields, text = LIES[name]
    async with scene() as stage:
        for _ in range(20):
            error = await stage.refused(lie(**fields), HEARTBEAT)
            assert error.startswith(f"INVALID_ARGUMENT: {text}"), error
        workers = stage.service.gateway.status(0.0).workers
        assert [worker.worker_id for worker in workers] == ["decode-0", "prefill-0"]
    [line] = lines(caplog)
    assert f"{HEARTBEAT} was refused" in line
    assert "\n" not in line


async def test_the_address_of_another_worker_is_its_own() -> None:
    async with scene() as stage:
        [address] = [worker.address for worker in stage.service.gateway.status(0.0).workers if worker.role == "decode"]
        error = await stage.refused(lie(address=address), HEARTBEAT)
        assert error.startswith("INVALID_ARGUMENT: address"), error


async def test_a_liar_that_is_believed_costs_only_the_requests_that_it_is_given() -> None:
    """It says that it is idle and fast, and nobody is there: its requests go on elsewhere, and it is shunned."""
    async with scene() as stage:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + 2.0
        names = range(20_000)
        sequence = 0
        while loop.time() < end_s:
            sequence += 1
            events = worker_pb2.KVEvents(sequence=sequence, is_snapshot=True, stored=names)
            channel = grpc.aio.insecure_channel(stage.service.address)
            beat = channel.unary_unary(HEARTBEAT)
            await beat(lie(decode_step_s=1e-6, kv_events=events).SerializeToString())
            await channel.close()
            await asyncio.sleep(0.1)
        assert "liar" in {worker.worker_id for worker in stage.service.gateway.status(0.0).workers}
