"""`POST /v1/chat/completions`: the request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.inference_convert import MAX_MESSAGES
from cluster.messages import GenerateRequest, Message
from cluster.openai.request import MANY, NAMES, SamplingFields
from cluster.openai.tools import CallField, ToolFields
from engine.errors import InvalidArgument
from engine.objectives import Objectives
from engine.tokenizer import Tokenizer


class Part(BaseModel):
    """A part of a message's content. Only text can be read here; parts of other types have other fields."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """One turn. Answers are sent back as turns, with fields that say nothing of what the model is to read: those are
    passed over."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[CallField], Field(max_length=MANY, fail_fast=True)] | None = None
    tool_call_id: str | None = None

    def turn(self, index: int) -> Message:
        """Raises InvalidArgument for content that is no text, and for calls of tools that make no sense."""
        where = f"messages[{index}]"
        if self.tool_calls and self.role != "assistant":
            raise InvalidArgument(f"{where}.tool_calls", "calls", f"none in a turn of role {self.role!r}")
        if self.role == "tool" and not self.tool_call_id:
            raise InvalidArgument(f"{where}.tool_call_id", self.tool_call_id, "the id of the call that it answers")
        calls = tuple(call.call(f"{where}.tool_calls[{at}]") for at, call in enumerate(self.tool_calls or ()))
        # Models know no developers: OpenAI's later name for the same turn.
        role = "system" if self.role == "developer" else self.role
        return Message(role, self._text(where), calls, (self.tool_call_id or "") if role == "tool" else "")

    def _text(self, where: str) -> str:
        if isinstance(self.content, str):
            return self.content
        if self.content is None:
            if self.tool_calls:
                return ""
            raise InvalidArgument(f"{where}.content", None, "text")
        return "".join(part_text(part, f"{where}.content[{at}]") for at, part in enumerate(self.content))


class ChatRequest(SamplingFields, ToolFields):
    """Without `max_completion_tokens` an answer may fill the model's context."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    # Without effect on a model of text that has no such modes.
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    prediction: dict[str, Any] | None = None

    def names(self) -> dict[str, str]:
        """Of the gateway's fields, what this request calls them."""
        longest = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        structure = "tools" if self.tools and self.tool_choice != "none" else self.structure_field()
        # The gateway knows of the chosen tool alone.
        chosen = {"tools[0].function.parameters": f"tools[{self.chosen_index}].function.parameters"}
        return {**NAMES, **chosen, "structure": structure, "text": "messages", "max_tokens": longest}

    def generate_request(
        self, request_id: str, objectives: Objectives, tenant: str, tokenizer: Tokenizer | None
    ) -> GenerateRequest:
        """Raises InvalidArgument for fields that contradict each other."""
        self.check_stream_options()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidArgument("top_logprobs", self.top_logprobs, "none where logprobs is not true")
        longest = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        params = self.sampling(1 if longest is None else longest, logprobs)
        tools = self.offered()
        if tools and tokenizer is not None:
            syntax = tokenizer.tool_syntax
            sign_id = tokenizer.special_id(syntax.sign)
            structure = self.calls_structure(syntax, sign_id, params.structure, self.structure_field())
            # A sign that is no text would be left out of it.
            skips = params.skip_special_tokens and sign_id is None
            params = replace(params, structure=structure, skip_special_tokens=skips)
        request = self.asks(request_id, _turns(self.messages), params, objectives, tenant)
        return replace(request, fills_context=longest is None, tools=tools)


def part_text(part: Part, field: str) -> str:
    """Raises InvalidArgument for a part that is no text."""
    if part.type != "text":
        raise InvalidArgument(f"{field}.type", part.type, "text: the model reads nothing else")
    if part.text is None:
        raise InvalidArgument(f"{field}.text", None, "text")
    return part.text


def _turns(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    return tuple(message.turn(index) for index, message in enumerate(messages))
