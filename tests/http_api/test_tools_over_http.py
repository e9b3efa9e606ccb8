"""Tools as the openai package offers and reads them."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from cluster.openai.chat_turn import CALL_ID_CHARS
from engine.tools import HERMES, Tool
from tests.http_api.test_openai_client import client
from tests.http_api.web import TOKENIZER, web

CHAT: list[Any] = [{"role": "user", "content": "Weather in Oslo and Rome?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "Today's weather.", "parameters": PARAMETERS},
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
OFFERED = (Tool("weather", "Today's weather.", PARAMETERS), Tool("time"))


def call(city: str) -> str:
    return f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'


TWO = f"I look.\n{call('Oslo')}\n{call('Rome')}"
CALLS = [("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"})]


async def test_calls_of_a_whole_answer() -> None:
    async with web(TWO) as running, client(running) as ai:
        answer = await ai.chat.completions.create(model="tiny", messages=CHAT, tools=[WEATHER, TIME])
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    found = choice.message.tool_calls
    assert found is not None
    functions = [one.function for one in found if one.type == "function"]
    assert [(function.name, json.loads(function.arguments)) for function in functions] == CALLS
    assert len({one.id for one in found}) == 2
    assert all(len(one.id) == CALL_ID_CHARS and one.id.isalnum() for one in found)
    (submit,) = (submit for _, submit in running.fake.submits)
    assert list(submit.token_ids) == TOKENIZER.encode_chat(CHAT, tools=OFFERED)
    assert submit.params.structure is None, "whoever is not strict is not held to anything"


async def test_calls_of_a_stream() -> None:
    async with web(TWO) as running, client(running) as ai:
        stream = await ai.chat.completions.create(model="tiny", messages=CHAT, tools=[WEATHER], stream=True, n=2)
        chunks = [chunk async for chunk in stream]
    ids = set()
    for index in range(2):
        deltas = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(delta.delta.content or "" for delta in deltas) == "I look."
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["tool_calls"]
        parts = [part for delta in deltas for part in delta.delta.tool_calls or ()]
        for at, (name, arguments) in enumerate(CALLS):
            first, *others = [part for part in parts if part.index == at]
            assert (first.type, first.function and first.function.name) == ("function", name)
            ids.add(first.id)
            assert all(part.id is None for part in others)
            assert len(others) > 1, "the arguments came as they were drawn"
            text = "".join((part.function and part.function.arguments) or "" for part in [first, *others])
            assert json.loads(text) == arguments
    assert len(ids) == 4


async def test_the_packages_own_helper_runs_a_tool() -> None:
    async with (
        web(call("Oslo")) as running,
        client(running) as ai,
        ai.chat.completions.stream(model="tiny", messages=CHAT, tools=[WEATHER]) as stream,
    ):
        answer = await stream.get_final_completion()
    (found,) = answer.choices[0].message.tool_calls or ()
    assert json.loads(found.function.arguments) == {"city": "Oslo"}
    assert not answer.choices[0].message.content


async def test_a_call_that_the_limit_cuts_off_stays_as_far_as_it_got() -> None:
    tokens = len(TOKENIZER.encode('<tool_call>\n{"name": "weather", "arguments": {"city": "Os'))
    async with web(call("Oslo")) as running, client(running) as ai:
        answer = await ai.chat.completions.create(model="tiny", messages=CHAT, tools=[WEATHER], max_tokens=tokens)
    (choice,) = answer.choices
    (found,) = choice.message.tool_calls or ()
    assert found.type == "function"
    assert (choice.finish_reason, found.function.arguments) == ("length", '{"city": "Os')


async def test_logprobs_of_calls_are_all_there() -> None:
    async with web(call("Oslo")) as running, client(running) as ai:
        stream = await ai.chat.completions.create(
            model="tiny", messages=CHAT, tools=[WEATHER], logprobs=True, stream=True
        )
        logprobs = [chunk.choices[0].logprobs async for chunk in stream]
    said = b"".join(bytes(token.bytes or []) for each in logprobs if each for token in each.content or [])
    assert call("Oslo").encode() in said


CHOSEN: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}
STRICT: dict[str, Any] = {"type": "function", "function": {"name": "time", "strict": True}}
NO_JSON: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "["}}


@pytest.mark.parametrize(
    ("options", "reason", "names"),
    [
        ({"tool_choice": "required"}, "tool_calls", ["weather", "time"]),
        ({"tool_choice": CHOSEN}, "stop", ["weather"]),
        ({"tools": [STRICT, WEATHER]}, "tool_calls", ["time", "weather"]),
        ({"response_format": {"type": "json_object"}}, "tool_calls", ["weather", "time"]),
    ],
)  # fmt: skip
async def test_what_has_to_be_called_is_held_to_its_schema(options: Any, reason: str, names: list[str]) -> None:
    async with web(call("Oslo")) as running, client(running) as ai:
        answer = await ai.chat.completions.create(
            **{"model": "tiny", "messages": CHAT, "tools": [WEATHER, TIME]} | options
        )
    assert answer.choices[0].finish_reason == reason
    (submit,) = (submit for _, submit in running.fake.submits)
    structure = submit.params.structure
    assert structure is not None
    assert structure.kind == "grammar"
    assert [line.count("%json") for line in structure.text.splitlines() if "arguments_" in line][1:] == [1] * len(names)
    assert all(json.dumps(json.dumps(name))[1:-1] in structure.text for name in names)


async def test_none_are_called_where_none_shall_be() -> None:
    async with web(call("Oslo")) as running, client(running) as ai:
        answer = await ai.chat.completions.create(model="tiny", messages=CHAT, tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].message.content == call("Oslo")
    (submit,) = (submit for _, submit in running.fake.submits)
    assert list(submit.token_ids) == TOKENIZER.encode_chat(CHAT)


async def test_an_answers_calls_and_their_results_are_turns_of_the_next_request() -> None:
    async with web(call("Oslo")) as running, client(running) as ai:
        first = await ai.chat.completions.create(model="tiny", messages=CHAT, tools=[WEATHER])
        message = first.choices[0].message
        (found,) = message.tool_calls or ()
        result = {"role": "tool", "tool_call_id": found.id, "content": "Rain."}
        await ai.chat.completions.create(model="tiny", messages=[*CHAT, message, result], tools=[WEATHER])
    prompt = TOKENIZER.decode(running.fake.submits[1][1].token_ids)
    assert f"assistant: {call('Oslo')}\nuser: <tool_response>\nRain.\n</tool_response>" in prompt


WRONG = {"properties": {"a": {"type": "string", "format": "weird"}}}


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"tools": [TIME, TIME]}, r"tools\[1\].function.name: got 'time'"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, r"tools\[0\].function.name"),
        ({"tools": [{"type": "search"}]}, r"tools\[0\].type"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            r"tools\[0\].function.parameters.type: got 'array', expected object",
        ),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice: got 'required'"),
        ({"tool_choice": {"type": "function", "function": {"name": "no"}}}, r"tool_choice.function.name: got 'no'"),
        (
            {
                "tool_choice": "required",
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": 3}}}],
            },
            r"tools\[0\].function.parameters: got '\{.*, expected a JSON schema: ",
        ),
        (
            {"tools": [WEATHER, {"type": "function", "function": {"name": "f", "strict": True, "parameters": WRONG}}]},
            r"tools\[1\].function.parameters: got '\{.*, expected a JSON schema: Unknown format: weird",
        ),
        (
            {
                "tool_choice": {"type": "function", "function": {"name": "f"}},
                "tools": [WEATHER, {"type": "function", "function": {"name": "f", "parameters": WRONG}}],
            },
            r"tools\[1\].function.parameters: got '\{.*, expected a JSON schema: Unknown format: weird",
        ),
        ({"extra_body": {"guided_regex": "a+"}}, "guided_regex: got 'a structure'"),
        ({"extra_body": {"guided_json": "{"}}, "guided_json: got '{', expected a JSON schema"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\].tool_call_id"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [NO_JSON]}]},
            r"messages\[0\].tool_calls\[0\].function.arguments: got '\[', expected a JSON object",
        ),
    ],
)  # fmt: skip
async def test_bad_tools_are_told_by_name(wrong: Any, text: str) -> None:
    async with web() as running, client(running) as ai:
        with pytest.raises(openai.BadRequestError, match=text):
            await ai.chat.completions.create(**{"model": "tiny", "messages": CHAT, "tools": [WEATHER]} | wrong)


async def test_tokenize_counts_what_is_told_of_tools() -> None:
    async with web() as running, client(running) as ai:
        answer = await ai.post(
            f"{running.root}/tokenize", body={"messages": CHAT, "tools": [WEATHER, TIME]}, cast_to=object
        )
    assert isinstance(answer, dict)
    assert answer["tokens"] == TOKENIZER.encode_chat(CHAT, tools=OFFERED)


def test_the_parameters_of_these_tests_are_a_schema() -> None:
    jsonschema.validate({"city": "Oslo"}, PARAMETERS)
    assert HERMES.begin in call("Oslo")
