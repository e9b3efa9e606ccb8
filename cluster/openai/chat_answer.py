"""`POST /v1/chat/completions`: the answer, whole or as events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cluster.messages import Choice, Chunk, Complete
from cluster.openai.answer import DONE, EventFrame, Heading, usage_fields
from cluster.openai.token_texts import TokenTexts
from engine.batch import Sampled


class ChatAnswer:
    """Of one request."""

    def __init__(self, heading: Heading, texts: TokenTexts, *, with_logprobs: bool, wants_usage: bool) -> None:
        self._heading = heading
        self._texts = texts
        self._with_logprobs = with_logprobs
        self._wants_usage = wants_usage
        self._frame = EventFrame(heading, "chat.completion.chunk", has_usage=wants_usage)

    def whole(self, complete: Complete) -> dict[str, Any]:
        return {
            **self._heading.fields("chat.completion"),
            "choices": [self._choice(choice) for choice in complete.choices],
            "usage": usage_fields(complete.usage),
        }

    def first(self, choices: int) -> Iterator[bytes]:
        """Before any text: whose turn it is."""
        for index in range(choices):
            yield self._event(index, {"role": "assistant", "content": ""}, ())

    def chunk(self, chunk: Chunk) -> Iterator[bytes]:
        # Nothing is said of a token whose text is not decided yet, unless by its probability.
        if chunk.text or (self._with_logprobs and chunk.tokens):
            yield self._event(chunk.index, {"content": chunk.text}, chunk.tokens)

    def last(self, complete: Complete) -> Iterator[bytes]:
        for choice in complete.choices:
            yield self._event(choice.index, {}, (), choice.finish_reason)
        if self._wants_usage:
            yield self._frame.usage(complete.usage)
        yield DONE

    def _event(self, index: int, delta: dict[str, Any], tokens: Sequence[Sampled], reason: str | None = None) -> bytes:
        logprobs = self._logprobs(tokens) if tokens else None
        return self._frame.event({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, tokens: Sequence[Sampled]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        return {"content": [self._texts.chat_logprobs(token) for token in tokens], "refusal": None}
