"""The KV streams that a decode worker has open, each read by a task of its own, from its start to its last word."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from decode_worker import pull as pulling
from decode_worker.links import PrefillLinks
from decode_worker.pull import News, Pull
from decode_worker.sequence import Request
from engine.batch import Runner
from kvtransfer.transport import PrefillTransport


class OpenPulls:
    """Each stream gets one of `leases`; `tell` gets its news. A pull stays here until `ended`, though it be closed."""

    def __init__(
        self, runner: Runner, transport: PrefillTransport, leases: Iterator[int], tell: Callable[[News], None]
    ) -> None:
        self._runner = runner
        self._transport = transport
        self._leases = leases
        self._tell = tell
        self._open: set[Pull] = set()
        self.links = PrefillLinks()

    def __len__(self) -> int:
        return len(self._open)

    def start(self, request: Request) -> Pull:
        request.times.pull_started_s = asyncio.get_running_loop().time()
        pull = pulling.start(request, self._runner, self._transport, self._leases, self._tell, self.links)
        self._open.add(pull)
        return pull

    def ended(self, pull: Pull) -> None:
        """Its task writes no more. Raises what was a bug in it: the worker is to crash, and not to wait for ever."""
        self._open.discard(pull)
        assert pull.task is not None, "a pull that ended has had a task"
        if not pull.task.cancelled():
            pull.task.result()

    def is_written(self, request: Request) -> bool:
        """Whether KV may still be received into blocks of `request`."""
        return any(pull.request is request for pull in self._open)

    def cancel(self) -> list[asyncio.Task[None]]:
        """Closes all of them; returns the tasks to wait for."""
        tasks = [pull.task for pull in self._open if pull.task is not None]
        for task in tasks:
            task.cancel()
        return tasks
