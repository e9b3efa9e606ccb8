"""The OpenAI-compatible target against a fake server on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from cluster.loadtest.openai_target import OpenAITarget
from cluster.loadtest.play import play
from cluster.loadtest.request import LoadRequest, Prompt
from cluster.loadtest.target import Finished, TargetFacts, Tokens
from engine.errors import ConfigError, InvalidArgument, Overloaded, TandemError, Unavailable
from engine.objectives import Objectives
from tests.eventually import eventually
from tests.loadtest.fake_openai import Behaviour, FakeOpenAI, completion, openai_server


@asynccontextmanager
async def served(behaviour: Behaviour, **settings: Any) -> AsyncIterator[tuple[FakeOpenAI, OpenAITarget]]:
    async with openai_server(behaviour) as fake:
        target = OpenAITarget("openai", fake.url, **settings)
        try:
            await target.facts()
            yield fake, target
        finally:
            await target.close()


async def collect(target: OpenAITarget, prompt: Prompt = "hello") -> list[Tokens | Finished]:
    stream = target.stream(LoadRequest(0, 0.0, prompt, 1, 4), Objectives(1.0, 1.0), 10.0)
    async with aclosing(stream):
        return [piece async for piece in stream]


async def test_a_streamed_completion() -> None:
    async with served(lambda body: (200, completion("a", "", "bc"))) as (fake, target):
        assert await target.facts() == TargetFacts("tiny", None, 512)
        assert await collect(target) == [Tokens(1), Tokens(1), Finished(11, 3, 3)]
        [(path, body)] = fake.bodies
    assert path == "/v1/completions"
    assert body == {
        "model": "tiny",
        "prompt": "hello",
        "max_tokens": 4,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }


async def test_token_ids_and_chats_and_what_is_added() -> None:
    settings = {
        "model": "mine",
        "ignore_eos": False,
        "extra_body": {"return_token_ids": True},
        "headers": {"x-key": "k"},
    }
    async with served(lambda body: (200, completion("a")), **settings) as (fake, target):
        await collect(target, (5, 6, 7))
        await collect(target, (("user", "hi"),))
        (first_path, first), (second_path, second) = fake.bodies
        assert (first_path, first["prompt"], first["model"]) == ("/v1/completions", [5, 6, 7], "mine")
        assert "ignore_eos" not in first
        assert first["return_token_ids"] is True
        assert second_path == "/v1/chat/completions"
        assert second["messages"] == [{"role": "user", "content": "hi"}]
        assert "prompt" not in second
        assert fake.headers[-1]["x-key"] == "k"


async def test_chat_deltas_and_token_ids_count() -> None:
    events = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"content": "a"}}]},
        {"choices": [{"delta": {"content": ""}, "token_ids": [4, 5]}]},
        "data: [DONE]\n\n",
    ]
    async with served(lambda body: (200, events)) as (_, target):
        assert await collect(target) == [Tokens(1), Tokens(2), Finished(None, None, None)]


@pytest.mark.parametrize(
    ("behaviour", "error", "text"),
    [
        ((429, ["slow down"]), Overloaded, "HTTP 429: slow down; retry after 7 s"),
        ((503, ["full"]), Overloaded, "HTTP 503: full; retry after 7 s"),
        ((400, ["no ignore_eos"]), InvalidArgument, "no ignore_eos"),
        ((500, ["oh"]), TandemError, "HTTP 500: oh"),
        ((200, [{"error": {"message": "lost"}}]), TandemError, "lost"),
        ((200, ["data: {\n\n"]), TandemError, "not JSON"),
        ((200, ["data: 3\n\n"]), TandemError, "not a JSON object"),
    ],
)
async def test_errors(behaviour: tuple[int, list[Any]], error: type[TandemError], text: str) -> None:
    async with served(lambda body: behaviour) as (_, target):
        with pytest.raises(error, match=text):
            await collect(target)


async def test_nobody_listens() -> None:
    target = OpenAITarget("openai", "http://127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match=r"--url http://127\.0\.0\.1:9/v1: no list of models"):
        await target.facts()
    with pytest.raises(Unavailable, match="ConnectError"):
        await collect(target)
    await target.close()


async def test_what_is_no_url_is_named() -> None:
    target = OpenAITarget("openai", "http://127.0.0.1:80x/v1")
    with pytest.raises(ConfigError, match=r"--url http://127\.0\.0\.1:80x/v1: no list of models"):
        await target.facts()
    await target.close()


async def test_played_over_real_sockets() -> None:
    """Two requests 30 ms apart, answers of 200 ms: the second is sent while the first runs."""
    requests = [LoadRequest(index, 0.03 * index, "hello", 0, 4) for index in range(2)]
    async with served(lambda body: (200, completion("a", "b", "c", gap_s=0.06))) as (_, target):
        records = await play(target, requests, objectives=Objectives(), timeout_s=10.0)
    assert [record.ending for record in records] == ["answered"] * 2
    assert records[1].arrival_s + records[1].late_s < records[0].done_s
    for record in records:
        assert record.ttft_s is not None
        assert record.ttft_s >= 0.06
        assert len(record.gaps_s) == 2
        assert (record.prompt_tokens, record.cached_tokens, record.output_tokens) == (11, 3, 3)


async def test_a_client_that_goes_away_is_seen_by_the_server() -> None:
    async with served(lambda body: (200, completion(*"abc", gap_s=0.02) * 100)) as (fake, target):
        stream = target.stream(LoadRequest(0, 0.0, "hello", 1, 4), Objectives(), 10.0)
        async with aclosing(stream):
            assert await anext(stream) == Tokens(1)
        await eventually(lambda: fake.cut == 1)


async def test_many_requests_at_once_wait_for_no_connection() -> None:
    """No answer begins before the last request has come."""
    all_came = asyncio.Event()
    count = 120  # httpx itself would stop at 100

    def behave(body: dict[str, Any]) -> tuple[int, list[Any]]:
        if len(fake.bodies) == count:
            all_came.set()
        return 200, [all_came, *completion("a")]

    requests = [LoadRequest(index, 0.0, "hello", 0, 4) for index in range(count)]
    async with served(behave) as (fake, target):
        records = await play(target, requests, objectives=Objectives(), timeout_s=60.0)
    assert [record.ending for record in records] == ["answered"] * count
