"""Requests through gateway, decode worker and prefill worker, over real gRPC: one trace each, of all three."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import grpc.aio
import pytest
from opentelemetry.trace import SpanKind, StatusCode
from tandem.client import Client, GenerateChunk
from tandem.v1 import inference_pb2, inference_pb2_grpc

from bench.one_process import Service, serving
from cluster.gateway_config import GatewayConfig, RouterConfig
from cluster.messages import ModelInfo
from cluster.tracing.sampler import Sampler
from decode_worker.config import DecodeConfig
from engine.batch import KVLayout
from engine.emulated_runner import EmulatedRunner
from kvtransfer.convert import receipt_from_proto
from tests.engine.tiny_tokenizers import build, byte_level_metadata
from tests.eventually import eventually
from tests.tracing.collected import Collector

TOKENIZER = build(byte_level_metadata())
MODEL = ModelInfo("m", TOKENIZER.vocab_size, 1024, "llama", "uint64", (0,), False)
LAYOUT = KVLayout("m", 2, 1, 1, "uint64", 16, 1024)
STEP_S = 0.005
PROMPT = [random.Random(1).randrange(1, MODEL.vocab_size) for _ in range(40)]
CLIENT_TRACE, CLIENT_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
# Each process converts to wall-clock time by itself, and its clock may be set meanwhile.
CLOCKS_S = 0.001
# All that may come between a prompt and its answer where a prefill worker computes it.
PULLED = {
    "text_completion m": 1,
    "gateway queue": 1,
    "route": 1,
    "attempt": 1,
    "decode worker": 1,
    "pull queue": 1,
    "pull": 1,
    "prefill worker": 1,
    "prefill queue": 1,
    "prefill": 1,
    "kv transfer": 1,
    "kv exposed": 1,
    "decode queue": 1,
    "decode": 1,
}


@asynccontextmanager
async def traced(
    collector: Collector, ratio: float = 1.0, router: str = "least_loaded", prefills: int = 1, **config: float
) -> AsyncIterator[Service]:
    """All that ends while the context lasts is in `collector`, and nothing is left."""
    gateway = GatewayConfig(heartbeat_interval_s=0.1, fresh_s=2.0, router=RouterConfig(policy=router), **config)
    runners = [EmulatedRunner(LAYOUT, lambda _: STEP_S, 2, vocab_size=MODEL.vocab_size) for _ in range(prefills + 1)]
    async with serving(
        MODEL,
        TOKENIZER,
        runners[1:],
        runners[:1],
        gateway_config=gateway,
        decode_config=DecodeConfig(schedule_ahead=False),
        sampler=Sampler(ratio, random.Random(3)),
        sink_of=collector.sink_of,
    ) as service:
        yield service
        await eventually(lambda: is_empty(service))


def is_empty(service: Service) -> bool:
    try:
        service.check_empty()
    except AssertionError:
        return False
    return True


async def ask(service: Service, *, metadata: tuple[tuple[str, str], ...] = (), **fields: object):
    """A client that says what its calls are part of; the last message of the answer."""
    async with grpc.aio.insecure_channel(service.address) as channel:
        params = inference_pb2.SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, **fields)
        request = inference_pb2.GenerateRequest(
            request_id="r", token_ids=inference_pb2.TokenIds(ids=PROMPT), sampling_params=params
        )
        call = inference_pb2_grpc.InferenceStub(channel).Generate(request, metadata=metadata)
        return [message async for message in call][-1].complete


def counted(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in names}


async def test_one_trace_of_all_processes_that_nests_and_sums_up_to_the_receipt() -> None:
    collector = Collector()
    async with traced(collector) as service:
        complete = await ask(service)
    [trace] = collector.traces()
    assert counted([span.name for span in trace.spans]) == PULLED
    assert trace.processes() == {"gateway", "decode-0", "prefill-0"}
    trace.check_tree(slack_s=CLOCKS_S)
    trace.check_receipt(receipt_from_proto(complete.receipt))
    # Every link of the chain, by name.
    chain = [trace.one("prefill")]
    by_id = {span.context.span_id: span for span in trace.spans}
    while chain[-1].parent is not None:
        chain.append(by_id[chain[-1].parent.span_id])
    names = ["prefill", "prefill worker", "pull", "decode worker", "attempt", "text_completion m"]
    assert [span.name for span in chain] == names
    kinds = [SpanKind.INTERNAL, SpanKind.SERVER, SpanKind.CLIENT, SpanKind.SERVER, SpanKind.CLIENT, SpanKind.SERVER]
    assert [span.kind for span in chain] == kinds
    assert [span.parent.is_remote for span in chain[:-1]] == [False, True, False, True, False]
    request = trace.request
    assert request.attributes["gen_ai.response.id"] == "r"
    assert request.attributes["gen_ai.usage.input_tokens"] == len(PROMPT)
    assert request.attributes["gen_ai.usage.output_tokens"] == 12
    assert request.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert request.attributes["gen_ai.response.time_to_first_chunk"] == pytest.approx(complete.receipt.ttft_s)
    assert trace.one("decode worker").attributes["tandem.request_id"] == "r"
    assert trace.one("pull").attributes["tandem.kv_bytes"] == complete.receipt.kv_bytes > 0
    assert all(span.status.status_code is StatusCode.UNSET for span in trace.spans)


async def test_a_prompt_that_is_computed_where_it_is_decoded() -> None:
    collector = Collector()
    async with traced(collector, prefills=0) as service:
        complete = await ask(service)
    [trace] = collector.traces()
    brought = {"pull queue", "pull", "prefill worker", "kv transfer", "kv exposed"}
    assert counted([span.name for span in trace.spans]) == {name: 1 for name in PULLED if name not in brought}
    assert trace.processes() == {"gateway", "decode-0"}
    trace.check_tree(slack_s=CLOCKS_S)
    trace.check_receipt(receipt_from_proto(complete.receipt))


async def test_several_choices_are_one_trace() -> None:
    collector = Collector()
    async with traced(collector) as service:
        complete = await ask(service, n=3)
    [trace] = collector.traces()
    assert counted([span.name for span in trace.spans]) == PULLED
    assert trace.request.attributes["gen_ai.request.choice.count"] == 3
    assert trace.request.attributes["gen_ai.usage.output_tokens"] == 36
    trace.check_tree(slack_s=CLOCKS_S)
    trace.check_receipt(receipt_from_proto(complete.receipt))


async def test_a_client_that_is_traced_itself_has_the_request_below_its_span() -> None:
    collector = Collector()
    sampled = (("traceparent", f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01"), ("tracestate", "vendor=1,other=2"))
    async with traced(collector, ratio=0.0) as service:
        await ask(service, metadata=sampled)
        await ask(service)
    [trace] = collector.traces()
    assert trace.trace_id == CLIENT_TRACE
    assert counted([span.name for span in trace.spans]) == PULLED
    trace.check_tree(outer_id=int(CLIENT_SPAN, 16), slack_s=CLOCKS_S)
    assert {span.context.trace_state.to_header() for span in trace.spans} == {"vendor=1,other=2"}


async def test_a_client_that_is_not_sampled_is_not_traced_here_either() -> None:
    collector = Collector()
    async with traced(collector) as service:
        await ask(service, metadata=(("traceparent", f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-00"),))
    assert collector.traces() == []


OF_ZEROS, OF_NO_VERSION = f"00-{'0' * 32}-{CLIENT_SPAN}-01", f"ff-{CLIENT_TRACE}-{CLIENT_SPAN}-01"


@pytest.mark.parametrize("header", ["", "nonsense", OF_ZEROS, OF_NO_VERSION])
async def test_what_is_no_trace_context_is_passed_over(header: str) -> None:
    collector = Collector()
    async with traced(collector) as service:
        await ask(service, metadata=(("traceparent", header),))
    [trace] = collector.traces()
    assert trace.trace_id != CLIENT_TRACE
    trace.check_tree(slack_s=CLOCKS_S)


async def test_a_client_that_leaves_ends_its_trace_and_that_is_no_error() -> None:
    collector = Collector()
    async with traced(collector) as service, Client(service.address) as client:
        async with aclosing(client.generate(PROMPT, request_id="left", max_tokens=500, ignore_eos=True)) as parts:
            async for part in parts:
                if isinstance(part, GenerateChunk):
                    break
        await eventually(lambda: "decode worker" in {span.name for trace in collector.traces() for span in trace.spans})
    trace = collector.trace_of("left")
    assert trace.request.attributes["tandem.reason"] == "cancelled"
    assert trace.request.status.status_code is StatusCode.UNSET
    assert trace.one("decode").end_time > trace.one("decode").start_time, "as far as it came"


async def test_a_deadline_that_passes_is_an_error() -> None:
    collector = Collector()
    async with traced(collector, default_deadline_s=0.3) as service, Client(service.address) as client:
        with pytest.raises(grpc.aio.AioRpcError):
            await client.complete(PROMPT, max_tokens=900, ignore_eos=True)
    [trace] = collector.traces()
    request, attempt = trace.request, trace.one("attempt")
    assert (request.attributes["tandem.reason"], request.attributes["error.type"]) == ("expired", "expired")
    assert attempt.attributes["error.type"] == "DeadlineExceeded"
    for span in (request, attempt):
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description.startswith("deadline exceeded during ")
