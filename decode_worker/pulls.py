"""Requests whose prompt's KV comes from a prefill worker: who opens a stream, and who gets blocks for what it sends.

    queued ─ start ─▶ PULLING ─ began ─▶ RESERVING ─ grant ─▶ RECEIVING ─ leave ─▶ (all KV is there)

A request that waits here holds at most the prefix that it has pinned in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from decode_worker.sequence import Request, RequestState
from engine.block_pool import BlockPool
from engine.slack_queue import PATIENCE_S, SlackQueue


class Pulls:
    """At most `max_open` streams at once; who is to have its first token soonest opens first."""

    def __init__(self, pool: BlockPool, max_open: int) -> None:
        self._pool = pool
        self._max_open = max_open
        self._queue: SlackQueue[Request] = SlackQueue()
        self._open: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._queue) + len(self._open)

    def add(self, request: Request, now: float) -> None:
        due_s = request.submit.ttft_due_s
        if request.submit.prompt_tokens:
            # Its client reads already.
            due_s = now
        elif due_s is None:
            # Nobody waits for its turn as long as its deadline, which may be minutes away.
            due_s = min(now + PATIENCE_S, math.inf if request.deadline_s is None else request.deadline_s)
        else:
            due_s += request.times.arrived_s
        self._queue.push(request.key, request, now, due_s)

    def remove(self, request: Request) -> None:
        """The request is served, or not wanted any more."""
        self._queue.remove(request.key)
        self._open.pop(request.key, None)

    def start(self) -> list[Request]:
        """Requests whose KV stream is to be opened now; each has pinned what the local cache holds of its prompt."""
        started: list[Request] = []
        while self._queue and len(self._open) < self._max_open:
            request = self._queue.pop()
            request.move(RequestState.PULLING)
            submit = request.submit
            request.have_tokens = self._pool.new(request.lead.owner, submit.token_ids, submit.salt)
            self._pool.counts.looked_up(len(submit.token_ids), request.have_tokens)
            self._open[request.key] = request
            started.append(request)
        return started

    def began(self, request: Request, first_token: int, cached_tokens: int) -> None:
        """The stream's first frame is here: KV from `first_token` on will come. Now the request wants blocks."""
        request.move(RequestState.RESERVING)
        self._pool.truncate(request.lead.owner, first_token)
        request.cached_tokens = max(request.have_tokens, cached_tokens)

    def grant(self, may_have: Callable[[Request, int], bool]) -> list[Request]:
        """Reserves whole prompts for those that wait for it, oldest first; returns who may read on. `may_have` says
        whether a request may have blocks for so many tokens."""
        granted: list[Request] = []
        for request in self.reserving():
            missing = self.missing(request)
            appended = self._pool.append(request.lead.owner, missing) if may_have(request, missing) else None
            if appended is None:
                break
            # Received KV starts on a block's boundary: both sides' block sizes are powers of two.
            assert not appended.copies, f"{request.key} would receive into a block that others read"
            request.move(RequestState.RECEIVING)
            granted.append(request)
        return granted

    def reserving(self) -> list[Request]:
        """Who wants blocks, the oldest first."""
        waiting = [request for request in self._open.values() if request.state is RequestState.RESERVING]
        return sorted(waiting, key=lambda request: request.serial)

    @property
    def is_receiving(self) -> bool:
        return any(request.state is RequestState.RECEIVING for request in self._open.values())

    def missing(self, request: Request) -> int:
        """Prompt tokens for which a reserving request has no blocks yet."""
        held = self._pool.block_count(request.lead.owner) * self._pool.block_size
        return len(request.submit.token_ids) - held

    def demote(self, kept: Request) -> Request | None:
        """Takes the youngest but `kept` out that has pinned a prefix, and that back. Call while nobody receives."""
        # Whoever has pinned nothing would give nothing back.
        others = [request for request in self._open.values() if request is not kept]
        holders = [request for request in others if self._pool.block_count(request.lead.owner)]
        if not holders:
            return None
        youngest = max(holders, key=lambda request: request.serial)
        del self._open[youngest.key]
        # A puller without a grant writes to none of its blocks, so they can go back at once.
        self._pool.free(youngest.lead.owner)
        youngest.have_tokens = 0
        youngest.preemptions += 1
        self._pool.counts.preemptions += 1
        return youngest
