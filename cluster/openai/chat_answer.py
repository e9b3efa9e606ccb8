"""`POST /v1/chat/completions`: the answer, whole or as events."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cluster.messages import Choice, Chunk, Complete
from cluster.openai.answer import DONE, EventFrame, Heading, usage_fields
from cluster.openai.chat_turn import ChatTurn
from cluster.openai.token_texts import TokenTexts
from cluster.openai.tool_reader import ToolReader
from engine.batch import Sampled
from engine.request import FinishReason


class ChatAnswer:
    """Of one request. `reader` None: no tools were offered, all of an answer is text. `names_tool`: the client has
    chosen the function to be called."""

    def __init__(
        self,
        heading: Heading,
        texts: TokenTexts,
        *,
        with_logprobs: bool,
        wants_usage: bool,
        reader: Callable[[], ToolReader] | None = None,
        names_tool: bool = False,
    ) -> None:
        self._heading = heading
        self._reader = reader
        self._names_tool = names_tool
        # Of the choices of a stream.
        self._turns: dict[int, ChatTurn] = {}
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
        deltas = self._deltas(chunk)
        # Nothing is said of a token whose text is not decided yet, unless by its probability.
        if not deltas and self._with_logprobs and chunk.tokens:
            deltas = [{"content": ""}]
        for at, delta in enumerate(deltas):
            yield self._event(chunk.index, delta, chunk.tokens if at == 0 else ())

    def last(self, complete: Complete) -> Iterator[bytes]:
        for choice in complete.choices:
            turn = self._turn(choice.index)
            for delta in turn.end() if turn is not None else ():
                yield self._event(choice.index, delta, ())
            yield self._event(choice.index, {}, (), self._reason(choice, turn))
        if self._wants_usage:
            yield self._frame.usage(complete.usage)
        yield DONE

    def _deltas(self, chunk: Chunk) -> list[dict[str, Any]]:
        if (turn := self._turn(chunk.index)) is not None:
            return turn.push(chunk.text)
        return [{"content": chunk.text}] if chunk.text else []

    def _turn(self, index: int) -> ChatTurn | None:
        if self._reader is None:
            return None
        if index not in self._turns:
            self._turns[index] = ChatTurn(self._reader(), f"{self._heading.id}/{index}")
        return self._turns[index]

    def _reason(self, choice: Choice, turn: ChatTurn | None) -> str:
        # Who chose the function knows that it is called: "stop" then, as OpenAI has it.
        is_call = turn is not None and turn.has_called and not self._names_tool
        return "tool_calls" if is_call and choice.finish_reason is FinishReason.STOP else choice.finish_reason

    def _event(self, index: int, delta: dict[str, Any], tokens: Sequence[Sampled], reason: str | None = None) -> bytes:
        logprobs = self._logprobs(tokens) if tokens else None
        return self._frame.event({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})

    def _choice(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        turn = self._turn(choice.index)
        if turn is not None:
            message |= turn.whole(choice.text)
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": self._reason(choice, turn),
        }

    def _logprobs(self, tokens: Sequence[Sampled]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        return {"content": [self._texts.chat_logprobs(token) for token in tokens], "refusal": None}
