"""What answers of both kinds have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.messages import Usage

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Heading:
    """What stands at the head of an answer and of each of its events. `created`: seconds since 1970."""

    id: str
    created: int
    model: str

    def fields(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage_fields(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def summed(usages: list[Usage]) -> Usage:
    """Of several prompts that were asked at once."""
    return Usage(
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.cached_tokens for usage in usages),
    )


def to_json(content: object) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def event(content: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(content) + b"\n\n"


class EventFrame:
    """Events of one stream: what is the same in all of them is encoded once."""

    def __init__(self, heading: Heading, kind: str, *, has_usage: bool) -> None:
        head = to_json({**heading.fields(kind), "choices": []})
        self._head = b"data: " + head[: -len(b"]}")]
        # Where a stream ends with its usage, all events but that have none.
        self._tail = b'],"usage":null}\n\n' if has_usage else b"]}\n\n"

    def event(self, choice: Mapping[str, Any]) -> bytes:
        return b"".join((self._head, to_json(choice), self._tail))

    def usage(self, usage: Usage) -> bytes:
        return b"".join((self._head, b'],"usage":', to_json(usage_fields(usage)), b"}\n\n"))
