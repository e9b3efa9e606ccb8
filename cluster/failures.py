"""What the gateway does about a request that its workers failed.

    error ─▶ is anybody to blame? shun it ─▶ may the request be tried again? ─▶ wait its turn ─▶ place it anew
                                                     └──────── no ──▶ the client gets the error

`retry` tries again as long as no token has come; `recompute` also goes on after those that came; `fail` does neither.
A worker that drains has failed nobody: what it hands back is placed anew at once, and counts as no attempt.
"""

from __future__ import annotations

import asyncio
import logging
import random

from cluster.breakers import Breakers
from cluster.deadline import within
from cluster.gateway_config import FailureConfig
from cluster.links import DecodeLinks
from cluster.retry_budget import RetryBudget
from cluster.routing.booking import Booking
from cluster.routing.view import ClusterView
from cluster.run import Run
from engine.errors import (
    DeadlineExceeded,
    HandedBack,
    InvalidArgument,
    NotFound,
    TandemError,
    TransferFailed,
    Unavailable,
    VersionMismatch,
)
from engine.log_fields import about

# A request that so many workers gave back finds the cluster in no state to serve it.
PLACEMENTS_MAX = 8
# Another worker would say the same.
FINAL = (InvalidArgument, NotFound, DeadlineExceeded)

_log = logging.getLogger(__name__)


class Failures:
    """One per gateway. `view` and `breakers` are told which worker failed; nothing is tried again once `links` is
    closed."""

    def __init__(
        self, config: FailureConfig, view: ClusterView, breakers: Breakers, links: DecodeLinks, rng: random.Random
    ) -> None:
        self._config = config
        self._view = view
        self._breakers = breakers
        self._links = links
        self._rng = rng
        self._budget = RetryBudget(config.retries_per_s, config.retry_burst)

    async def recover(self, run: Run, booking: Booking, error: TandemError) -> None:
        """Returns when the request is to be placed anew, or is over. Raises `error` where it has failed for good,
        DeadlineExceeded where its deadline comes first. `booking` has ended."""
        if self._links.is_closed:
            raise error
        if isinstance(error, HandedBack):
            self._handed_back(run, booking, is_of_prefill=error.is_of_prefill)
            return
        if isinstance(error, FINAL):
            raise error
        may_retry = run.on_failure == "recompute" or (run.on_failure == "retry" and not run.is_resumed)
        if not may_retry or run.retries + 1 >= self._config.max_attempts:
            raise error
        run.retries += 1
        route = booking.route
        pair = (route.prefill_id or "local", route.decode_id)
        extra = about(run.request_id, run.trace)
        _log.info("%s, %s: %s; retry %d", *pair, error, run.retries, extra=extra)
        await within(run.deadline_s, "recovery", asyncio.sleep(self._pause_s(run.retries)))

    def blame(self, booking: Booking, error: Exception) -> None:
        """Call when a failure comes, however late the request's reader learns of it."""
        if not isinstance(error, Unavailable | TransferFailed | VersionMismatch) or isinstance(error, HandedBack):
            return
        if self._links.is_closed:
            return
        if error.is_of_prefill:
            self._breakers.pull_failed(booking)
        else:
            self._breakers.failed(booking.route.decode_id, booking)

    def _handed_back(self, run: Run, booking: Booking, *, is_of_prefill: bool) -> None:
        run.handed_back += 1
        if run.handed_back == PLACEMENTS_MAX:
            raise Unavailable(f"{PLACEMENTS_MAX} workers in a row were about to change their role or to leave")
        route = booking.route
        self._view.drains(route.prefill_id if is_of_prefill else route.decode_id)

    def _pause_s(self, retry: int) -> float:
        config = self._config
        longest_s = min(config.max_backoff_s, config.backoff_s * 2.0 ** min(retry - 1, 60))
        turn_s = self._budget.take(asyncio.get_running_loop().time())
        return turn_s + self._rng.uniform(0.0, longest_s)
