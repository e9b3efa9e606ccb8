"""A whole service on this machine whose workers faults can befall, and what is heard of them."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from cluster.chaos.hub import Hub, Note, running_hub
from cluster.chaos.leases import LeaseBook
from cluster.chaos.relay import Relay, Weather, running_relay
from cluster.config import TandemConfig
from cluster.environment import use_relay
from cluster.fleet import Fleet, Log
from cluster.messages import WorkerStatus
from cluster.processes import ProcessFleet
from cluster.progress import Progress
from cluster.registry import Role
from cluster.service import Service, running_service

POLL_S = 0.1
GATEWAY = "gateway"
# Given its role: the beginning of a worker's command line, changed so that it runs elsewhere.
Place = Callable[[Role, Sequence[str]], Sequence[str]]


def here(role: Role, command: Sequence[str]) -> Sequence[str]:
    return command


class Observer:
    """What workers say, by the hub and by their heartbeats: who is where, what is held, what was damaged."""

    def __init__(self) -> None:
        self.leases = LeaseBook(self.name_of)
        # Bits flipped, and those of them in streams that were left before their end.
        self.flips = 0
        self.unread = 0
        self._names: dict[str, str] = {}
        self._kv_faults: dict[tuple[str, int], int] = {}

    def name_of(self, address: str) -> str:
        """Who listens there: the gateway, or a worker that it has heard of; "" where that is not known."""
        return self._names.get(address, "")

    @property
    def kv_faults(self) -> int:
        """What workers of all incarnations have last reported, in sum."""
        return sum(self._kv_faults.values())

    def noted(self, worker_id: str, note: Note) -> None:
        match note:
            case {"flip": count}:
                self.flips += count
            case {"unread": count}:
                self.unread += count
            case _:
                self.leases.noted(worker_id, note, asyncio.get_running_loop().time())

    def serves(self, address: str, name: str) -> None:
        self._names[address] = name

    def heard(self, workers: Sequence[WorkerStatus]) -> None:
        for worker in workers:
            self.serves(worker.address, worker.worker_id)
            self._kv_faults[worker.worker_id, worker.incarnation] = worker.kv_faults


class ChaosCluster:
    """Implements cluster.chaos.faults.Victims. Made by `running_cluster`."""

    def __init__(self, service: Service, observer: Observer, hub: Hub, relay: Relay | None) -> None:
        assert isinstance(service.fleet, ProcessFleet), "faults are signals to processes of this machine"
        self.service = service
        self.observer = observer
        self._fleet = service.fleet
        self._hub = hub
        self._relay = relay

    def running(self) -> Sequence[str]:
        return self._fleet.running()

    def signal(self, worker_id: str, number: signal.Signals) -> bool:
        return self._fleet.signal(worker_id, number)

    def tell(self, worker_id: str, order: Note) -> bool:
        return self._hub.tell(worker_id, order)

    def disturbed(self, worker_id: str, peer: str, weather: Weather) -> AbstractContextManager[None]:
        assert self._relay is not None, "a plan with faults of links has a relay"
        return self._relay.disturbed(worker_id, peer, weather)

    async def observe(self) -> None:
        """Looks at what the gateway has heard, until cancelled."""
        gateway, loop = self.service.gateway, asyncio.get_running_loop()
        while True:
            self.observer.heard(gateway.status(loop.time()).workers)
            await asyncio.sleep(POLL_S)


@asynccontextmanager
async def running_cluster(
    config: TandemConfig,
    progress: Progress,
    *,
    has_relay: bool = False,
    is_warped: bool = False,
    place: Place = here,
) -> AsyncIterator[ChaosCluster]:
    """Starts a service of plain processes, and waits until every worker has reported. `has_relay`: for faults of links;
    `is_warped`: for faults of clocks."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="tandem-chaos-")))
        observer = Observer()
        hub = await stack.enter_async_context(running_hub(folder, observer.noted))
        options, relay = ["--hub", str(hub.path)], None
        if has_relay:
            relay = await stack.enter_async_context(running_relay(observer.name_of))
            use_relay(GATEWAY, relay.address)
            options += ["--relay", relay.address]
        if is_warped:
            options.append("--warped")

        def program(role: Role, worker_id: str) -> Sequence[str]:
            return place(role, [sys.executable, "-P", "-m", "cluster.chaos.worker", *options])

        def fleet_of(config: TandemConfig, log: Log) -> Fleet:
            return ProcessFleet(config, log, program)

        service = await stack.enter_async_context(running_service(config, progress, fleet_of))
        observer.serves(service.registry_address, GATEWAY)
        cluster = ChaosCluster(service, observer, hub, relay)
        observing = asyncio.create_task(cluster.observe(), name="chaos observer")
        try:
            yield cluster
        finally:
            observing.cancel()
            await asyncio.wait([observing])
