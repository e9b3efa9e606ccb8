"""A request's answer while it grows: tokens become text, and stop strings end it.

Delta's tokens ─▶ Detokenizer ─▶ StopStrings ─▶ text shown to the client
"""

from __future__ import annotations

from cluster.messages import Choice, Chunk
from cluster.token_flow import TokenFlow
from decode_worker.stream import ChoiceSoFar, Delta
from engine.batch import Sampled
from engine.detokenizer import Detokenizer
from engine.request import FinishReason
from engine.sampling import SamplingParams
from engine.stop_strings import StopStrings
from engine.tokenizer import Tokenizer


class Answer:
    """All choices of one request. Without a tokenizer every text is empty. `first_s` and `last_s` are when the first
    and the last token came, None before. `flow` counts its tokens, and the gaps between them."""

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer | None, flow: TokenFlow | None = None) -> None:
        self._flow = TokenFlow() if flow is None else flow
        self._choices = [_GrowingChoice(index, params, tokenizer) for index in range(params.n)]
        self.first_s: float | None = None
        self.last_s: float | None = None

    @property
    def has_ended(self) -> bool:
        """True when every choice has: the worker may still go on with those that only a stop string ended."""
        return all(choice.finish_reason is not None for choice in self._choices)

    @property
    def token_count(self) -> int:
        return sum(len(choice.tokens) for choice in self._choices)

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first, over the longest choice; 0.0 with fewer than two tokens."""
        longest = max(len(choice.tokens) for choice in self._choices)
        if self.first_s is None or self.last_s is None or longest < 2:
            return 0.0
        return (self.last_s - self.first_s) / (longest - 1)

    def add(self, delta: Delta, now: float) -> Chunk | None:
        """Takes new tokens; returns what the client is to see of them, None for a choice that has ended already."""
        assert 0 <= delta.choice < len(self._choices), f"{delta.request_id} has no choice {delta.choice}"
        choice = self._choices[delta.choice]
        if choice.finish_reason is not None:
            return None
        if delta.tokens:
            self.first_s = now if self.first_s is None else self.first_s
            self.last_s = now
            if choice.last_s is not None:
                self._flow.gaps.add(now - choice.last_s)
            choice.last_s = now
        chunk = choice.add(delta)
        self._flow.generation_tokens += len(chunk.tokens)
        return chunk

    def so_far(self) -> tuple[ChoiceSoFar, ...]:
        """What another worker has to know to go on with it."""
        return tuple(
            ChoiceSoFar(tuple(token.token_id for token in choice.tokens), choice.finish_reason is not None)
            for choice in self._choices
        )

    def finish_reasons(self) -> tuple[FinishReason, ...]:
        """Of every choice, `abort` for one without an end."""
        return tuple(choice.finish_reason or FinishReason.ABORT for choice in self._choices)

    def choices(self) -> tuple[Choice, ...]:
        """Every choice as far as it got; one without an end has the reason `abort`."""
        return tuple(choice.freeze() for choice in self._choices)


class _GrowingChoice:
    def __init__(self, index: int, params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self._index = index
        self._min_tokens = params.min_tokens
        self._detokenizer = Detokenizer(tokenizer, params.skip_special_tokens) if tokenizer is not None else None
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output)
        self._text: list[str] = []
        self.tokens: list[Sampled] = []
        self.last_s: float | None = None
        self.finish_reason: FinishReason | None = None
        self._matched_stop_str: str | None = None
        self._matched_token_id: int | None = None

    def add(self, delta: Delta) -> Chunk:
        if self._detokenizer is None:
            # Without text nothing but the worker ends a choice.
            self.tokens.extend(delta.tokens)
            if delta.finish_reason is not None:
                self._end(delta.finish_reason, delta.matched_token_id)
            return Chunk(self._index, "", delta.tokens)
        seen = len(self.tokens)
        pieces: list[str] = []
        for position, token in enumerate(delta.tokens):
            self.tokens.append(token)
            is_stop_token = delta.matched_token_id is not None and position == len(delta.tokens) - 1
            if not is_stop_token:
                pieces.append(self._show(self._decode(token.token_id)))
            if self.finish_reason is not None:
                break
        if self.finish_reason is None and delta.finish_reason is not None:
            pieces.append(self._end(delta.finish_reason, delta.matched_token_id))
        text = "".join(pieces)
        self._text.append(text)
        return Chunk(self._index, text, tuple(self.tokens[seen:]))

    def freeze(self) -> Choice:
        return Choice(
            index=self._index,
            text="".join(self._text),
            tokens=tuple(self.tokens),
            finish_reason=self.finish_reason or FinishReason.ABORT,
            matched_stop_str=self._matched_stop_str,
            matched_token_id=self._matched_token_id,
        )

    def _decode(self, token_id: int) -> str:
        return self._detokenizer.push([token_id]) if self._detokenizer is not None else ""

    def _show(self, text: str) -> str:
        """What of `text` may be shown; ends the choice where a stop string is complete."""
        # As in vLLM: the text of the first min_tokens tokens cannot stop an answer.
        if len(self.tokens) <= self._min_tokens:
            return text
        shown, matched = self._stops.push(text)
        if matched is not None:
            self.finish_reason = FinishReason.STOP
            self._matched_stop_str = matched
        return shown

    def _end(self, reason: FinishReason, matched_token_id: int | None) -> str:
        """The text that was held back. It may itself hold a stop string."""
        shown = self._show(self._detokenizer.flush()) if self._detokenizer is not None else ""
        if self.finish_reason is None:
            self.finish_reason = reason
            self._matched_token_id = matched_token_id
            shown += self._stops.flush()
        return shown
