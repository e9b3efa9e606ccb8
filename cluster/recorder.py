"""Keeps what a gateway's page shows of the past: its requests as they end, and its state once a second."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from cluster.background import tell_of_crash
from cluster.endings import Ended
from cluster.gateway import Gateway
from cluster.history import History
from cluster.recent_requests import RecentRequests


class Recorder:
    """Implements cluster.endings.Observer for `gateway`, from now on. `run` looks at the state; without it the history
    has no queues."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self.history = History()
        self.recent = RecentRequests()
        gateway.endings.observe(self)

    def ended(self, request: Ended) -> None:
        self.history.ended(request)
        self.recent.ended(request)

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            self.history.sample(self._gateway.status(now), now)
            # In the middle of the next second: wherever a loop that is busy wakes late, it is still that one.
            await asyncio.sleep(math.floor(now) + 1.5 - now)


@asynccontextmanager
async def recording(gateway: Gateway) -> AsyncIterator[Recorder]:
    """A recorder that runs while the context lasts."""
    recorder = Recorder(gateway)
    task = asyncio.create_task(recorder.run(), name="recorder")
    crashed = "what records the page's history has crashed: it has no queues from now on"
    task.add_done_callback(partial(tell_of_crash, crashed))
    try:
        yield recorder
    finally:
        task.cancel()
        await asyncio.wait([task])
