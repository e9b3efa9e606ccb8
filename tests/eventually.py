"""Waiting for what has no event of its own."""

import asyncio
from collections.abc import Callable


async def eventually(condition: Callable[[], object], within_s: float = 2.0) -> None:
    """Returns as soon as `condition()` holds; TimeoutError when it does not within `within_s`."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - the condition is a plain value of the code under test
            await asyncio.sleep(0.005)
