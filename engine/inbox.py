"""The bounded mailbox of a worker's loop: everything that happens outside reaches the loop as a message.

RPC handlers, timers and transfers only put messages here; the loop alone changes the pool and the scheduler. The loop
also reads its mail while a step runs, but gives blocks back only between steps.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from engine.errors import Overloaded

# Messages that may wait for one turn of a worker's loop. The loop reads its mail many times a second.
INBOX_LIMIT = 4096

Message = TypeVar("Message")
Result = TypeVar("Result")


class Inbox(Generic[Message]):
    """`offer` new work, which may be refused; `put` news about accepted work, which never is.

    What `put` adds is bounded by what `offer` let in: each accepted request sends a small, fixed number of messages
    between two drains.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._messages: deque[Message] = deque()
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._messages)

    def offer(self, message: Message) -> None:
        """Raises Overloaded when `limit` messages wait already."""
        if len(self._messages) >= self._limit:
            raise Overloaded(f"{len(self._messages)} messages wait for the worker's loop")
        self.put(message)

    def put(self, message: Message) -> None:
        self._messages.append(message)
        self._wake.set()

    def drain(self, handle: Callable[[Message], None]) -> None:
        """Hands every waiting message to `handle`, in order of arrival."""
        while self._messages:
            handle(self._messages.popleft())

    async def wait(self, until_s: float = math.inf) -> None:
        """Returns when there is at least one message, or at `until_s` of the loop's clock."""
        is_late = asyncio.Event()

        def ring() -> None:
            is_late.set()
            self._wake.set()

        timer = None if math.isinf(until_s) else asyncio.get_running_loop().call_at(until_s, ring)
        try:
            while not self._messages and not is_late.is_set():
                self._wake.clear()
                await self._wake.wait()
        finally:
            if timer is not None:
                timer.cancel()

    async def serve_until(self, future: asyncio.Future[Any], handle: Callable[[Message], None]) -> None:
        """Handles messages as they come until `future` is done. Cancelling this leaves the future as it is."""

        def wake(_: object) -> None:
            self._wake.set()

        future.add_done_callback(wake)
        try:
            while not future.done():
                self.drain(handle)
                self._wake.clear()
                await self._wake.wait()
        finally:
            future.remove_done_callback(wake)

    async def serve_while(self, step: Coroutine[Any, Any, Result], handle: Callable[[Message], None]) -> Result:
        """Runs `step` to its end and handles messages as they come meanwhile. Cancelling this cancels and awaits it."""
        task = asyncio.ensure_future(step)
        task.add_done_callback(lambda _: self._wake.set())
        try:
            while not task.done():
                self.drain(handle)
                self._wake.clear()
                if not task.done():
                    await self._wake.wait()
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
