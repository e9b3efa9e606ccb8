"""Makes a plan's faults happen to the workers of a local cluster, and notes when."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from cluster.chaos.hub import Note
from cluster.chaos.plan import Clock, Corrupt, Fault, Kill, Lasting, OfLinks, Partition, Slow, Stop
from cluster.chaos.relay import Weather


class Victims(Protocol):
    """Worker processes that faults can be made to befall (cluster/chaos/cluster.py)."""

    def running(self) -> Sequence[str]:
        """The ids of workers whose processes run now."""
        ...

    def signal(self, worker_id: str, number: signal.Signals) -> bool:
        """False where there is no such process any more."""
        ...

    def tell(self, worker_id: str, order: Note) -> bool:
        """False where nobody hears it."""
        ...

    def disturbed(self, worker_id: str, peer: str, weather: Weather) -> AbstractContextManager[None]:
        """While the context lasts, `weather` is on the worker's links to `peer`."""
        ...


@dataclass(slots=True)
class Happened:
    """A fault, on whom and when. Seconds of the loop's clock; `until_s` is `time_s` while it lasts."""

    kind: str
    worker_id: str
    time_s: float
    until_s: float = 0.0
    peer: str = "any"

    def __post_init__(self) -> None:
        self.until_s = max(self.until_s, self.time_s)


class Injector:
    """Runs faults until cancelled; none outlasts the run."""

    def __init__(self, victims: Victims, rng: random.Random) -> None:
        self._victims = victims
        self._rng = rng
        # Stopped or cut off: of another fault there nobody could say what it did.
        self._away: set[str] = set()
        self.happened: list[Happened] = []

    async def run(self, faults: Sequence[Fault], seconds: float) -> None:
        """Returns after `seconds`."""
        try:
            async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
                for fault in faults:
                    group.create_task(self._repeat(fault))
                await asyncio.sleep(seconds + 1.0)
        except TimeoutError:
            pass

    async def _repeat(self, fault: Fault) -> None:
        if fault.at_s is not None:
            await asyncio.sleep(fault.at_s)
            await self._happen(fault)
            return
        assert fault.every_s is not None, "once or often"
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(fault.every_s)
                group.create_task(self._happen(fault))

    async def _happen(self, fault: Fault) -> None:
        there = sorted(name for name in self._victims.running() if fault.may_hit(name) and name not in self._away)
        # Who is drawn first may be no more, or not yet hear.
        for worker_id in self._rng.sample(there, len(there)):
            with self._befalls(fault, worker_id) as is_hit:
                if is_hit:
                    await self._last(fault, worker_id)
                    return

    async def _last(self, fault: Fault, worker_id: str) -> None:
        loop = asyncio.get_running_loop()
        peer = fault.peer if isinstance(fault, OfLinks) else "any"
        happened = Happened(fault.kind, worker_id, loop.time(), peer=peer)
        self.happened.append(happened)
        try:
            if isinstance(fault, Lasting):
                await asyncio.sleep(fault.for_s)
        finally:
            happened.until_s = loop.time()

    @contextmanager
    def _befalls(self, fault: Fault, worker_id: str) -> Iterator[bool]:
        """The fault lasts as long as the context. Yields False where there was nobody to be hit."""
        victims = self._victims
        match fault:
            case Kill():
                yield victims.signal(worker_id, signal.SIGKILL)
            case Stop():
                with self._is_away(worker_id):
                    try:
                        yield victims.signal(worker_id, signal.SIGSTOP)
                    finally:
                        victims.signal(worker_id, signal.SIGCONT)
            case Partition():
                with self._is_away(worker_id), victims.disturbed(worker_id, fault.peer, Weather(is_cut=True)):
                    yield True
            case Slow(delay_ms=delay_ms, bytes_per_s=bytes_per_s):
                weather = Weather(delay_s=delay_ms / 1e3, bytes_per_s=bytes_per_s or float("inf"))
                with victims.disturbed(worker_id, fault.peer, weather):
                    yield True
            case Corrupt(every_frames=every_frames):
                try:
                    yield victims.tell(worker_id, {"corrupt": every_frames})
                finally:
                    victims.tell(worker_id, {"corrupt": 0})
            case Clock(jump_s=jump_s, rate=rate):
                try:
                    yield victims.tell(worker_id, {"jump_s": jump_s, "rate": rate})
                finally:
                    victims.tell(worker_id, {"jump_s": 0.0, "rate": 1.0})

    @contextmanager
    def _is_away(self, worker_id: str) -> Iterator[None]:
        self._away.add(worker_id)
        try:
            yield
        finally:
            self._away.discard(worker_id)
