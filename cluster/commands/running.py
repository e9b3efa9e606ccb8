"""Runs a command's coroutine: on uvloop unless told otherwise, and ended in good order by SIGINT or SIGTERM."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

Value = TypeVar("Value")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A signal ended the command, after its cleanup."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def run(
    main: Coroutine[Any, Any, Value],
    new_loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop,
) -> Value:
    """The first signal cancels `main`, waits for its cleanup and raises Stopped; a second one ends the process."""
    received: list[int] = []

    async def guarded() -> Value:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None, "a coroutine that runs is a task's"

        def stop(number: int) -> None:
            received.append(number)
            for other in SIGNALS:
                loop.remove_signal_handler(other)
                # Python's own handler of SIGINT would only raise an exception, somewhere in the cleanup.
                signal.signal(other, signal.SIG_DFL)
            task.cancel()

        for number in SIGNALS:
            loop.add_signal_handler(number, stop, number)
        return await main

    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(guarded())
    except asyncio.CancelledError:
        assert received, "cancelled without a signal"
        raise Stopped(received[0]) from None
