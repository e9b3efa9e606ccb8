"""`tandem.v1.Inference` over real gRPC, in front of the real gateway and a fake decode worker."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tandem.v1 import inference_pb2 as pb

from cluster.inference_server import inference_service
from cluster.messages import Complete, Message
from cluster.security.auth_config import QuotaConfig
from cluster.security.quotas import Quotas
from engine.errors import InvalidArgument, NotFound, TandemError
from kvtransfer.rpc import error_from_rpc
from kvtransfer.rpc_channel import Channels
from kvtransfer.rpc_server import start_server
from tests.cluster.fake_decode import CACHED_TOKENS, FakeDecode
from tests.cluster.serving import ANSWER, LENGTH, MODEL, TOKENIZER
from tests.cluster.serving import serving as serving_gateway
from tests.eventually import eventually

PREFIX = "/tandem.v1.Inference/"
RESPONSES = {
    "GetModel": pb.GetModelResponse,
    "Tokenize": pb.TokenizeResponse,
    "Detokenize": pb.DetokenizeResponse,
    "GetStatus": pb.GetStatusResponse,
}


class Service:
    """A served gateway, and calls to it as a foreign client would make them."""

    def __init__(self, channel: grpc.aio.Channel, fake: FakeDecode) -> None:
        self.channel = channel
        self.fake = fake

    def generate(self, request: pb.GenerateRequest, timeout_s: float | None = None):
        method = self.channel.unary_stream(
            f"{PREFIX}Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        return method(request, timeout=timeout_s)

    async def ask(self, method: str, request):
        call = self.channel.unary_unary(
            PREFIX + method,
            request_serializer=type(request).SerializeToString,
            response_deserializer=RESPONSES[method].FromString,
        )
        return await call(request)

    async def refusal(self, request: pb.GenerateRequest) -> tuple[grpc.StatusCode, TandemError]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(self.generate(request)))
        return caught.value.code(), error_from_rpc(caught.value)


@asynccontextmanager
async def serving(answer=ANSWER, **options) -> AsyncIterator[Service]:
    fake = FakeDecode(answer)
    async with serving_gateway(fake) as gateway:
        server = await start_server("127.0.0.1:0", [inference_service(gateway, **options)])
        channels = Channels()
        try:
            yield Service(channels.get(server.address), fake)
        finally:
            await channels.close()
            await server.stop()


def request(text: str = "hello", **sampling) -> pb.GenerateRequest:
    sampling.setdefault("max_tokens", LENGTH)
    return pb.GenerateRequest(request_id="r", text=text, sampling_params=pb.SamplingParams(**sampling))


async def test_generate_streams_chunks_and_ends_with_the_whole_answer():
    async with serving() as service:
        responses = [response async for response in service.generate(request(seed=7))]
    assert {response.request_id for response in responses} == {"r"}
    chunks, complete = [response.chunk for response in responses[:-1]], responses[-1].complete
    assert "".join(chunk.text for chunk in chunks) == "One, two, three."
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == ANSWER
    assert not any(chunk.logprobs for chunk in chunks)
    (choice,) = complete.choices
    assert (choice.text, choice.finish_reason, choice.index) == ("One, two, three.", "length", 0)
    assert list(choice.token_ids) == ANSWER
    assert choice.WhichOneof("matched") is None
    assert complete.usage.prompt_tokens == len(TOKENIZER.encode("hello"))
    assert (complete.usage.completion_tokens, complete.usage.cached_tokens) == (LENGTH, CACHED_TOKENS)
    assert (complete.receipt.kv_bytes, complete.receipt.decode_worker) == (640, "d")


async def test_logprobs_come_only_when_asked_for():
    async with serving() as service:
        responses = [response async for response in service.generate(request(logprobs=0))]
    assert [entry.token_id for entry in responses[-1].complete.choices[0].logprobs] == ANSWER
    assert sum(len(response.chunk.logprobs) for response in responses[:-1]) == LENGTH


async def test_a_stop_string_and_several_choices():
    async with serving() as service:
        *_, last = [response async for response in service.generate(request(n=3, stop=[", t"]))]
    assert [choice.index for choice in last.complete.choices] == [0, 1, 2]
    for choice in last.complete.choices:
        assert (choice.finish_reason, choice.WhichOneof("matched")) == ("stop", "matched_stop_str")
        assert choice.matched_stop_str == ", t"


async def test_the_request_reaches_the_worker_as_it_was_sent():
    sent = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1, 2, 3]),
        cache_salt="Ümlaut",
        sampling_params=pb.SamplingParams(temperature=0, top_p=0.9, seed=-3, max_tokens=1, logit_bias={5: -1.5}),
    )
    async with serving() as service:
        responses = [response async for response in service.generate(sent, timeout_s=20)]
        ((_, submit),) = service.fake.submits
    assert len({response.request_id for response in responses}) == 1
    assert responses[0].request_id, "the gateway makes an id where the client gave none"
    assert submit.token_ids == (1, 2, 3)
    assert submit.salt == "Ümlaut".encode()
    assert (submit.seed, submit.params.temperature, submit.params.top_p) == (-3, 0.0, 0.9)
    assert submit.params.logit_bias == ((5, -1.5),)
    # gRPC sends what is left rounded up to a tenth of a second, and the server's clock starts when it comes.
    assert 15 < submit.deadline_s <= 20.1


BAD = [
    (request(temperature=math.nan), "sampling_params.temperature"),
    (request(temperature=-1), "sampling_params.temperature"),
    (request(temperature=math.inf), "sampling_params.temperature"),
    (request(top_p=0), "sampling_params.top_p"),
    (request(top_k=-2), "sampling_params.top_k"),
    (request(min_p=1.5), "sampling_params.min_p"),
    (request(repetition_penalty=0), "sampling_params.repetition_penalty"),
    (request(presence_penalty=math.nan), "sampling_params.presence_penalty"),
    (request(frequency_penalty=3), "sampling_params.frequency_penalty"),
    (request(n=0), "sampling_params.n"),
    (request(n=65), "sampling_params.n"),
    (request(max_tokens=0), "sampling_params.max_tokens"),
    (request(max_tokens=(1 << 32) - 1), "sampling_params.max_tokens"),
    (request(max_tokens=4000), "sampling_params.max_tokens"),
    (request(min_tokens=LENGTH + 1), "sampling_params.min_tokens"),
    (request(logprobs=21), "sampling_params.logprobs"),
    (request(stop=[""]), "sampling_params.stop"),
    (request(stop=["x"] * 17), "sampling_params.stop"),
    (request(stop_token_ids=[1 << 31]), "sampling_params.stop_token_ids"),
    (request(logit_bias={0: math.nan}), "sampling_params.logit_bias"),
    (request(logit_bias={1 << 31: 1.0}), "sampling_params.logit_bias"),
    (request(text=""), "text"),
    (request(text="hello " * 3000), "text"),
    (pb.GenerateRequest(), "input"),
    (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[MODEL.vocab_size])), "token_ids"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[(1 << 32) - 1])), "token_ids"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 3000)), "token_ids"),
    (pb.GenerateRequest(messages=pb.Messages()), "messages"),
    (pb.GenerateRequest(text="x", request_id="r" * 1000), "request_id"),
    (pb.GenerateRequest(text="x", cache_salt="s" * 1000), "cache_salt"),
]


@pytest.mark.parametrize(("bad", "field"), BAD, ids=[f"{index}-{field}" for index, (_, field) in enumerate(BAD)])
async def test_bad_input_names_the_field(bad, field):
    async with serving() as service:
        code, error = await service.refusal(bad)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert isinstance(error, InvalidArgument)
        assert error.field == field
        assert error.expected
        good = [response async for response in service.generate(request(max_tokens=1))]
        assert good[-1].complete.choices[0].finish_reason == "length"


async def test_another_model_is_not_found():
    async with serving() as service:
        code, error = await service.refusal(pb.GenerateRequest(text="x", model="gpt-9"))
    assert code is grpc.StatusCode.NOT_FOUND
    assert isinstance(error, NotFound)
    assert "tiny" in str(error)


async def test_invalid_utf8_and_garbage_are_refused_and_the_service_goes_on():
    # `text` (field 3) and a stop string in `sampling_params` (field 6, field 13) that are not UTF-8; no message at all.
    broken = [b"\x1a\x02\xff\xfe", b"\x32\x03\x6a\x01\xff", b"\xff" * 50, b"\x1a\xff\xff\xff\xff\x0f"]
    async with serving() as service:
        raw = service.channel.unary_stream(f"{PREFIX}Generate")
        for wire in broken:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(raw(wire)))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert [response async for response in service.generate(request())]


async def test_any_text_is_answered_or_refused():
    async with serving() as service:
        loop = asyncio.get_running_loop()

        @settings(max_examples=25, suppress_health_check=list(HealthCheck))
        @given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=5), max_size=3))
        def check(text, stop):
            coroutine = one(request(text=text, stop=stop, max_tokens=1))
            assert asyncio.run_coroutine_threadsafe(coroutine, loop).result(10)

        async def one(asked):
            try:
                return [response async for response in service.generate(asked)]
            except grpc.aio.AioRpcError as error:
                return error.code() is grpc.StatusCode.INVALID_ARGUMENT

        await asyncio.to_thread(check)
        await loop.shutdown_default_executor()


@pytest.mark.parametrize("chunks_read", [0, 2])
async def test_a_client_that_leaves_frees_the_worker(chunks_read):
    async with serving(ANSWER * 40) as service:
        call = service.generate(request(max_tokens=500))
        responses = aiter(call)
        for _ in range(chunks_read):
            await anext(responses)
        await eventually(lambda: service.fake.running)
        call.cancel()
        await eventually(lambda: not service.fake.running, within_s=0.25)


async def test_the_clients_deadline_ends_the_request_everywhere():
    async with serving(ANSWER * 40) as service:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in service.generate(request(max_tokens=500), timeout_s=0.2):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(lambda: not service.fake.running, within_s=0.25)


async def test_too_many_requests_are_told_when_to_come_back():
    async with serving(ANSWER * 40) as service:
        calls = [service.generate(pb.GenerateRequest(text="x")) for _ in range(4)]
        await eventually(lambda: len(service.fake.running) == 2)
        code, error = await service.refusal(pb.GenerateRequest(text="x"))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.retry_after_s > 0
        for call in calls:
            call.cancel()


async def test_get_model_and_status():
    async with serving() as service:
        model = await service.ask("GetModel", pb.GetModelRequest())
        [response async for response in service.generate(request())]
        status = await service.ask("GetStatus", pb.GetStatusRequest())
    assert (model.model, model.vocab_size, model.max_context) == ("tiny", MODEL.vocab_size, 2048)
    assert list(model.eos_token_ids) == [0]
    assert (status.model, status.requests_finished, status.requests_running) == ("tiny", 1, 0)
    assert [(worker.worker_id, worker.role, worker.fresh) for worker in status.workers] == [
        ("d", "decode", True),
        ("p", "prefill", True),
    ]
    assert status.workers[0].blocks_free == 64
    assert 0 <= status.workers[0].heartbeat_age_s < 60


async def test_tokenize_and_detokenize():
    async with serving(max_prompt_chars=100) as service:
        tokens = await service.ask("Tokenize", pb.TokenizeRequest(text="the hé😀"))
        assert list(tokens.token_ids) == TOKENIZER.encode("the hé😀")
        text = await service.ask("Detokenize", pb.DetokenizeRequest(token_ids=tokens.token_ids))
        assert text.text == "the hé😀"
        whole = pb.DetokenizeRequest(token_ids=[0, *tokens.token_ids], skip_special_tokens=False)
        assert (await service.ask("Detokenize", whole)).text == "<|end|>the hé😀"
        assert list((await service.ask("Tokenize", pb.TokenizeRequest(text=""))).token_ids) == TOKENIZER.encode("")
        for method, bad, field in (
            ("Tokenize", pb.TokenizeRequest(), "input"),
            ("Tokenize", pb.TokenizeRequest(text="x" * 101), "text"),
            ("Tokenize", pb.TokenizeRequest(messages=pb.Messages()), "messages"),
            ("Tokenize", pb.TokenizeRequest(messages=pb.Messages(messages=[pb.Message()])), "messages"),
            ("Detokenize", pb.DetokenizeRequest(token_ids=[(1 << 32) - 1]), "token_ids"),
            ("Detokenize", pb.DetokenizeRequest(token_ids=[1] * 101), "token_ids"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await service.ask(method, bad)
            error = error_from_rpc(caught.value)
            assert isinstance(error, InvalidArgument)
            assert error.field == field


async def test_a_bug_in_the_gateway_is_internal_and_says_nothing(caplog):
    class Broken:
        tokenizer = None
        model = MODEL

        quotas = Quotas(QuotaConfig(), {})

        def new_request_id(self, tenant: str) -> str:
            return "r"

        async def generate(self, asked) -> AsyncIterator[Complete]:
            assert asked.prompt == (Message("user", "secret"),)
            raise KeyError("secret")
            yield

    server = await start_server("127.0.0.1:0", [inference_service(Broken())])
    channels = Channels()
    service = Service(channels.get(server.address), FakeDecode())
    chat = pb.GenerateRequest(messages=pb.Messages(messages=[pb.Message(role="user", content="secret")]))
    code, error = await service.refusal(chat)
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in str(error)
    assert any(entry.exc_info for entry in caplog.records)
    with pytest.raises(grpc.aio.AioRpcError, match="this gateway has none"):
        await service.ask("Tokenize", pb.TokenizeRequest(text="x"))
    await channels.close()
    await server.stop()
