"""One worker that can change its role: the same runner, weights and process under a prefill loop or a decode loop.

    SERVING ── asked for the other role ──▶ DRAINING ── nothing left here, nothing on its way ──▶ SERVING, other role
       ▲                                       │
       └── called off, or the limit passed ────┘

A decode worker gives back what it has not begun, and what still comes, and the gateway places that anew
(engine/errors.py, HandedBack); a prefill worker still takes what comes: that was sent before its gateway knew. The
gateway names the role once more when it knows of the draining and has nothing more on its way here (`is_released`), so
a flip loses no request. A worker that cannot drain within its limit goes on as it was. Plain asyncio: knows neither
gRPC nor Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, cast

from cluster.registry import Role
from decode_worker.stream import Command, TokenFrame
from engine.errors import Unavailable
from engine.kv_events import KVEventBatch
from engine.stats import LoopStats
from kvtransfer.frames import Frame
from kvtransfer.transport import PrefillCall

# How often a draining worker looks whether it is done. A flip is rare: not worth an event in the loops' steps.
DRAIN_POLL_S = 0.02

_log = logging.getLogger(__name__)


class Loop(Protocol):
    """What the loops of both roles have in common."""

    @property
    def is_idle(self) -> bool:
        """No request is unfinished, no KV stream is open, and nothing waits to be handled."""
        ...

    async def run(self) -> None: ...

    def stats(self) -> LoopStats: ...

    def kv_events(self) -> KVEventBatch | None: ...

    def kv_snapshot(self) -> KVEventBatch: ...

    def check_empty(self) -> None: ...


class PrefillLoop(Loop, Protocol):
    """prefill_worker.worker.PrefillWorker, as far as it is used here."""

    def prefill(self, call: PrefillCall) -> AsyncIterator[Frame]: ...


class DecodeLoop(Loop, Protocol):
    """decode_worker.worker.DecodeWorker, as far as it is used here."""

    def attach(self, commands: AsyncIterator[Command]) -> AsyncIterator[TokenFrame]: ...

    def drain(self) -> None: ...

    def resume(self) -> None: ...

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

    `make_prefill` and `make_decode` build a loop over the one runner that they share; a loop is built anew for every
    flip, and never are two alive at once. `changed` is set when routing must know of something: hand it to
    cluster.heartbeat.report_forever.
    """

    def __init__(
        self,
        make_prefill: Callable[[], PrefillLoop],
        make_decode: Callable[[], DecodeLoop],
        role: Role,
        *,
        worker_id: str,
        drain_limit_s: float = 120.0,
    ) -> None:
        self.worker_id = worker_id
        self.changed = asyncio.Event()
        self._make_prefill = make_prefill
        self._make_decode = make_decode
        self._drain_limit_s = drain_limit_s
        self._role: Role = role
        # What takes new work: at most one of the two. `_loop` is what still runs.
        self._prefill: PrefillLoop | None = None
        self._decode: DecodeLoop | None = None
        self._loop = self._build(role)
        self._flip: _Flip | None = None
        self._flip_wanted = asyncio.Event()
        # A role that was given up is taken only when it is asked for anew.
        self._given_up: Role | None = None
        self._pull_count = 0
        self._came_count = 0
        self._sessions: dict[_Commands, None] = {}

    @property
    def role(self) -> Role:
        return self._role

    @property
    def is_draining(self) -> bool:
        return self._flip is not None

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
        stats = self._loop.stats()
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
            raise Unavailable(f"{self.worker_id}: this worker is a decode worker now")
        self._pull_count += 1
        self._count_arrival()
        try:
            async with aclosing(cast(AsyncGenerator[Frame, None], self._prefill.prefill(call))) as frames:
                async for frame in frames:
                    yield frame
        finally:
            self._pull_count -= 1

    async def attach(self, commands: AsyncIterator[Command]) -> AsyncIterator[TokenFrame]:
        """See DecodeService. Raises Unavailable while this is a prefill worker; ends when it becomes one."""
        if self._decode is None:
            raise Unavailable(f"{self.worker_id}: this worker is a prefill worker now")
        session = _Commands(commands, self._count_arrival)
        self._sessions[session] = None
        try:
            async with aclosing(cast(AsyncGenerator[TokenFrame, None], self._decode.attach(session))) as frames:
                async for frame in frames:
                    yield frame
        finally:
            del self._sessions[session]

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
        if self._decode is not None:
            self._decode.drain()
        self._flip_wanted.set()
        self.changed.set()

    async def run(self) -> None:
        """The loop of the present role, and of every one after it. Runs until cancelled; a loop's crash is its own."""
        while True:
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
            self._loop.check_empty()
            self._swap()

    async def drained(self, limit_s: float, quiet_s: float = 0.0) -> bool:
        """Waits until nothing is left here, and nothing has come for `quiet_s`: a request may have been on its way when
        the gateway learned that this worker leaves. False when that takes longer than `limit_s`."""
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + limit_s
        quiet_since_s, came = loop.time(), self._came_count
        while loop.time() < give_up_s:
            if not self._is_idle() or self._came_count != came:
                quiet_since_s, came = loop.time(), self._came_count
            elif loop.time() - quiet_since_s >= quiet_s:
                return True
            await asyncio.sleep(DRAIN_POLL_S)
        return False

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
            if self._decode is not None:
                self._decode.resume()
            flip.outcome.set_result(False)
            self.changed.set()

    async def _drain_for(self, flip: _Flip) -> bool:
        give_up_s = asyncio.get_running_loop().time() + self._drain_limit_s
        idle_at: int | None = None
        while not flip.is_called_off and asyncio.get_running_loop().time() < give_up_s:
            # Twice in a row, and nothing came in between: the first may lie in the loop's inbox, unread.
            if flip.is_released and self._is_idle() and idle_at == self._came_count:
                # At once: whatever may run between this look and the swap finds the door closed.
                self._close()
                return True
            idle_at = self._came_count if self._is_idle() else None
            await asyncio.sleep(DRAIN_POLL_S)
        return False

    def _is_idle(self) -> bool:
        return self._loop.is_idle and self._pull_count == 0

    def _close(self) -> None:
        """From now on nothing is taken; gateways' streams end as if all had been said, which it has."""
        self._prefill = self._decode = None
        for session in self._sessions:
            session.close()

    def _swap(self) -> None:
        flip = self._flip
        assert flip is not None, "a drained worker has a flip to make"
        _log.info("%s was a %s worker and is a %s worker now", self.worker_id, self._role, flip.role)
        self._role, self._flip = flip.role, None
        self._loop = self._build(flip.role)
        if not flip.outcome.done():
            flip.outcome.set_result(True)
        self.changed.set()

    def _build(self, role: Role) -> Loop:
        if role == "prefill":
            self._prefill = self._make_prefill()
            return self._prefill
        self._decode = self._make_decode()
        return self._decode


class _Commands:
    """A gateway's commands, until they end or `close` is called."""

    def __init__(self, commands: AsyncIterator[Command], came: Callable[[], None]) -> None:
        self._commands = commands
        self._came = came
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def close(self) -> None:
        if not self._closed.done():
            self._closed.set_result(None)

    def __aiter__(self) -> AsyncIterator[Command]:
        return self

    async def __anext__(self) -> Command:
        following = asyncio.create_task(self._next())
        either: list[asyncio.Future[Any]] = [following, self._closed]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            command = following.result() if following.done() else None
        finally:
            if not following.done():
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
        if command is None:
            raise StopAsyncIteration
        self._came()
        return command

    async def _next(self) -> Command | None:
        return await anext(self._commands, None)
