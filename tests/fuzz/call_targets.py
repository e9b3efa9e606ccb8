"""What clients ask of a gateway, a gateway of a decode worker, and what workers tell it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import cast

from google.protobuf.message import DecodeError
from tandem.v1 import inference_pb2, worker_pb2

from cluster.gateway import Gateway
from cluster.inference_convert import chunk_to_proto, complete_to_proto, request_from_proto, status_to_proto
from cluster.links import DecodeLinks
from cluster.messages import Chunk
from cluster.registry import KVEvents, Registry
from cluster.registry_server import reply_from_proto, report_from_proto, report_to_proto
from cluster.text_queue import Result, TextQueue
from decode_worker.config import DecodeConfig
from decode_worker.convert import command_from_bytes, command_to_bytes, frame_from_bytes, frame_to_bytes
from decode_worker.stream import Cancel, ChoiceSoFar, Command, Delta, Done, Failed, Submit, TokenFrame
from decode_worker.worker import DecodeWorker
from engine.batch import Sampled
from engine.emulated_runner import EmulatedRunner
from engine.errors import CorruptFrame, TandemError, Unavailable
from engine.request import FinishReason, Receipt
from engine.sampling import SamplingParams
from tests.cluster.serving import CONFIG, MODEL, STATS, report
from tests.engine.tiny_tokenizers import build, byte_level_metadata
from tests.fuzz.kv_targets import GREEDY, LAYOUT, no_cost, on_virtual_time
from tests.fuzz.target import Target, joined, pieces

# Longer than anything waits.
LONG_S = 600.0
ASKED = "asked#1"
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}"
TOKENIZER = build(byte_level_metadata(), TEMPLATE)
STRUCTURES = (
    ("json_schema", '{"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]}'),
    ("regex", "(a|[b-d]{2,3})+x?"),
    ("choice", '["yes", "no"]'),
    ("grammar", 'start: "a" (B | "c")*\nB: /[x-z]+/'),
    ("grammar", 'root ::= "a" | "b" root'),
)


class _Script:
    """A decode worker that answers every request with the same frames."""

    def __init__(self, frames: Sequence[TokenFrame]) -> None:
        self._frames = frames
        self._is_asked = asyncio.Event()

    @asynccontextmanager
    async def attach(self, address: str) -> AsyncIterator[_Script]:
        yield self

    async def send(self, command: Command) -> None:
        if isinstance(command, Submit):
            # As the worker reads it.
            assert command_from_bytes(command_to_bytes(command)) == command, f"{command} reads otherwise"
            self._is_asked.set()

    async def frames(self) -> AsyncIterator[TokenFrame]:
        await self._is_asked.wait()
        for frame in self._frames:
            yield frame
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Nothing is open."""


class _AtOnce(TextQueue):
    """Virtual time knows no threads."""

    async def run(self, chars: int, work: Callable[[], Result], *, is_long: bool = False) -> Result:
        return work()


@asynccontextmanager
async def scripted_gateway(frames: Sequence[TokenFrame]) -> AsyncIterator[Gateway]:
    failures = CONFIG.failures.model_copy(update={"max_attempts": 2})
    config = CONFIG.model_copy(update={"failures": failures, "default_deadline_s": 20.0})
    links = DecodeLinks(_Script(frames))
    gateway = Gateway(TOKENIZER, MODEL, Registry(1000.0, 1000.0), links, config, random.Random(1))
    gateway.texts = _AtOnce(config.max_prompt_chars)
    for name in ("p", "d"):
        gateway.heartbeat(report(name))
    try:
        yield gateway
    finally:
        await asyncio.sleep(1.0)
        gateway.check_empty()
        await links.close()


async def _generate(gateway: Gateway, message: inference_pb2.GenerateRequest) -> None:
    asked = request_from_proto(message, message.request_id or "r", None)
    stream = cast("AsyncGenerator[object, None]", gateway.generate(asked))
    async with aclosing(stream) as parts:
        async for part in parts:
            if isinstance(part, Chunk):
                chunk_to_proto(part, True).SerializeToString()
            else:
                complete_to_proto(part, True).SerializeToString()


# ── a client's request ───────────────────────────────────────────────────────────────────────────────────────────────


def ask(data: bytes) -> None:
    on_virtual_time(_asked, inference_pb2.GenerateRequest.FromString(data))


async def _asked(message: inference_pb2.GenerateRequest) -> None:
    request_id = f"{message.request_id or 'r'}#1"
    done = [TokenFrame(1, (Delta(request_id, 0, (Sampled(1),), FinishReason.LENGTH), Done(request_id, 0, Receipt())))]
    async with scripted_gateway(done) as gateway:
        async with asyncio.timeout(LONG_S):
            await _generate(gateway, message)


def _requests() -> Sequence[bytes]:
    params = inference_pb2.SamplingParams(
        temperature=0.5, top_k=3, n=1, max_tokens=8, stop=["x"], logit_bias={1: 0.5}, stop_token_ids=[2], logprobs=1
    )
    turn = inference_pb2.Message(role="user", content="hello")
    messages = [
        inference_pb2.GenerateRequest(text="hello", sampling_params=params, cache_salt="s", slo_class=""),
        inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=[1, 2, 3]),
            objectives=inference_pb2.Objectives(ttft_ms=500, tpot_ms=50),
            on_failure="retry",
        ),
        inference_pb2.GenerateRequest(messages=inference_pb2.Messages(messages=[turn]), request_id="mine"),
        *(
            inference_pb2.GenerateRequest(
                text="a",
                sampling_params=inference_pb2.SamplingParams(
                    structure=inference_pb2.Structure(kind=kind, text=text), max_tokens=4
                ),
            )
            for kind, text in STRUCTURES
        ),
    ]
    return [message.SerializeToString() for message in messages]


# ── a worker's frames, and its reports ───────────────────────────────────────────────────────────────────────────────


def believe(data: bytes) -> None:
    """The pieces are token frames."""
    on_virtual_time(_believed, [frame_from_bytes(piece) for piece in pieces(data)])


async def _believed(frames: Sequence[TokenFrame]) -> None:
    params = inference_pb2.SamplingParams(temperature=0.0, n=2, max_tokens=3, stop=["x"])
    message = inference_pb2.GenerateRequest(text="hello", sampling_params=params, request_id="asked")
    async with scripted_gateway(frames) as gateway:
        async with asyncio.timeout(LONG_S):
            await _generate(gateway, message)


def _frames() -> Sequence[bytes]:
    receipt = Receipt(prefill_s=0.1, kv_bytes=9)
    frames = [
        TokenFrame(1, (Delta(ASKED, 0, (Sampled(5, -0.5, ((5, -0.5),)),)), Delta(ASKED, 1, (Sampled(6),)))),
        TokenFrame(
            2,
            (
                Delta(ASKED, 0, (Sampled(7),), FinishReason.STOP, 7),
                Delta(ASKED, 1, (Sampled(8), Sampled(9)), FinishReason.LENGTH),
                Done(ASKED, 2, receipt),
            ),
        ),
    ]
    other = TokenFrame(3, (Failed("another", Unavailable("gone")),))
    return [joined(*map(frame_to_bytes, (*frames, other))), joined(*map(frame_to_bytes, (other, *frames)))]


def hear(data: bytes) -> None:
    """The pieces are workers' reports; between them, and after, a request is placed."""
    on_virtual_time(_heard, [worker_pb2.WorkerStats.FromString(piece) for piece in pieces(data)])


async def _heard(messages: Sequence[worker_pb2.WorkerStats]) -> None:
    done = [TokenFrame(1, (Delta("r#1", 0, (Sampled(1),), FinishReason.LENGTH), Done("r#1", 0, Receipt())))]
    async with scripted_gateway(done) as gateway:
        problem: TandemError | None = None
        for message in messages:
            try:
                gateway.heartbeat(report_from_proto(message))
            except TandemError as error:
                problem = error
            status_to_proto(gateway.status(asyncio.get_running_loop().time())).SerializeToString()
        async with asyncio.timeout(LONG_S):
            await _generate(gateway, inference_pb2.GenerateRequest(text="hello", request_id="r"))
        if problem is not None:
            raise problem


def _reports() -> Sequence[bytes]:
    events = KVEvents(1, True, (1, 2), (3,))
    measured = replace(STATS, prefill_tokens_per_s=100.0, decode_step_s=0.05, queued_s=0.5, prefill_scale=2.0)
    links = (("p:1", 1e6),)
    reports = [report("d", incarnation=2, links=links, kv_events=events), report("p", stats=measured), report("d-2")]
    return [joined(*(report_to_proto(each).SerializeToString() for each in reports))]


def _replies() -> Sequence[bytes]:
    return [
        worker_pb2.HeartbeatReply(interval_s=0.5, role="decode", kv_resync=True, now_s=5.0).SerializeToString(),
        worker_pb2.HeartbeatReply(interval_s=1.0, on_its_way=3, ticket_key=bytes(32)).SerializeToString(),
    ]


# ── a gateway's commands ─────────────────────────────────────────────────────────────────────────────────────────────


def serve_commands(data: bytes) -> None:
    """The pieces are commands, to a decode worker that computes prompts itself."""
    on_virtual_time(_commanded, [command_from_bytes(piece) for piece in pieces(data)])


class _Nobody:
    """No prefill worker can be reached."""

    @asynccontextmanager
    async def open(self, address: str, call: object) -> AsyncIterator[AsyncIterator[object]]:
        raise Unavailable(f"nobody at {address!r:.99}")
        yield

    async def close(self) -> None:
        """Nothing is open."""


async def _commanded(commands: Sequence[Command]) -> None:
    worker = DecodeWorker(
        EmulatedRunner(LAYOUT, no_cost, 1),
        DecodeConfig(),
        _Nobody(),
        worker_id="d",
        eos_token_ids=frozenset({0}),
        max_context=64,
    )
    loop = asyncio.create_task(worker.run())

    async def spoken() -> AsyncIterator[Command]:
        for command in commands:
            yield command
            await asyncio.sleep(0.001)
        await asyncio.sleep(LONG_S)

    try:
        stream = cast("AsyncGenerator[TokenFrame, None]", worker.attach(spoken()))
        async with aclosing(stream) as frames:
            async for frame in frames:
                # As the gateway reads it.
                frame_from_bytes(frame_to_bytes(frame))
        assert not loop.done(), "the loop ended by itself"
        worker.check_empty()
    finally:
        loop.cancel()
        await asyncio.wait([loop])
        if not loop.cancelled():
            loop.result()


def _commands() -> Sequence[bytes]:
    wide = SamplingParams(temperature=0.5, top_k=3, n=2, max_tokens=5, stop_token_ids=(3,), logprobs=2)
    resumed = (ChoiceSoFar((4, 5)), ChoiceSoFar((), True))
    submits: list[Command] = [
        Submit("a", (1, 2, 3), GREEDY, 1),
        Submit("b", tuple(range(9)), wide, 2, deadline_s=5.0, ttft_due_s=0.1, tpot_s=0.01, salt=b"s", ticket=b"t"),
        Submit("c", (1, 2, 3), wide, 3, prompt_tokens=2, resumed=resumed),
        Submit("d", (1, 2, 3), replace(GREEDY, max_tokens=30), 3, prefill_address="p:1"),
        Cancel("a"),
    ]
    return [joined(*map(command_to_bytes, submits))]


TARGETS = (
    Target("generate", ask, _requests, (DecodeError, TandemError)),
    Target("token-frames", believe, _frames, (CorruptFrame, TandemError)),
    Target("report", hear, _reports, (DecodeError, TandemError)),
    Target(
        "heartbeat-reply",
        lambda data: reply_from_proto(worker_pb2.HeartbeatReply.FromString(data)),
        _replies,
        (DecodeError, Unavailable),
    ),
    Target("commands", serve_commands, _commands, (DecodeError, TandemError)),
)
