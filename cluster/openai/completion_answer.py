"""`POST /v1/completions`: the answer to one prompt or several, whole or as events."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from cluster.messages import Choice, Chunk, Complete
from cluster.openai.answer import DONE, EventFrame, Heading, summed, usage_fields
from cluster.openai.token_texts import TokenTexts, finite
from engine.batch import Sampled

KIND = "text_completion"


class CompletionAnswer:
    """Of one call. `echoed`: what stands before each prompt's answers. `choices` of each prompt."""

    def __init__(
        self,
        heading: Heading,
        texts: TokenTexts,
        echoed: Sequence[str],
        choices: int,
        *,
        with_logprobs: bool,
        wants_usage: bool,
    ) -> None:
        self._heading = heading
        self._texts = texts
        self._echoed = echoed
        self._choices = choices
        self._with_logprobs = with_logprobs
        self._wants_usage = wants_usage
        self._frame = EventFrame(heading, KIND, has_usage=wants_usage)
        # Where each choice's next token begins, by its index among all; its text may be held back. Made as they come:
        # nobody has looked yet at how many `choices` are asked for.
        self._offsets: defaultdict[int, int] = defaultdict(int)

    def whole(self, completes: Sequence[Complete]) -> dict[str, Any]:
        """`completes`: in the order of the prompts."""
        choices = [
            self._whole_choice(prompt, choice)
            for prompt, complete in enumerate(completes)
            for choice in complete.choices
        ]
        usage = summed([complete.usage for complete in completes])
        return {**self._heading.fields(KIND), "choices": choices, "usage": usage_fields(usage)}

    def first(self) -> Iterator[bytes]:
        for prompt, text in enumerate(self._echoed):
            if text:
                for choice in range(self._choices):
                    yield self._event(prompt * self._choices + choice, text, ())

    def chunk(self, prompt: int, chunk: Chunk) -> Iterator[bytes]:
        if chunk.text or (self._with_logprobs and chunk.tokens):
            yield self._event(prompt * self._choices + chunk.index, chunk.text, chunk.tokens)

    def end(self, prompt: int, complete: Complete) -> Iterator[bytes]:
        """One prompt's answers are over."""
        for choice in complete.choices:
            yield self._event(prompt * self._choices + choice.index, "", (), choice.finish_reason)

    def last(self, completes: Sequence[Complete]) -> Iterator[bytes]:
        if self._wants_usage:
            yield self._frame.usage(summed([complete.usage for complete in completes]))
        yield DONE

    def _event(self, index: int, text: str, tokens: Sequence[Sampled], reason: str | None = None) -> bytes:
        logprobs = self._logprobs(tokens, self._offsets[index]) if tokens else None
        if logprobs is not None:
            self._offsets[index] = logprobs["text_offset"][-1] + len(logprobs["tokens"][-1])
        return self._frame.event({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})

    def _whole_choice(self, prompt: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": prompt * self._choices + choice.index,
            "text": self._echoed[prompt] + choice.text,
            "logprobs": self._logprobs(choice.tokens, 0),
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, tokens: Sequence[Sampled], offset: int) -> dict[str, Any] | None:
        """`offset`: of the first token's text in that of its choice."""
        if not self._with_logprobs:
            return None
        names = [self._texts.text(token.token_id) for token in tokens]
        offsets = []
        for name in names:
            offsets.append(offset)
            offset += len(name)
        return {
            "tokens": names,
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {self._texts.text(token_id): finite(logprob) for token_id, logprob in token.top} for token in tokens
            ],
            "text_offset": offsets,
        }
