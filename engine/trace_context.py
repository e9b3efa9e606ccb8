"""Where in a trace a request is, as W3C's Trace Context says it: what makes spans of several processes one trace.

    client ── traceparent ──▶ gateway ── Submit ──▶ decode worker ── traceparent ──▶ prefill worker

An id of a span below another follows from that one's, the span's name and a number. So whoever hands a context on need
not remember it: the spans are made at the end, of what was measured anyway, and have the ids that were handed on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import xxhash

PARENT_HEADER = "traceparent"
STATE_HEADER = "tracestate"
# Vendors' entries beyond what everybody must pass on are dropped, and the trace goes on without them.
MAX_STATE_CHARS = 512
MAX_STATE_MEMBERS = 32
_SAMPLED = 0x01
# What a later version appends comes after another dash. Version ff is none.
_PARENT = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
# One vendor's entry: its name, perhaps with a tenant's before it, and any text without commas and equals signs.
_NAME = r"[_0-9a-z\-*/]"
_MEMBER = re.compile(
    rf"(?:[a-z]{_NAME}{{0,255}}|[0-9a-z]{_NAME}{{0,240}}@[a-z]{_NAME}{{0,13}})=[ -+\--<>-~]{{0,255}}[!-+\--<>-~]"
)


@dataclass(frozen=True, slots=True)
class TraceContext:
    """One span, before it is known how long it took. `is_sampled`: it is to be recorded. `state` is other vendors', and
    passed on as it is. `parent_id` 0: nothing is above it, or nobody here knows what."""

    trace_id: int
    span_id: int
    is_sampled: bool
    state: str = ""
    parent_id: int = 0

    @property
    def trace_id_hex(self) -> str:
        return f"{self.trace_id:032x}"

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{_SAMPLED if self.is_sampled else 0:02x}"

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """What a call carries that is made on its behalf."""
        state = ((STATE_HEADER, self.state),) if self.state else ()
        return ((PARENT_HEADER, self.traceparent), *state)

    def child(self, name: str, number: int = 0) -> TraceContext:
        """The span `name` below this one; `number` tells several of the name apart."""
        span_id = xxhash.xxh3_64_intdigest(f"{self.span_id:016x}/{name}/{number}".encode()) or 1
        return replace(self, span_id=span_id, parent_id=self.span_id)


def read_trace(traceparent: str, tracestate: str = "") -> TraceContext | None:
    """The span of whoever sent these headers; None for none, or for what is no such header."""
    match = _PARENT.fullmatch(traceparent)
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    is_sampled = bool(int(flags, 16) & _SAMPLED)
    return TraceContext(int(trace_id, 16), int(span_id, 16), is_sampled, tracestate if _is_state(tracestate) else "")


def trace_of(headers: Iterable[tuple[str, str | bytes]]) -> TraceContext | None:
    """The same of a call's headers or metadata, with names in lower case. Several `tracestate` are one."""
    parents: list[str] = []
    states: list[str] = []
    for name, value in headers:
        if name == PARENT_HEADER and isinstance(value, str):
            parents.append(value)
        elif name == STATE_HEADER and isinstance(value, str):
            states.append(value)
    # Two parents are none: nobody knows which of them is meant.
    return read_trace(parents[0].strip(), ",".join(states)) if len(parents) == 1 else None


def _is_state(text: str) -> bool:
    """Whether it is what W3C calls a list of members. Whoever reads another may complain of it in its log, once a span,
    in the words of whoever sent it."""
    if len(text) > MAX_STATE_CHARS:
        return False
    # Empty ones are allowed, and count for nothing.
    members = [member for part in text.split(",") if (member := part.strip(" "))]
    keys = {member.partition("=")[0] for member in members}
    return len(keys) == len(members) <= MAX_STATE_MEMBERS and all(map(_MEMBER.fullmatch, members))
