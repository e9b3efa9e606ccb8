"""Traces: who asks when, for how long a prompt and how long an answer, and which prompts begin alike.

A file holds one JSON object a line: `arrival_s` (seconds from the start, in order; null in every line of a file that
has lengths only), `prompt_tokens`, `output_tokens`, and perhaps `prefix_hashes`, whose number i names block i of 512
tokens together with all before it. Two prompts share a prefix exactly as far as their leading hashes agree.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

PREFIX_BLOCK_TOKENS = 512
# Mooncake's published traces tell arrivals to about this much.
STEP_S = 3.0


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. `arrival_s` None: not known. `prefix_hashes` (): shares its prompt with nobody."""

    arrival_s: float | None
    prompt_tokens: int
    output_tokens: int
    prefix_hashes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival."""

    requests: tuple[TraceRequest, ...]

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def has_arrivals(self) -> bool:
        """Whether every request says when it comes."""
        return all(request.arrival_s is not None for request in self.requests)

    @property
    def arrivals_s(self) -> tuple[float, ...]:
        """Raises ConfigError for a trace of lengths only."""
        known = tuple(request.arrival_s for request in self.requests if request.arrival_s is not None)
        if len(known) != len(self.requests):
            raise ConfigError("trace: arrival_s is null, expected an arrival process for a trace of lengths only")
        return known

    @property
    def rate_rps(self) -> float:
        """Mean requests per second: all but the first, over the time from the first to the last. 0.0 for fewer than
        two, or when all come at once."""
        times = self.arrivals_s
        span_s = times[-1] - times[0] if times else 0.0
        return (len(times) - 1) / span_s if span_s > 0 else 0.0

    def scaled(self, rate_scale: float) -> Trace:
        """The same requests, `rate_scale` times as many in a second: every gap divided by it."""
        if not (math.isfinite(rate_scale) and rate_scale > 0):
            raise ConfigError(f"rate_scale: got {rate_scale!r}, expected a positive number")
        return self.arriving([time / rate_scale for time in self.arrivals_s])

    def spread(self, step_s: float = STEP_S) -> Trace:
        """Requests of one and the same arrival spread evenly over the `step_s` seconds after it: undoes the coarse
        clock of a trace, and leaves one with a fine clock as it is."""
        groups = itertools.groupby(self.arrivals_s)
        sizes = [(time, sum(1 for _ in group)) for time, group in groups]
        times = [time + index * step_s / size for time, size in sizes for index in range(size)]
        return self.arriving(times)

    def arriving(self, times: Sequence[float]) -> Trace:
        """These requests at other times, in seconds; in order of their new arrival."""
        assert len(times) == len(self.requests), f"{len(times)} arrivals for {len(self.requests)} requests"
        moved = (replace(request, arrival_s=time) for request, time in zip(self.requests, times, strict=True))
        return Trace(tuple(sorted(moved, key=lambda request: request.arrival_s or 0.0)))

    def repeated(self, times: int) -> Trace:
        """The trace `times` times in a row, a mean gap between two of them. Prompts of different turns share nothing:
        a cache would otherwise know all of the second."""
        if times == 1:
            return self
        arrivals_s = self.arrivals_s
        turn_s = arrivals_s[-1] - arrivals_s[0] + 1 / self.rate_rps
        names = 1 + max((max(request.prefix_hashes, default=-1) for request in self.requests), default=-1)
        requests = (
            replace(
                request,
                arrival_s=arrival_s + turn * turn_s,
                prefix_hashes=tuple(name + turn * names for name in request.prefix_hashes),
            )
            for turn in range(times)
            for request, arrival_s in zip(self.requests, arrivals_s, strict=True)
        )
        return Trace(tuple(requests))

    def head(self, count: int) -> Trace:
        """The first `count` requests."""
        return Trace(self.requests[:count])


class TracePrompts:
    """Token ids for a trace's prompts, made when they are asked for: every 512 tokens one id, the block's own.

    Blocks of equal hash get equal tokens and others differ in every token, so prompts agree exactly as far as their
    hashes do. A prompt without hashes is filled with an id that no other prompt has.
    """

    def __init__(self, trace: Trace) -> None:
        self._requests = trace.requests
        self._first_private = 1 + max((max(request.prefix_hashes, default=-1) for request in trace.requests), default=0)

    @property
    def vocab_size(self) -> int:
        """All token ids are below this."""
        return self._first_private + len(self._requests)

    def token_ids(self, index: int) -> tuple[int, ...]:
        """The prompt of the trace's request number `index`."""
        request = self._requests[index]
        if not request.prefix_hashes:
            return (self._first_private + index,) * request.prompt_tokens
        blocks = (itertools.repeat(name, PREFIX_BLOCK_TOKENS) for name in request.prefix_hashes)
        return tuple(itertools.chain.from_iterable(blocks))[: request.prompt_tokens]


def read_trace(path: Path | str, limit: int | None = None) -> Trace:
    """The first `limit` requests of a trace file, all for None. Raises ConfigError naming file, line and field."""
    try:
        with Path(path).open(encoding="utf-8") as lines:
            requests = [_read_line(text, f"{path}:{number}") for number, text in _numbered(lines, limit)]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if not requests:
        raise ConfigError(f"{path}: holds no request, expected one JSON object a line")
    _check_order(requests, str(path))
    return Trace(tuple(requests))


def _numbered(lines: Iterable[str], limit: int | None) -> Iterable[tuple[int, str]]:
    filled = ((number, text) for number, text in enumerate(lines, 1) if text.strip())
    return itertools.islice(filled, limit)


def _read_line(text: str, where: str) -> TraceRequest:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: is not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: got a {type(fields).__name__}, expected a JSON object")
    prompt_tokens = _count(fields, "prompt_tokens", where)
    return TraceRequest(
        _arrival(fields, where), prompt_tokens, _count(fields, "output_tokens", where), _hashes(fields, where)
    )


def _count(fields: dict[str, Any], name: str, where: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where}: {name}: got {value!r}, expected an integer of 1 or more")
    return value


def _arrival(fields: dict[str, Any], where: str) -> float | None:
    value = fields.get("arrival_s")
    if value is None and "arrival_s" in fields:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{where}: arrival_s: got {value!r}, expected seconds from the trace's start, or null")
    return float(value)


def _hashes(fields: dict[str, Any], where: str) -> tuple[int, ...]:
    hashes = fields.get("prefix_hashes") or []
    if not isinstance(hashes, list) or not all(type(name) is int and 0 <= name < 1 << 62 for name in hashes):
        raise ConfigError(f"{where}: prefix_hashes: got {str(hashes)[:40]}, expected a list of integers in [0, 2^62)")
    expected = -(-fields["prompt_tokens"] // PREFIX_BLOCK_TOKENS)
    if hashes and len(hashes) != expected:
        problem = f"got {len(hashes)} of them, expected {expected}: one for each {PREFIX_BLOCK_TOKENS} tokens"
        raise ConfigError(f"{where}: prefix_hashes: {problem} of the prompt")
    return tuple(hashes)


def _check_order(requests: Sequence[TraceRequest], path: str) -> None:
    """A trace of lengths only has no arrival at all; others never step back."""
    last_s: float | None = requests[0].arrival_s
    for number, request in enumerate(requests, 1):
        time = request.arrival_s
        if (time is None) != (last_s is None):
            raise ConfigError(f"{path}: arrival_s: is null for some requests only (request {number} differs)")
        if time is not None and last_s is not None and time < last_s:
            raise ConfigError(f"{path}: arrival_s: request {number} comes at {time}, before the one ahead at {last_s}")
        last_s = time
