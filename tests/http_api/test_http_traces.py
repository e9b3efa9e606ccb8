"""What calls over HTTP are part of, and what their answers name them by."""

from __future__ import annotations

import httpx
import openai
import pytest

from tests.http_api.web import web

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CHAT = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("is_chat", [True, False])
async def test_a_clients_trace_reaches_the_worker_by_every_way_to_ask(is_chat: bool) -> None:
    async with web() as here, openai.AsyncOpenAI(base_url=here.url, api_key="any") as client:
        headers = {"traceparent": PARENT, "tracestate": "vendor=1"}
        if is_chat:
            await client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=4, extra_headers=headers)
        else:
            prompts = ["hello", "you"]
            await client.completions.create(model="tiny", prompt=prompts, max_tokens=4, extra_headers=headers)
        traces = [submit.trace for _, submit in here.fake.submits]
    assert len(traces) == (1 if is_chat else 2)
    for trace in traces:
        assert trace is not None
        assert trace.traceparent.split("-")[1] == PARENT.split("-")[1]
        assert trace.state == "vendor=1"


@pytest.mark.parametrize("header", ["", "nonsense", PARENT + "-more"])
async def test_a_bad_header_is_passed_over(header: str) -> None:
    async with web() as here, openai.AsyncOpenAI(base_url=here.url, api_key="any") as client:
        await client.completions.create(
            model="tiny", prompt="hello", max_tokens=4, extra_headers={"traceparent": header}
        )
        [(_, submit)] = here.fake.submits
    assert submit.trace is None


@pytest.mark.parametrize(
    ("body", "status"), [({"prompt": "hello", "max_tokens": 4}, 200), ({"prompt": ""}, 400), ({"promt": "x"}, 400)]
)
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_every_answer_names_its_request(body: dict[str, object], status: int, is_streamed: bool) -> None:
    asked = {"model": "tiny", "stream": is_streamed, **body}
    async with web() as here, httpx.AsyncClient(base_url=here.root) as client:
        given = await client.post("/v1/completions", json=asked, headers={"x-request-id": "mine"})
        assert (given.status_code, given.headers["x-request-id"]) == (status, "mine")
        made = await client.post("/v1/completions", json=asked)
        assert len(made.headers["x-request-id"]) == 16
