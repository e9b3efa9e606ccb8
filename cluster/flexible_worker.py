"""One worker that can change its role: the same runner, weights and process under a prefill loop or a decode loop.

    SERVING ── asked for the other role ──▶ DRAINING ── nothing left here, nothing on its way ──▶ SERVING, other role
       ▲                                       │
       └── called off, or the limit passed ────┘

A worker that drains gives back what it has not begun, and what still comes, and the gateway places that anew
(engine/errors.py, HandedBack). The gateway names the role once more when it knows of the draining and has nothing more
on its way here (`is_released`), so a flip loses no request. A worker that cannot drain within its limit goes on as it
was: a flip is a matter of choice. An end is not: `leave`, and after a while `let_go` of the rest. Plain asyncio: knows
neither gRPC nor Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, cast

from cluster.command_stream import CommandStream
from cluster.registry import Role
from decode_worker.stream import Received, TokenFrame
from engine.errors import HandedBack, TandemError, Unavailable
from engine.kv_events import KVEventBatch
from engine.pulse import Pulse
from engine.stats import LoopStats
from kvtransfer.frames import Frame
from kvtransfer.transport import PrefillCall

# How often a draining worker looks whether it is done. A flip is rare: not worth an event in the loops' steps.
DRAIN_POLL_S = 0.02
# How often a worker that leaves, and has nothing left, asks its gateway whether more is to come.
RELEASE_POLL_S = 0.1

_log = logging.getLogger(__name__)


class Loop(Protocol):
    """What the loops of both roles have in common."""

    @property
    def is_idle(self) -> bool:
        """No request is unfinished, no KV stream is open, and nothing waits to be handled."""
        ...

    async def run(self) -> None: ...

    def drain(self) -> None: ...

    def resume(self) -> None: ...

    def let_go(self, error: TandemError) -> None: ...

    def stats(self) -> LoopStats: ...

    def kv_events(self) -> KVEventBatch | None: ...

    def kv_snapshot(self) -> KVEventBatch: ...

    def check_empty(self) -> None: ...


class PrefillLoop(Loop, Protocol):
    """prefill_worker.worker.PrefillWorker, as far as it is used here."""

    def prefill(self, call: PrefillCall) -> AsyncIterator[Frame]: ...


class DecodeLoop(Loop, Protocol):
    """decode_worker.worker.DecodeWorker, as far as it is used here."""

    def attach(self, commands: AsyncIterator[Received]) -> AsyncIterator[TokenFrame]: ...

    def link_rates(self) -> tuple[tuple[str, float], ...]: ...


@dataclass(slots=True, eq=False)
class _Flip:
    """A change of role under way. `outcome` becomes True when it is made, False when it is given up."""

    role: Role
    is_released: bool = False
    is_called_off: bool = False
    outcome: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class FlexibleWorker:
    """Implements kvtransfer.transport.PrefillService and decode_worker.stream.DecodeService by turns.

    `make_prefill` and `make_decode` build a loop over the one runner that they share, and whose `pulse` they tell; a
    loop is built anew for every flip, and never are two alive at once. `changed` is set when routing must know of
    something: hand it to cluster.heartbeat.report_forever.
    """

    def __init__(
        self,
        make_prefill: Callable[[], PrefillLoop],
        make_decode: Callable[[], DecodeLoop],
        role: Role,
        *,
        worker_id: str,
        flip_limit_s: float = 120.0,
        pulse: Pulse | None = None,
    ) -> None:
        self.worker_id = worker_id
        self.pulse = Pulse() if pulse is None else pulse
        self.changed = asyncio.Event()
        self._make_prefill = make_prefill
        self._make_decode = make_decode
        self._flip_limit_s = flip_limit_s
        self._role: Role = role
        # What takes new work: at most one of the two. `_loop` is what still runs.
        self._prefill: PrefillLoop | None = None
        self._decode: DecodeLoop | None = None
        self._loop = self._build(role)
        # Of the loops before it.
        self._before: LoopStats | None = None
        self._flip: _Flip | None = None
        self._flip_wanted = asyncio.Event()
        self.is_leaving = False
        self._has_ended = False
        # A role that was given up is taken only when it is asked for anew.
        self._given_up: Role | None = None
        self._pull_count = 0
        self._came_count = 0
        self._sessions: dict[CommandStream, None] = {}

    @property
    def role(self) -> Role:
        return self._role

    @property
    def is_draining(self) -> bool:
        return self.is_leaving or self._flip is not None

    @property
    def loop(self) -> Loop:
        """The loop of the present role; another object after every flip."""
        return self._loop

    @property
    def unfinished_count(self) -> int:
        """Requests that are computed or wait here, and prompts whose KV is still being pulled."""
        stats = self._loop.stats()
        return max(stats.running + stats.waiting, self._pull_count)

    def stats(self) -> LoopStats:
        stats = self._loop.stats().plus(self._before)
        return replace(stats, draining=True) if self.is_draining else stats

    def link_rates(self) -> tuple[tuple[str, float], ...]:
        """Bytes per second of what a decode worker pulled, by the prefill worker's address."""
        return () if self._decode is None else self._decode.link_rates()

    def check_empty(self) -> None:
        """Asserts that no request holds anything here."""
        self._loop.check_empty()
        assert self._pull_count == 0, f"{self._pull_count} KV streams are still open"

    # ── the two services ─────────────────────────────────────────────────────────────────────────────────────────────

    async def prefill(self, call: PrefillCall) -> AsyncIterator[Frame]:
        """See PrefillService. Raises Unavailable while this is a decode worker."""
        if self._prefill is None:
            raise self._closed("decode")
        self._pull_count += 1
        self._count_arrival()
        try:
            async with aclosing(cast(AsyncGenerator[Frame, None], self._prefill.prefill(call))) as frames:
                async for frame in frames:
                    yield frame
        finally:
            self._pull_count -= 1

    async def attach(self, commands: AsyncIterator[Received]) -> AsyncIterator[TokenFrame]:
        """See DecodeService. Raises Unavailable while this is a prefill worker; ends when it becomes one."""
        if self._decode is None:
            raise self._closed("prefill")
        session = CommandStream(commands, self._count_arrival)
        self._sessions[session] = None
        try:
            async with aclosing(cast(AsyncGenerator[TokenFrame, None], self._decode.attach(session))) as frames:
                async for frame in frames:
                    yield frame
        finally:
            del self._sessions[session]

    def _closed(self, role: Role) -> Unavailable:
        if self.is_leaving:
            return HandedBack(f"{self.worker_id}: this worker leaves")
        return Unavailable(f"{self.worker_id}: this worker is a {role} worker now")

    def _count_arrival(self) -> None:
        self._came_count += 1

    # ── roles ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def ask(self, role: Role | Literal[""], *, knows_draining: bool = True) -> None:
        """Takes what a gateway asks for: the other role starts a flip, and once more releases it when the gateway
        `knows_draining`; "" lets everything be as it is; the present role calls a flip off."""
        if role == "":
            self._given_up = None
        elif self._flip is None:
            if role == self._role:
                self._given_up = None
            elif role != self._given_up:
                self._begin(role)
        elif role == self._flip.role:
            self._flip.is_released = self._flip.is_released or knows_draining
        else:
            self._flip.is_called_off = True

    async def flip(self, role: Role) -> bool:
        """Changes over to `role` without asking anybody. False when that was given up or called off; `run` must be
        running."""
        if self._flip is None and role == self._role:
            return True
        if self._flip is None:
            self._begin(role)
        assert self._flip is not None, "begun above"
        self.ask(role)
        return await asyncio.shield(self._flip.outcome)

    def _begin(self, role: Role) -> None:
        self._flip = _Flip(role)
        self._loop.drain()
        self._flip_wanted.set()
        self.changed.set()

    async def run(self) -> None:
        """The loop of the present role, and of every one after it. Runs until cancelled; a loop's crash is its own."""
        try:
            while True:
                await self._run_until_swap()
                self._loop.check_empty()
                self._swap()
        finally:
            self._has_ended = True

    async def _run_until_swap(self) -> None:
        loop = asyncio.create_task(self._loop.run(), name=f"{self.worker_id} {self._role} loop")
        drain = asyncio.create_task(self._drain(), name=f"{self.worker_id} drain")
        try:
            await asyncio.wait([loop, drain], return_when=asyncio.FIRST_COMPLETED)
            # The loop never returns: if it is done, it has crashed.
            (loop if loop.done() else drain).result()
            assert not loop.done(), f"{self.worker_id}: the {self._role} loop ended by itself"
        finally:
            loop.cancel()
            drain.cancel()
            await asyncio.wait([loop, drain])

    # ── its end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def leave(self) -> None:
        """Takes nothing new from now on; what has not begun is handed back."""
        self.is_leaving = True
        self._loop.drain()
        self.changed.set()

    async def drained(self, limit_s: float, is_released: Callable[[], bool]) -> bool:
        """Waits until nothing is left here, and nothing more is on its way. False when that takes longer than
        `limit_s`, or the loop crashes meanwhile."""
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + limit_s
        while loop.time() < give_up_s and not self._has_ended:
            if self._is_idle():
                if is_released():
                    return True
                # The gateway says whether more is to come in its answer to a report.
                self.changed.set()
                await asyncio.sleep(RELEASE_POLL_S)
            await asyncio.sleep(DRAIN_POLL_S)
        return False

    def let_go(self, error: TandemError) -> None:
        """Ends with `error` whatever is here. The gateway gets that at once, though a step be under way."""
        self.is_leaving = True
        self._loop.let_go(error)
        self.changed.set()

    def close(self) -> None:
        """From now on nothing is taken; gateways' streams end as if all had been said."""
        self._prefill = self._decode = None
        for session in self._sessions:
            session.close()

    # ── a change of role ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _drain(self) -> None:
        """Returns when a flip is wanted, nothing is left here that it could lose, and nothing more is taken."""
        while True:
            await self._flip_wanted.wait()
            self._flip_wanted.clear()
            flip = self._flip
            assert flip is not None, "a flip is wanted"
            if await self._drain_for(flip):
                return
            _log.info("%s stays a %s worker", self.worker_id, self._role)
            self._flip, self._given_up = None, flip.role
            if not self.is_leaving:
                self._loop.resume()
            flip.outcome.set_result(False)
            self.changed.set()

    async def _drain_for(self, flip: _Flip) -> bool:
        give_up_s = asyncio.get_running_loop().time() + self._flip_limit_s
        idle_at: int | None = None
        while not (flip.is_called_off or self.is_leaving) and asyncio.get_running_loop().time() < give_up_s:
            # Twice in a row, and nothing came in between: the first may lie in the loop's inbox, unread.
            if flip.is_released and self._is_idle() and idle_at == self._came_count:
                # At once: whatever may run between this look and the swap finds the door closed.
                self.close()
                return True
            idle_at = self._came_count if self._is_idle() else None
            await asyncio.sleep(DRAIN_POLL_S)
        return False

    def _is_idle(self) -> bool:
        return self._loop.is_idle and self._pull_count == 0

    def _swap(self) -> None:
        flip = self._flip
        assert flip is not None, "a drained worker has a flip to make"
        _log.info("%s was a %s worker and is a %s worker now", self.worker_id, self._role, flip.role)
        self._role, self._flip = flip.role, None
        self._before = self._loop.stats().plus(self._before)
        self._loop = self._build(flip.role)
        if self.is_leaving:
            self._loop.drain()
        if not flip.outcome.done():
            flip.outcome.set_result(True)
        self.changed.set()

    def _build(self, role: Role) -> Loop:
        if role == "prefill":
            self._prefill = self._make_prefill()
            return self._prefill
        self._decode = self._make_decode()
        return self._decode
