"""One span of a trace: something that a request went through, from when to when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from engine.errors import TandemError
from engine.log_fields import told
from engine.trace_context import TraceContext

# What OpenTelemetry takes for the value of an attribute.
Value = str | bool | int | float | tuple[str, ...]
Kind = Literal["internal", "server", "client"]


@dataclass(frozen=True, slots=True)
class Span:
    """Times are seconds of the running loop's clock. `kind`: "client" asks another process, where a "server" answers.
    `error_type` says in one word what it failed with, "" where it did not; `problem` says it to people."""

    name: str
    trace: TraceContext
    start_s: float
    end_s: float
    kind: Kind = "internal"
    attributes: Mapping[str, Value] = field(default_factory=dict)
    error_type: str = ""
    problem: str = ""


class Sink(Protocol):
    """Where the spans of requests that have ended go."""

    def write(self, spans: list[Span]) -> None:
        """Never waits."""
        ...


class Phases:
    """The spans of one request in one process, below a span of its own."""

    def __init__(self, above: TraceContext, end_s: float) -> None:
        self.spans: list[Span] = []
        self._above = above
        self._end_s = end_s

    def add(
        self,
        name: str,
        start_s: float | None,
        end_s: float | None,
        number: int = 0,
        attributes: Mapping[str, Value] | None = None,
    ) -> None:
        """A phase that did not start is none; one that did not end ended with the request."""
        if start_s is None:
            return
        end_s = self._end_s if end_s is None else end_s
        self.spans.append(Span(name, self._above.child(name, number), start_s, end_s, "internal", attributes or {}))


def how_failed(error: TandemError | None) -> tuple[str, str]:
    """A span's `error_type` and `problem`."""
    return ("", "") if error is None else (type(error).__name__, told(error))
