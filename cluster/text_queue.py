"""Long texts on their way through the tokenizer: one at a time, in a thread, so that nobody else waits for them.

A million characters take seconds. Short texts are done at once: a thread would cost them more than it gains.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from engine.errors import Overloaded

# What takes some 10 ms on one core.
SHORT_CHARS = 4096
# Texts of full length that may wait.
WAITING_MAX = 4
# About what the tokenizer takes.
CHARS_PER_S = 300_000

Result = TypeVar("Result")


class TextQueue:
    """Belongs to one gateway. `max_chars`: the longest text that is tokenized at all."""

    def __init__(self, max_chars: int) -> None:
        self._max_chars = max_chars
        self._turn = asyncio.Lock()
        self._in_turn: asyncio.Task[Any] | None = None
        self._chars = 0

    async def run(self, chars: int, work: Callable[[], Result], *, is_long: bool = False) -> Result:
        """What `work` makes of a text of `chars`. `is_long`: it takes long whatever the length of its text. Raises what
        `work` raises, and Overloaded when too much waits already."""
        # A text that is too long is refused, which takes no time.
        if not (is_long or SHORT_CHARS < chars <= self._max_chars):
            return work()
        chars = min(max(chars, SHORT_CHARS), self._max_chars)
        if self._chars + chars > WAITING_MAX * self._max_chars:
            raise Overloaded(f"texts of {self._chars} characters wait to be tokenized", self._chars / CHARS_PER_S)
        self._chars += chars
        task = asyncio.create_task(self._take_turn(work))
        task.add_done_callback(partial(self._done, chars))
        try:
            return await asyncio.shield(task)
        finally:
            # A thread cannot be stopped: its turn lasts until it is done, whoever waits for it.
            if self._in_turn is not task:
                task.cancel()

    async def _take_turn(self, work: Callable[[], Result]) -> Result:
        async with self._turn:
            self._in_turn = asyncio.current_task()
            return await asyncio.to_thread(work)

    def _done(self, chars: int, task: asyncio.Task[Any]) -> None:
        self._chars -= chars
        if not task.cancelled():
            # Looked at even when whoever asked has gone, or asyncio would complain that nobody did.
            task.exception()
