"""Who is told how prompts end on a prefill worker, and changes nothing."""

from __future__ import annotations

from typing import Protocol

from engine.errors import TandemError
from prefill_worker.job import Job


class Observer(Protocol):
    """Called once for each prompt that was taken, when its stream has ended."""

    def ended(self, job: Job, now: float, error: TandemError | None) -> None:
        """`error`: what it failed with here; None where all was sent, or is not wanted any more."""
        ...
