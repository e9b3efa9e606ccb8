"""What calls over HTTP are part of, and what their answers name them by."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest

from tests.cluster.serving import CONFIG
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


async def test_requests_at_once_may_have_one_name() -> None:
    config = CONFIG.model_copy(update={"max_running": 6})
    headers = {"x-request-id": "mine"}
    async with web(config=config) as here, httpx.AsyncClient(base_url=here.root, headers=headers) as client:
        chats = [client.post("/v1/chat/completions", json={"messages": CHAT}) for _ in range(2)]
        plain = [client.post("/v1/completions", json={"prompt": ["a", "b"], "stream": each}) for each in (False, True)]
        answers = await asyncio.gather(*chats, *plain)
        ids = [recent.ended.request_id for recent in here.recorder.recent.newest(10, part="mine")]
    assert [(answer.status_code, answer.headers["x-request-id"]) for answer in answers] == [(200, "mine")] * 4
    # Each by its own id inside, whose beginning everybody knows.
    assert len(set(ids)) == 6
    assert {"mine", "mine-0", "mine-1"} < set(ids)
