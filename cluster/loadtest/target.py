"""The seam between the load generator and what it measures: a target streams the answer of one request."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.loadtest.request import LoadRequest
from engine.objectives import Objectives


@dataclass(frozen=True, slots=True)
class Tokens:
    """A chunk that carried `count` new tokens."""

    count: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer; None: the server did not say."""

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    receipt: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """What a target says of itself; None: it does not say."""

    model: str
    vocab_size: int | None = None
    max_context: int | None = None


class Target(Protocol):
    """Contract: every stream yields Tokens as they come, and one Finished at its end. Closing it early tells the server
    that nobody waits any more. A stream raises Overloaded when the server rejects the request, DeadlineExceeded when
    the server's own clock ended it, another TandemError when it fails. `acts_on_objectives`: the server is told the
    objectives and may act on them, so that its answers cannot be judged by others."""

    @property
    def name(self) -> str: ...

    @property
    def url(self) -> str: ...

    @property
    def acts_on_objectives(self) -> bool: ...

    async def facts(self) -> TargetFacts:
        """Raises ConfigError naming the URL when nothing answers there."""

    def stream(
        self, request: LoadRequest, objectives: Objectives, timeout_s: float
    ) -> AsyncGenerator[Tokens | Finished, None]: ...

    async def close(self) -> None: ...
