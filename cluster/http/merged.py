"""Several asynchronous generators read at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

Item = TypeVar("Item")


async def merged(sources: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[tuple[int, Item], None]:
    """What they give, as it comes, with the index of the source. Raises what the first of them raises. However this
    ends, all of them are closed then."""
    # Of one each: a source goes on when what it gave was taken.
    items: asyncio.Queue[tuple[int, Item] | BaseException | None] = asyncio.Queue(len(sources))

    async def read(index: int, source: AsyncGenerator[Item, None]) -> None:
        try:
            async with aclosing(source):
                async for item in source:
                    await items.put((index, item))
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # Whatever it is, it belongs to the reader of all.
            await items.put(error)
            return
        await items.put(None)

    tasks = [asyncio.create_task(read(index, source)) for index, source in enumerate(sources)]
    running = len(tasks)
    try:
        while running:
            item = await items.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
