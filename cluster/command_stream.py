"""A gateway's commands to a worker, which the worker's side can end as well."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from decode_worker.stream import Received


class CommandStream:
    """Commands, until they end or `close` is called. `came` is told of each."""

    def __init__(self, commands: AsyncIterator[Received], came: Callable[[], None]) -> None:
        self._commands = commands
        self._came = came
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def close(self) -> None:
        if not self._closed.done():
            self._closed.set_result(None)

    def __aiter__(self) -> AsyncIterator[Received]:
        return self

    async def __anext__(self) -> Received:
        following = asyncio.create_task(self._next())
        either: list[asyncio.Future[Any]] = [following, self._closed]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            command = following.result() if following.done() else None
        finally:
            if not following.done():
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
        if command is None:
            raise StopAsyncIteration
        self._came()
        return command

    async def _next(self) -> Received | None:
        return await anext(self._commands, None)
