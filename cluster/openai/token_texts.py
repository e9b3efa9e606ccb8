"""What single tokens say, for log-probabilities."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from engine.batch import Sampled
from engine.detokenizer import token_bytes
from engine.tokenizer import Tokenizer

# More than the tokens that are drawn again and again.
REMEMBERED = 8192
# Log-probabilities of tokens that cannot be drawn are -inf, which is no JSON.
LOWEST = -9999.0


class TokenTexts:
    """Without a tokenizer every token's text is its id."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self.spelled = lru_cache(REMEMBERED)(self._spelled)

    def chat_logprobs(self, token: Sampled) -> dict[str, Any]:
        """One entry of `logprobs.content`."""
        top = [self._entry(token_id, logprob) for token_id, logprob in token.top]
        return {**self._entry(token.token_id, token.logprob), "top_logprobs": top}

    def text(self, token_id: int) -> str:
        """Bytes that are no whole character show as U+FFFD."""
        return self.spelled(token_id)[0]

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, spelled = self.spelled(token_id)
        return {"token": text, "logprob": finite(logprob), "bytes": list(spelled)}

    def _spelled(self, token_id: int) -> tuple[str, bytes]:
        if self._tokenizer is None:
            return str(token_id), b""
        spelled = token_bytes(self._tokenizer, token_id)
        return spelled.decode("utf-8", "replace"), spelled


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)
