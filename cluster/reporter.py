"""What a worker's heartbeats say, and what it makes of their answers: its role and its prefix cache's news."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from cluster.flexible_worker import FlexibleWorker
from cluster.kv_reporter import KVReporter
from cluster.registry import HeartbeatReply, KVEvents, WorkerReport


class Reporter:
    """`collect` and `answered` are for cluster.heartbeat.report_forever, with `changed=worker.changed`.

    `local_only`: the worker is to be given local routes, and no others. `tells_cache`: its loops note what happens to
    their prefix caches. `tickets` gets the gateway's key and clock, and this worker's. `left` is set when the gateway
    knows of `leave`.
    """

    def __init__(
        self,
        worker: FlexibleWorker,
        *,
        address: str,
        incarnation: int,
        model: str,
        local_only: bool = False,
        tells_cache: bool = True,
        public_key: bytes = b"",
        tickets: Callable[[bytes, float, float], None] | None = None,
    ) -> None:
        self.worker = worker
        self.left = asyncio.Event()
        self.is_released = False
        self._has_told_leaving = False
        self._address = address
        self._incarnation = incarnation
        self._model = model
        self._local_only = local_only
        self._public_key = public_key
        self._tickets = tickets
        self._has_told_draining = False
        self._cache = KVReporter() if tells_cache else None
        self._loop: object = worker.loop

    def collect(self) -> WorkerReport:
        """What there is to report now. The news in it is told once: call this only for a report that is sent."""
        worker = self.worker
        stats = worker.stats()
        self._has_told_draining = stats.draining
        self._has_told_leaving = worker.is_leaving
        return WorkerReport(
            worker_id=worker.worker_id,
            role=worker.role,
            address=self._address,
            incarnation=self._incarnation,
            model=self._model,
            stats=replace(stats, local_only=self._local_only),
            links=worker.link_rates(),
            kv_events=self._cache_events(),
            public_key=self._public_key,
        )

    def _cache_events(self) -> KVEvents | None:
        loop = self.worker.loop
        if self._cache is None:
            return None
        if loop is not self._loop:
            self._loop = loop
            self._cache.resync()
        return self._cache.report(loop.kv_events, loop.kv_snapshot)

    def answered(self, reply: HeartbeatReply) -> None:
        """Takes the answer to the last report collected."""
        if self._tickets is not None:
            self._tickets(reply.ticket_key, reply.now_s, asyncio.get_running_loop().time())
        if reply.kv_resync and self._cache is not None:
            self._cache.resync()
        if self._has_told_leaving:
            self.left.set()
            self.is_released = reply.on_its_way == 0
        if not self.worker.is_leaving:
            self.worker.ask(reply.role, knows_draining=self._has_told_draining)
