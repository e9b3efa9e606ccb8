"""What may come in: checks a request against the model and the gateway's limits, and tokenizes its prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from cluster.messages import GenerateRequest, Message, ModelInfo
from engine.errors import ContextExceeded, InvalidArgument, NotFound
from engine.request_checks import check_token_ids
from engine.structure import Structure
from engine.tokenizer import Tokenizer
from engine.tool_grammar import argument_schemas
from engine.tools import Tool

MAX_REQUEST_ID_CHARS = 256
MAX_SALT_BYTES = 256


def prompt_token_ids(
    request: GenerateRequest, model: ModelInfo, tokenizer: Tokenizer | None, max_prompt_chars: int
) -> tuple[int, ...]:
    """The prompt's token ids. Raises NotFound for another model, InvalidArgument for everything else that is wrong."""
    if request.model not in ("", model.name):
        raise NotFound("model", request.model, known=model.name)
    _check_small_fields(request)
    params = fitted(request, model.max_context).params
    params.validate(model.vocab_size)
    if params.structure is not None:
        _check_structure(params.structure, request.tools)
    if params.stop and tokenizer is None:
        raise InvalidArgument("sampling_params.stop", params.stop, "none: this gateway has no tokenizer")
    field, token_ids = _encode(request.prompt, request.tools, tokenizer, max_prompt_chars)
    if not token_ids:
        raise InvalidArgument(field, request.prompt, "a prompt of at least one token")
    _check_length(field, len(token_ids), 1 if request.fills_context else params.max_tokens, model.max_context)
    check_token_ids(field, token_ids, model.vocab_size)
    return token_ids


def fitted(request: GenerateRequest, room_tokens: int) -> GenerateRequest:
    """The request; one that wants it, with as long an answer as there is room for."""
    if not request.fills_context:
        return request
    return replace(request, params=replace(request.params, max_tokens=max(1, room_tokens)))


def text_chars(prompt: str | tuple[int, ...] | tuple[Message, ...], tools: Sequence[Tool] = ()) -> int:
    """Characters of a prompt that are to be tokenized."""
    if isinstance(prompt, str):
        return len(prompt)
    if not is_conversation(prompt):
        return 0
    return sum(turn.chars for turn in cast(tuple[Message, ...], prompt)) + sum(tool.chars for tool in tools)


def is_conversation(prompt: str | tuple[int, ...] | tuple[Message, ...]) -> bool:
    """Whether it is a chat."""
    # Of token ids the first says enough: a prompt never mixes them with messages.
    return bool(prompt) and isinstance(prompt[0], Message)


def _check_structure(structure: Structure, tools: Sequence[Tool]) -> None:
    # Imported here: nobody else needs the library behind it.
    from engine.guidance import check_structure

    try:
        check_structure(structure)
    except InvalidArgument:
        # Nobody who offers tools has written the grammar that is made of them, but one of the schemas in it.
        for index, schema in argument_schemas(structure) if tools else ():
            check_structure(schema, f"tools[{index}].function.parameters")
        raise


def _check_small_fields(request: GenerateRequest) -> None:
    if len(request.request_id) > MAX_REQUEST_ID_CHARS:
        raise InvalidArgument("request_id", request.request_id, f"at most {MAX_REQUEST_ID_CHARS} characters")
    if len(request.salt) > MAX_SALT_BYTES:
        raise InvalidArgument("cache_salt", f"{len(request.salt)} bytes", f"at most {MAX_SALT_BYTES} bytes")
    deadline_s = request.deadline_s
    if deadline_s is not None and not (math.isfinite(deadline_s) and deadline_s > 0):
        raise InvalidArgument("deadline_s", deadline_s, "a positive number of seconds")


def _encode(
    prompt: str | tuple[int, ...] | tuple[Message, ...],
    tools: Sequence[Tool],
    tokenizer: Tokenizer | None,
    max_prompt_chars: int,
) -> tuple[str, tuple[int, ...]]:
    """(the field that held the prompt, by its name in inference.proto; its token ids)"""
    if isinstance(prompt, str):
        _check_chars("text", len(prompt), max_prompt_chars)
        return "text", tuple(_needed("text", tokenizer).encode(prompt)) if prompt else ()
    # At C's speed: a prompt may have 100,000 tokens, and all other requests wait.
    if Message not in set(map(type, prompt)):
        return "token_ids", cast(tuple[int, ...], prompt)
    messages = [turn for turn in prompt if isinstance(turn, Message)]
    assert len(messages) == len(prompt), "a prompt mixes messages and token ids"
    _check_chars("messages", text_chars(prompt, tools), max_prompt_chars)
    turns = [turn.described() for turn in messages]
    return "messages", tuple(_needed("messages", tokenizer).encode_chat(turns, tools=tools))


def _needed(field: str, tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise InvalidArgument(field, "a prompt to tokenize", "token_ids: this gateway has no tokenizer")
    return tokenizer


def _check_chars(field: str, chars: int, max_prompt_chars: int) -> None:
    if chars > max_prompt_chars:
        raise InvalidArgument(field, f"{chars} characters", f"at most {max_prompt_chars}")


def _check_length(field: str, prompt_tokens: int, max_tokens: int, max_context: int) -> None:
    if prompt_tokens >= max_context:
        limit = f"at most {max_context - 1}: the model's context is {max_context}"
        raise ContextExceeded(field, f"{prompt_tokens} tokens", limit)
    if prompt_tokens + max_tokens > max_context:
        room = f"at most {max_context - prompt_tokens}: the prompt has {prompt_tokens} of {max_context} tokens"
        raise ContextExceeded("sampling_params.max_tokens", max_tokens, room)
