"""What this gateway has sent each worker that the worker's last report does not show yet.

routed ──────── in the ledger ────────▶ the worker's next report shows it, or the request has ended
                (its prompt only until the first token is here)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.registry import KnownWorker
from cluster.router import Route, WorkerLoad, blocks_for


@dataclass(slots=True, eq=False)
class Entry:
    """One running request. Set `is_prefilled` when its first token has come: nothing of its prompt is queued then."""

    prompt_tokens: int
    prefill_id: str
    decode_id: str
    routed_s: float
    is_prefilled: bool = False


class Ledger:
    """Entries by worker, each at most as long as its request runs."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[Entry, None]] = {}

    @contextmanager
    def entry(self, route: Route, prompt_tokens: int, now: float) -> Iterator[Entry]:
        """Books a request on the route's workers for as long as the context lasts."""
        entry = Entry(prompt_tokens, route.prefill_id or route.decode_id, route.decode_id, now)
        workers = {entry.prefill_id, entry.decode_id}
        for worker_id in workers:
            self._entries.setdefault(worker_id, {})[entry] = None
        try:
            yield entry
        finally:
            for worker_id in workers:
                self._drop(worker_id, [entry])

    def load(self, worker: KnownWorker) -> WorkerLoad:
        """The worker's report with what came after it."""
        report = worker.report
        entries = self._entries.get(report.worker_id, {})
        self._drop(report.worker_id, [entry for entry in entries if entry.routed_s < worker.heard_s])
        added = list(self._entries.get(report.worker_id, {}))
        return WorkerLoad(
            worker_id=report.worker_id,
            role=report.role,
            address=report.address,
            stats=report.stats,
            heard_s=worker.heard_s,
            added_prefill_tokens=sum(
                entry.prompt_tokens
                for entry in added
                if entry.prefill_id == report.worker_id and not entry.is_prefilled
            ),
            added_blocks=sum(
                blocks_for(entry.prompt_tokens, report.stats.block_size)
                for entry in added
                if entry.decode_id == report.worker_id
            ),
        )

    def check_empty(self) -> None:
        """Asserts that nothing is booked."""
        assert not self._entries, f"requests are still booked on {sorted(self._entries)}"

    def _drop(self, worker_id: str, entries: list[Entry]) -> None:
        booked = self._entries.get(worker_id, {})
        for entry in entries:
            booked.pop(entry, None)
        if not booked:
            self._entries.pop(worker_id, None)
