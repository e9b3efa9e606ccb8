"""The OpenAPI document: right by itself, complete, and true of what the service answers."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.routing import Route

from cluster.door import Door
from cluster.http.app import http_app
from cluster.http.openapi import openapi_document
from cluster.metrics.exposition import Metrics
from cluster.recorder import Recorder
from cluster.security.auth_config import AuthConfig
from cluster.security.clients import Clients
from tests.cluster.fake_decode import FakeDecode
from tests.cluster.serving import MODEL
from tests.cluster.serving import serving as serving_gateway
from tests.http_api.openapi_cases import run
from tests.http_api.web import Web, web
from tests.security.credentials import key_file

DOCUMENT = openapi_document(MODEL, asks_who_calls=False)
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Count!"}]}
LOGPROBS = {"logprobs": True, "top_logprobs": 2}
TOOLS = {"tools": [{"type": "function", "function": {"name": "weather"}}]}
CALL = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
CASES = 240


def holds(value: object, schema: str) -> None:
    """Raises where the value is not as that schema of the document says."""
    jsonschema.validate(value, {"$ref": f"#/components/schemas/{schema}", "components": DOCUMENT["components"]})


@pytest.mark.parametrize("asks_who_calls", [True, False])
def test_the_document_is_one(asks_who_calls: bool) -> None:
    document = openapi_document(MODEL, asks_who_calls=asks_who_calls)
    assert list(OpenAPIV31SpecValidator(document).iter_errors()) == []
    assert ({} in document["security"]) is not asks_who_calls


async def test_every_path_is_in_it_but_those_of_the_page() -> None:
    async with serving_gateway(FakeDecode()) as gateway:
        app = http_app(
            gateway,
            Door(gateway, None),
            Metrics(gateway),
            Recorder(gateway),
            max_prompt_chars=1000,
            max_body_bytes=1000,
            is_ready=lambda: True,
            wall_clock=lambda: 0.0,
        )
        served = {
            (route.path.replace(":path", ""), method.lower())
            for route in app.routes
            if isinstance(route, Route) and not re.match(r"/$|/tandem/", route.path)
            for method in (route.methods or set()) - {"HEAD"}
        }
    assert served == {(path, method) for path, item in DOCUMENT["paths"].items() for method in item}


async def test_it_is_open_to_all_and_what_needs_a_key_says_so(tmp_path: Path) -> None:
    file, keys = key_file(tmp_path, "acme")
    async with web(clients=Clients(AuthConfig(keys_file=file))) as running, httpx.AsyncClient() as client:
        document = (await client.get(f"{running.root}/openapi.json")).json()
        for path, item in document["paths"].items():
            for method, operation in item.items():
                url = running.root + path.replace("{model}", "tiny")
                is_open = operation.get("security", document["security"]) == []
                refused = (await client.request(method, url)).status_code == 401
                assert refused is not is_open, path
                credentials = ({"authorization": f"Bearer {keys['acme']}"}, {"x-api-key": keys["acme"]})
                for headers in credentials:
                    assert (await client.request(method, url, headers=headers)).status_code != 401, path


@pytest.mark.parametrize("changes", [{}, LOGPROBS, TOOLS, {"n": 3}], ids=["plain", "logprobs", "tools", "n"])
@pytest.mark.parametrize("stream", [{}, {"stream": True}, USAGE], ids=["whole", "streamed", "with usage"])
async def test_chats(changes: dict[str, Any], stream: dict[str, Any]) -> None:
    async with web(CALL) as running:
        asked = {**CHAT, **changes, **stream}
        holds(asked, "ChatRequest")
        answers = await posted(running, "/v1/chat/completions", asked)
    for answer in answers:
        holds(answer, "ChatCompletionChunk" if stream else "ChatCompletion")
    assert ("tool_calls" in str(answers)) is (changes is TOOLS)


@pytest.mark.parametrize("changes", [{}, {"logprobs": 2}, {"n": 2, "echo": True}], ids=["plain", "logprobs", "echo"])
@pytest.mark.parametrize("stream", [{}, {"stream": True}, USAGE], ids=["whole", "streamed", "with usage"])
async def test_completions(changes: dict[str, Any], stream: dict[str, Any]) -> None:
    async with web() as running:
        asked = {"prompt": ["Ab", "Cd"], **changes, **stream}
        holds(asked, "CompletionRequest")
        answers = await posted(running, "/v1/completions", asked)
    for answer in answers:
        holds(answer, "CompletionChunk" if stream else "Completion")


async def posted(running: Web, path: str, body: dict[str, Any]) -> list[Any]:
    """The answer, or those of its events but the last."""
    async with httpx.AsyncClient(timeout=20) as client:
        response = await client.post(running.root + path, json=body)
    assert response.status_code == 200, response.text
    media_type = response.headers["content-type"].partition(";")[0]
    assert media_type in DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"]
    if media_type == "application/json":
        return [response.json()]
    *events, last = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


@pytest.mark.parametrize(
    ("field", "inside", "outside"),
    [
        ("temperature", (0, 100), (-0.1, 100.1)),
        ("top_p", (0.01, 1), (0, 1.1)),
        ("n", (1, 64), (0, 65)),
        ("top_logprobs", (0, 20), (-1, 21)),
        ("max_completion_tokens", (1, 5), (0, -1)),
        ("seed", (-(1 << 63), (1 << 63) - 1), (1 << 63,)),
        ("stop_token_ids", ([0, MODEL.vocab_size - 1],), ([-1], [MODEL.vocab_size])),
        ("model", ("", "tiny"), ("huge",)),
        ("temprature", (), (1,)),
    ],
)
async def test_bounds_are_those_of_the_service(field: str, inside: tuple[Any, ...], outside: tuple[Any, ...]) -> None:
    async with web() as running, httpx.AsyncClient(timeout=20) as client:
        for value in (*inside, *outside):
            asked = {**CHAT, "logprobs": True, "max_tokens": 1, field: value}
            response = await client.post(f"{running.root}/v1/chat/completions", json=asked)
            assert response.status_code in ((200,) if value in inside else (400, 404)), (value, response.text)
            if value in inside:
                holds(asked, "ChatRequest")
            else:
                holds(response.json(), "ErrorBody")
                with pytest.raises(jsonschema.ValidationError):
                    holds(asked, "ChatRequest")


async def test_tokenizing_names_its_own_fields() -> None:
    async with web() as running, httpx.AsyncClient() as client:
        ids = await client.post(f"{running.root}/detokenize", json={"tokens": [-1]})
        text = await client.post(f"{running.root}/tokenize", json={"prompt": "x" * 1_000_001})
    assert (ids.status_code, ids.json()["error"]["param"]) == (400, "tokens")
    assert ids.json()["error"]["message"].startswith("tokens: got -1, expected a token id in [0,")
    assert (text.status_code, text.json()["error"]["param"]) == (400, "prompt")


async def test_made_up_requests() -> None:
    """`make test-openapi` sends many more, to a real service."""
    async with web() as running:
        counts = await asyncio.to_thread(run, running.root, CASES, 1)
    assert counts.total() >= CASES * 0.9, "of some paths there are not so many requests to make"
    assert counts["POST /v1/chat/completions positive 200"]
    assert counts["POST /v1/completions positive 200"]
