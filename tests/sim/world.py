"""A whole cluster in one process on virtual time: the real gateway, router, registry, links and workers.

    clients ─▶ Gateway ─▶ DecodeLinks ─(memory)─▶ DecodeWorker ×2 ─(memory)─▶ PrefillWorker ×2
                  ▲ heartbeats ───────────────────────┴────────────────────────────┘

Only what lies outside is emulated: the model, the wire and the clock. Everything random comes from one seed.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import cast, get_args

from cluster.gateway import Gateway
from cluster.gateway_config import GatewayConfig, ObjectivesConfig, Policy, RouterConfig
from cluster.heartbeat import report_forever
from cluster.kv_reporter import KVReporter
from cluster.links import DecodeLinks
from cluster.messages import Chunk, Complete, ModelInfo
from cluster.planning import virtual_loop
from cluster.registry import HeartbeatReply, Registry, Role, WorkerReport
from cluster.tracing.sampler import Sampler
from decode_worker.config import DecodeConfig
from decode_worker.memory import MemoryDecodeTransport
from decode_worker.observer import Observer as DecodeObserver
from decode_worker.stream import DecodeService
from decode_worker.worker import DecodeWorker
from engine.batch import Batch, KVLayout, LayerListener, StepOutput
from engine.emulated_runner import EmulatedRunner
from engine.errors import TandemError
from engine.pulse import CANARY
from kvtransfer.memory import Link, MemoryNetwork, MemoryPrefillTransport
from kvtransfer.transport import PrefillService
from prefill_worker.config import PrefillConfig
from prefill_worker.observer import Observer as PrefillObserver
from prefill_worker.worker import PrefillWorker
from tests.planning.linear_cost import LinearCost
from tests.sim.traffic import EOS, MAX_CONTEXT, VOCAB, Client, check_client, draw_clients

NUM_LAYERS = 4
MODEL = "emulated"
# Long after the last arrival everything must have finished: nobody waits for ever.
PATIENCE_S = 300.0
# How long after its end a request may still be computed: messages on their way, and steps under way on both workers.
FREED_WITHIN_S = 0.25


@dataclass(frozen=True)
class Shape:
    """What a seed draws for the cluster itself."""

    prefill_block: int
    decode_block: int
    prefill_blocks: int
    decode_blocks: int
    token_budget: int
    max_batch_prompts: int
    max_transfers: int
    max_batch: int
    latency_s: float
    bandwidth_bytes_s: float
    window: int
    allow_local: bool
    prefill_known_after_s: float
    prefix_cache: bool

    def prefill_config(self) -> PrefillConfig:
        return PrefillConfig(
            token_budget=self.token_budget, max_batch_prompts=self.max_batch_prompts, max_frame_bytes=4096
        )

    def decode_config(self, **more: bool | int) -> DecodeConfig:
        return DecodeConfig(
            max_batch=self.max_batch, local_token_budget=self.token_budget, max_transfers=self.max_transfers, **more
        )


def draw_shape(rng: random.Random) -> Shape:
    prefill_block, decode_block = rng.choice([8, 16]), rng.choice([4, 16, 16])
    allow_local = rng.random() < 0.7
    return Shape(
        prefill_block=prefill_block,
        decode_block=decode_block,
        prefill_blocks=int(rng.choice([1.0, 1.5, 5]) * MAX_CONTEXT / prefill_block) + 1,
        decode_blocks=int(rng.choice([1.0, 1.5, 2.5, 8]) * MAX_CONTEXT / decode_block) + 1,
        token_budget=rng.choice([32, 100, 256]),
        max_batch_prompts=rng.choice([1, 1, 3]),
        max_transfers=rng.choice([2, 32]),
        max_batch=rng.choice([3, 64, 64]),
        latency_s=rng.choice([0.0, 0.0005, 0.01]),
        bandwidth_bytes_s=rng.choice([1e6, 1e8, float("inf")]),
        window=rng.choice([1, 4, 16]),
        allow_local=allow_local,
        # Until the gateway hears of prefill workers, decode workers compute the prompts themselves.
        prefill_known_after_s=rng.choice([0.0, 0.0, 1.0, float("inf")]) if allow_local else 0.0,
        prefix_cache=rng.random() < 0.8,
    )


@dataclass(frozen=True)
class Routing:
    """How the gateway decides, which a seed draws as well. With objectives the goodput policy may refuse requests."""

    policy: Policy
    has_cost: bool
    objectives: ObjectivesConfig

    @property
    def may_refuse(self) -> bool:
        return self.policy == "goodput" and self.objectives != ObjectivesConfig()


def draw_routing(rng: random.Random) -> Routing:
    tight, lax = ObjectivesConfig(ttft_ms=60, tpot_ms=6), ObjectivesConfig(ttft_ms=1000, tpot_ms=40)
    policy: Policy = "goodput" if rng.random() < 0.5 else rng.choice(get_args(Policy))
    return Routing(policy, rng.random() < 0.5, rng.choice([ObjectivesConfig(), lax, lax, tight]))


class WatchedRunner(EmulatedRunner):
    """Asserts at each step that nobody in it has been gone for long. Rows' names contain the requests' ids."""

    clients: dict[str, Client]
    freed_within_s: float

    async def run(self, batch: Batch, on_layers: LayerListener | None = None) -> StepOutput:
        now = asyncio.get_running_loop().time()
        for row in batch.rows:
            if row.seq_id == CANARY:
                continue
            found = re.search(r"q\d+", row.seq_id)
            assert found, f"{row.seq_id} does not name its request"
            client = self.clients[found.group()]
            deadline_s = client.request.deadline_s
            gone_s = [client.ended_s] if client.ended_s is not None else []
            gone_s += [client.arrives_s + deadline_s] if deadline_s is not None else []
            late = [now - gone for gone in gone_s if now - gone > self.freed_within_s]
            assert not late, f"{row.seq_id} is computed {max(late):.3f} s after its request was gone"
        return await super().run(batch, on_layers)


class World:
    """One run. `steps` and the like are there to show that a run did something."""

    def __init__(
        self, seed: int, requests: int, rate_s: float | None = None, schedule_ahead: bool = True, max_steps: int = 1
    ) -> None:
        rng = random.Random(seed)
        self.shape = draw_shape(rng)
        self.routing = draw_routing(random.Random(f"routing of {seed}"))
        self.clients = draw_clients(rng, requests, rate_s or rng.choice([5.0, 30.0, 100.0]))
        self._rng = rng
        # As in a real worker: no two, nor two lives of one, count from the same number.
        self._lease_starts = random.Random(f"leases of {seed}")
        self._schedule_ahead = schedule_ahead
        self._max_steps = max_steps
        self.freed_within_s = FREED_WITHIN_S
        self._by_id = {client.request.request_id: client for client in self.clients}
        shape = self.shape
        link = Link(shape.latency_s, shape.bandwidth_bytes_s, shape.window)
        self.prefill_network: MemoryNetwork[PrefillService] = MemoryNetwork(link)
        self.decode_network: MemoryNetwork[DecodeService] = MemoryNetwork(Link(shape.latency_s, window=shape.window))
        self.prefills: dict[str, PrefillWorker] = {}
        self.decodes: dict[str, DecodeWorker] = {}
        # Where requests are traced, and those who write down what each process says of them.
        self.sampler: Sampler | None = None
        self.prefill_observer: PrefillObserver | None = None
        self.decode_observer: DecodeObserver | None = None
        self.oracle = self._runner(KVLayout(MODEL, NUM_LAYERS, 1, 1, "uint64", 16, 1))

    async def run(self) -> None:
        """Serves every client, then checks that nothing is left anywhere."""
        async with self._running() as (gateway, tasks):
            await self._serve_all(gateway, tasks)
            await self._peace()
            await asyncio.sleep(self.freed_within_s)
            self._check_empty(gateway)

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[tuple[Gateway, list[asyncio.Task[None]]]]:
        """The cluster, and the tasks of all that is not its clients. Nothing of it is left afterwards."""
        async with AsyncExitStack() as stack:
            tasks = self._start_workers()
            links = DecodeLinks(MemoryDecodeTransport(self.decode_network))
            gateway = self._gateway(links)
            tasks += self._start_heartbeats(gateway)
            stack.push_async_callback(_stop, tasks)
            stack.push_async_callback(links.close)
            yield gateway, tasks
        assert not self.decode_network.open_streams(), "token streams are still open"
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks are left: {left}"

    async def _serve_all(self, gateway: Gateway, tasks: list[asyncio.Task[None]]) -> None:
        clients = asyncio.gather(*(self._serve(client, gateway) for client in self.clients))
        # A worker's loop that dies takes the run with it, instead of leaving everybody waiting.
        limit_s = self.clients[-1].arrives_s - asyncio.get_running_loop().time() + PATIENCE_S
        await asyncio.wait([clients, *tasks], timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
        waiting = [client.request.request_id for client in self.clients if client.ended_s is None]
        assert clients.done(), f"{waiting} have not ended after {limit_s:.0f} s"
        await clients

    def check_clients(self) -> None:
        # Handing an error back to the client takes no virtual time, so a deadline is met to the instant.
        for client in self.clients:
            check_client(client, self.oracle, late_s=1e-6, may_refuse=self.routing.may_refuse)

    def _check_empty(self, gateway: Gateway) -> None:
        gateway.check_empty()
        for worker in (*self.prefills.values(), *self.decodes.values()):
            worker.check_empty()
            stats = worker.stats()
            assert stats.blocks_free == stats.blocks_total, f"{worker.worker_id} holds blocks"
            assert (stats.running, stats.waiting, stats.queued_tokens) == (0, 0, 0), f"{worker.worker_id}: {stats}"
        assert not self.prefill_network.open_streams(), "KV streams are still open"

    async def _peace(self) -> None:
        """Until nothing befalls the workers any more."""

    async def _serve(self, client: Client, gateway: Gateway) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(client.arrives_s - loop.time())
        client.arrives_s = loop.time()
        limit = asyncio.timeout(client.cancel_after_s)
        try:
            async with limit:
                answer = cast(AsyncGenerator[Chunk | Complete, None], gateway.generate(client.request))
                async with aclosing(answer) as parts:
                    async for part in parts:
                        client.take(part)
                        await asyncio.sleep(client.reads_after_s)
        except TandemError as error:
            client.error = error
        except TimeoutError:
            assert limit.expired(), "a TimeoutError of the gateway's own"
        client.ended_s = loop.time()

    # ── building ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _runner(self, layout: KVLayout, kind: type[WatchedRunner] = WatchedRunner) -> WatchedRunner:
        runner = kind(layout, _step_s, layer_group=2, vocab_size=VOCAB, eos_token_id=EOS, eos_rate=0.01)
        runner.clients = self._by_id
        runner.freed_within_s = self.freed_within_s
        return runner

    def _prefill(self, runner: WatchedRunner, name: str) -> PrefillWorker:
        shape = self.shape
        config = shape.prefill_config()
        cache, observer = shape.prefix_cache, self.prefill_observer
        return PrefillWorker(runner, config, worker_id=name, max_context=1 << 16, prefix_cache=cache, observer=observer)

    def _decode(self, runner: WatchedRunner, name: str) -> DecodeWorker:
        shape = self.shape
        config = shape.decode_config(schedule_ahead=self._schedule_ahead, max_steps=self._max_steps)
        return DecodeWorker(
            runner,
            config,
            self._kv_transport(name),
            worker_id=name,
            eos_token_ids=frozenset({EOS}),
            max_context=MAX_CONTEXT,
            prefix_cache=shape.prefix_cache,
            leases=count(self._lease_starts.getrandbits(62)),
            observer=self.decode_observer,
        )

    def _kv_transport(self, decode_id: str) -> MemoryPrefillTransport:
        return MemoryPrefillTransport(self.prefill_network)

    def _start_workers(self) -> list[asyncio.Task[None]]:
        shape = self.shape
        prefill_layout = KVLayout(MODEL, NUM_LAYERS, 1, 1, "uint64", shape.prefill_block, shape.prefill_blocks)
        decode_layout = KVLayout(MODEL, NUM_LAYERS, 1, 1, "uint64", shape.decode_block, shape.decode_blocks)
        for name in ("prefill-0", "prefill-1"):
            self.prefills[name] = self._prefill(self._runner(prefill_layout), name)
            self.prefill_network.register(name, self.prefills[name])
        for name in ("decode-0", "decode-1"):
            self.decodes[name] = self._decode(self._runner(decode_layout), name)
            self.decode_network.register(name, self.decodes[name])
        workers = {**self.prefills, **self.decodes}
        return [asyncio.create_task(worker.run(), name=name) for name, worker in workers.items()]

    def _gateway_config(self) -> GatewayConfig:
        routing = self.routing
        return GatewayConfig(
            default_deadline_s=None,
            heartbeat_interval_s=0.2,
            fresh_s=1.0,
            objectives=routing.objectives,
            router=RouterConfig(policy=routing.policy, allow_local=self.shape.allow_local),
        )

    def _gateway(self, links: DecodeLinks) -> Gateway:
        config, routing = self._gateway_config(), self.routing
        model = ModelInfo(MODEL, VOCAB, MAX_CONTEXT, eos_token_ids=(EOS,))
        registry = Registry(config.fresh_s, config.expire_s)
        cost = LinearCost(2e-3, 5e-5, 0.0, 5e-5, 2e-7, saturation_tokens=64) if routing.has_cost else None
        rng = random.Random(self._rng.getrandbits(64))
        return Gateway(None, model, registry, links, config, rng, cost, sampler=self.sampler)

    def _start_heartbeats(self, gateway: Gateway) -> list[asyncio.Task[None]]:
        roles: list[tuple[Role, str, PrefillWorker | DecodeWorker]] = []
        roles += [("prefill", name, worker) for name, worker in self.prefills.items()]
        roles += [("decode", name, decode) for name, decode in self.decodes.items()]
        return [asyncio.create_task(self._beat(gateway, *role), name=f"heartbeat of {role[1]}") for role in roles]

    async def _beat(self, gateway: Gateway, role: Role, name: str, worker: PrefillWorker | DecodeWorker) -> None:
        cache = KVReporter()

        async def send(report: WorkerReport) -> HeartbeatReply:
            await asyncio.sleep(self.shape.latency_s)
            return gateway.heartbeat(report)

        def collect() -> WorkerReport:
            events = cache.report(worker.kv_events, worker.kv_snapshot)
            links = worker.link_rates() if isinstance(worker, DecodeWorker) else ()
            return WorkerReport(name, role, name, 1, MODEL, worker.stats(), links, events)

        rng = random.Random(self._rng.getrandbits(64))
        if role == "prefill":
            await asyncio.sleep(self.shape.prefill_known_after_s)
        await report_forever(collect, send, changed=asyncio.Event(), rng=rng)


def simulate(
    seed: int, requests: int, rate_s: float | None = None, schedule_ahead: bool = True, max_steps: int = 1
) -> World:
    """Runs one seed to its end and checks everything; every failure says which seed it was."""
    world = World(seed, requests, rate_s, schedule_ahead, max_steps)
    try:
        virtual_loop.run(world.run())
        world.check_clients()
    except BaseException as error:
        settings = f"schedule_ahead={schedule_ahead}, max_steps={max_steps}, {world.shape}, {world.routing}"
        error.add_note(f"seed {seed}, {requests} requests, {settings}")
        raise
    return world


def _step_s(batch: Batch) -> float:
    """Some seconds per step: a constant, the tokens computed, and the KV read."""
    return 2e-3 + 5e-5 * batch.token_count + 2e-7 * sum(row.end for row in batch.rows)


async def _stop(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
