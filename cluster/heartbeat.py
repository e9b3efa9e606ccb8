"""A worker's reports to its gateway, for as long as the worker lives."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from cluster.registry import HeartbeatReply, WorkerReport
from engine.errors import TandemError, Unavailable

# Workers that started together must not report together for ever.
JITTER = 0.1
FIRST_RETRY_S = 0.2
# Whatever a gateway answers, a worker does not flood it.
MIN_INTERVAL_S = 0.05

_log = logging.getLogger(__name__)


async def report_forever(
    collect: Callable[[], WorkerReport],
    send: Callable[[WorkerReport], Awaitable[HeartbeatReply]],
    *,
    changed: asyncio.Event,
    rng: random.Random,
    answered: Callable[[HeartbeatReply], None] | None = None,
    max_retry_s: float = 5.0,
    send_timeout_s: float = 5.0,
) -> None:
    """Reports until cancelled: about every interval that `send`'s answer names, and at once when `changed` is set.
    `answered` gets every answer.

    Set `changed` after a change that routing must know of, above all of `draining`; it is cleared here. While the
    gateway is away or refuses, tries again after FIRST_RETRY_S, then twice as long each time up to `max_retry_s`.
    Every wait is jittered by `rng`. Raises nothing of the TandemError tree.
    """
    retry_s = FIRST_RETRY_S
    last_problem = ""
    while True:
        changed.clear()
        try:
            reply = await _send_once(send, collect(), send_timeout_s)
            wait_s = max(MIN_INTERVAL_S, reply.interval_s)
            if answered is not None:
                answered(reply)
            retry_s, problem = FIRST_RETRY_S, ""
        except TandemError as error:
            wait_s, problem = retry_s, str(error)
            retry_s = min(2 * retry_s, max_retry_s)
        if problem != last_problem:
            _log.warning("heartbeat: %s", problem or "the gateway answers again")
            last_problem = problem
        await _sleep_unless(changed, wait_s * rng.uniform(1 - JITTER, 1 + JITTER))


async def _send_once(
    send: Callable[[WorkerReport], Awaitable[HeartbeatReply]], report: WorkerReport, timeout_s: float
) -> HeartbeatReply:
    try:
        async with asyncio.timeout(timeout_s):
            return await send(report)
    except TimeoutError:
        raise Unavailable(f"the gateway did not answer within {timeout_s:g} s") from None


async def _sleep_unless(changed: asyncio.Event, seconds: float) -> None:
    # Either way the next report follows, so that the timer may as well say that something has changed.
    timer = asyncio.get_running_loop().call_later(seconds, changed.set)
    try:
        await changed.wait()
    finally:
        timer.cancel()
