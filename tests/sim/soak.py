"""The simulated cluster for days: faults now and then, traffic in bursts, and whether anything grows.

hour after hour:   clients of all kinds ─▶ all ended, each with the right answer ─▶ pools empty ─▶ what is there?
"""

from __future__ import annotations

import asyncio
import gc
import random
from dataclasses import dataclass

from cluster.planning import virtual_loop
from tests.sim.faults import Faults, FaultWorld
from tests.sim.traffic import draw_clients

HOUR_S = 3600.0
# Longer than any freeze, any restart and any wait between attempts.
CALM_S = 60.0


@dataclass(frozen=True)
class Sample:
    """What an hour has left behind: bytes resident, objects that Python knows, tasks."""

    resident_bytes: int
    objects: int
    tasks: int


class SoakWorld(FaultWorld):
    """Faults all the time, but for the last minute of each hour, when everything is looked at."""

    def __init__(self, seed: int, hours: int, requests_each: int) -> None:
        super().__init__(seed, requests_each)
        self.faults = Faults(events_per_s=0.02, frame_rate=0.005)
        self.samples: list[Sample] = []
        self.served = 0
        self._hours = hours
        self._requests_each = requests_each
        self._ends_s = 0.0
        self._traffic = random.Random(f"traffic of {seed}")

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        async with self._running() as (gateway, tasks):
            for hour in range(self._hours):
                self._ends_s = (hour + 1) * HOUR_S
                self._draw(loop.time())
                await self._serve_all(gateway, tasks)
                self.check_clients()
                self.served += len(self.clients)
                await asyncio.sleep(max(CALM_S, self._ends_s - loop.time()))
                self._check_empty(gateway)
                self.samples.append(_sample())

    def _draw(self, now: float) -> None:
        rate_s = self._traffic.choice([0.05, 1.0, 30.0])
        # Requests of one hour have the names of the last one's: nothing may remember them.
        clients = draw_clients(self._traffic, self._requests_each, rate_s)
        self._slow_down(clients)
        for client in clients:
            client.arrives_s = now + min(client.arrives_s, HOUR_S / 2)
        self.clients = clients
        self._by_id.clear()
        self._by_id.update({client.request.request_id: client for client in clients})

    async def _disturb(self) -> None:
        async with asyncio.TaskGroup() as under_way:
            while True:
                await asyncio.sleep(self.dice.expovariate(self.faults.events_per_s))
                if asyncio.get_running_loop().time() < self._ends_s - CALM_S:
                    self._befall(under_way)


def soak(seed: int, hours: int, requests_each: int = 120) -> SoakWorld:
    """Runs `hours` of virtual time, and checks all but what `samples` say."""
    world: SoakWorld | None = None

    async def run() -> None:
        nonlocal world
        world = SoakWorld(seed, hours, requests_each)
        await world.run()

    virtual_loop.run(run())
    assert world is not None
    return world


def _sample() -> Sample:
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[1])
    return Sample(pages * 4096, len(gc.get_objects()), len(asyncio.all_tasks()))
