"""One worker of either role, from its model's files to its last heartbeat. Ray actors and plain processes run this.

    load engine ─▶ loop + gRPC server (both roles' services, health, reflection)
                ─▶ a first step has ended ─▶ SERVING, heartbeats … until cancelled
    cancelled ─▶ NOT_SERVING ─▶ what runs is finished, or handed back (departure.py) ─▶ all ends
    a step hangs (step_watch.py) ─▶ NOT_SERVING ─▶ its requests fail, at once ─▶ all ends

The heartbeats' answers may ask for the other role: then the loop is swapped (cluster/flexible_worker.py), and nothing
else.

A worker of several ranks is this in the leader's process; the others only compute (cluster/rank_process.py).
Loads torch, so it is imported only where a worker really runs.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any, Protocol

import torch

from cluster.config import TandemConfig
from cluster.departure import depart, depart_at_once
from cluster.flexible_worker import FlexibleWorker
from cluster.heartbeat import report_forever
from cluster.planning.cost_model import CostModel, predictor_for_worker
from cluster.rank_process import rank_processes
from cluster.registry import HeartbeatReply, WorkerReport
from cluster.registry_server import send_heartbeat
from cluster.reporter import Reporter
from cluster.security.identity import WorkerIdentity
from cluster.security.names import GATEWAY_NAME, WORKER_NAME
from cluster.served_model import served_name
from cluster.step_watch import Hung, watch_steps
from cluster.tracing.decode_spans import DecodeSpans
from cluster.tracing.opening import open_sink
from cluster.tracing.prefill_spans import PrefillSpans
from cluster.tracing.span import Sink
from cluster.watchdog import Watchdog
from cluster.worker_config import worker_config
from cluster.worker_spec import WorkerSpec, cpus_of, is_colocated
from decode_worker.config import DecodeConfig
from decode_worker.server import decode_service
from decode_worker.stream import DecodeService
from decode_worker.worker import DecodeWorker
from engine.config import EngineConfig
from engine.device_runner import DeviceRunner
from engine.engine import Engine, check_ranks, choose_device, load_engine
from engine.errors import TandemError, Unavailable
from engine.kv_cache import DTYPES
from engine.model_source import ModelFiles, Report, resolve, silent
from engine.pulse import Pulse
from engine.ranks import Member, Ranks, Rendezvous
from engine.step_cost import StepCost
from kvtransfer.frames import Frame
from kvtransfer.grpc_transport import GrpcPrefillTransport, frame_to_message
from kvtransfer.rpc_channel import Channels, KeepAlive
from kvtransfer.rpc_limits import CallLimits
from kvtransfer.rpc_server import RpcServer, start_server
from kvtransfer.transport import PrefillService, PrefillTransport
from prefill_worker.server import prefill_service
from prefill_worker.worker import PrefillWorker

# Streams that are only idle (health watchers) are cut after this.
CLOSE_GRACE_S = 1.0
# A worker without work runs a step so often, to show that it can.
CANARY_S = 10.0
# How long a worker that hangs may take over its farewells.
HUNG_END_S = 5.0

Send = Callable[[WorkerReport], Awaitable[HeartbeatReply]]


class Served(PrefillService, DecodeService, Protocol):
    """What others reach of a worker."""


class Edges:
    """Where a worker meets the wire. One of another class may put something in between."""

    def worker(self, worker: FlexibleWorker) -> Served:
        """What is served of the worker."""
        return worker

    def encode(self, frame: Frame, lease: int) -> bytes:
        """What is sent of a KV frame."""
        return frame_to_message(frame, lease)

    def transport(self, transport: PrefillTransport) -> PrefillTransport:
        """By what it reaches prefill workers."""
        return transport


EDGES = Edges()


async def run_worker(
    spec: WorkerSpec,
    config: TandemConfig,
    *,
    incarnation: int,
    report: Report = silent,
    serving: Callable[[str], None] | None = None,
    rendezvous: Rendezvous | None = None,
    watchdog: Watchdog | None = None,
    edges: Edges = EDGES,
) -> None:
    """Runs a worker until cancelled, then drains it. `incarnation`: the time of the process's start, in nanoseconds.

    `serving` is called with the worker's address once it listens. `rendezvous`: where the other ranks come to, if the
    worker has several; without one they are started here, as processes beside this one.
    Raises TandemErrors for what cannot be loaded or listened on, Hung when a step did not come back, and whatever the
    loop crashed with: then nothing of the worker is left running. A step that still hangs keeps this from returning:
    `watchdog` ends the process then.
    """
    config = worker_config(config, spec.role)
    files = await asyncio.to_thread(resolve, config.engine.model, report)
    run = partial(_run_engine, spec, config, files, incarnation, serving, watchdog, edges)
    if config.engine.ranks == 1 or rendezvous is not None:
        await run(rendezvous)
        return
    check_ranks(config.engine, files)
    async with rank_processes(config) as others:
        worker, watch = asyncio.create_task(run(others.rendezvous)), asyncio.create_task(others.watch())
        try:
            done, _ = await asyncio.wait([worker, watch], return_when=asyncio.FIRST_COMPLETED)
            # Of two errors, the rank's own tells more than that it is missed.
            (watch if watch in done else worker).result()
        finally:
            worker.cancel()
            watch.cancel()
            await asyncio.gather(worker, watch, return_exceptions=True)


async def _run_engine(
    spec: WorkerSpec,
    config: TandemConfig,
    files: ModelFiles,
    incarnation: int,
    serving: Callable[[str], None] | None,
    watchdog: Watchdog | None,
    edges: Edges,
    rendezvous: Rendezvous | None,
) -> None:
    ranks = None
    if rendezvous is not None and config.engine.ranks > 1:
        ranks = Ranks(Member(0, *config.engine.parallel, rendezvous.host), rendezvous)
    engine = await asyncio.to_thread(load_engine, _bound(spec, config), files, ranks)
    name = served_name(config.engine.model, files)
    identity = WorkerIdentity(spec.worker_id, incarnation, config.security)
    channels = identity.channels_to_workers(KeepAlive.within(config.cluster.lease_s))
    transport = GrpcPrefillTransport(channels, identity.holder.prove)
    try:
        cost = predictor(config, engine)
        async with open_sink(config.tracing, spec.worker_id) as spans:
            worker = flexible_worker(spec, config, engine, edges.transport(transport), cost, spans)
            await serve_worker(spec, config, worker, name, incarnation, identity, serving, watchdog, cost, edges)
    finally:
        await transport.close()
        await engine.runner.close()


def flexible_worker(
    spec: WorkerSpec,
    config: TandemConfig,
    engine: Engine,
    transport: PrefillTransport,
    cost: StepCost,
    spans: Sink | None = None,
) -> FlexibleWorker:
    """The loops of both roles over one engine. What steps have taught of its speed outlives a change of role. `spans`:
    where traces go, None for nowhere."""
    pulse = Pulse(CANARY_S)
    # Not those that a predecessor at this address had.
    leases = count(secrets.randbits(62))

    def make_prefill() -> PrefillWorker:
        return PrefillWorker(
            engine.runner,
            config.prefill,
            worker_id=spec.worker_id,
            max_context=engine.model.max_context,
            prefix_cache=config.engine.prefix_cache,
            cost=cost,
            note_events=config.engine.prefix_cache,
            pulse=pulse,
            observer=None if spans is None else PrefillSpans(spans),
        )

    def make_decode() -> DecodeWorker:
        return DecodeWorker(
            engine.runner,
            _decode_config(config.decode, engine),
            transport,
            worker_id=spec.worker_id,
            eos_token_ids=frozenset(engine.model.eos_token_ids),
            max_context=engine.model.max_context,
            prefix_cache=config.engine.prefix_cache,
            cost=cost,
            note_events=config.engine.prefix_cache,
            leases=leases,
            pulse=pulse,
            observer=None if spans is None else DecodeSpans(spans),
        )

    flip_limit_s = config.cluster.controller.flip_limit_s
    return FlexibleWorker(
        make_prefill, make_decode, spec.role, worker_id=spec.worker_id, flip_limit_s=flip_limit_s, pulse=pulse
    )


def predictor(config: TandemConfig, engine: Engine) -> CostModel:
    """What the worker thinks of its own steps before it has run any. Raises ConfigError for a `cluster.profile` that is
    none."""
    layout = engine.runner.layout
    device = choose_device(config.engine.device)
    return predictor_for_worker(
        config.cluster.profile,
        torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        engine.model,
        tp=config.engine.tensor_parallel,
        pp=config.engine.pipeline_parallel,
        kv_capacity=layout.num_blocks * layout.block_size,
        element_bytes=DTYPES[layout.dtype].itemsize,
    )


def _bound(spec: WorkerSpec, config: TandemConfig) -> EngineConfig:
    """The engine's config with the CPUs that are this worker's alone."""
    available = config.engine.cpus or tuple(sorted(os.sched_getaffinity(0)))
    cpus = cpus_of(spec.worker_id, config.cluster, available)
    return config.engine.model_copy(update={"cpus": cpus}) if cpus else config.engine


def _decode_config(config: DecodeConfig, engine: Engine) -> DecodeConfig:
    """With what depends on the device filled in."""
    if config.schedule_ahead != "auto":
        return config
    return config.model_copy(update={"schedule_ahead": isinstance(engine.runner, DeviceRunner)})


async def serve_worker(
    spec: WorkerSpec,
    config: TandemConfig,
    worker: FlexibleWorker,
    model: str,
    incarnation: int,
    identity: WorkerIdentity,
    serving: Callable[[str], None] | None = None,
    watchdog: Watchdog | None = None,
    cost: StepCost | None = None,
    edges: Edges = EDGES,
) -> None:
    """Serves a worker that is loaded, until cancelled; then drains it. Raises what its loop crashed with, or Hung.
    `cost` says how long steps should take."""
    keepalive = KeepAlive.within(config.cluster.lease_s)
    served = edges.worker(worker)
    # A gateway's token stream has no end of its own: it lives as long as both do, and each of its requests has one.
    prefill = prefill_service(served, identity.check_call, edges.encode).within(
        CallLimits(age_s=config.gateway.max_stream_s)
    )
    services = [replace(prefill, caller=WORKER_NAME), replace(decode_service(served), caller=GATEWAY_NAME)]
    address = f"{spec.host}:{spec.port}"
    server = await start_server(address, services, ready=False, keepalive=keepalive, tls=identity.tls)
    if serving is not None:
        serving(server.address)
    reporter = Reporter(
        worker,
        address=f"{spec.reached_at or spec.host}:{server.port}",
        incarnation=incarnation,
        model=model,
        local_only=is_colocated(spec.worker_id),
        tells_cache=config.engine.prefix_cache,
        public_key=identity.holder.public_key,
        tickets=identity.tickets.learn,
    )
    channels = identity.channels_to_gateway(keepalive)
    send = partial(send_heartbeat, channels, spec.gateway)
    loop = asyncio.create_task(worker.run(), name=f"{spec.worker_id} loop")
    watch = asyncio.create_task(watch_steps(worker.pulse, config.cluster.step_limit_s, cost))
    heart = asyncio.create_task(_report(reporter, send, server, random.Random(incarnation)))
    tasks = [loop, watch, heart]
    broken: TandemError | None = None
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        broken = Unavailable(f"{spec.worker_id} has crashed")
        # None ever returns: whichever is done has crashed, and its error is the worker's.
        next(task for task in tasks if task in done).result()
        raise AssertionError(f"{spec.worker_id}: the loop ended by itself")
    except Hung as hung:
        broken = Unavailable(f"{spec.worker_id}: {hung}")
        if watchdog is not None:
            watchdog.end_within(HUNG_END_S, str(hung))
        raise
    finally:
        if broken is None:
            leaving = depart(worker, reporter, config.cluster.drain_s)
        else:
            leaving = depart_at_once(worker, reporter, broken)
        await _to_its_end(_end(server, leaving, tasks, channels))


async def _report(reporter: Reporter, send: Send, server: RpcServer, rng: random.Random) -> None:
    """Reports from when the worker has shown that it can compute."""
    worker = reporter.worker
    await worker.pulse.is_proven.wait()
    await server.set_ready(True)
    await report_forever(reporter.collect, send, changed=worker.changed, rng=rng, answered=reporter.answered)


async def _end(
    server: RpcServer, leaving: Coroutine[Any, Any, None], tasks: Sequence[asyncio.Task[Any]], channels: Channels
) -> None:
    await server.set_ready(False)
    await leaving
    await server.stop(CLOSE_GRACE_S)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await channels.close()


async def _to_its_end(cleanup: Coroutine[Any, Any, None]) -> None:
    """Awaits all of it, though this be cancelled meanwhile: once more, or because a rank is gone as well."""
    task, is_cancelled = asyncio.create_task(cleanup), False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            is_cancelled = True
    task.result()
    if is_cancelled:
        raise asyncio.CancelledError
