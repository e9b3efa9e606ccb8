"""The one thread that talks to Ray: its calls block, and the event loop must not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Value = TypeVar("Value")


class RayThread:
    """Calls come one after the other, so each of them must be short."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")

    async def call(self, function: Callable[..., Value], *args: object) -> Value:
        """Calls Ray in the thread. A cancelled call is waited for: Ray cannot be interrupted half-way."""
        call = asyncio.get_running_loop().run_in_executor(self._thread, function, *args)
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            await asyncio.wait([call])
            raise

    async def future(self, method: Callable[..., Any], *args: object) -> Any:  # noqa: ANN401 - Ray has no types
        """Calls a method of an actor and waits for what it returns."""
        reference = await self.call(method, *args)
        return await asyncio.wrap_future(reference.future())

    def close(self) -> None:
        self._thread.shutdown()
