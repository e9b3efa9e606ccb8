"""A line for each request that has ended, and what no line, span or error says."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from cluster.gateway_config import RouterConfig
from cluster.logs.access_log import LOGGER, AccessLog
from cluster.logs.lines import JsonLines
from cluster.tracing.gateway_spans import GatewaySpans
from cluster.tracing.span import Span
from engine.errors import DeadlineExceeded, InvalidArgument, Overloaded
from engine.log_fields import FIELDS
from engine.objectives import Objectives
from engine.sampling import SamplingParams
from engine.trace_context import read_trace
from tests.cluster.fake_decode import CACHED_TOKENS, STEP_S, FakeDecode, on_virtual_time
from tests.cluster.serving import ANSWER, CONFIG, LENGTH, REQUEST, TO_THE_END, TOKENIZER, collect, serving

PROMPT_TOKENS = len(TOKENIZER.encode("hello"))
TRACE = read_trace("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
SECRET = "swordfish"


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [getattr(record, FIELDS) for record in caplog.records if record.name == LOGGER]


@on_virtual_time
async def test_an_answer_with_its_times_tokens_and_workers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        async with serving(FakeDecode(ANSWER)) as gateway:
            gateway.endings.observe(AccessLog())
            _, complete = await collect(gateway, replace(TO_THE_END, tenant="acme", trace=TRACE))
    [line] = lines(caplog)
    assert line == {
        "request_id": "r",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "reason": "finished",
        "total_s": pytest.approx((LENGTH + 1.1) * STEP_S, abs=1e-3),
        "prompt_tokens": PROMPT_TOKENS,
        "cached_tokens": CACHED_TOKENS,
        "completion_tokens": LENGTH,
        "tenant": "acme",
        "ttft_s": round(complete.receipt.ttft_s, 4),
        "tpot_s": round(complete.receipt.tpot_s, 5),
        "prefill_worker": "p",
        "decode_worker": "d",
        "retries": 0,
    }


@on_virtual_time
async def test_how_others_ended(caplog: pytest.LogCaptureFixture) -> None:
    config = CONFIG.model_copy(update={"router": RouterConfig(default_prefill_tokens_per_s=0.001)})
    with caplog.at_level(logging.INFO):
        async with serving(FakeDecode(ANSWER), config=config) as gateway:
            gateway.endings.observe(AccessLog())
            with pytest.raises(Overloaded):
                await collect(gateway, replace(REQUEST, objectives=Objectives(ttft_s=0.01)))
            with pytest.raises(DeadlineExceeded):
                await collect(gateway, replace(REQUEST, deadline_s=4.5 * STEP_S))
            async with aclosing(gateway.generate(TO_THE_END)) as parts:
                await anext(parts)
                with pytest.raises(InvalidArgument):
                    await collect(gateway, TO_THE_END)
            await asyncio.sleep(STEP_S)
    ends = [(line["reason"], line.get("problem", "")) for line in lines(caplog)]
    assert [reason for reason, _ in ends] == ["rejected", "expired", "invalid", "cancelled"]
    assert "objectives" in ends[0][1] or "retry after" in ends[0][1]
    assert [problem for _, problem in ends[1:]] == ["deadline exceeded during decode", "", ""]


@on_virtual_time
async def test_nothing_is_written_above_its_level(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        async with serving(FakeDecode(ANSWER)) as gateway:
            gateway.endings.observe(AccessLog())
            await collect(gateway, TO_THE_END)
    assert lines(caplog) == []


class Notebook:
    """Implements cluster.tracing.span.Sink."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def write(self, spans: list[Span]) -> None:
        self.spans += spans


@on_virtual_time
async def test_neither_logs_nor_spans_hold_what_clients_said(caplog: pytest.LogCaptureFixture) -> None:
    spans = Notebook()
    params = SamplingParams(max_tokens=LENGTH, stop=(SECRET,))
    said = replace(REQUEST, prompt=SECRET, salt=SECRET.encode(), params=params, trace=TRACE)
    with caplog.at_level(logging.DEBUG):
        async with serving(FakeDecode(ANSWER), ("p", "d", "e")) as gateway:
            gateway.endings.observe(AccessLog())
            gateway.endings.observe(GatewaySpans(spans, "tiny"))
            parts, _ = await collect(gateway, said)
            async with aclosing(gateway.generate(said)) as left:
                await anext(left)
                with pytest.raises(InvalidArgument):
                    await collect(gateway, said)
    answer = "".join(part.text for part in parts)
    text = "\n".join(map(JsonLines().format, caplog.records))
    assert len(lines(caplog)) == 3
    assert len({span.trace.trace_id for span in spans.spans}) == 1
    for written in (text, repr(spans.spans)):
        assert SECRET not in written
        assert answer not in written
