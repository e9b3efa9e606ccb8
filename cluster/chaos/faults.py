"""Makes a plan's faults happen to the workers of a local cluster, and notes when."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.chaos.plan import Fault


class Victims(Protocol):
    """Worker processes that can be sent signals (cluster/processes.py)."""

    def running(self) -> Sequence[str]:
        """The ids of workers whose processes run now."""
        ...

    def signal(self, worker_id: str, number: signal.Signals) -> bool:
        """False where there is no such process any more."""
        ...


@dataclass(frozen=True, slots=True)
class Happened:
    """A fault, when it came and on whom. Seconds of the loop's clock."""

    kind: str
    worker_id: str
    time_s: float


class Injector:
    """Runs faults until cancelled; nobody is left stopped."""

    def __init__(self, victims: Victims, rng: random.Random) -> None:
        self._victims = victims
        self._rng = rng
        self._stopped: set[str] = set()
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
        finally:
            for worker_id in list(self._stopped):
                self._goes_on(worker_id)

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
        there = [name for name in self._victims.running() if self._is_meant(fault.target, name)]
        if not there:
            return
        worker_id = self._rng.choice(sorted(there))
        number = signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP
        if not self._victims.signal(worker_id, number):
            return
        self.happened.append(Happened(fault.kind, worker_id, asyncio.get_running_loop().time()))
        if fault.kind == "stop":
            self._stopped.add(worker_id)
            await asyncio.sleep(fault.for_s)
            self._goes_on(worker_id)

    def _is_meant(self, target: str, worker_id: str) -> bool:
        if worker_id in self._stopped:
            return False
        return target in ("any", worker_id) or worker_id.startswith(f"{target}-")

    def _goes_on(self, worker_id: str) -> None:
        self._stopped.discard(worker_id)
        self._victims.signal(worker_id, signal.SIGCONT)
