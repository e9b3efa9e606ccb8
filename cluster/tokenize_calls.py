"""What callers may have the tokenizer do for them, within the bounds of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from cluster.gateway import Gateway
from cluster.intake import text_chars
from cluster.messages import Message
from engine.errors import InvalidArgument
from engine.tokenizer import Tokenizer
from engine.tools import Tool


class TokenizeCalls:
    """Each method raises InvalidArgument for what is too long, or cannot be had of this model, and Overloaded when too
    much waits to be tokenized."""

    def __init__(self, gateway: Gateway, max_prompt_chars: int) -> None:
        self._gateway = gateway
        self._max_prompt_chars = max_prompt_chars

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        tokenizer = self._tokenizer()
        self._check("text", len(text))
        return await self._gateway.texts.run(len(text), partial(tokenizer.encode, text, add_special_tokens))

    async def encode_chat(self, messages: tuple[Message, ...], tools: Sequence[Tool] = ()) -> list[int]:
        tokenizer = self._tokenizer()
        self._check("messages", chars := text_chars(messages, tools))
        turns = [turn.described() for turn in messages]
        return await self._gateway.texts.run(chars, partial(tokenizer.encode_chat, turns, tools=tools))

    async def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        self._check("token_ids", len(token_ids))
        decode = partial(self._tokenizer().decode, list(token_ids), skip_special_tokens)
        return await self._gateway.texts.run(len(token_ids), decode)

    def _tokenizer(self) -> Tokenizer:
        if self._gateway.tokenizer is None:
            raise InvalidArgument("model", self._gateway.model.name, "a model with a tokenizer; this gateway has none")
        return self._gateway.tokenizer

    def _check(self, field: str, count: int) -> None:
        if count > self._max_prompt_chars:
            raise InvalidArgument(field, f"a length of {count}", f"at most {self._max_prompt_chars}")
