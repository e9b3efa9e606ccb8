"""A worker's prefix cache as its gateway is to know it: changes by default, all of it at the start and when asked.

    pool's changes since the last heartbeat ─▶ stored, evicted     sequence n, n + 1, …
    first report, new loop, resync          ─▶ snapshot            what was known before is forgotten
    more names than a report holds          ─▶ the rest follows    with the next reports

A report that is lost leaves a gap in the sequence; the gateway then asks for a snapshot (HeartbeatReply.kv_resync).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from cluster.registry import KVEvents
from cluster.report_checks import MAX_KV_NAMES
from engine.kv_events import KVEventBatch

NO_CHANGES = KVEventBatch(())


class KVReporter:
    """Numbers what a loop's prefix cache has to tell."""

    def __init__(self, max_names: int = MAX_KV_NAMES) -> None:
        self._max_names = max_names
        self._sequence = 0
        self._wants_snapshot = True
        # Of the last snapshot, in its order: what is still to be told.
        self._rest: dict[int, None] = {}

    def resync(self) -> None:
        """The next report is to be a snapshot: something was lost, or the pool is another one."""
        self._wants_snapshot = True

    def report(self, changes: Callable[[], KVEventBatch | None], snapshot: Callable[[], KVEventBatch]) -> KVEvents:
        """What to say next: asks for a snapshot where one is due, else for changes. Without any this says nothing, but
        has its number: so a lost report shows with the next one."""
        batch = (snapshot() if self._wants_snapshot else changes()) or NO_CHANGES
        self._wants_snapshot = False
        self._sequence += 1
        if batch.is_snapshot:
            self._rest = {}
        self._rest.update(dict.fromkeys(batch.stored))
        for name in batch.evicted:
            self._rest.pop(name, None)
        stored = tuple(islice(self._rest, max(0, self._max_names - len(batch.evicted))))
        for name in stored:
            del self._rest[name]
        return KVEvents(self._sequence, batch.is_snapshot, stored, batch.evicted)
