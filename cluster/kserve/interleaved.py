"""One stream of requests whose answers are computed side by side.

requests ─▶ at most `most` at once, the next is not read before ─▶ answers as they come, of whichever request
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import TypeVar

from engine.errors import DeadlineExceeded

Request = TypeVar("Request")
Response = TypeVar("Response")


async def interleaved(
    requests: AsyncIterator[Request],
    answer: Callable[[Request], AsyncGenerator[Response, None]],
    *,
    most: int,
    idle_s: float,
) -> AsyncGenerator[Response, None]:
    """Ends when there are no more requests and all have been answered. Raises what a request's reading or answering
    raises first, and DeadlineExceeded where nothing is under way and no request comes for `idle_s`. However it ends,
    all answers are closed then."""
    # Of one: an answer goes on when what it gave was taken.
    given: asyncio.Queue[Response | Exception | None] = asyncio.Queue(1)
    room = asyncio.Semaphore(most)
    running: set[asyncio.Task[None]] = set()

    async def serve(request: Request) -> None:
        try:
            async with aclosing(answer(request)) as parts:
                async for part in parts:
                    await given.put(part)
        except Exception as error:  # Whatever it is, it belongs to the reader of all.
            await given.put(error)
        finally:
            room.release()

    async def read() -> None:
        try:
            async for request in requests:
                await room.acquire()
                task = asyncio.create_task(serve(request))
                running.add(task)
                task.add_done_callback(running.discard)
            while running:
                await asyncio.wait(running)
            await given.put(None)
        except Exception as error:
            await given.put(error)

    reader = asyncio.create_task(read())
    try:
        while True:
            try:
                async with asyncio.timeout(idle_s):
                    part = await given.get()
            except TimeoutError:
                if running:
                    continue
                raise DeadlineExceeded(f"waiting for a request, for {idle_s:g} s") from None
            if part is None:
                return
            if isinstance(part, Exception):
                raise part
            yield part
    finally:
        tasks = [reader, *running]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
