"""The whole cluster while its workers die, come back, freeze and are cut off, all drawn from a seed.

    keeper of a worker:   start ─▶ runs, reports ─ killed ─▶ gone for a while ─▶ start, next incarnation
                                     ⟲ frozen: computes nothing, says nothing, cannot be reached
                                     ⟲ cut off: cannot be reached, computes on
                                     ⟲ shut in: a decode worker that is reached by all, and reaches no prefill worker

KV frames are changed, repeated, lost and held back on their way, and some clients are slow to read.
When the faults stop, everything that clients asked for must come to its end.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from cluster.gateway import Gateway
from cluster.gateway_config import FailureConfig, GatewayConfig
from cluster.heartbeat import report_forever
from cluster.kv_reporter import KVReporter
from cluster.registry import HeartbeatReply, Role, WorkerReport
from decode_worker.stream import DecodeService
from decode_worker.worker import DecodeWorker
from engine.batch import Batch, KVLayout, LayerListener, StepOutput
from engine.errors import Unavailable
from kvtransfer.frames import Arrival, Frame
from kvtransfer.memory import Link, MemoryNetwork, MemoryPrefillTransport
from kvtransfer.transport import PrefillCall, PrefillService
from prefill_worker.worker import PrefillWorker
from tests.sim.one_run import to_its_end
from tests.sim.traffic import Client
from tests.sim.world import FREED_WITHIN_S, MODEL, WatchedRunner, World

# After so long a silence a peer counts as gone.
KEEPALIVE_S = 1.0


class FrozenRunner(WatchedRunner):
    """Computes nothing while its process is stopped."""

    goes_on: asyncio.Event

    async def _execute(self, batch: Batch, on_layers: LayerListener | None) -> StepOutput:
        await self.goes_on.wait()
        return await super()._execute(batch, on_layers)


@dataclass(frozen=True)
class Faults:
    """What a seed draws: how often something happens to some worker, and how often a frame is not what was sent."""

    events_per_s: float
    frame_rate: float


def draw_faults(rng: random.Random) -> Faults:
    return Faults(rng.choice([0.3, 1.0, 3.0]), rng.choice([0.0, 0.0, 0.01, 0.1]))


class _WayOut(MemoryPrefillTransport):
    """A decode worker's way to the prefill pool."""

    is_shut = False

    @asynccontextmanager
    async def open(self, address: str, call: PrefillCall) -> AsyncIterator[AsyncIterator[Arrival]]:
        async with super().open(address, call) as frames:
            yield self._nothing(address) if self.is_shut else frames

    @staticmethod
    async def _nothing(address: str) -> AsyncIterator[Arrival]:
        raise Unavailable(f"no way to {address}")
        yield


class _Keeper:
    """One worker's place: starts it, and starts it anew when it was killed."""

    def __init__(self, world: FaultWorld, role: Role, name: str) -> None:
        self.world = world
        self.role = role
        self.name = name
        self.incarnation = 0
        self.is_up = False
        self.way_out: _WayOut | None = None
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self._killed = asyncio.Event()

    async def run(self) -> None:
        while True:
            self.incarnation += 1
            self._killed.clear()
            worker = self.world.start_worker(self)
            self.is_up = True
            loop = asyncio.create_task(worker.run(), name=f"{self.name}, life {self.incarnation}")
            beat = asyncio.create_task(self.world.beat(self, worker), name=f"heartbeat of {self.name}")
            killed = asyncio.create_task(self._killed.wait())
            try:
                await asyncio.wait([loop, killed], return_when=asyncio.FIRST_COMPLETED)
                if loop.done():
                    loop.result()
            finally:
                self.is_up = False
                for task in (beat, killed, loop):
                    task.cancel()
                self.world.network(self.role).kill(self.name)
                (self.world.prefills if self.role == "prefill" else self.world.decodes).pop(self.name)
                await asyncio.wait([beat, killed, loop])
                if not loop.cancelled():
                    loop.result()
            await asyncio.sleep(self.world.dice.choice([0.01, 0.3, 3.0]))

    @property
    def is_well(self) -> bool:
        if self.way_out is not None and self.way_out.is_shut:
            return False
        return self.is_up and self.goes_on.is_set() and not self.world.network(self.role).is_cut(self.name)

    def kill(self) -> None:
        self._killed.set()

    async def cut(self, seconds: float) -> None:
        network = self.world.network(self.role)
        network.cut(self.name)
        await asyncio.sleep(seconds)
        network.heal(self.name)

    async def shut_in(self, seconds: float) -> None:
        """Its certificate has expired, say, or a network policy forbids its calls."""
        assert self.way_out is not None, f"{self.name} pulls from nobody"
        way_out = self.way_out
        way_out.is_shut = True
        await way_out.close()
        await asyncio.sleep(seconds)
        way_out.is_shut = False

    async def freeze(self, seconds: float) -> None:
        """SIGSTOP, and later SIGCONT."""
        self.goes_on.clear()
        try:
            await self.cut(seconds)
        finally:
            self.goes_on.set()


class FaultWorld(World):
    """`deaths` and the like are there to show that a run did something."""

    def __init__(self, seed: int, requests: int, rate_s: float | None = None) -> None:
        super().__init__(seed, requests, rate_s, schedule_ahead=seed % 3 == 2, max_steps=32 if seed % 3 == 1 else 1)
        self.dice = random.Random(f"faults of {seed}")
        self.faults = draw_faults(self.dice)
        # Apart from the other dice: which of all seeds shut somebody in changes nothing of the others.
        self._shutting = random.Random(f"ways of {seed}")
        self._shuts_in = self._shutting.random() < 0.3
        self._slow_down(self.clients)
        self.freed_within_s = FREED_WITHIN_S + KEEPALIVE_S + 4 * self.shape.latency_s
        link = Link(self.shape.latency_s, self.shape.bandwidth_bytes_s, self.shape.window, KEEPALIVE_S)
        self.prefill_network: MemoryNetwork[PrefillService] = MemoryNetwork(link)
        self.decode_network: MemoryNetwork[DecodeService] = MemoryNetwork(replace(link, bandwidth_bytes_s=float("inf")))
        self.deaths = self.cuts = self.freezes = self.shut_ins = self.tampered = 0
        self._late: dict[str, list[bytes]] = {}
        self._is_peace = False
        self._keepers = {
            name: _Keeper(self, role, name)
            for role, name in (
                ("prefill", "prefill-0"),
                ("prefill", "prefill-1"),
                ("decode", "decode-0"),
                ("decode", "decode-1"),
            )
        }
        self._gateway_of_all: Gateway | None = None

    def _slow_down(self, clients: list[Client]) -> None:
        """Some of them."""
        for client in clients:
            client.reads_after_s = self.dice.choice([0.0] * 6 + [0.01, 0.5])

    def network(self, role: Role) -> MemoryNetwork[PrefillService] | MemoryNetwork[DecodeService]:
        return self.prefill_network if role == "prefill" else self.decode_network

    def blocks_of(self, role: Role, name: str) -> int:
        """How many a worker has."""
        return self.shape.prefill_blocks if role == "prefill" else self.shape.decode_blocks

    def start_worker(self, keeper: _Keeper) -> PrefillWorker | DecodeWorker:
        shape, blocks = self.shape, self.blocks_of(keeper.role, keeper.name)
        if keeper.role == "prefill":
            layout = KVLayout(MODEL, 4, 1, 1, "uint64", shape.prefill_block, blocks)
            prefill = self._prefill(self._frozen(layout, keeper), keeper.name)
            self.prefills[keeper.name] = prefill
            self.prefill_network.register(keeper.name, prefill)
            return prefill
        layout = KVLayout(MODEL, 4, 1, 1, "uint64", shape.decode_block, blocks)
        decode = self._decode(self._frozen(layout, keeper), keeper.name)
        self.decodes[keeper.name] = decode
        self.decode_network.register(keeper.name, decode)
        return decode

    async def beat(self, keeper: _Keeper, worker: PrefillWorker | DecodeWorker) -> None:
        cache, incarnation = KVReporter(), keeper.incarnation
        while self._gateway_of_all is None:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        gateway = self._gateway_of_all

        async def send(report: WorkerReport) -> HeartbeatReply:
            await keeper.goes_on.wait()
            await asyncio.sleep(self.shape.latency_s)
            if self.network(keeper.role).is_cut(keeper.name):
                raise Unavailable("the gateway cannot be reached")
            return gateway.heartbeat(report)

        def collect() -> WorkerReport:
            events = cache.report(worker.kv_events, worker.kv_snapshot)
            links = worker.link_rates() if isinstance(worker, DecodeWorker) else ()
            name = keeper.name
            return WorkerReport(name, keeper.role, name, incarnation, MODEL, worker.stats(), links, events)

        await report_forever(collect, send, changed=asyncio.Event(), rng=random.Random(self.dice.getrandbits(64)))

    # ── building ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _frozen(self, layout: KVLayout, keeper: _Keeper) -> FrozenRunner:
        runner = self._runner(layout, FrozenRunner)
        assert isinstance(runner, FrozenRunner)
        runner.goes_on = keeper.goes_on
        return runner

    def _start_workers(self) -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(keeper.run(), name=keeper.name) for keeper in self._keepers.values()]
        return [*tasks, asyncio.create_task(self._disturb(), name="faults")]

    def _start_heartbeats(self, gateway: Gateway) -> list[asyncio.Task[None]]:
        self._gateway_of_all = gateway
        return []

    def _gateway_config(self) -> GatewayConfig:
        changes = {"route_wait_s": 60.0, "failures": FailureConfig(max_attempts=1000)}
        return super()._gateway_config().model_copy(update=changes)

    def _kv_transport(self, decode_id: str) -> MemoryPrefillTransport:
        way_out = self._keepers[decode_id].way_out = _WayOut(self.prefill_network, self._tamper)
        return way_out

    def _tamper(self, address: str, frame: Frame, wire: bytes) -> list[bytes]:
        """What arrives instead of a frame. One that is late may come by the next stream, of another request."""
        dice = self.dice
        late = self._late.pop(address, [])
        if dice.random() >= self.faults.frame_rate:
            return [wire, *late]
        self.tampered += 1
        match dice.choice(["flip", "flip", "twice", "lose", "late"]):
            case "flip":
                bit = dice.randrange(8 * len(wire))
                return [wire[: bit // 8] + bytes([wire[bit // 8] ^ 1 << bit % 8]) + wire[bit // 8 + 1 :], *late]
            case "twice":
                return [wire, wire, *late]
            case "lose":
                return late
            case _:
                self._late[address] = [wire]
                return late

    async def _peace(self) -> None:
        while not self._is_peace or not all(keeper.is_well for keeper in self._keepers.values()):  # noqa: ASYNC110
            await asyncio.sleep(0.1)

    async def _disturb(self) -> None:
        """Until shortly after the last client has come."""
        until_s = self.clients[-1].arrives_s + 1.0
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as under_way:
            if self._shuts_in:
                under_way.create_task(self._shut_in(until_s))
            while loop.time() < until_s:
                await asyncio.sleep(self.dice.expovariate(self.faults.events_per_s))
                self._befall(under_way)
        self._is_peace = True
        await asyncio.Event().wait()

    async def _shut_in(self, until_s: float) -> None:
        """One decode worker after the other."""
        dice = self._shutting
        while asyncio.get_running_loop().time() < until_s:
            await asyncio.sleep(dice.expovariate(1.0))
            keeper = self._keepers[dice.choice(["decode-0", "decode-1"])]
            if keeper.is_well:
                self.shut_ins += 1
                await keeper.shut_in(dice.choice([0.05, 0.5, 3.0]))

    def _befall(self, under_way: asyncio.TaskGroup) -> None:
        """One fault, to one worker; none where it has one already."""
        dice = self.dice
        keeper = dice.choice(list(self._keepers.values()))
        if not keeper.is_well:
            return
        match dice.choice(["kill", "kill", "cut", "freeze"]):
            case "kill":
                self.deaths += 1
                keeper.kill()
            case "cut":
                self.cuts += 1
                under_way.create_task(keeper.cut(dice.choice([0.05, 0.5, 3.0])))
            case _:
                self.freezes += 1
                under_way.create_task(keeper.freeze(dice.choice([0.05, 0.5, 3.0])))


class ShutInWorld(FaultWorld):
    """Nothing befalls anybody, but that decode-0 reaches no prefill worker as long as clients come. `absent_s` sums up
    how long each prefill worker was given nothing."""

    def __init__(self, seed: int, requests: int, rate_s: float) -> None:
        super().__init__(seed, requests, rate_s)
        self.faults = replace(self.faults, frame_rate=0.0)
        self.absent_s = 0.0

    async def _disturb(self) -> None:
        loop, look_s = asyncio.get_running_loop(), 0.01
        until_s = self.clients[-1].arrives_s
        async with asyncio.TaskGroup() as under_way:
            # Once all workers are known.
            await asyncio.sleep(0.5)
            under_way.create_task(self._keepers["decode-0"].shut_in(until_s - loop.time()))
            assert self._gateway_of_all is not None
            order = self._gateway_of_all.view.prefill_order
            while loop.time() < until_s:
                self.absent_s += look_s * (len(self.prefills) - len(order))
                await asyncio.sleep(look_s)
        self._is_peace = True
        await asyncio.Event().wait()


def simulate(seed: int, requests: int, rate_s: float | None = None) -> FaultWorld:
    """Runs one seed to its end and checks everything; every failure says which seed it was."""
    return to_its_end(
        lambda: FaultWorld(seed, requests, rate_s),
        f"seed {seed}, {requests} requests, rate {rate_s}",
        lambda world: f"{world.shape}, {world.routing}, {world.faults}",
    )


def simulate_shut_in(seed: int, requests: int, rate_s: float) -> ShutInWorld:
    """As `simulate`."""
    return to_its_end(
        lambda: ShutInWorld(seed, requests, rate_s),
        f"seed {seed}, {requests} requests, rate {rate_s}",
        lambda world: f"{world.shape}, {world.routing}",
    )
