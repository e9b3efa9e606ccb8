"""The openai package as the judge: what people's own programs call a service with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from engine.errors import Unavailable
from engine.structure import Structure
from tests.http_api.web import TOKENIZER, WALL_S, Web, eventually, web

TEXT = "One, two, three."
TOKENS = len(TOKENIZER.encode(TEXT))
CHAT: list[Any] = [{"role": "user", "content": "Count!"}]


@asynccontextmanager
async def client(running: Web, api_key: str = "any") -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=running.url, api_key=api_key, max_retries=0, timeout=20) as openai_client:
        yield openai_client


async def test_a_chat() -> None:
    async with web(TEXT) as running, client(running) as ai:
        answer = await ai.chat.completions.create(model="tiny", messages=CHAT)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.created, answer.model) == ("chat.completion", int(WALL_S), "tiny")
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "stop", "assistant")
    assert choice.message.content == TEXT
    assert choice.logprobs is None
    assert answer.usage is not None
    prompt = TOKENIZER.encode_chat(CHAT)
    counts = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert counts == (len(prompt), TOKENS + 1, len(prompt) + TOKENS + 1)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    (submit,) = (submit for _, submit in running.fake.submits)
    assert list(submit.token_ids) == prompt
    # Nobody said how long: as long as the context allows.
    # Or as a worker of 64 blocks of 16 tokens has room for.
    assert submit.params.max_tokens == 1024 - len(prompt)


async def test_a_chat_that_is_streamed() -> None:
    async with web(TEXT) as running, client(running) as ai:
        stream = await ai.chat.completions.create(
            model="tiny", messages=CHAT, stream=True, n=2, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert {(chunk.object, chunk.id, chunk.created) for chunk in chunks} == {
        ("chat.completion.chunk", chunks[0].id, int(WALL_S))
    }
    *others, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 2 * (TOKENS + 1)
    assert all(chunk.usage is None for chunk in others)
    for index in range(2):
        deltas = [chunk.choices[0] for chunk in others if chunk.choices[0].index == index]
        assert deltas[0].delta.role == "assistant"
        assert "".join(delta.delta.content or "" for delta in deltas) == TEXT
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["stop"]
        assert len(deltas) > 10, "the text came as it was drawn"


async def test_completions_of_several_prompts() -> None:
    async with web(TEXT) as running, client(running) as ai:
        answer = await ai.completions.create(model="tiny", prompt=["Ab", "Cd"], n=2, max_tokens=3, echo=True)
        ids = await ai.completions.create(model="tiny", prompt=[[5, 6], [7]])
        one = await ai.completions.create(model="tiny", prompt=[5, 6], max_tokens=4)
    three = TOKENIZER.decode(TOKENIZER.encode(TEXT)[:3])
    assert [(choice.index, choice.text, choice.finish_reason) for choice in answer.choices] == [
        (index, prompt + three, "length") for index, prompt in enumerate(["Ab", "Ab", "Cd", "Cd"])
    ]
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 12)
    assert [choice.index for choice in ids.choices] == [0, 1]
    assert len(one.choices) == 1
    prompts = [tuple(submit.token_ids) for _, submit in running.fake.submits]
    assert sorted(prompts[2:]) == [(5, 6), (5, 6), (7,)]
    # OpenAI's own default for completions.
    assert running.fake.submits[2][1].params.max_tokens == 16


async def test_completions_that_are_streamed() -> None:
    async with web(TEXT) as running, client(running) as ai:
        stream = await ai.completions.create(
            model="tiny", prompt=["Ab", "Cd"], echo=True, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    texts = {0: "", 1: ""}
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "Ab" + TEXT, 1: "Cd" + TEXT}
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2 * (TOKENS + 1)


async def test_logprobs() -> None:
    async with web("é.") as running, client(running) as ai:
        chat = await ai.chat.completions.create(model="tiny", messages=CHAT, logprobs=True, top_logprobs=2)
        plain = await ai.completions.create(model="tiny", prompt="A", logprobs=1)
        stream = await ai.chat.completions.create(model="tiny", messages=CHAT, logprobs=True, stream=True)
        chunks = [chunk async for chunk in stream]
    whole = chat.choices[0].logprobs
    assert whole is not None
    assert whole.content is not None
    said = b"".join(bytes(token.bytes or []) for token in whole.content[:-1])
    assert said.decode() == "é."
    streamed = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token.bytes for part in streamed for token in part.content or []] == [t.bytes for t in whole.content]
    legacy = plain.choices[0].logprobs
    assert legacy is not None
    assert legacy.tokens is not None
    assert legacy.text_offset is not None
    # Half a character shows as one.
    assert (legacy.tokens, legacy.text_offset) == (["\ufffd", "\ufffd", ".", "<|end|>"], [0, 1, 2, 3])
    assert len(legacy.token_logprobs or []) == 4
    assert [submit.params.logprobs for _, submit in running.fake.submits] == [2, 1, 0]


@pytest.mark.parametrize("text", [TEXT, "aé.", "One, two"])
async def test_offsets_are_those_of_the_whole_answer_also_while_text_is_held_back(text: str) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": ["A", "B"], "logprobs": 0, "n": 2, "stop": [", thx"]}
    async with web(text) as running, client(running) as ai:
        whole = await ai.completions.create(**asked)
        chunks = [chunk.choices[0] async for chunk in await ai.completions.create(**asked, stream=True)]
    for choice in whole.choices:
        parts = [chunk.logprobs for chunk in chunks if chunk.index == choice.index and chunk.logprobs]
        assert choice.logprobs is not None
        assert [offset for part in parts for offset in part.text_offset or []] == choice.logprobs.text_offset


async def test_what_a_request_asks_for_is_what_workers_get() -> None:
    async with web(TEXT) as running, client(running) as ai:
        await ai.chat.completions.create(
            model="tiny",
            messages=[
                {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "!"}]}
            ],
            max_completion_tokens=7,
            temperature=0.5,
            top_p=0.9,
            seed=11,
            stop=["x", "y"],
            logit_bias={"5": -3},
            presence_penalty=0.25,
            frequency_penalty=-0.5,
            user="somebody",
            metadata={"any": "thing"},
            extra_body={"top_k": 9, "min_p": 0.1, "repetition_penalty": 1.5, "min_tokens": 2, "stop_token_ids": [9]},
            extra_headers={"x-request-id": "mine"},
        )
    (submit,) = (submit for _, submit in running.fake.submits)
    assert list(submit.token_ids) == TOKENIZER.encode_chat([{"role": "system", "content": "Be!"}])
    params = submit.params
    assert (params.max_tokens, params.temperature, params.top_p, params.seed) == (7, 0.5, 0.9, 11)
    assert (params.logit_bias, params.presence_penalty, params.frequency_penalty) == (((5, -3.0),), 0.25, -0.5)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (9, 0.1, 1.5)
    assert (params.min_tokens, params.stop_token_ids) == (2, (9,))
    assert submit.request_id.startswith("mine")


@pytest.mark.parametrize(
    ("asked", "structure"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Structure("json_schema", '{"type": "object"}')),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "null"}}}},
            Structure("json_schema", '{"type": "null"}'),
        ),
        ({"extra_body": {"guided_json": {"type": "null"}}}, Structure("json_schema", '{"type": "null"}')),
        ({"extra_body": {"guided_json": '{"type":"null"}'}}, Structure("json_schema", '{"type":"null"}')),
        ({"extra_body": {"guided_regex": "[ab]+"}}, Structure("regex", "[ab]+")),
        ({"extra_body": {"guided_choice": ["é", "b"]}}, Structure("choice", '["é", "b"]')),
        ({"extra_body": {"guided_grammar": 'root ::= "a"'}}, Structure("grammar", 'root ::= "a"')),
    ],
)
async def test_structures_are_what_workers_are_told(asked: dict[str, Any], structure: Structure | None) -> None:
    async with web(TEXT) as running, client(running) as ai:
        await ai.chat.completions.create(**{"model": "tiny", "messages": CHAT, **asked})
    (submit,) = (submit for _, submit in running.fake.submits)
    assert submit.params.structure == structure


async def test_stop_strings_end_an_answer() -> None:
    async with web(TEXT) as running, client(running) as ai:
        answer = await ai.chat.completions.create(model="tiny", messages=CHAT, stop=", th")
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("One, two", "stop")


async def test_models() -> None:
    async with web() as running, client(running) as ai:
        models = await ai.models.list()
        model = await ai.models.retrieve("tiny")
        with pytest.raises(openai.NotFoundError):
            await ai.models.retrieve("another")
    assert [each.id for each in models.data] == [model.id] == ["tiny"]
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == 2048


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"temperature": 101}, "temperature", "temperature: got 101.0, expected a number in [0, 100]"),
        ({"temperature": "hot"}, "temperature", "temperature: got 'hot', expected a valid number"),
        (
            {"max_completion_tokens": 0},
            "max_completion_tokens",
            "max_completion_tokens: got 0, expected an integer in [1, 2147483648]",
        ),
        ({"max_tokens": 4000}, "max_tokens", "max_tokens: got 4000, expected at most 2"),
        ({"n": 65}, "n", "n: got 65, expected an integer in [1, 64]"),
        ({"messages": []}, "messages", "messages: got [], expected List should have at least 1 item"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content: got None, expected text"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role", "messages[0].role: got 'king'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
            "messages[0].content[0].type",
            "messages[0].content[0].type: got 'image_url', expected text",
        ),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs: got 2, expected none where logprobs is not true"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "none where stream is not true"),
        ({"logit_bias": {"the": 1}}, "logit_bias", "logit_bias: got 'the', expected token ids as keys"),
        ({"stop": [""]}, "stop", "stop: got '', expected strings of 1 to 256 characters"),
        ({"extra_body": {"temprature": 1}}, "temprature", "temperature?"),
        (
            {"extra_body": {"max-tokens": 5}},
            "max-tokens",
            "max-tokens: got 'a field that nobody knows'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content[0].text",
            "messages[0].content[0].text: got 5, expected a valid string",
        ),
        ({"tool_choice": "sometimes"}, "tool_choice", "expected 'none', 'auto' or 'required'"),
        (
            {"tool_choice": {"type": "function", "function": {}}},
            "tool_choice.function.name",
            "tool_choice.function.name: got None, expected a value",
        ),
        ({"extra_headers": {"x-slo-ttft-ms": "soon"}}, "x-slo-ttft-ms", "got 'soon', expected a number of millisec"),
        ({"extra_headers": {"x-slo-ttft-ms": "-1"}}, "x-slo-ttft-ms", "x-slo-ttft-ms: got"),
        ({"extra_body": {"slo_class": "gold"}}, "slo_class", "slo_class: got 'gold', expected one of the gateway's"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "got 'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "got 'none', expected what goes"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nope"}}}},
            "response_format",
            "expected a JSON schema: Invalid type: nope",
        ),
        ({"extra_body": {"guided_regex": "(a"}}, "guided_regex", "guided_regex: got '(a', expected a regular expr"),
        ({"extra_body": {"guided_choice": []}}, "guided_choice", "expected a JSON list of texts"),
        (
            {"extra_body": {"guided_choice": ["a"], "guided_regex": "a"}},
            "guided_choice",
            "guided_choice: got 'a structure', expected none beside guided_regex",
        ),
        ({"extra_body": {"guided_regex": "a", "min_tokens": 2}}, "min_tokens", "got 2, expected 0 with a structure"),
        ({"extra_body": {"on_failure": "cry"}}, "on_failure", "on_failure: got 'cry', expected one of"),
    ],
)
async def test_bad_requests(changes: dict[str, Any], param: str, message: str) -> None:
    async with web() as running, client(running) as ai:
        with pytest.raises(openai.BadRequestError) as raised:
            await ai.chat.completions.create(**{"model": "tiny", "messages": CHAT, **changes})
        # Whether it is streamed or not.
        if "stream_options" not in changes:
            with pytest.raises(openai.BadRequestError) as streamed:
                await ai.chat.completions.create(**{"model": "tiny", "messages": CHAT, "stream": True, **changes})
            assert streamed.value.body == raised.value.body
        assert running.fake.submits == []
    assert isinstance(raised.value.body, dict)
    assert message in raised.value.body["message"]
    assert (raised.value.param, raised.value.type) == (param, "invalid_request_error")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "prompt: got '', expected a prompt of at least one token"),
        ({"prompt": []}, "prompt: got []"),
        ({"prompt": [[]]}, "prompt: got (), expected a prompt of at least one token"),
        ({"prompt": ["a"] * 65}, "expected List should have at most 64 items"),
        ({"prompt": [[5]] * 65}, "expected List should have at most 64 items"),
        ({"prompt": ["a", 5]}, "prompt[1]: got 5, expected a valid string"),
        ({"prompt": [[5, "a"]]}, "prompt[0][1]: got 'a', expected a valid integer"),
        ({"prompt": 5}, "prompt: got 5, expected a valid string"),
        ({"stop": ["a", 1]}, "stop[1]: got 1, expected a valid string"),
        ({"prompt": [5, 999_999]}, "prompt: got 999999, expected a token id in [0,"),
        ({"suffix": "end"}, "suffix: got 'end', expected none"),
        ({"best_of": 3}, "best_of: got 3, expected the same as n"),
        ({"echo": True, "logprobs": 1}, "echo: got True, expected false with logprobs"),
        ({"echo": True, "prompt": [5]}, "echo: got True, expected false where prompts are token ids"),
        ({"logprobs": 21}, "logprobs: got 21, expected an integer in [0, 20]"),
        ({"n": 1 << 62}, "n: got 4611686018427387904, expected an integer in [1, 64]"),
        ({"n": -(10**4299)}, "expected an integer in [1, 64]"),
    ],
)
async def test_bad_completions(changes: dict[str, Any], message: str) -> None:
    async with web() as running, client(running) as ai:
        with pytest.raises(openai.BadRequestError) as raised:
            await ai.completions.create(**{"model": "tiny", "prompt": "a", **changes})
    assert message in str(raised.value)


async def test_another_model() -> None:
    async with web() as running, client(running) as ai:
        with pytest.raises(openai.NotFoundError) as raised:
            await ai.chat.completions.create(model="huge", messages=CHAT)
    assert raised.value.code == "model_not_found"


@pytest.mark.parametrize(("prompt_tokens", "max_tokens", "param"), [(3000, 1, "prompt"), (2000, 100, "max_tokens")])
async def test_more_than_the_context_holds(prompt_tokens: int, max_tokens: int, param: str) -> None:
    async with web() as running, client(running) as ai:
        with pytest.raises(openai.BadRequestError) as raised:
            await ai.completions.create(model="tiny", prompt=[5] * prompt_tokens, max_tokens=max_tokens)
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", param)


async def test_nobody_to_serve_it() -> None:
    async with web(workers=("p",)) as running, client(running) as ai:
        with pytest.raises(openai.InternalServerError) as raised:
            await ai.chat.completions.create(model="tiny", messages=CHAT, stream=True)
    assert raised.value.status_code == 503
    assert "retry-after" in raised.value.response.headers


async def test_more_than_may_wait() -> None:
    async with web() as running, client(running) as ai:
        # Two run, two wait, and every further one is refused.
        asked = [ai.chat.completions.create(model="tiny", messages=CHAT, max_tokens=20) for _ in range(8)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert 0 < len(refused) <= 4
    for error in refused:
        assert isinstance(error, openai.RateLimitError)
        assert int(error.response.headers["retry-after"]) >= 1
        assert error.code == "rate_limit_exceeded"


@pytest.mark.parametrize("after", [1, 5])
async def test_closing_a_stream_frees_everything(after: int) -> None:
    async with web("a" * 500) as running, client(running) as ai:
        stream = await ai.chat.completions.create(model="tiny", messages=CHAT, stream=True)
        seen = 0
        async for _ in stream:
            seen += 1
            if seen == after:
                break
        await stream.close()
        await running.until_idle()
        assert len(running.fake.cancels) == 1


async def test_giving_up_an_answer_that_is_not_streamed_frees_everything() -> None:
    async with web("a" * 500) as running, client(running) as ai:
        asking = asyncio.create_task(ai.completions.create(model="tiny", prompt=["a", "b"], max_tokens=400))
        await eventually(lambda: len(running.fake.running) == 2)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await running.until_idle()
        assert len(running.fake.cancels) == 2


async def test_an_error_in_the_middle_of_a_stream() -> None:
    async with web("a" * 500) as running, client(running) as ai:
        stream = await ai.chat.completions.create(
            model="tiny", messages=CHAT, stream=True, extra_body={"on_failure": "fail"}
        )
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        running.fake.break_link("d:1", Unavailable("the worker is gone"))
        with pytest.raises(openai.APIError) as raised:
            [chunk async for chunk in stream]
        assert "the worker is gone" in raised.value.message


async def test_a_made_up_field_is_not_told_whole() -> None:
    async with web() as running, client(running) as ai:
        with pytest.raises(openai.BadRequestError) as raised:
            await ai.chat.completions.create(model="tiny", messages=CHAT, extra_body={"x" * 100_000: 1})
    assert raised.value.param == "x" * 256 + "..."
    assert len(raised.value.message) < 1000
