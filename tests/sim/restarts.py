"""The whole cluster while its workers are restarted in good order, one at a time, again and again.

    a worker's place:  start ─▶ reports, serves ─ told to end ─▶ drains, hands back the rest ─▶ start, next incarnation
    the operator:      tells one ─▶ waits until its next life has reported ─▶ tells another …

Every worker runs canaries, and is watched by what takes hung ones for hung: none is.
"""

from __future__ import annotations

import asyncio
import random
from functools import partial

from cluster.departure import depart
from cluster.flexible_worker import FlexibleWorker
from cluster.gateway import Gateway
from cluster.gateway_config import GatewayConfig
from cluster.heartbeat import report_forever
from cluster.registry import HeartbeatReply, Role, WorkerReport
from cluster.reporter import Reporter
from cluster.step_watch import watch_steps
from decode_worker.worker import DecodeWorker
from engine.batch import KVLayout
from engine.pulse import Pulse
from kvtransfer.memory import MemoryPrefillTransport
from prefill_worker.worker import PrefillWorker
from tests.sim.one_run import to_its_end
from tests.sim.traffic import EOS, MAX_CONTEXT
from tests.sim.world import MODEL, NUM_LAYERS, WatchedRunner, World

NAMES: dict[str, Role] = {"prefill-0": "prefill", "prefill-1": "prefill", "decode-0": "decode", "decode-1": "decode"}
# How long what was said last has to arrive before the process is gone.
CLOSE_GRACE_S = 1.0
# A step that takes longer counts as hung. The longest takes some 50 ms.
STEP_LIMIT_S = 1.0


class Place:
    """One worker's place, and who lives there now."""

    def __init__(self, world: RestartingWorld, name: str, role: Role) -> None:
        self.world = world
        self.name = name
        self.role = role
        self.lives = 0
        self.told_to_end = asyncio.Event()
        self.pulse = Pulse()

    @property
    def address(self) -> str:
        """Another one in every life, as a port is."""
        return f"{self.name}.{self.lives}"

    async def run(self) -> None:
        while True:
            self.lives += 1
            self.told_to_end.clear()
            self.pulse = Pulse(self.world.canary_s)
            worker = self.world.build(self)
            reporter = Reporter(worker, address=self.address, incarnation=self.lives, model=MODEL)
            loop = asyncio.create_task(worker.run(), name=self.address)
            watch = asyncio.create_task(watch_steps(self.pulse, STEP_LIMIT_S))
            heart = asyncio.create_task(self.world.beat(worker, reporter))
            told = asyncio.create_task(self.told_to_end.wait())
            try:
                await asyncio.wait([loop, watch, told], return_when=asyncio.FIRST_COMPLETED)
                for task in (loop, watch):
                    if task.done():
                        task.result()
                await depart(worker, reporter, self.world.drain_s)
                await asyncio.sleep(CLOSE_GRACE_S)
            finally:
                for task in (loop, watch, heart, told):
                    task.cancel()
                self.world.leave(self.address)
                await asyncio.wait([loop, watch, heart, told])
                if not loop.cancelled():
                    loop.result()
            worker.check_empty()
            await asyncio.sleep(self.world.dice.choice([0.01, 0.3]))


class RestartingWorld(World):
    """`restarts` shows that a run did something."""

    def __init__(self, seed: int, requests: int, rate_s: float | None = None, drain_s: float | None = None) -> None:
        super().__init__(seed, requests, rate_s, schedule_ahead=seed % 2 == 0)
        self.dice = random.Random(f"restarts of {seed}")
        self.drain_s = self.dice.choice([0.0, 0.02, 30.0]) if drain_s is None else drain_s
        self.canary_s = self.dice.choice([0.02, 0.3])
        self.restarts = 0
        self._places = [Place(self, name, role) for name, role in NAMES.items()]
        self._has_gateway = asyncio.Event()
        self._the_gateway: Gateway | None = None
        self._is_peace = asyncio.Event()

    def build(self, place: Place) -> FlexibleWorker:
        shape = self.shape
        prefills = place.role == "prefill"
        size, blocks = shape.decode_block, shape.decode_blocks
        if prefills:
            size, blocks = shape.prefill_block, shape.prefill_blocks
        runner = self._runner(KVLayout(MODEL, NUM_LAYERS, 1, 1, "uint64", size, blocks))
        worker = FlexibleWorker(
            partial(self._prefill_loop, runner, place),
            partial(self._decode_loop, runner, place),
            place.role,
            worker_id=place.name,
            pulse=place.pulse,
        )
        # Where the world looks for what is left.
        self.prefills[place.name] = worker  # type: ignore[assignment]
        self.prefill_network.register(place.address, worker)
        self.decode_network.register(place.address, worker)
        return worker

    def leave(self, address: str) -> None:
        self.prefill_network.kill(address)
        self.decode_network.kill(address)

    async def beat(self, worker: FlexibleWorker, reporter: Reporter) -> None:
        await self._has_gateway.wait()
        await worker.pulse.is_proven.wait()
        assert self._the_gateway is not None
        gateway = self._the_gateway

        async def send(report: WorkerReport) -> HeartbeatReply:
            await asyncio.sleep(self.shape.latency_s)
            reply = gateway.heartbeat(report)
            await asyncio.sleep(self.shape.latency_s)
            return reply

        rng = random.Random(self.dice.getrandbits(64))
        await report_forever(reporter.collect, send, changed=worker.changed, rng=rng, answered=reporter.answered)

    # ── building ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _prefill_loop(self, runner: WatchedRunner, place: Place) -> PrefillWorker:
        shape = self.shape
        config = shape.prefill_config()
        return PrefillWorker(
            runner,
            config,
            worker_id=place.name,
            max_context=1 << 16,
            prefix_cache=shape.prefix_cache,
            note_events=True,
            pulse=place.pulse,
        )

    def _decode_loop(self, runner: WatchedRunner, place: Place) -> DecodeWorker:
        shape = self.shape
        config = shape.decode_config(schedule_ahead=self._schedule_ahead)
        return DecodeWorker(
            runner,
            config,
            MemoryPrefillTransport(self.prefill_network),
            worker_id=place.name,
            eos_token_ids=frozenset({EOS}),
            max_context=MAX_CONTEXT,
            prefix_cache=shape.prefix_cache,
            note_events=True,
            pulse=place.pulse,
        )

    def _start_workers(self) -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(place.run(), name=place.name) for place in self._places]
        return [*tasks, asyncio.create_task(self._restart(), name="operator")]

    def _start_heartbeats(self, gateway: Gateway) -> list[asyncio.Task[None]]:
        self._the_gateway = gateway
        self._has_gateway.set()
        return []

    def _gateway_config(self) -> GatewayConfig:
        return super()._gateway_config().model_copy(update={"route_wait_s": 60.0})

    async def _peace(self) -> None:
        await self._is_peace.wait()
        # A canary under way holds a block, and is no request.
        for place in self._places:
            place.pulse.canary_s = float("inf")

    async def _restart(self) -> None:
        """Until shortly after the last client has come."""
        until_s, loop = self.clients[-1].arrives_s + 1.0, asyncio.get_running_loop()
        await asyncio.sleep(0.3)
        while loop.time() < until_s:
            for place in self.dice.sample(self._places, len(self._places)):
                before = place.lives
                place.told_to_end.set()
                # Looking on is no event that the worker should know of.
                while not self._serves(place, before):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                self.restarts += 1
                await asyncio.sleep(self.dice.choice([0.0, 0.2]))
        self._is_peace.set()
        await asyncio.Event().wait()

    def _serves(self, place: Place, before: int) -> bool:
        assert self._the_gateway is not None
        workers = self._the_gateway.status(asyncio.get_running_loop().time()).workers
        return any(
            worker.worker_id == place.name and worker.fresh and worker.incarnation > before and not worker.draining
            for worker in workers
        )


def simulate(seed: int, requests: int, rate_s: float | None = None, drain_s: float | None = None) -> RestartingWorld:
    """Runs one seed to its end and checks everything; every failure says which seed it was."""
    return to_its_end(
        lambda: RestartingWorld(seed, requests, rate_s, drain_s),
        f"seed {seed}, {requests} requests, rate {rate_s}",
        lambda world: f"{world.shape}, {world.routing}, drain_s {world.drain_s}, canary_s {world.canary_s}",
    )
