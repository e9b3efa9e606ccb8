"""The whole cluster under random traffic while its workers change their roles: every answer is right, none is lost."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from typing import Literal

import pytest

from cluster.controller_loop import Sight, sight_of
from cluster.flexible_worker import FlexibleWorker
from cluster.gateway import Gateway
from cluster.gateway_config import GatewayConfig, RouterConfig
from cluster.heartbeat import report_forever
from cluster.links import DecodeLinks
from cluster.messages import ModelInfo
from cluster.planning import virtual_loop
from cluster.registry import HeartbeatReply, Registry, Role, WorkerReport
from cluster.reporter import Reporter
from decode_worker.worker import DecodeWorker
from engine.batch import KVLayout
from engine.objectives import Objectives
from kvtransfer.memory import MemoryPrefillTransport
from prefill_worker.worker import PrefillWorker
from tests.sim.traffic import EOS, MAX_CONTEXT, VOCAB
from tests.sim.world import MODEL, NUM_LAYERS, WatchedRunner, World

WORKERS = 5


class Roles:
    """Asks now this worker, now that one, to take the other role; never the last one of a role."""

    def __init__(self, rng: random.Random) -> None:
        self.sight: Sight | None = None
        self.made = self.given_up = 0
        self._rng = rng
        self._wanted: dict[str, Role] = {}

    def wanted_role(self, worker_id: str) -> Role | Literal[""]:
        assert self.sight is not None
        known = self.sight.registry.all(asyncio.get_running_loop().time())
        is_draining = {worker.report.worker_id: worker.report.stats.draining for worker in known}
        if is_draining[worker_id] and self.sight.on_its_way(worker_id):
            return ""
        return self._wanted.get(worker_id, "")

    def arrived(self, prompt_tokens: int, max_tokens: int, objectives: Objectives) -> None:
        """Of no interest here."""

    def answered(self, prompt_tokens: int, cached_tokens: int, max_tokens: int, answer_tokens: int) -> None:
        """Of no interest here."""

    async def run(self, workers: list[FlexibleWorker]) -> None:
        rng = self._rng
        while True:
            await asyncio.sleep(rng.uniform(0.0, 0.5))
            worker = rng.choice(workers)
            if sum(other.role == worker.role for other in workers) == 1:
                continue
            role: Role = "decode" if worker.role == "prefill" else "prefill"
            self._wanted = {worker.worker_id: role}
            has_drained = False
            # Looking on is no event that the worker should know of.
            while worker.role != role and not (has_drained and not worker.is_draining):
                has_drained = has_drained or worker.is_draining
                await asyncio.sleep(0.01)
            self._wanted = {}
            self.made += worker.role == role
            self.given_up += worker.role != role
            # Longer than a heartbeat, so that a worker that gave up learns that it is not asked any more.
            await asyncio.sleep(0.3)


class FlippingWorld(World):
    """Workers that are all of one kind, and change."""

    def __init__(self, seed: int, requests: int, rate_s: float | None = None) -> None:
        super().__init__(seed, requests, rate_s, schedule_ahead=seed % 2 == 0)
        self._dice = random.Random(seed ^ 0x5EED)
        self.roles = Roles(random.Random(seed ^ 0xF11B))
        self.workers: list[FlexibleWorker] = []
        self._registry = Registry(1.0, 60.0)

    def _start_workers(self) -> list[asyncio.Task[None]]:
        for index in range(WORKERS):
            role: Role = "prefill" if index in (0, 1) else "decode"
            worker = self._flexible(f"w{index}", role)
            self.workers.append(worker)
            self.prefill_network.register(worker.worker_id, worker)
            self.decode_network.register(worker.worker_id, worker)
            # Where the world looks for what is left.
            self.prefills[worker.worker_id] = worker  # type: ignore[assignment]
        tasks = [asyncio.create_task(worker.run(), name=worker.worker_id) for worker in self.workers]
        return [*tasks, asyncio.create_task(self.roles.run(self.workers), name="roles")]

    def _flexible(self, name: str, role: Role) -> FlexibleWorker:
        shape, rng = self.shape, self._dice
        size = rng.choice([shape.prefill_block, shape.decode_block])
        blocks = int(rng.choice([1.0, 1.5, 5.0]) * MAX_CONTEXT / size) + 1
        runner = self._runner(KVLayout(MODEL, NUM_LAYERS, 1, 1, "uint64", size, blocks))
        return FlexibleWorker(
            partial(self._prefill_loop, runner, name),
            partial(self._decode_loop, runner, name),
            role,
            worker_id=name,
            flip_limit_s=rng.choice([0.05, 10.0, 10.0]),
        )

    def _prefill_loop(self, runner: WatchedRunner, name: str) -> PrefillWorker:
        shape = self.shape
        config = shape.prefill_config()
        return PrefillWorker(
            runner, config, worker_id=name, max_context=1 << 16, prefix_cache=shape.prefix_cache, note_events=True
        )

    def _decode_loop(self, runner: WatchedRunner, name: str) -> DecodeWorker:
        shape = self.shape
        config = shape.decode_config(schedule_ahead=self._schedule_ahead)
        transport = MemoryPrefillTransport(self.prefill_network)
        return DecodeWorker(
            runner,
            config,
            transport,
            worker_id=name,
            eos_token_ids=frozenset({EOS}),
            max_context=MAX_CONTEXT,
            prefix_cache=shape.prefix_cache,
            note_events=True,
        )

    def _gateway(self, links: DecodeLinks) -> Gateway:
        # Every policy in turn: what they choose differs, what becomes of it must not.
        policy = self._dice.choice(["goodput", "round_robin", "least_loaded", "prefix_affinity"])
        config = GatewayConfig(
            default_deadline_s=None,
            heartbeat_interval_s=0.2,
            fresh_s=1.0,
            router=RouterConfig(allow_local=self.shape.allow_local, policy=policy),
        )
        model = ModelInfo(MODEL, VOCAB, MAX_CONTEXT, eos_token_ids=(EOS,))
        gateway = Gateway(
            None, model, self._registry, links, config, random.Random(self._rng.getrandbits(64)), controller=self.roles
        )
        self.roles.sight = sight_of(gateway, self._registry)
        return gateway

    def _start_heartbeats(self, gateway: Gateway) -> list[asyncio.Task[None]]:
        async def send(report: WorkerReport) -> HeartbeatReply:
            await asyncio.sleep(self.shape.latency_s)
            reply = gateway.heartbeat(report)
            await asyncio.sleep(self.shape.latency_s)
            return reply

        tasks = []
        for worker in self.workers:
            reporter = Reporter(worker, address=worker.worker_id, incarnation=1, model=MODEL)
            rng = random.Random(self._rng.getrandbits(64))
            beats = report_forever(reporter.collect, send, changed=worker.changed, rng=rng, answered=reporter.answered)
            tasks.append(asyncio.create_task(beats, name=f"heartbeat of {worker.worker_id}"))
        return tasks


def simulate(seed: int, requests: int, rate_s: float | None = None) -> FlippingWorld:
    """Runs one seed to its end and checks everything; every failure says which seed it was."""
    world = FlippingWorld(seed, requests, rate_s)
    try:
        virtual_loop.run(world.run())
        world.check_clients()
    except BaseException as error:
        error.add_note(f"seed {seed}, {requests} requests, rate {rate_s}, {world.shape}")
        raise
    return world


@pytest.mark.parametrize("seed", range(15))
def test_seed(seed: int):
    simulate(seed, requests=35)


def test_flips_are_made_under_load_and_some_are_given_up():
    worlds = [simulate(seed, requests=120, rate_s=15.0) for seed in (7000, 7002)]
    assert sum(world.roles.made for world in worlds) > 15
    assert sum(world.roles.given_up for world in worlds) > 0
    receipts = [client.complete.receipt for world in worlds for client in world.clients if client.complete is not None]
    assert len({receipt.decode_worker for receipt in receipts}) == WORKERS, "everybody decodes at some time"
    assert len({receipt.prefill_worker for receipt in receipts} - {""}) == WORKERS


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(10_000, 10_400))
def test_many_seeds(seed: int):
    simulate(seed, requests=120)
