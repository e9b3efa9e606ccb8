"""Ends calls that no status can end: those whose reader has stopped.

A status follows the messages before it, so to a reader that stopped it never comes, and gRPC keeps the call for as long
as the connection lives. What ends such a call is to let go of it: gRPC resets a stream whose call nobody holds. Besides
the handler its holder is a task of grpc.aio's own, which starts the handler's task, then waits for the call's end, and
is shown to nobody. It is the task that runs while the handler's is made.

grpc.aio's server also holds on to the first call that it took, and to the last: these two are reset later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

AnyTask: TypeAlias = "asyncio.Task[Any]"
Work: TypeAlias = "Coroutine[Any, Any, Any] | Generator[Any, None, Any]"
# The coroutine of a handler's task, by its name in grpc.aio.
HANDLER = "_handle_exceptions"


class CallTasks:
    """A task factory that remembers which task made a handler's. One per event loop; `of` finds it, or installs it."""

    def __init__(self, make: Callable[..., Any] | None) -> None:
        self._make = make
        self._owners: WeakKeyDictionary[AnyTask, AnyTask] = WeakKeyDictionary()

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> CallTasks:
        factory = loop.get_task_factory()
        if not isinstance(factory, CallTasks):
            factory = CallTasks(factory)
            loop.set_task_factory(factory)
        return factory

    def __call__(self, loop: asyncio.AbstractEventLoop, work: Work, **options: Any) -> AnyTask:  # noqa: ANN401
        task: AnyTask = (
            asyncio.Task(work, loop=loop, **options) if self._make is None else self._make(loop, work, **options)
        )
        if getattr(work, "__name__", "") == HANDLER and (owner := asyncio.current_task(loop)) is not None:
            self._owners[task] = owner
        return task

    def let_go(self, handler: AnyTask) -> None:
        """Ends the call of a handler that is about to end; the call is over when its last holder has."""
        owner = self._owners.get(handler)
        assert owner is not None, "a handler's task was made by gRPC, after this was installed"
        # Where it waits for the handler, the call has just ended by itself.
        if getattr(owner, "_fut_waiter", None) is not handler:
            owner.cancel()
