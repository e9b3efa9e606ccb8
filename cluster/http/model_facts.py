"""`/v1/models`, `/tokenize` and `/detokenize`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from cluster.gateway import Gateway
from cluster.http.body import read_body
from cluster.http.responses import json_response
from cluster.inference_convert import MAX_MESSAGES
from cluster.openai.chat_request import ChatMessage
from cluster.openai.request import parse, told
from cluster.openai.tools import MAX_TOOLS, ToolField, offered
from cluster.security.caller import Caller
from cluster.tokenize_calls import TokenizeCalls
from engine.errors import NotFound, TandemError


class TokenizeRequest(BaseModel):
    """As in vLLM: a text, or a chat and what it may call."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = ""
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    tools: Annotated[list[ToolField], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("one of prompt and messages")
        return self


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = ""
    tokens: Annotated[list[int], Field(fail_fast=True)]


class ModelFacts:
    """What can be asked of the model without computing anything. `created`: seconds since 1970."""

    def __init__(self, gateway: Gateway, calls: TokenizeCalls, max_body_bytes: int, created: int) -> None:
        self._gateway = gateway
        self._calls = calls
        self._max_body_bytes = max_body_bytes
        self._created = created

    async def models(self, request: Request, caller: Caller) -> Response:
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: Request, caller: Caller) -> Response:
        name = request.path_params["model"]
        if name != self._gateway.model.name:
            raise NotFound("model", name, known=self._gateway.model.name)
        return json_response(self._model())

    async def tokenize(self, request: Request, caller: Caller) -> Response:
        asked = parse(TokenizeRequest, await read_body(request, self._max_body_bytes))
        self._check_model(asked.model)
        with _told():
            if asked.messages is None:
                token_ids = await self._calls.encode(asked.prompt or "", asked.add_special_tokens)
            else:
                turns = tuple(message.turn(index) for index, message in enumerate(asked.messages))
                token_ids = await self._calls.encode_chat(turns, offered(asked.tools or ()))
        count = {"count": len(token_ids), "max_model_len": self._gateway.model.max_context}
        return json_response({**count, "tokens": token_ids})

    async def detokenize(self, request: Request, caller: Caller) -> Response:
        asked = parse(DetokenizeRequest, await read_body(request, self._max_body_bytes))
        self._check_model(asked.model)
        with _told():
            text = await self._calls.decode(asked.tokens, skip_special_tokens=False)
        return json_response({"prompt": text})

    def _check_model(self, name: str) -> None:
        if name not in ("", self._gateway.model.name):
            raise NotFound("model", name, known=self._gateway.model.name)

    def _model(self) -> dict[str, Any]:
        model = self._gateway.model
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "tandem",
            "root": model.name,
            "parent": None,
            "max_model_len": model.max_context,
        }


@contextmanager
def _told() -> Iterator[None]:
    """Errors name fields as these calls have them."""
    try:
        yield
    except TandemError as error:
        raise told(error, {"text": "prompt", "token_ids": "tokens"}) from error
