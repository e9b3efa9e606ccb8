"""Prompts for `tandem generate`: from the command line, or one JSON object a line.

    {"id": "a", "prompt": "The capital of France is", "max_tokens": 16}
    {"id": "b", "messages": [{"role": "user", "content": "Say hello."}]}
    {"id": "c", "token_ids": [504, 3575, 282, 4649, 314]}

Other keys are ignored, so that data sets can be used as they are, unless they look like a misspelt known one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, InvalidArgument

PROMPT_KEYS = ("prompt", "messages", "token_ids")
KNOWN_KEYS = ("id", *PROMPT_KEYS, "max_tokens")
MAX_UINT32 = (1 << 32) - 1
TYPO_SIMILARITY = 0.85


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One request. `prompt` is text, token ids or a chat of (role, content). `where` names it in errors."""

    id: str | int
    prompt: str | tuple[int, ...] | tuple[tuple[str, str], ...]
    max_tokens: int | None = None
    where: str = ""


def from_text(text: str, *, is_chat: bool = False) -> PromptLine:
    """The prompt of the command line, as it is or as the one message of a chat."""
    if not text:
        raise InvalidArgument("TEXT", text, "a prompt of at least one character")
    _check_unicode("TEXT", text)
    return PromptLine("0", (("user", text),) if is_chat else text, where="TEXT")


def read_prompt_file(path: Path) -> list[PromptLine]:
    """Every line of a file; empty lines are skipped. Raises ConfigError or InvalidArgument naming file:line and field,
    so that nothing is sent when one line is wrong."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--file {path}: cannot be read: {error.strerror}") from None
    lines = [
        _parse(raw, f"{path}:{number}", number)
        for number, raw in enumerate(content.split(b"\n"), start=1)
        if raw.strip()
    ]
    if not lines:
        raise ConfigError(f"--file {path}: is empty, expected one JSON object a line")
    return lines


def _parse(raw: bytes, where: str, number: int) -> PromptLine:
    try:
        values = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InvalidArgument(where, values, "a JSON object")
    _check_keys(values, where)
    id_ = values.get("id", str(number))
    if not isinstance(id_, str | int) or isinstance(id_, bool):
        raise InvalidArgument(f"{where}: id", id_, "a string or an integer")
    max_tokens = values.get("max_tokens")
    if max_tokens is not None and not _is_count(max_tokens, at_least=1):
        raise InvalidArgument(f"{where}: max_tokens", max_tokens, f"an integer in [1, {MAX_UINT32}]")
    return PromptLine(id_, _prompt(values, where), max_tokens, where)


def _check_keys(values: Mapping[str, Any], where: str) -> None:
    given = [key for key in PROMPT_KEYS if key in values]
    for key in values:
        near = get_close_matches(key, KNOWN_KEYS, 1, TYPO_SIMILARITY)
        if key not in KNOWN_KEYS and near and near[0] not in values:
            raise InvalidArgument(f"{where}: {key}", values[key], f"no such key; did you mean {near[0]!r}?")
    if len(given) != 1:
        raise InvalidArgument(where, given, f"exactly one of {', '.join(PROMPT_KEYS)}")


def _prompt(values: Mapping[str, Any], where: str) -> str | tuple[int, ...] | tuple[tuple[str, str], ...]:
    if "prompt" in values:
        return _text(values["prompt"], f"{where}: prompt")
    if "token_ids" in values:
        token_ids = values["token_ids"]
        if not isinstance(token_ids, list) or not token_ids:
            raise InvalidArgument(f"{where}: token_ids", token_ids, "a list of at least one token id")
        for index, token_id in enumerate(token_ids):
            if not _is_count(token_id, at_least=0):
                raise InvalidArgument(f"{where}: token_ids[{index}]", token_id, f"an integer in [0, {MAX_UINT32}]")
        return tuple(token_ids)
    messages = values["messages"]
    if not isinstance(messages, list) or not messages:
        raise InvalidArgument(f"{where}: messages", messages, "a list of at least one message")
    return tuple(_message(message, f"{where}: messages[{index}]") for index, message in enumerate(messages))


def _message(message: object, field: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise InvalidArgument(field, message, 'an object {"role": ..., "content": ...}')
    # An empty message is a legal turn of a chat; an empty prompt is not a prompt.
    return _text(message.get("role"), f"{field}.role"), _text(
        message.get("content"), f"{field}.content", can_be_empty=True
    )


def _text(value: object, field: str, *, can_be_empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or can_be_empty):
        raise InvalidArgument(field, value, "a string" if can_be_empty else "a string of at least one character")
    _check_unicode(field, value)
    return value


def _check_unicode(field: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = text[error.start : error.start + 1]
        raise InvalidArgument(field, problem, f"valid UTF-8; character {error.start} is none") from None


def _is_count(value: object, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and at_least <= value <= MAX_UINT32
