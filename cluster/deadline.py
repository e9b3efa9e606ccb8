"""A request's deadline, applied to one wait at a time.

One `asyncio.timeout` around a whole request would not do: a generator is suspended between its parts, and the timeout
would then hit whatever its reader happens to be doing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from engine.errors import DeadlineExceeded

Value = TypeVar("Value")


async def within(deadline_s: float | None, phase: str, wait: Awaitable[Value]) -> Value:
    """Awaits `wait` until `deadline_s` on the loop's clock, None for no limit. Raises DeadlineExceeded(phase)."""
    limit = asyncio.timeout_at(deadline_s)
    try:
        async with limit:
            return await wait
    except TimeoutError:
        assert limit.expired(), "a TimeoutError that is not the deadline's: errors are TandemErrors here"
        raise DeadlineExceeded(phase) from None
