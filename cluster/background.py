"""Tasks beside the requests: those are served without them too."""

from __future__ import annotations

import asyncio
import logging

_log = logging.getLogger(__name__)


def tell_of_crash(what: str, task: asyncio.Task[None]) -> None:
    """To be called when `task` is done: a bug is told, as `what` it means, and ends nothing else."""
    if not task.cancelled() and (bug := task.exception()) is not None:
        _log.error("%s", what, exc_info=bug)
