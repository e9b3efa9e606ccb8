"""The Tandem target over real gRPC, against a service that says what it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from tandem.v1 import inference_pb2 as pb

from cluster.loadtest.play import play
from cluster.loadtest.request import LoadRequest, Prompt
from cluster.loadtest.tandem_target import TandemTarget
from cluster.loadtest.target import Finished, TargetFacts, Tokens
from engine.errors import ConfigError, DeadlineExceeded, Overloaded, TandemError
from engine.objectives import Objectives
from kvtransfer.rpc_server import RpcService, start_server

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"]
# Pauses, and the numbers of tokens of the chunks between them; an error ends the answer.
Pieces = list[float | int | TandemError]


class FakeTandem:
    """Remembers the requests and what time their deadlines left."""

    def __init__(self, pieces: Callable[[], Pieces]) -> None:
        self.pieces = pieces
        self.requests: list[pb.GenerateRequest] = []
        self.left_s: list[float | None] = []
        # How long each answer keeps all others waiting.
        self.alone_s = 0.0
        self._alone = asyncio.Lock()

    async def generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.left_s.append(context.time_remaining())
        tokens = 0
        async with self._alone:
            await asyncio.sleep(self.alone_s)
        for piece in self.pieces():
            if isinstance(piece, float):
                await asyncio.sleep(piece)
            elif isinstance(piece, TandemError):
                raise piece
            else:
                tokens += piece
                yield pb.GenerateResponse(chunk=pb.GenerateChunk(token_ids=[1] * piece))
        usage = pb.Usage(prompt_tokens=3, completion_tokens=tokens, cached_tokens=1)
        receipt = pb.Receipt(prefill_s=0.5, decode_worker="d")
        yield pb.GenerateResponse(complete=pb.GenerateComplete(usage=usage, receipt=receipt))

    async def get_model(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        return pb.GetModelResponse(model="tiny", vocab_size=300, max_context=2048)


@asynccontextmanager
async def served(pieces: Pieces, **settings: Any) -> AsyncIterator[tuple[FakeTandem, TandemTarget]]:
    fake = FakeTandem(lambda: pieces)
    names = {method.name for method in SERVICE.methods}
    handlers: dict[str, Any] = {
        name: grpc.unary_unary_rpc_method_handler(
            fake.get_model, pb.GetModelRequest.FromString, pb.GetModelResponse.SerializeToString
        )
        for name in names
    }
    handlers["Generate"] = grpc.unary_stream_rpc_method_handler(
        fake.generate, pb.GenerateRequest.FromString, pb.GenerateResponse.SerializeToString
    )
    server = await start_server("127.0.0.1:0", [RpcService(SERVICE, handlers)])
    target = TandemTarget("tandem", server.address, **settings)
    try:
        yield fake, target
    finally:
        await target.close()
        await server.stop()


def request(prompt: Prompt = (5, 6, 7), index: int = 0) -> LoadRequest:
    return LoadRequest(index, 0.0, prompt, 3, 4)


async def collect(target: TandemTarget, prompt: Prompt = (5, 6, 7)) -> list[Tokens | Finished]:
    async with aclosing(target.stream(request(prompt), Objectives(1.5, 0.09), 10.0)) as stream:
        return [piece async for piece in stream]


async def test_an_answer_and_what_was_asked() -> None:
    async with served([1, 0, 2], cache_salt="salt") as (fake, target):
        assert await target.facts() == TargetFacts("tiny", 300, 2048)
        *tokens, end = await collect(target)
        [asked] = fake.requests
    # A chunk without tokens is none.
    assert tokens == [Tokens(1), Tokens(2)]
    assert isinstance(end, Finished)
    assert (end.prompt_tokens, end.cached_tokens, end.output_tokens) == (3, 1, 3)
    assert end.receipt is not None
    assert end.receipt["prefill_s"] == 0.5
    assert end.receipt["decode_worker"] == "d"
    assert list(asked.token_ids.ids) == [5, 6, 7]
    assert (asked.objectives.ttft_ms, asked.objectives.tpot_ms) == (1500.0, 90.0)
    assert asked.cache_salt == "salt"
    assert asked.sampling_params.max_tokens == 4
    assert asked.sampling_params.ignore_eos
    assert asked.sampling_params.temperature == 0.0
    assert fake.left_s[0] == pytest.approx(10.0, abs=1.0)


async def test_objectives_can_be_kept_back() -> None:
    async with served([1], sends_objectives=False) as (fake, target):
        await collect(target)
        assert not fake.requests[0].objectives.HasField("ttft_ms")
        assert not fake.requests[0].objectives.HasField("tpot_ms")
        assert not target.acts_on_objectives


async def test_text_and_chats() -> None:
    async with served([1]) as (fake, target):
        await collect(target, "hello")
        await collect(target, (("user", "hi"),))
        assert fake.requests[0].text == "hello"
        assert fake.requests[1].messages.messages[0].content == "hi"


@pytest.mark.parametrize("error", [Overloaded("full", 3.0), DeadlineExceeded("decode"), TandemError("oh")])
async def test_errors_come_as_they_were(error: TandemError) -> None:
    async with served([1, error]) as (_, target):
        with pytest.raises(type(error)) as caught:
            await collect(target)
    assert str(error) in str(caught.value)


async def test_a_reject_is_quick_and_a_miss() -> None:
    async with served([Overloaded("full", 3.0)]) as (_, target):
        [record] = await play(target, [request()], objectives=Objectives(), timeout_s=10.0)
    assert (record.ending, record.error) == ("rejected", "full; retry after 3 s")


async def test_the_deadline_goes_to_the_server() -> None:
    async with served([1, 30.0]) as (_, target):
        [record] = await play(target, [request()], objectives=Objectives(), timeout_s=0.3)
    assert record.ending == "timed_out"
    assert record.end_s < 5.0


async def test_many_at_once() -> None:
    async with served([0.3, 1, 0.05, 1]) as (_, target):
        requests = [request(index=index) for index in range(200)]
        records = await play(target, requests, objectives=Objectives(), timeout_s=20.0)
    assert {record.ending for record in records} == {"answered"}
    assert all(record.ttft_s is not None and record.ttft_s >= 0.3 for record in records)


async def test_nobody_listens() -> None:
    target = TandemTarget("tandem", "127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"--url 127\.0\.0\.1:9: no service answers there"):
        await target.facts()
    await target.close()
