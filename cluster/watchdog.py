"""A thread that ends the process where its event loop cannot: when that has stopped turning, or takes too long to end.

    event loop   beat ── beat ── beat ── (stuck)
    thread        tick    tick    tick    tick … limit ─▶ where everybody is, to stderr ─▶ the process ends

Time is counted in the thread's own ticks: after the whole process was stopped, or the machine suspended, both go on
where they were. Whoever supervises the process starts it again.
"""

from __future__ import annotations

import asyncio
import faulthandler
import math
import os
import sys
import threading
from collections.abc import Callable

# A loop that has not turned for so long never will.
LOOP_LIMIT_S = 30.0
TICK_S = 0.25
# How much longer than `cluster.drain_s` a worker's process may take to end; and one that does not serve yet.
END_MARGIN_S = 10.0
LOADING_END_S = 1.0
EXIT_CODE = 3


def end_process(why: str) -> None:
    """Says where every thread is, and ends the process without further ado. Without a reason nothing is wrong."""
    if not why:
        os._exit(0)
    print(f"tandem: {why}; ending the process", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
    os._exit(EXIT_CODE)


class Watchdog:
    """Made in a running event loop, which it watches until `stop`. `end` gets the reason."""

    def __init__(self, limit_s: float = LOOP_LIMIT_S, end: Callable[[str], None] = end_process) -> None:
        self._limit_s = limit_s
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._beats = 0
        self._lock = threading.Lock()
        self._left_s, self._why = math.inf, ""
        self._is_stopped = threading.Event()
        self._loop.call_soon(self._beat)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def end_within(self, seconds: float, why: str) -> None:
        """Ends the process when it is still there after `seconds`, unless `stop` comes first. The shortest such time
        counts. `why` "": a load that cannot be interrupted is all that keeps it. May be called from any thread."""
        with self._lock:
            if seconds < self._left_s:
                self._left_s, self._why = seconds, why

    def end_worker_within(self, drain_s: float, *, is_serving: bool) -> None:
        """The same for a worker that has been told to end."""
        if is_serving:
            limit_s = drain_s + END_MARGIN_S
            self.end_within(limit_s, f"the worker has not ended within {limit_s:g} s")
        else:
            self.end_within(LOADING_END_S, "")

    def stop(self) -> None:
        """Nothing is ended any more."""
        self._is_stopped.set()

    def _beat(self) -> None:
        self._beats += 1
        if not self._is_stopped.is_set():
            self._loop.call_later(TICK_S, self._beat)

    def _watch(self) -> None:
        beats, silent_s = -1, 0.0
        while not self._is_stopped.wait(TICK_S):
            with self._lock:
                self._left_s -= TICK_S
            silent_s = silent_s + TICK_S if beats == self._beats else 0.0
            beats = self._beats
            if silent_s > self._limit_s:
                self._end(f"the event loop has not turned for {silent_s:.0f} s")
            elif self._left_s <= 0:
                self._end(self._why)
            else:
                continue
            return
