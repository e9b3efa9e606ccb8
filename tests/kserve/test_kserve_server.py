"""`inference.GRPCInferenceService` as its clients see it: whole answers, refusals, health and metadata."""

from __future__ import annotations

import asyncio
import math
import struct

import grpc
import grpc.aio
import pytest
from tandem.kserve import open_inference_pb2 as pb

from engine.errors import InvalidArgument, NotFound
from tests.cluster.fake_decode import CACHED_TOKENS
from tests.cluster.serving import ANSWER, LENGTH, MODEL, TOKENIZER
from tests.eventually import eventually
from tests.kserve.service import parameter, request, serving, tensor, values


async def test_a_text_is_answered_whole() -> None:
    async with serving() as service:
        answer = await service.stub.ModelInfer(request(), timeout=20)
    assert (answer.model_name, answer.model_version, answer.id) == ("tiny", "1", "mine")
    assert values(answer, "text_output") == ["One, two, three."]
    assert values(answer, "output_ids") == ANSWER
    assert values(answer, "sequence_index") == [0]
    assert values(answer, "finish_reason") == ["length"]
    assert values(answer, "num_output_tokens") == [LENGTH]
    assert values(answer, "num_input_tokens") == [len(TOKENIZER.encode("hello"))]
    assert values(answer, "cached_tokens") == [CACHED_TOKENS]
    assert answer.parameters["triton_final_response"].bool_param is True


async def test_token_ids_and_the_prompt_before_the_answer() -> None:
    ids = tensor("input_ids", "INT64", 1, 2, 3, shape=[1, 3])
    async with serving() as service:
        answer = await service.stub.ModelInfer(request(ids, text=None, max_tokens=2), timeout=20)
        echoed = await service.stub.ModelInfer(request(exclude_input_in_output=False), timeout=20)
        ((_, submit), _) = service.fake.submits
    assert submit.token_ids == (1, 2, 3)
    assert values(answer, "output_ids") == ANSWER[:2]
    assert values(echoed, "text_output") == ["helloOne, two, three."]


async def test_several_choices_and_only_the_outputs_that_are_asked_for() -> None:
    asked = request(n=2, stop=", t")
    asked.outputs.add(name="num_output_tokens")
    asked.outputs.add(name="text_output")
    async with serving() as service:
        answer = await service.stub.ModelInfer(asked, timeout=20)
    assert [output.name for output in answer.outputs] == ["num_output_tokens", "text_output"]
    assert values(answer, "text_output") == ["One"] * 2
    assert len(values(answer, "num_output_tokens")) == 2


SAMPLING = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": -3, "ignore_eos": True, "max_tokens": 2}


@pytest.mark.parametrize(
    "asked",
    [
        request(stop="zz", **SAMPLING),
        # As clients send them whose protocol has no numbers but int64.
        request(stop="zz", **{**SAMPLING, "temperature": "0.7", "top_p": "0.9"}),
        request(
            tensor("temperature", "FP32", 0.7, shape=[1, 1]),
            tensor("top_p", "FP64", 0.9),
            tensor("top_k", "INT32", 5),
            tensor("random_seed", "INT64", -3),
            tensor("ignore_eos", "BOOL", True),
            tensor("stop_words", "BYTES", b"zz", shape=[1, 1]),
            max_tokens=2,
        ),
        request(
            tensor(
                "sampling_parameters",
                "BYTES",
                b'{"temperature": 0.7, "top_p": "0.9", "top_k": 5, "seed": -3, "ignore_eos": true, "stop": ["zz"], '
                b'"max_tokens": 2}',
            ),
            max_tokens=None,
        ),
    ],
    ids=["parameters", "texts", "tensors", "one JSON object"],
)
async def test_sampling_is_asked_for_in_any_of_the_usual_ways(asked: pb.ModelInferRequest) -> None:
    async with serving() as service:
        await service.stub.ModelInfer(asked, timeout=20)
        ((_, submit),) = service.fake.submits
    params = submit.params
    assert (params.temperature, params.top_p, params.top_k, submit.seed) == (0.7, 0.9, 5, -3)
    assert (params.ignore_eos, params.stop, params.max_tokens) == (True, ("zz",), 2)


async def test_raw_tensors_are_answered_raw() -> None:
    """As Triton's own clients send and read them."""
    asked = pb.ModelInferRequest(model_name="tiny", parameters={"max_tokens": parameter(3)})
    asked.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    asked.inputs.add(name="temperature", datatype="FP16", shape=[1])
    asked.raw_input_contents.extend([b"\x05\0\0\0hello", struct.pack("<e", 0.5)])
    async with serving() as service:
        answer = await service.stub.ModelInfer(asked, timeout=20)
        ((_, submit),) = service.fake.submits
    raw = dict(zip([output.name for output in answer.outputs], answer.raw_output_contents, strict=True))
    assert raw["output_ids"] == struct.pack("<3q", *ANSWER[:3])
    text = TOKENIZER.decode(ANSWER[:3]).encode()
    assert raw["text_output"] == struct.pack("<I", len(text)) + text
    assert not any(output.HasField("contents") for output in answer.outputs)
    assert submit.params.temperature == 0.5


def raw_request(datatype: str, shape: list[int], raw: bytes, name: str = "text_input") -> pb.ModelInferRequest:
    asked = pb.ModelInferRequest(model_name="tiny", raw_input_contents=[raw])
    asked.inputs.add(name=name, datatype=datatype, shape=shape)
    return asked


def with_shared_memory() -> pb.ModelInferRequest:
    asked = request()
    asked.inputs[0].parameters["shared_memory_region"].string_param = "secrets"
    return asked


def with_output(name: str, **parameters: pb.InferParameter) -> pb.ModelInferRequest:
    asked = request()
    asked.outputs.add(name=name, parameters=parameters)
    return asked


BAD = [
    (request(text=None), "inputs"),
    (request(tensor("input_ids", "INT64", 1)), "inputs"),
    (request(text=""), "text_input"),
    (request(text="hello " * 3000), "text_input"),
    (request(tensor("text_input", "BYTES", b"a", b"b"), text=None), "text_input"),
    (request(tensor("text_input", "BYTES", b"\xff"), text=None), "text_input"),
    (request(tensor("text_input", "INT64", 1), text=None), "text_input.datatype"),
    (request(tensor("text_input", "BYTES", b"a", shape=[2]), text=None), "text_input.shape"),
    (request(tensor("text_input", "BYTES", b"a", shape=[-1]), text=None), "text_input.shape"),
    (request(tensor("text_input", "BYTES", b"a", shape=[1] * 9), text=None), "text_input.shape"),
    (request(tensor("text_input", "BYTES", shape=[1 << 40]), text=None), "text_input.shape"),
    (request(tensor("input_ids", "INT64", MODEL.vocab_size), text=None), "input_ids"),
    (request(tensor("input_ids", "INT64", -1), text=None), "input_ids"),
    (request(tensor("input_ids", "FP32", 1.0), text=None), "input_ids.datatype"),
    (request(tensor("input_ids", "INT64", *[1] * 3000), text=None), "input_ids"),
    (request(tensor("text_input", "BYTES", b"a")), "inputs[1].name"),
    (request(*[tensor(f"x{index}", "BOOL", True) for index in range(64)]), "inputs"),
    (with_shared_memory(), "text_input.parameters"),
    (with_output("logits"), "outputs"),
    (with_output("text_output", classification=parameter(3)), "text_output.parameters"),
    (raw_request("BYTES", [1], b"\x05\0\0\0hell"), "text_input"),
    (raw_request("BYTES", [1], b"\x05\0"), "text_input"),
    (raw_request("INT64", [1], b"1234567", "input_ids"), "input_ids"),
    (raw_request("BF16", [1], b"12"), "text_input.datatype"),
    (raw_request("COMPLEX", [1], b""), "text_input.datatype"),
    (pb.ModelInferRequest(model_name="tiny", raw_input_contents=[b"a"]), "raw_input_contents"),
    (request(temperature=math.nan), "temperature"),
    (request(temperature=-1), "temperature"),
    (request(temperature=True), "temperature"),
    (request(temperature="warm"), "temperature"),
    (request(tensor("top_p", "FP32", 0.0)), "top_p"),
    (request(tensor("top_k", "INT32", 1, 2)), "top_k"),
    (request(tensor("top_k", "FP32", 1.5)), "top_k"),
    (request(tensor("seed", "UINT64", 1 << 63)), "seed"),
    (request(max_tokens=0), "max_tokens"),
    (request(max_tokens=4000), "max_tokens"),
    (request(n=65), "n"),
    (request(temprature=0.5), "temprature"),
    (request(tensor("temperature", "FP32", 0.5), temperature=0.5), "temperature"),
    (request(random_seed=1, seed=1), "seed"),
    (request(beam_width=2), "beam_width"),
    (request(sampling_parameters="[]"), "sampling_parameters"),
    (request(sampling_parameters="[" * 100_000), "sampling_parameters"),
    (request(sampling_parameters=5), "sampling_parameters"),
    (request(sampling_parameters='{"logit_bias": {"a": 1}}'), "logit_bias"),
    (request(sampling_parameters='{"stop": [""]}'), "stop"),
    (request(guided_regex="("), "guided_regex"),
    (request(slo_class="gold"), "slo_class"),
    (request(ttft_ms=-5.0), "ttft_ms"),
    (request(timeout=0), "timeout"),
    (request(timeout="1" + "0" * 400), "timeout"),
    (request(stream=True), "stream"),
    (request(tensor("stream", "BOOL", True)), "stream"),
    (request(tensor("input_ids", "INT64", 1), text=None, exclude_input_in_output=False), "exclude_input_in_output"),
    (pb.ModelInferRequest(model_name="tiny", id="x" * 300), "id"),
    (
        pb.ModelInferRequest(model_name="tiny", inputs=request().inputs, parameters={"seed": pb.InferParameter()}),
        "parameters.seed",
    ),
    (request(model="other"), "model"),
]


@pytest.mark.parametrize(("bad", "field"), BAD, ids=[f"{index}-{field}" for index, (_, field) in enumerate(BAD)])
async def test_bad_input_names_the_field(bad: pb.ModelInferRequest, field: str) -> None:
    async with serving() as service:
        code, error = await service.refusal(bad)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert isinstance(error, InvalidArgument)
        assert error.field == field, str(error)
        assert error.expected
        assert str(error).startswith(f"{field}: got ")
        assert service.fake.submits == []


async def test_another_model_or_version_is_not_found() -> None:
    versioned = request()
    versioned.model_version = "2"
    async with serving() as service:
        for asked in (pb.ModelInferRequest(model_name="huge", inputs=request().inputs), versioned):
            code, error = await service.refusal(asked)
            assert code is grpc.StatusCode.NOT_FOUND
            assert isinstance(error, NotFound)
        with pytest.raises(grpc.aio.AioRpcError, match="known: tiny version 1") as caught:
            await service.stub.ModelMetadata(pb.ModelMetadataRequest(name="huge"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_garbage_is_refused_and_the_service_goes_on() -> None:
    async with serving() as service:
        channel = grpc.aio.insecure_channel(service.address)
        for wire in (b"\xff" * 50, b"\x0a\x02\xff\xfe"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(wire, timeout=20)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await channel.close()
        assert await service.stub.ModelInfer(request(), timeout=20)


@pytest.mark.parametrize("is_ready", [True, False])
async def test_health_and_metadata(is_ready: bool) -> None:
    async with serving(is_ready=is_ready) as service:
        stub = service.stub
        assert (await stub.ServerLive(pb.ServerLiveRequest())).live
        assert (await stub.ServerReady(pb.ServerReadyRequest())).ready is is_ready
        assert (await stub.ModelReady(pb.ModelReadyRequest(name="tiny", version="1"))).ready is is_ready
        assert not (await stub.ModelReady(pb.ModelReadyRequest(name="huge"))).ready
        assert not (await stub.ModelReady(pb.ModelReadyRequest(name="tiny", version="2"))).ready
        server = await stub.ServerMetadata(pb.ServerMetadataRequest())
        model = await stub.ModelMetadata(pb.ModelMetadataRequest(name="tiny"))
    assert (server.name, server.version) == ("tandem", "0.1.0")
    assert (model.name, list(model.versions), model.platform) == ("tiny", ["1"], "tandem")
    assert [(each.datatype, list(each.shape)) for each in model.inputs if each.name == "text_input"] == [("BYTES", [1])]


async def test_the_inputs_of_the_metadata_are_taken_and_its_outputs_given() -> None:
    samples = {"BYTES": b"zz", "BOOL": False, "INT32": 1, "INT64": 1, "FP32": 0.5}
    async with serving() as service:
        model = await service.stub.ModelMetadata(pb.ModelMetadataRequest(name="tiny"))
        for each in model.inputs:
            if each.name not in ("text_input", "input_ids"):
                value = b'{"top_k": 3}' if each.name == "sampling_parameters" else samples[each.datatype]
                given = None if each.name == "max_tokens" else 2
                answer = await service.stub.ModelInfer(
                    request(tensor(each.name, each.datatype, value), max_tokens=given), timeout=20
                )
                assert [(output.name, output.datatype) for output in answer.outputs] == [
                    (output.name, output.datatype) for output in model.outputs
                ], each.name


async def test_a_client_that_leaves_frees_the_worker() -> None:
    async with serving(ANSWER * 40) as service:
        call = service.stub.ModelInfer(request(max_tokens=500))
        await eventually(lambda: service.fake.running)
        call.cancel()
        await asyncio.wait([asyncio.ensure_future(call)])
        await eventually(lambda: not service.fake.running)


async def test_a_timeout_of_the_request_or_the_call_ends_it_everywhere() -> None:
    async with serving(ANSWER * 40) as service:
        # Triton's, in microseconds.
        code, error = await service.refusal(request(max_tokens=500, timeout=200_000))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "decode" in str(error)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.stub.ModelInfer(request(max_tokens=500), timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(lambda: not service.fake.running)


async def test_too_many_requests_are_told_when_to_come_back() -> None:
    async with serving(ANSWER * 40) as service:
        calls = [service.stub.ModelInfer(request(max_tokens=500)) for _ in range(4)]
        await eventually(lambda: service.gateway.status(0.0).requests_waiting == 2)
        code, error = await service.refusal(request())
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "retry after" in str(error)
        for call in calls:
            call.cancel()


async def test_a_gateway_that_ends_takes_no_more() -> None:
    async with serving() as service:
        await service.gateway.drain(1.0)
        assert not (await service.stub.ServerReady(pb.ServerReadyRequest())).ready
        assert not (await service.stub.ModelReady(pb.ModelReadyRequest(name="tiny"))).ready
        code, _ = await service.refusal(request())
        assert code is grpc.StatusCode.UNAVAILABLE


async def test_a_request_is_part_of_its_clients_trace() -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    async with serving() as service:
        metadata = (("traceparent", f"00-{trace_id}-b7ad6b7169203331-01"),)
        await service.stub.ModelInfer(request(), timeout=20, metadata=metadata)
        ((_, submit),) = service.fake.submits
    assert submit.trace is not None
    assert submit.trace.trace_id_hex == trace_id
