"""One gateway's token stream, as the worker's loop sees it: events go in, one frame comes out whenever it is read.

While a gateway does not read, the events of several steps gather and leave together. What can gather is bounded by what
the gateway itself asked for: `max_tokens` of each of its requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from decode_worker.sequence import Request
from decode_worker.stream import Event, TokenFrame


class Session:
    """`requests` maps the gateway's request ids to the requests that are unfinished."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.requests: dict[str, Request] = {}
        self._events: list[Event] = []
        self._step = 0
        self._is_closed = False
        self._wake = asyncio.Event()

    def push(self, step: int, events: Iterable[Event]) -> None:
        """Adds what step `step` gave."""
        self._step = step
        self._events.extend(events)
        self._wake.set()

    def close(self) -> None:
        """No more commands will come: `frames` ends once everything pushed has been read."""
        self._is_closed = True
        self._wake.set()

    async def frames(self) -> AsyncIterator[TokenFrame]:
        while True:
            if self._events:
                events, self._events = tuple(self._events), []
                yield TokenFrame(self._step, events)
            elif self._is_closed:
                return
            else:
                self._wake.clear()
                await self._wake.wait()
