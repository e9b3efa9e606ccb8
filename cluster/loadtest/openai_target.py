"""Any server that speaks OpenAI's HTTP API as a target: /v1/completions, or /v1/chat/completions for chats, streamed.

Chunks with text, or with `token_ids` (vLLM, when asked with "return_token_ids"), carry tokens. How many an answer has
is what its usage says; else it is counted by chunks.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import httpx

from cluster.loadtest.request import LoadRequest, chat_of, token_ids_of
from cluster.loadtest.target import Finished, TargetFacts, Tokens
from engine.errors import ConfigError, InvalidArgument, Overloaded, TandemError, Unavailable
from engine.objectives import Objectives

FACTS_TIMEOUT_S = 30.0
# Shorter than servers keep idle connections (uvicorn: 5 s), or one would be closed under a request.
KEEPALIVE_S = 2.0
ERROR_CHARS = 300
_DATA = "data:"
_BUSY = (429, 503)


class OpenAITarget:
    """`extra_body` is merged into every request's body, `headers` into its headers. Without `ignore_eos` the field is
    not sent: some servers refuse fields that they do not know. Objectives are never sent: no field is theirs."""

    acts_on_objectives = False

    def __init__(
        self,
        name: str,
        url: str,
        *,
        model: str = "",
        ignore_eos: bool = True,
        temperature: float = 0.0,
        extra_body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.url = name, url.rstrip("/")
        self._model = model
        self._body = {
            "temperature": temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if ignore_eos else {}),
            **(extra_body or {}),
        }
        # As many connections as requests are under way: a queue in the client would be measured as the server's.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEPALIVE_S)
        self._client = httpx.AsyncClient(limits=limits, timeout=None, headers=dict(headers or {}), trust_env=False)

    async def facts(self) -> TargetFacts:
        """The first model of /models, unless one was named."""
        try:
            response = await self._client.get(f"{self.url}/models", timeout=FACTS_TIMEOUT_S)
            response.raise_for_status()
            models = {str(model["id"]): model for model in response.json()["data"]}
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--url {self.url}: no list of models at /models: {_words(error)}") from None
        if not self._model:
            if not models:
                raise ConfigError(f"--url {self.url}: lists no model; name one with --model")
            self._model = next(iter(models))
        length = models.get(self._model, {}).get("max_model_len")
        return TargetFacts(self._model, max_context=length if isinstance(length, int) else None)

    async def stream(
        self, request: LoadRequest, objectives: Objectives, timeout_s: float
    ) -> AsyncGenerator[Tokens | Finished, None]:
        chat = chat_of(request.prompt)
        body = {**self._body, "model": self._model, "max_tokens": request.output_tokens}
        if chat is not None:
            path, body["messages"] = "/chat/completions", chat
        else:
            path, body["prompt"] = "/completions", token_ids_of(request.prompt) or request.prompt
        usage: Mapping[str, Any] = {}
        try:
            async with self._client.stream("POST", f"{self.url}{path}", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    raise _error_of(response, await response.aread())
                async for event in _events(response):
                    if error := event.get("error"):
                        raise TandemError(f"the stream ended with an error: {_cut(str(error))}")
                    usage = event.get("usage") or usage
                    if count := _token_count(event):
                        yield Tokens(count)
        except httpx.HTTPError as error:
            raise Unavailable(f"{self.url}: {_words(error)}") from error
        details = usage.get("prompt_tokens_details") or {}
        yield Finished(usage.get("prompt_tokens"), details.get("cached_tokens"), usage.get("completion_tokens"))

    async def close(self) -> None:
        await self._client.aclose()


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a server-sent event stream, until [DONE]."""
    async for line in response.aiter_lines():
        if not line.startswith(_DATA):
            continue
        content = line[len(_DATA) :].strip()
        if content == "[DONE]":
            return
        try:
            event = json.loads(content)
        except ValueError:
            raise TandemError(f"the stream holds what is not JSON: {_cut(content)}") from None
        if not isinstance(event, dict):
            raise TandemError(f"the stream holds what is not a JSON object: {_cut(content)}")
        yield event


def _token_count(event: Mapping[str, Any]) -> int:
    """Tokens that an event carried, as far as it says; 0 for one without any."""
    count = 0
    for choice in event.get("choices") or ():
        has_text = bool(choice.get("text") or (choice.get("delta") or {}).get("content"))
        count += len(choice.get("token_ids") or ()) or int(has_text)
    return count


def _error_of(response: httpx.Response, content: bytes) -> TandemError:
    text = _cut(content.decode("utf-8", "replace"))
    if response.status_code in _BUSY:
        retry = response.headers.get("retry-after", "")
        return Overloaded(f"HTTP {response.status_code}: {text}", float(retry) if retry.isdecimal() else 1.0)
    if httpx.codes.is_client_error(response.status_code):
        return InvalidArgument("request", f"HTTP {response.status_code}", f"what the server takes; it says: {text}")
    return TandemError(f"HTTP {response.status_code}: {text}")


def _words(error: Exception) -> str:
    return _cut(f"{type(error).__name__}: {error}")


def _cut(text: str) -> str:
    return " ".join(text.split())[:ERROR_CHARS]
