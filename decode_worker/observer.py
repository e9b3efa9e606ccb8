"""Who is told how requests end on a decode worker, and changes nothing."""

from __future__ import annotations

from typing import Protocol

from decode_worker.sequence import Request
from engine.errors import TandemError


class Observer(Protocol):
    """Called by the loop, once for each request that it had taken."""

    def ended(self, request: Request, now: float, error: TandemError | None) -> None:
        """`error`: what it failed with here; None where it was answered, or is not wanted any more."""
        ...
