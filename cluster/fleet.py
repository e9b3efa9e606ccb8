"""The workers of one service, wherever they run: as Ray actors (launcher.py) or plain processes (processes.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cluster.registry import Role

# Takes one line about a worker: that it died, that it was started again.
Log = Callable[[str], None]


class Fleet(Protocol):
    """open ─▶ start ─▶ check, add, remove, restart … ─▶ close. A worker that dies is started again, so many times at
    most."""

    async def open(self) -> str:
        """Gets ready to start workers. Returns the host under which they reach this process. Raises ConfigError."""
        ...

    async def start(self, gateway: str) -> None:
        """Starts all workers, reporting to `gateway` (HOST:PORT), and returns before they serve. Raises ConfigError."""
        ...

    def check(self) -> None:
        """Raises the TandemError of a worker that failed for good, of those that were there from the start."""
        ...

    def worker_ids(self) -> list[str]:
        """The workers of this fleet that have not failed for good, running or about to be started again."""
        ...

    def has(self, worker_id: str) -> bool:
        """Whether a worker is one of these."""
        ...

    async def add(self, role: Role) -> str:
        """Starts one more worker; returns its id before it serves. One that fails for good is logged, and is no more.
        Raises ConfigError where there is no room."""
        ...

    async def remove(self, worker_id: str) -> None:
        """Drains a worker and ends it; returns when it has ended, which takes as long as what runs there, up to
        `drain_s` and some seconds. Raises NotFound for a worker that is not here."""
        ...

    async def restart(self, worker_id: str) -> None:
        """Drains a worker, ends it as `remove` does and starts it again, with the role that it began with. Returns
        before it serves. Raises NotFound for a worker that is not here."""
        ...

    async def close(self) -> None:
        """Ends all workers within seconds. May be called in any state, and does not raise."""
        ...
