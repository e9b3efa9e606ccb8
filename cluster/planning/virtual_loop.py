"""An asyncio event loop on virtual time: it never waits; when nothing is ready, time jumps to the next timer.

Whatever reads time only through its loop runs on it unchanged, hours in seconds, and the same program gives the same
run every time. For that, the world outside is shut out: no sockets, no threads. A program that waits for something that
no timer and no task will bring is told so at once (`Deadlock`) instead of hanging.
"""

from __future__ import annotations

import asyncio
import selectors
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor
from contextvars import Context
from heapq import heapify, heappop, heappush
from types import CoroutineType
from typing import Any, NoReturn, TypeVar, TypeVarTuple

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

# Cancelled timers are left where they are as long as there are no more of them, or not more than of live ones.
MIN_CANCELLED = 100


class Deadlock(RuntimeError):
    """Nothing is ready, no timer is set, and yet somebody waits. The text lists pending tasks and where they stand."""


class _NumberedTask(asyncio.Task[Any]):
    """A task that hashes by its number, not its address: sets of tasks (asyncio's TaskGroup cancels from one) then
    have the same order in every run."""

    _number = 0

    def __hash__(self) -> int:
        return self._number


class _NoSelector(selectors.SelectSelector):
    """Stands where the loop would wait for I/O, of which there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.is_closed_to_all = False

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:  # noqa: ANN401
        # The loop's own wake-up pipe is registered while the loop is being made; nothing else may come.
        if self.is_closed_to_all:
            raise RuntimeError("no real I/O in virtual time: a socket or pipe was registered with the virtual loop")
        return super().register(fileobj, events, data)


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` starts at `start` seconds and moves only when every task waits. `events` counts the callbacks run."""

    # asyncio's own: handles, whose insides have no published types.
    _ready: deque[Any]
    _stopping: bool

    def __init__(self, start: float = 0.0) -> None:
        selector = _NoSelector()
        super().__init__(selector)
        selector.is_closed_to_all = True
        self.events = 0
        self._now = start
        # (when, number, timer): numbers keep timers of one moment in the order in which they were set, and pairs of
        # numbers compare at C's speed, however many timers there are.
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._timer_count = 0
        self._cancelled_count = 0
        self._task_count = 0
        self._thread = threading.get_ident()
        self.set_task_factory(_numbered)

    def time(self) -> float:
        return self._now

    def call_at(
        self, when: float, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """See asyncio. Timers that are due at one moment fire in the order of these calls."""
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        timer._scheduled = True  # type: ignore[attr-defined]
        self._timer_count += 1
        heappush(self._timers, (when, self._timer_count, timer))
        return timer

    def close(self) -> None:
        super().close()
        self._timers.clear()

    def _timer_handle_cancelled(self, timer: asyncio.TimerHandle) -> None:
        """asyncio's hook, just before a timer is cancelled: it stays until it surfaces, or they are too many."""
        if not timer._scheduled:  # type: ignore[attr-defined]
            return
        self._cancelled_count += 1
        if self._cancelled_count > MIN_CANCELLED and 2 * self._cancelled_count > len(self._timers):
            self._timers = [entry for entry in self._timers if entry[2] is not timer and not entry[2].cancelled()]
            heapify(self._timers)
            self._cancelled_count = 0

    def _run_once(self) -> None:
        """One round: what is ready now, and the timers that are due. In place of asyncio's, which asks for I/O each
        time, and logs what a callback raises: that is a bug here, and ends the run."""
        timers, ready = self._timers, self._ready
        while timers and timers[0][2].cancelled():
            heappop(timers)[2]._scheduled = False  # type: ignore[attr-defined]
            self._cancelled_count -= 1
        if not ready and not self._stopping:
            if not timers:
                raise Deadlock(_describe(self))
            self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            timer = heappop(timers)[2]
            timer._scheduled = False  # type: ignore[attr-defined]
            self._cancelled_count -= timer.cancelled()
            ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                self.events += 1
                handle._context.run(handle._callback, *handle._args)

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
