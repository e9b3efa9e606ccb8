"""`/v1/chat/completions` and `/v1/completions`: from a body to an answer.

body ─▶ request (openai/*_request.py) ─▶ gateway.generate ─▶ answer (openai/*_answer.py) ─▶ JSON, or events
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import cast

from starlette.requests import Request
from starlette.responses import Response

from cluster.gateway import Gateway
from cluster.http.body import read_body, unless_gone
from cluster.http.merged import merged
from cluster.http.responses import EventStream, json_response
from cluster.intake import MAX_REQUEST_ID_CHARS
from cluster.messages import Chunk, Complete, GenerateRequest
from cluster.openai.answer import Heading
from cluster.openai.chat_answer import ChatAnswer
from cluster.openai.chat_request import ChatRequest
from cluster.openai.completion_answer import CompletionAnswer
from cluster.openai.completion_request import CompletionRequest
from cluster.openai.request import objectives, parse, told
from cluster.openai.token_texts import TokenTexts
from cluster.openai.tool_reader import ToolReader
from cluster.security.caller import Caller
from engine.errors import InvalidArgument, TandemError
from engine.trace_context import trace_of


class Generation:
    """Both ways to ask for text. `wall_clock`: seconds since 1970."""

    def __init__(self, gateway: Gateway, max_body_bytes: int, wall_clock: Callable[[], float]) -> None:
        self._gateway = gateway
        self._max_body_bytes = max_body_bytes
        self._wall_clock = wall_clock
        self._texts = TokenTexts(gateway.tokenizer)

    async def chat(self, request: Request, caller: Caller) -> Response:
        request_id = self._request_id(request, caller)
        asked = parse(ChatRequest, await read_body(request, self._max_body_bytes))
        tokenizer = self._gateway.tokenizer
        generate = asked.generate_request(request_id, objectives(request.headers), caller.tenant, tokenizer)
        generate = replace(generate, trace=trace_of(request.headers.items()), shares_id=True)
        reader = None
        if generate.tools and tokenizer is not None:
            reader = partial(ToolReader, tokenizer.tool_syntax, {tool.name for tool in generate.tools})
        answer = ChatAnswer(
            self._heading("chatcmpl", request_id),
            self._texts,
            with_logprobs=bool(asked.logprobs),
            wants_usage=asked.wants_usage,
            reader=reader,
            names_tool=asked.names_tool,
        )
        headers = {"x-request-id": request_id}
        if asked.stream:
            return EventStream(self._chat_events(generate, asked.names(), answer), headers)
        complete = await unless_gone(request.receive, self._to_the_end([generate], asked.names()))
        return json_response(answer.whole(complete[0]), headers=headers)

    async def completions(self, request: Request, caller: Caller) -> Response:
        request_id = self._request_id(request, caller)
        asked = parse(CompletionRequest, await read_body(request, self._max_body_bytes))
        generates = asked.generate_requests(request_id, objectives(request.headers), caller.tenant)
        # The call itself was counted for the first.
        now = asyncio.get_running_loop().time()
        self._gateway.quotas.further_calls(caller.tenant, len(generates) - 1, now)
        trace = trace_of(request.headers.items())
        generates = [replace(generate, trace=trace, shares_id=True) for generate in generates]
        answer = CompletionAnswer(
            self._heading("cmpl", request_id),
            self._texts,
            [prompt if asked.echo and isinstance(prompt, str) else "" for prompt in asked.prompts()],
            generates[0].params.n,
            with_logprobs=asked.logprobs is not None,
            wants_usage=asked.wants_usage,
        )
        headers = {"x-request-id": request_id}
        if asked.stream:
            return EventStream(self._completion_events(generates, asked.names(), answer), headers)
        completes = await unless_gone(request.receive, self._to_the_end(generates, asked.names()))
        return json_response(answer.whole(completes), headers=headers)

    # ── the gateway's part ───────────────────────────────────────────────────────────────────────────────────────────

    async def _chat_events(
        self, request: GenerateRequest, names: Mapping[str, str], answer: ChatAnswer
    ) -> AsyncGenerator[bytes, None]:
        has_begun = False
        async with aclosing(self._parts(request, names)) as parts:
            async for part in parts:
                if not has_begun:
                    has_begun = True
                    yield b"".join(answer.first(request.params.n))
                events = answer.chunk(part) if isinstance(part, Chunk) else answer.last(part)
                if text := b"".join(events):
                    yield text

    async def _completion_events(
        self, requests: Sequence[GenerateRequest], names: Mapping[str, str], answer: CompletionAnswer
    ) -> AsyncGenerator[bytes, None]:
        completes: list[Complete | None] = [None] * len(requests)
        has_begun = False
        async with aclosing(self._all_parts(requests, names)) as parts:
            async for prompt, part in parts:
                if not has_begun:
                    has_begun = True
                    if echoed := b"".join(answer.first()):
                        yield echoed
                if isinstance(part, Complete):
                    completes[prompt] = part
                events = answer.chunk(prompt, part) if isinstance(part, Chunk) else answer.end(prompt, part)
                if text := b"".join(events):
                    yield text
        yield b"".join(answer.last([complete for complete in completes if complete is not None]))

    async def _to_the_end(self, requests: Sequence[GenerateRequest], names: Mapping[str, str]) -> list[Complete]:
        completes: dict[int, Complete] = {}
        async with aclosing(self._all_parts(requests, names)) as parts:
            async for index, part in parts:
                if isinstance(part, Complete):
                    completes[index] = part
        return [completes[index] for index in range(len(requests))]

    def _all_parts(
        self, requests: Sequence[GenerateRequest], names: Mapping[str, str]
    ) -> AsyncGenerator[tuple[int, Chunk | Complete], None]:
        return merged([self._parts(request, names) for request in requests])

    async def _parts(
        self, request: GenerateRequest, names: Mapping[str, str]
    ) -> AsyncGenerator[Chunk | Complete, None]:
        stream = cast(AsyncGenerator[Chunk | Complete, None], self._gateway.generate(request))
        try:
            async with aclosing(stream) as parts:
                async for part in parts:
                    yield part
        except TandemError as error:
            raise told(error, names) from error

    # ── one call ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _request_id(self, request: Request, caller: Caller) -> str:
        """What the caller named it, so that its own logs and these agree. Proxies pass one on to several requests."""
        given = request.headers.get("x-request-id", "")
        if len(given) > MAX_REQUEST_ID_CHARS or not given.isprintable():
            raise InvalidArgument("x-request-id", given, f"at most {MAX_REQUEST_ID_CHARS} printable characters")
        request.state.request_id = given or self._gateway.new_request_id(caller.tenant)
        return str(request.state.request_id)

    def _heading(self, prefix: str, request_id: str) -> Heading:
        return Heading(f"{prefix}-{request_id}", int(self._wall_clock()), self._gateway.model.name)
