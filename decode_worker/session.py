"""One gateway's token stream, as the worker's loop sees it: events go in, one frame comes out whenever it is read.

While a gateway does not read, the events of several steps gather and leave together. From a number on no more of its
commands are read meanwhile, so what can gather beyond that is bounded by what it has asked for by then: `max_tokens` of
each of its requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from decode_worker.sequence import Request
from decode_worker.stream import Event, TokenFrame
from engine.errors import TandemError

# Seconds of a busy worker's events, and some 30 MB.
MANY_EVENTS = 1 << 16


class Session:
    """`requests` maps the gateway's request ids to the requests that are unfinished."""

    def __init__(self, name: str, many_events: int = MANY_EVENTS) -> None:
        self.name = name
        self.requests: dict[str, Request] = {}
        self._events: list[Event] = []
        self._many_events = many_events
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._step = 0
        self._is_closed = False
        self._problem: TandemError | None = None
        self._wake = asyncio.Event()

    def push(self, step: int, events: Iterable[Event]) -> None:
        """Adds what step `step` gave."""
        self._step = step
        self._events.extend(events)
        self._wake.set()
        if len(self._events) >= self._many_events:
            self._has_room.clear()

    async def room(self) -> None:
        """Returns when there are not too many events that the gateway has not read."""
        await self._has_room.wait()

    def close(self, problem: TandemError | None = None) -> None:
        """No more commands will come: `frames` ends, or raises `problem`, once everything pushed has been read."""
        self._is_closed = True
        self._problem = problem
        self._wake.set()

    async def frames(self) -> AsyncIterator[TokenFrame]:
        while True:
            if self._events:
                events, self._events = tuple(self._events), []
                self._has_room.set()
                yield TokenFrame(self._step, events)
            elif self._problem is not None:
                raise self._problem
            elif self._is_closed:
                return
            else:
                self._wake.clear()
                await self._wake.wait()
