"""A worker's prefix cache as its gateway is to know it: changes by default, all of it at the start and when asked.

    pool's changes since the last heartbeat ─▶ stored, evicted     sequence n, n + 1, …
    first report, new loop, resync          ─▶ snapshot            what was known before is forgotten

A report that is lost leaves a gap in the sequence; the gateway then asks for a snapshot (HeartbeatReply.kv_resync).
"""

from __future__ import annotations

from collections.abc import Callable

from cluster.registry import KVEvents
from engine.kv_events import KVEventBatch

NO_CHANGES = KVEventBatch(())


class KVReporter:
    """Numbers what a loop's prefix cache has to tell."""

    def __init__(self) -> None:
        self._sequence = 0
        self._wants_snapshot = True

    def resync(self) -> None:
        """The next report is to be a snapshot: something was lost, or the pool is another one."""
        self._wants_snapshot = True

    def report(self, changes: Callable[[], KVEventBatch | None], snapshot: Callable[[], KVEventBatch]) -> KVEvents:
        """What to say next: asks for a snapshot where one is due, else for changes. Without any this says nothing, but
        has its number: so a lost report shows with the next one."""
        batch = (snapshot() if self._wants_snapshot else changes()) or NO_CHANGES
        self._wants_snapshot = False
        self._sequence += 1
        return KVEvents(self._sequence, batch.is_snapshot, batch.stored, batch.evicted)
