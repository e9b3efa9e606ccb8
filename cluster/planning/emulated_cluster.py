"""A cluster in one process on virtual time: everything in it is the production code but the model, the wire, the clock.

    clients ─▶ Gateway ─▶ DecodeLinks ─(memory)─▶ DecodeWorker × D ─(memory)─▶ PrefillWorker × P
                  ▲ heartbeats ─────────────────────────┴────────────────────────────┘

tests/sim/world.py is the same for correctness under faults; this one is for capacity: what would so many GPUs serve?
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

from cluster.controller_loop import ControllerLoop, sight_of
from cluster.demand import DemandMeter
from cluster.flexible_worker import FlexibleWorker
from cluster.gateway import Gateway
from cluster.gateway_config import GatewayConfig, RouterConfig, require_policy
from cluster.heartbeat import report_forever
from cluster.links import DecodeLinks
from cluster.messages import ModelInfo
from cluster.planning.answer_lengths import EndingTransport
from cluster.planning.cost_runner import CostRunner, StepNoise, cost_layout
from cluster.planning.emulation_costs import EmulationCosts, loop_s_of, noise_of, own_copy
from cluster.planning.emulation_spec import EmulationSpec, WorkerCost
from cluster.registry import HeartbeatReply, Registry, Role, WorkerReport
from cluster.reporter import Reporter
from cluster.routing.costs import RoleCosts
from decode_worker.config import DecodeConfig
from decode_worker.memory import MemoryDecodeTransport
from decode_worker.stream import DecodeService
from decode_worker.worker import DecodeWorker
from kvtransfer.memory import Link, MemoryNetwork, MemoryPrefillTransport
from kvtransfer.transport import PrefillService
from prefill_worker.config import PrefillConfig
from prefill_worker.worker import PrefillWorker

# Token frames, or KV frames, that may be on their way in one stream.
WINDOW = 8
# One frame per publication: frames of 2 MB would only make the same transfer into more events.
ONE_FRAME = 1 << 62
# What workers on GPUs are given where the spec does not say: their configs' defaults suit a CPU.
MAX_BATCH = 256
MAX_BATCH_PROMPTS = 64
MAX_TRANSFERS = 64
MAX_QUEUED = 1024
# Decode steps that are one event as long as nothing interferes: more than any answer has.
MAX_STEPS = 1 << 20
LEAST_TOKEN_BUDGET, MOST_TOKEN_BUDGET = 256, 8192


class EmulatedCluster:
    """Workers, heartbeats and gateway of one spec. `gateway` serves from within `running` on."""

    def __init__(
        self, spec: EmulationSpec, costs: EmulationCosts, vocab_size: int, length_of: Callable[[str], int]
    ) -> None:
        self._spec = spec
        self._costs = costs
        self._rng = random.Random(spec.seed)
        link = Link(spec.link_latency_s, window=WINDOW)
        self._prefill_network: MemoryNetwork[PrefillService] = MemoryNetwork(link)
        self._decode_network: MemoryNetwork[DecodeService] = MemoryNetwork(link)
        self._links = DecodeLinks(EndingTransport(MemoryDecodeTransport(self._decode_network), length_of))
        self._prefill_config = spec.prefill_config or prefill_config(costs.prefill)
        self._decode_config = spec.decode_config or decode_config(costs.decode)
        config = self._gateway_config()
        self._interval_s = config.heartbeat_interval_s
        self._registry = Registry(config.fresh_s, config.expire_s)
        self.controller = self._controller()
        self.gateway = Gateway(
            None,
            ModelInfo(costs.model, vocab_size, costs.max_context),
            self._registry,
            self._links,
            config,
            self._new_rng(),
            RoleCosts(costs.prefill, costs.decode),
            self.controller,
        )
        self.workers: list[FlexibleWorker] = []

    @property
    def gpus(self) -> int:
        spec, costs = self._spec, self._costs
        return spec.prefill * costs.prefill.gpus + (spec.decode + spec.colocated) * costs.decode.gpus

    @asynccontextmanager
    async def running(self) -> AsyncIterator[list[asyncio.Task[None]]]:
        """Starts the workers and waits until the gateway knows them all. Yields their tasks: none ever ends but by a
        crash."""
        tasks: list[asyncio.Task[None]] = []
        try:
            for role, index, is_local in self._places():
                tasks += self._start(role, index, is_local=is_local)
            await asyncio.sleep(self._interval_s)
            if self.controller is not None:
                sight = sight_of(self.gateway, self._registry)
                tasks.append(asyncio.create_task(self.controller.run(sight), name="controller"))
            yield tasks
        finally:
            await self._links.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def check_empty(self) -> None:
        """Asserts that no request holds anything anywhere."""
        self.gateway.check_empty()
        for worker in self.workers:
            worker.check_empty()

    # ── building ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _places(self) -> list[tuple[Role, int, bool]]:
        """Every worker: its role, its number among its like, and whether it only takes local routes."""
        spec = self._spec
        places: list[tuple[Role, int, bool]] = [("prefill", index, False) for index in range(spec.prefill)]
        places += [("decode", index, False) for index in range(spec.decode)]
        return places + [("decode", index, True) for index in range(spec.colocated)]

    def _start(self, role: Role, index: int, *, is_local: bool) -> list[asyncio.Task[None]]:
        name = f"{'colocated' if is_local else role}-{index}"
        cost = self._costs.prefill if role == "prefill" else self._costs.decode
        own = own_copy(cost)
        # The loops of a worker that changes its role share one runner, as they share one engine.
        layout = cost_layout(self._costs.model, cost, self._spec.block_size)
        runner = CostRunner(layout, cost, self._noise(cost), loop_s_of(cost))
        worker = FlexibleWorker(
            partial(self._prefill_loop, runner, own, name),
            partial(self._decode_loop, runner, own, name),
            role,
            worker_id=name,
        )
        self.workers.append(worker)
        bandwidth = Link(self._spec.link_latency_s, self._costs.link_bytes_s(cost), WINDOW)
        self._prefill_network.register(name, worker, bandwidth)
        self._decode_network.register(name, worker)
        reporter = Reporter(worker, address=name, incarnation=1, model=self._costs.model, local_only=is_local)
        beat = report_forever(
            reporter.collect,
            self._send,
            changed=worker.changed,
            rng=self._new_rng(),
            answered=reporter.answered,
        )
        return [
            asyncio.create_task(worker.run(), name=name),
            asyncio.create_task(beat, name=f"{name} heartbeats"),
        ]

    def _prefill_loop(self, runner: CostRunner, cost: WorkerCost, name: str) -> PrefillWorker:
        return PrefillWorker(
            runner,
            self._prefill_config,
            worker_id=name,
            max_context=self._costs.max_context,
            prefix_cache=self._spec.prefix_cache,
            cost=cost,
            note_events=self._spec.prefix_cache,
        )

    def _decode_loop(self, runner: CostRunner, cost: WorkerCost, name: str) -> DecodeWorker:
        return DecodeWorker(
            runner,
            self._decode_config,
            MemoryPrefillTransport(self._prefill_network),
            worker_id=name,
            eos_token_ids=frozenset(),
            max_context=self._costs.max_context,
            prefix_cache=self._spec.prefix_cache,
            cost=cost,
            note_events=self._spec.prefix_cache,
        )

    def _controller(self) -> ControllerLoop | None:
        spec, costs = self._spec, self._costs
        if spec.controller is None:
            return None
        router = self._gateway_config().router
        meter = DemandMeter(
            costs.prefill,
            costs.decode,
            spec.controller.window_s,
            self._decode_config.max_batch,
            local_chunk_tokens=router.local_chunk_tokens,
            has_local=router.has_local,
        )
        return ControllerLoop(spec.controller, meter, spec.prefill + spec.decode)

    def _gateway_config(self) -> GatewayConfig:
        """As many places as the workers have, so that it is the router that decides who waits and who is refused."""
        spec = self._spec
        if spec.gateway_config is not None:
            return with_policy(spec.gateway_config, spec.router)
        places = (spec.decode + spec.colocated) * MAX_QUEUED
        link_bytes_s = self._costs.link_bytes_s(self._costs.prefill)
        router = RouterConfig(
            default_link_bytes_per_s=link_bytes_s if math.isfinite(link_bytes_s) else None,
            prefill_chunk_tokens=self._prefill_config.token_budget,
            local_chunk_tokens=self._decode_config.local_token_budget,
        )
        return with_policy(GatewayConfig(max_running=places, max_waiting=places, router=router), spec.router)

    async def _send(self, report: WorkerReport) -> HeartbeatReply:
        await asyncio.sleep(self._spec.link_latency_s)
        return self.gateway.heartbeat(report)

    def _noise(self, cost: WorkerCost) -> StepNoise | None:
        prefill, decode = noise_of(self._spec, cost)
        return StepNoise(prefill, decode, self._new_rng()) if prefill or decode else None

    def _new_rng(self) -> random.Random:
        """One for each part, so that none of them depends on how often another draws."""
        return random.Random(self._rng.getrandbits(64))


def with_policy(config: GatewayConfig, policy: str) -> GatewayConfig:
    """Raises ConfigError for a policy that there is not."""
    require_policy(policy, "router")
    return config.model_copy(update={"router": config.router.model_copy(update={"policy": policy})})


def prefill_config(cost: WorkerCost) -> PrefillConfig:
    """Batches of about the length from which on a longer one is only longer."""
    return PrefillConfig(
        token_budget=token_budget(cost),
        max_batch_prompts=MAX_BATCH_PROMPTS,
        max_queued=MAX_QUEUED,
        max_frame_bytes=ONE_FRAME,
    )


def decode_config(cost: WorkerCost) -> DecodeConfig:
    return DecodeConfig(
        max_batch=MAX_BATCH,
        local_token_budget=token_budget(cost),
        max_queued=MAX_QUEUED,
        max_transfers=MAX_TRANSFERS,
        schedule_ahead=False,
        max_steps=MAX_STEPS,
    )


def token_budget(cost: WorkerCost) -> int:
    return min(max(LEAST_TOKEN_BUDGET, cost.saturation_tokens), MOST_TOKEN_BUDGET)
