"""`POST /v1/chat/completions`: the request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.inference_convert import MAX_MESSAGES
from cluster.messages import GenerateRequest, Message
from cluster.openai.request import NAMES, SamplingFields
from engine.errors import InvalidArgument
from engine.objectives import Objectives


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
    content: str | list[Part] | None = None
    name: str | None = None

    def turn(self, index: int) -> Message:
        """Raises InvalidArgument for content that is no text."""
        # Models know no developers: OpenAI's later name for the same turn.
        role = "system" if self.role == "developer" else self.role
        return Message(role, self._text(index))

    def _text(self, index: int) -> str:
        if isinstance(self.content, str):
            return self.content
        if self.content is None:
            raise InvalidArgument(f"messages[{index}].content", None, "text")
        return "".join(part_text(part, f"messages[{index}].content[{at}]") for at, part in enumerate(self.content))


class ChatRequest(SamplingFields):
    """Without `max_completion_tokens` an answer may fill the model's context."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    # Without effect on a model of text that has no such modes.
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    prediction: dict[str, Any] | None = None

    def names(self) -> dict[str, str]:
        """Of the gateway's fields, what this request calls them."""
        longest = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return {**NAMES, "structure": self.structure_field(), "text": "messages", "max_tokens": longest}

    def generate_request(self, request_id: str, objectives: Objectives, tenant: str) -> GenerateRequest:
        """Raises InvalidArgument for fields that contradict each other."""
        self.check_stream_options()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidArgument("top_logprobs", self.top_logprobs, "none where logprobs is not true")
        longest = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        params = self.sampling(1 if longest is None else longest, logprobs)
        request = self.asks(request_id, _turns(self.messages), params, objectives, tenant)
        return replace(request, fills_context=longest is None)


def part_text(part: Part, field: str) -> str:
    """Raises InvalidArgument for a part that is no text."""
    if part.type != "text":
        raise InvalidArgument(f"{field}.type", part.type, "text: the model reads nothing else")
    if part.text is None:
        raise InvalidArgument(f"{field}.text", None, "text")
    return part.text


def _turns(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    return tuple(message.turn(index) for index, message in enumerate(messages))
