"""The shapes of answers, for the OpenAPI document: answers are built elsewhere, and tests hold them to these."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


# ── what both kinds of answers have ──────────────────────────────────────────────────────────────────────────────────


class PromptTokensDetails(Shape):
    cached_tokens: int


class TokenUsage(Shape):
    prompt_tokens: int
    completion_tokens: int = Field(description="Of all choices together.")
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Answer(Shape):
    id: str
    created: int = Field(description="Seconds since 1970.")
    model: str


# ── chats ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class LikelyToken(Shape):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(LikelyToken):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(Shape):
    content: list[ChatToken]
    refusal: None


class FunctionCall(Shape):
    name: str
    arguments: str = Field(description="JSON.")


class ToolCall(Shape):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(Shape):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] = Field(default=[], description="Left out where nothing is called.")


class ChatChoice(Shape):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "abort"]


class ChatCompletion(Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: TokenUsage


class FunctionDelta(Shape):
    name: str = ""
    arguments: str


class ToolCallDelta(Shape):
    """The first of a call has its id, type and name; the others go on with its arguments."""

    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionDelta


class Delta(Shape):
    role: Literal["assistant"] = "assistant"
    content: str = ""
    tool_calls: list[ToolCallDelta] = []


class ChatChunkChoice(Shape):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "abort"] | None


class ChatCompletionChunk(Answer):
    """What each event of a stream holds; the last event of all is `[DONE]`."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: TokenUsage | None = Field(default=None, description="With `stream_options.include_usage`, in the last.")


# ── completions ──────────────────────────────────────────────────────────────────────────────────────────────────────


class CompletionLogprobs(Shape):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Shape):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "abort"]


class Completion(Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: TokenUsage


class CompletionChunkChoice(Shape):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "abort"] | None


class CompletionChunk(Answer):
    """What each event of a stream holds; the last event of all is `[DONE]`."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: TokenUsage | None = Field(default=None, description="With `stream_options.include_usage`, in the last.")


# ── the others ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Model(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int = Field(description="Tokens of prompt and answer together.")


class ModelList(Shape):
    object: Literal["list"]
    data: list[Model]


class TokenizeAnswer(Shape):
    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeAnswer(Shape):
    prompt: str


class State(Shape):
    status: str


class ErrorFields(Shape):
    message: str = Field(description="Names the field, what it was, and what would be right.")
    type: str
    param: str | None
    code: str | None


class ErrorBody(Shape):
    error: ErrorFields
