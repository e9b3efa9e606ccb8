"""Where answers end: the trace knows, and nobody in the cluster does before they have ended.

    client, gateway, router     max_tokens as clients ask for it: one limit for all
    ── Submit ─▶ this ─▶ decode worker     max_tokens as long as the trace's answer: there the model ends it

A router that saw the trace's lengths would be told what no router of a real cluster can know.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from decode_worker.stream import Command, DecodeSession, DecodeTransport, Submit, TokenFrame


class EndingTransport:
    """Implements decode_worker.stream.DecodeTransport over another. `length_of` gives the tokens of the answer to a
    request, by the id that it has on the wire."""

    def __init__(self, inner: DecodeTransport, length_of: Callable[[str], int]) -> None:
        self._inner = inner
        self._length_of = length_of

    @asynccontextmanager
    async def attach(self, address: str) -> AsyncIterator[DecodeSession]:
        async with self._inner.attach(address) as session:
            yield _EndingSession(session, self._length_of)

    async def close(self) -> None:
        await self._inner.close()


class _EndingSession:
    def __init__(self, inner: DecodeSession, length_of: Callable[[str], int]) -> None:
        self._inner = inner
        self._length_of = length_of

    async def send(self, command: Command) -> None:
        if isinstance(command, Submit):
            length = self._length_of(command.request_id)
            command = replace(command, params=replace(command.params, max_tokens=length))
        await self._inner.send(command)

    def frames(self) -> AsyncIterator[TokenFrame]:
        return self._inner.frames()
