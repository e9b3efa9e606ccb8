"""An asyncio event loop on virtual time: it never waits; when nothing is ready, time jumps to the next timer.

Whatever reads time only through its loop runs on it unchanged, hours in seconds, and the same program gives the same
run every time. For that, the world outside is shut out: no sockets, no threads. A program that waits for something that
no timer and no task will bring is told so at once (`Deadlock`) instead of hanging.
"""

from __future__ import annotations

import asyncio
import math
import selectors
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor
from contextvars import Context
from types import CoroutineType
from typing import Any, NoReturn, TypeVar, TypeVarTuple

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class Deadlock(RuntimeError):
    """Nothing is ready, no timer is set, and yet somebody waits. The text lists pending tasks and where they stand."""


class _NumberedTask(asyncio.Task[Any]):
    """A task that hashes by its number, not its address: sets of tasks (asyncio's TaskGroup cancels from one) then
    have the same order in every run."""

    _number = 0

    def __hash__(self) -> int:
        return self._number


class _JumpingSelector(selectors.SelectSelector):
    """Stands where the loop would wait for I/O, and moves the loop's time instead."""

    def __init__(self) -> None:
        super().__init__()
        self.loop: VirtualLoop | None = None

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:  # noqa: ANN401
        # The loop's own wake-up pipe is registered while the loop is being made; nothing else may come.
        if self.loop is not None:
            raise RuntimeError("no real I/O in virtual time: a socket or pipe was registered with the virtual loop")
        return super().register(fileobj, events, data)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert self.loop is not None, "the loop was started before its selector was bound to it"
        if timeout is None:
            raise Deadlock(_describe(self.loop))
        if timeout > 0:
            self.loop.jump()
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` starts at `start` seconds and moves only when every task waits."""

    def __init__(self, start: float = 0.0) -> None:
        selector = _JumpingSelector()
        super().__init__(selector)
        selector.loop = self
        self._task_count = 0
        self._thread = threading.get_ident()
        self.set_task_factory(_numbered)
        self._set_time(start)

    def time(self) -> float:
        return self._now

    def jump(self) -> None:
        """Moves time to the earliest timer."""
        # The timer's own value, not now + timeout: a sum that rounds down would leave the timer just out of reach.
        self._set_time(max(self._now, self._scheduled[0].when()))  # type: ignore[attr-defined]

    def next_task_number(self) -> int:
        self._task_count += 1
        return self._task_count

    def call_soon_threadsafe(
        self, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """From the loop's own thread, where asyncio itself uses it, the same as `call_soon`; RuntimeError elsewhere."""
        if threading.get_ident() != self._thread:
            raise RuntimeError("no threads in virtual time: another thread called into the virtual loop")
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: Executor | None, func: Callable[..., object], *args: object) -> NoReturn:
        raise RuntimeError(f"no threads in virtual time: run_in_executor was asked to run {func!r}")

    def _set_time(self, now: float) -> None:
        self._now = now
        # asyncio fires every timer below now + resolution: with one unit in the last place that is exactly "due now",
        # however large the time.
        self._clock_resolution = math.ulp(now)


def run(coro: Coroutine[Any, Any, _T], *, start: float = 0.0) -> _T:
    """Like `asyncio.run`, on virtual time: runs `coro` to its end, cancels what it left behind, closes the loop.

    Raises Deadlock when `coro` waits for something that cannot come.
    """
    if asyncio._get_running_loop() is not None:
        raise RuntimeError("virtual time cannot be started inside a running event loop")
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(start)) as runner:
        return runner.run(coro)


def _numbered(loop: asyncio.AbstractEventLoop, coro: Any, context: Context | None = None) -> asyncio.Task[Any]:  # noqa: ANN401
    assert isinstance(loop, VirtualLoop)
    number = loop.next_task_number()
    # The number is needed before __init__ runs, because that puts the task into asyncio's set of all tasks.
    task = _NumberedTask.__new__(_NumberedTask)
    task._number = number
    task.__init__(coro, loop=loop, name=f"task-{number}", context=context)  # type: ignore[misc]
    return task


def _describe(loop: VirtualLoop) -> str:
    tasks = sorted((task for task in asyncio.all_tasks(loop) if not task.done()), key=hash)
    lines = [f"  {task.get_name()}: {' > '.join(_frames(task.get_coro()))}" for task in tasks]
    head = f"deadlock at virtual time {loop.time():.6f} s: nothing is ready and no timer is set; pending tasks:"
    return "\n".join([head, *(lines or ["  none: the future that the loop runs for belongs to no task"])])


def _frames(awaited: object) -> Iterator[str]:
    """Where a suspended coroutine stands, from the outside in."""
    while isinstance(awaited, CoroutineType):
        frame = awaited.cr_frame
        if frame is not None:
            yield f"{awaited.__qualname__} ({frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno})"
        awaited = awaited.cr_await
    if awaited is not None:
        yield f"waits for {type(awaited).__name__}"
