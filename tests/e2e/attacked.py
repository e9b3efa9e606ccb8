"""A small service with honest clients, for tests in which others are not: real gRPC on every hop, emulated steps."""

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
from tandem.v1 import inference_pb2

from bench.one_process import Service, serving
from bench.raw_http2 import (
    RawConnection,
)
from cluster.gateway_config import GatewayConfig, RouterConfig
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
