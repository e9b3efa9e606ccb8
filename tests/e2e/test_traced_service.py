"""A service of real processes, its traces at a collector and its log as JSON."""

from __future__ import annotations

import json
from collections import Counter

import openai
import pytest

from tests.e2e.service import CONFIG, eventually, serving
from tests.golden.default_model import require_default_model
from tests.tracing.otlp_receiver import receiving, texts

pytestmark = [pytest.mark.model]
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ARRIVES_S = 30.0
# Each process converts to wall-clock time by itself.
CLOCKS_NS = 2_000_000
RECEIPT = {
    "prefill queue": "prefill_queue_s",
    "prefill": "prefill_s",
    "kv exposed": "kv_exposed_s",
    "decode queue": "decode_queue_s",
    "decode": "decode_s",
}


def test_one_trace_and_one_line_of_each_request(tmp_path) -> None:
    require_default_model()
    with receiving() as receiver:
        more = f"tracing: {{endpoint: '{receiver.endpoint}'}}\nlogging: {{level: info, format: json}}\n"
        with serving(tmp_path, "--address", "none", config=CONFIG + more) as served:
            [answer] = served.generate("The capital of France is", "--temperature", "0", "--max-tokens", "12")
            with openai.OpenAI(base_url=served.openai_url, api_key="none") as client:
                client.completions.create(
                    model="smollm2-135m-instruct",
                    prompt="Once upon a time",
                    max_tokens=8,
                    extra_headers={"traceparent": f"00-{TRACE}-{SPAN}-01", "x-request-id": "mine"},
                )
            eventually(lambda: Counter(span.name for _, span in receiver.spans)["decode worker"] == 2, ARRIVES_S)
        log = served.log.read_text().splitlines()

    spans = {(span.trace_id, span.span_id): (process, span) for process, span in receiver.spans}
    [theirs] = {trace for trace, _ in spans if trace == bytes.fromhex(TRACE)}
    [ours] = {trace for trace, _ in spans if trace != theirs}
    for trace, outer in ((theirs, bytes.fromhex(SPAN)), (ours, b"")):
        mine = {span_id: each for (trace_id, span_id), each in spans.items() if trace_id == trace}
        assert {process["service.instance.id"] for process, _ in mine.values()} == {"gateway", "decode-0", "prefill-0"}
        for _, span in mine.values():
            if span.name == "text_completion smollm2-135m-instruct":
                assert span.parent_span_id == outer
                continue
            _, above = mine[span.parent_span_id]
            assert above.start_time_unix_nano - CLOCKS_NS <= span.start_time_unix_nano, span.name
            assert span.end_time_unix_nano <= above.end_time_unix_nano + CLOCKS_NS, span.name

    taken = Counter[str]()
    for (trace_id, _), (_, span) in spans.items():
        if trace_id == ours:
            taken[span.name] += span.end_time_unix_nano - span.start_time_unix_nano
    for name, field in RECEIPT.items():
        assert taken[name] / 1e9 == pytest.approx(answer["receipt"][field], rel=0.05, abs=1e-6), name
    before_s = (taken["gateway queue"] + taken["route"]) / 1e9
    assert before_s == pytest.approx(answer["receipt"]["gateway_queue_s"], rel=0.05, abs=1e-6)

    said = [json.loads(line) for line in log if line.startswith("{")]
    access = [line for line in said if line["logger"] == "tandem.access"]
    assert [line["reason"] for line in access] == ["finished", "finished"]
    assert (access[1]["request_id"], access[1]["trace_id"]) == ("mine", TRACE)
    assert access[0]["trace_id"] == ours.hex()
    [outermost] = [span for _, span in spans.values() if span.parent_span_id == bytes.fromhex(SPAN)]
    assert texts(outermost.attributes)["gen_ai.response.id"] == "mine"
