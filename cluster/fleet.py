"""The workers of one service, wherever they run: as Ray actors (launcher.py) or plain processes (processes.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

# Takes one line about a worker: that it died, that it was started again.
Log = Callable[[str], None]


class Fleet(Protocol):
    """open ─▶ start ─▶ check … ─▶ close. A worker that dies is started again, a bounded number of times."""

    async def open(self) -> str:
        """Gets ready to start workers. Returns the host under which they reach this process. Raises ConfigError."""
        ...

    async def start(self, gateway: str) -> None:
        """Starts all workers, reporting to `gateway` (HOST:PORT), and returns before they serve. Raises ConfigError."""
        ...

    def check(self) -> None:
        """Raises the TandemError of a worker that failed for good."""
        ...

    async def close(self) -> None:
        """Ends all workers within seconds. May be called in any state, and does not raise."""
        ...
