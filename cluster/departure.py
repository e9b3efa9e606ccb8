"""A worker's last seconds: it takes nothing new, finishes what it can, and hands the rest back.

told to end ─▶ draining, hands back what has not begun ─▶ the gateway knows, and has nothing more on its way here
            ─▶ nothing is left, or `drain_s` have passed ─▶ the rest is handed back ─▶ its streams end

What is handed back is placed anew at once, with the tokens that it has, and counts as no attempt
(cluster/failures.py). Plain asyncio: knows neither gRPC nor Ray.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from cluster.flexible_worker import FlexibleWorker
from cluster.reporter import Reporter
from engine.errors import HandedBack, TandemError

# How long a worker that leaves tries to tell its gateway.
GOODBYE_S = 1.0
# How long after it has let go of everything a step under way may still hold blocks.
LET_GO_S = 2.0

_log = logging.getLogger(__name__)


async def depart(worker: FlexibleWorker, reporter: Reporter, drain_s: float) -> None:
    """Returns when nothing is left: within `drain_s` and some seconds. `reporter` must go on reporting meanwhile."""
    worker.leave()
    await _say_goodbye(reporter)

    def is_released() -> bool:
        # Whoever could not be told sends nothing, or is gone.
        return reporter.is_released or not reporter.left.is_set()

    if not await worker.drained(drain_s, is_released):
        if worker.unfinished_count:
            _log.warning("%d requests are handed back after %g s", worker.unfinished_count, drain_s)
        worker.let_go(HandedBack(f"{worker.worker_id} leaves, and had {drain_s:g} s to finish what it had"))
        await worker.drained(LET_GO_S, lambda: True)
    worker.close()


async def depart_at_once(worker: FlexibleWorker, reporter: Reporter, error: TandemError) -> None:
    """The same for a worker that can compute no more: all that it has ends with `error`."""
    worker.let_go(error)
    await _say_goodbye(reporter)
    worker.close()


async def _say_goodbye(reporter: Reporter) -> None:
    """Waits until the gateway knows of the draining: from then on no request is sent here."""
    with suppress(TimeoutError):
        async with asyncio.timeout(GOODBYE_S):
            await reporter.left.wait()
    if not reporter.left.is_set():
        _log.info("the gateway was not told that %s leaves", reporter.worker.worker_id)
