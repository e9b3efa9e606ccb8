"""`ModelStreamInfer`: requests and answers of one stream side by side, and what ends it."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from tandem.kserve import open_inference_pb2 as pb

from cluster.kserve.server import MAX_STREAM_REQUESTS
from cluster.security.auth_config import QuotaConfig
from engine.errors import InvalidArgument
from kvtransfer.rpc import error_from_rpc
from tests.cluster.serving import ANSWER, CONFIG, LENGTH
from tests.eventually import eventually
from tests.kserve.service import Service, request, serving, tensor, values

ERRORS_END_IT = (("triton_grpc_error", "true"),)


def named(request_id: str, **parameters: Any) -> pb.ModelInferRequest:
    asked = request(**parameters)
    asked.id = request_id
    return asked


async def answers(service: Service, *requests: pb.ModelInferRequest, **options: Any) -> list[Any]:
    """All that a stream of those requests gives."""
    call = service.stub.ModelStreamInfer(iter(requests), timeout=20, **options)
    return [response async for response in call]


def is_final(response: pb.ModelStreamInferResponse) -> bool:
    return response.infer_response.parameters["triton_final_response"].bool_param


async def test_an_answer_in_parts() -> None:
    async with serving() as service:
        *parts, last = [part.infer_response for part in await answers(service, request(stream=True))]
    assert "".join(text for part in parts for text in values(part, "text_output")) == "One, two, three."
    assert [token for part in parts for token in values(part, "output_ids")] == ANSWER
    assert {(part.id, part.parameters["triton_final_response"].bool_param) for part in parts} == {("mine", False)}
    assert [values(part, "finish_reason") for part in parts] == [[""]] * len(parts)
    assert (last.id, last.parameters["triton_final_response"].bool_param) == ("mine", True)
    assert (values(last, "text_output"), values(last, "output_ids")) == ([""], [])
    assert (values(last, "finish_reason"), values(last, "num_output_tokens")) == (["length"], [0])
    assert values(last, "num_input_tokens")


async def test_choices_of_a_stream_have_their_index() -> None:
    async with serving() as service:
        *parts, last = [part.infer_response for part in await answers(service, request(stream=True, n=2))]
    texts = {0: "", 1: ""}
    for part in parts:
        (index,), (text,) = values(part, "sequence_index"), values(part, "text_output")
        texts[index] += text
    assert texts == {0: "One, two, three.", 1: "One, two, three."}
    assert (values(last, "sequence_index"), values(last, "finish_reason")) == ([0, 1], ["length"] * 2)


async def test_without_stream_the_answer_comes_whole() -> None:
    stream = tensor("stream", "BOOL", False)
    async with serving() as service:
        (answer,) = await answers(service, request(stream))
    assert values(answer.infer_response, "text_output") == ["One, two, three."]
    assert is_final(answer)


async def test_requests_of_one_stream_run_side_by_side_and_an_error_is_its_requests_own() -> None:
    async with serving() as service:
        found = await answers(
            service, named("a", stream=True), named("bad", temperature=-1), named("b", stream=True), named("a")
        )
    errors = [(each.infer_response.id, each.error_message) for each in found if each.error_message]
    assert errors == [("bad", "temperature: got -1.0, expected a number in [0, 100]")]
    assert sorted(each.infer_response.id for each in found if is_final(each)) == ["a", "a", "b", "bad"]
    order = [each.infer_response.id for each in found if each.infer_response.id in ("a", "b")]
    assert order != sorted(order), "the one goes on while the other does"


async def test_an_error_ends_the_stream_where_that_is_asked_for() -> None:
    async with serving(ANSWER * 40) as service:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answers(
                service, named("a", stream=True, max_tokens=500), named("bad", top_k=-2), metadata=ERRORS_END_IT
            )
        error = error_from_rpc(caught.value)
        assert isinstance(error, InvalidArgument)
        assert error.field == "top_k"
        await eventually(lambda: not service.fake.running)


async def test_no_more_requests_are_read_than_may_run_at_once() -> None:
    config = CONFIG.model_copy(update={"max_running": 1000})
    async with serving(ANSWER * 40, config=config) as service:
        call = service.stub.ModelStreamInfer(iter([request(max_tokens=500)] * (MAX_STREAM_REQUESTS + 5)))
        await eventually(lambda: len(service.fake.running) == MAX_STREAM_REQUESTS, within_s=10)
        await asyncio.sleep(0.1)
        assert len(service.fake.submits) == MAX_STREAM_REQUESTS
        call.cancel()
        await eventually(lambda: not service.fake.running)


@pytest.mark.parametrize("parts_read", [0, 3])
async def test_a_client_that_leaves_frees_the_worker(parts_read: int) -> None:
    async with serving(ANSWER * 40) as service:
        call = service.stub.ModelStreamInfer(iter([named("a", stream=True, max_tokens=500), named("b")]))
        for _ in range(parts_read):
            await call.read()
        await eventually(lambda: len(service.fake.running) == 2)
        call.cancel()
        await eventually(lambda: not service.fake.running)


async def test_a_stream_that_says_nothing_is_ended() -> None:
    async with serving(stream_idle_s=0.2) as service:
        call = service.stub.ModelStreamInfer()
        # While something is under way it is not idle, however long that takes.
        await call.write(request(max_tokens=LENGTH))
        answer = await call.read()
        assert values(answer.infer_response, "text_output") == ["One, two, three."]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "waiting for a request, for 0.2 s" in str(caught.value.details())


async def test_a_message_that_is_none_ends_the_stream() -> None:
    async with serving(ANSWER * 40) as service:
        async with grpc.aio.insecure_channel(service.address) as channel:
            call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")()
            await call.write(request(max_tokens=500).SerializeToString())
            await eventually(lambda: service.fake.running)
            await call.write(b"\xff" * 50)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await eventually(lambda: not service.fake.running)


async def test_each_request_of_a_stream_counts_as_a_call() -> None:
    config = CONFIG.model_copy(update={"quota": QuotaConfig(requests_per_s=0.01, burst=2)})
    async with serving(config=config) as service:
        found = await answers(service, named("a"), named("b"), named("c"))
    refused = [each for each in found if each.error_message]
    assert len(refused) == 1
    assert "over this tenant's requests_per_s; retry after" in refused[0].error_message
