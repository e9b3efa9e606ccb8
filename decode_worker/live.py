"""An unfinished request and what belongs to it: its gateway, its deadline's timer, its open pull."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from decode_worker.pull import Pull
from decode_worker.sequence import Request
from decode_worker.session import Session


@dataclass(slots=True, eq=False)
class Live:
    """What the loop knows of a request that has not ended."""

    request: Request
    session: Session
    timer: asyncio.TimerHandle | None = None
    pull: Pull | None = None

    def close_pull(self) -> None:
        """Closes its stream and forgets it: what that still says is ignored."""
        pull, self.pull = self.pull, None
        if pull is not None and pull.task is not None:
            pull.task.cancel()
