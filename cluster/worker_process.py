"""One worker of either role, from its model's files to its last heartbeat. Ray actors and plain processes run this.

    load engine ─▶ loop + gRPC server (both roles' services, health, reflection) ─▶ heartbeats … until cancelled
    cancelled, or asked to leave ─▶ draining, NOT_SERVING ─▶ what runs is finished, for a bounded time ─▶ all ends

The heartbeats' answers may ask for the other role: then the loop is swapped (cluster/flexible_worker.py), and nothing
else.

A worker of several ranks is this in the leader's process; the others only compute (cluster/rank_process.py).
Loads torch, so it is imported only where a worker really runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch

from cluster.config import TandemConfig
from cluster.flexible_worker import FlexibleWorker
from cluster.heartbeat import report_forever
from cluster.planning.cost_model import CostModel, predictor_for_worker
from cluster.rank_process import rank_processes
from cluster.registry_server import send_heartbeat
from cluster.reporter import Reporter
from cluster.served_model import served_name
from cluster.worker_config import worker_config
from cluster.worker_spec import WorkerSpec, cpus_of, is_colocated
from decode_worker.config import DecodeConfig
from decode_worker.server import decode_service
from decode_worker.worker import DecodeWorker
from engine.config import EngineConfig
from engine.device_runner import DeviceRunner
from engine.engine import Engine, check_ranks, choose_device, load_engine
from engine.kv_cache import DTYPES
from engine.model_source import ModelFiles, Report, resolve, silent
from engine.ranks import Member, Ranks, Rendezvous
from kvtransfer.grpc_transport import GrpcPrefillTransport
from kvtransfer.rpc_channel import Channels, KeepAlive
from kvtransfer.rpc_server import RpcServer, start_server
from kvtransfer.transport import PrefillTransport
from prefill_worker.server import prefill_service
from prefill_worker.worker import PrefillWorker

# How long a worker that leaves tries to tell its gateway.
GOODBYE_S = 1.0
# How long nothing may have come to a worker that leaves while the rest goes on: it may have been on its way.
QUIET_S = 1.0
# Streams that are only idle (health watchers, a gateway's token stream) are cut after this.
CLOSE_GRACE_S = 0.5

_log = logging.getLogger(__name__)


async def run_worker(
    spec: WorkerSpec,
    config: TandemConfig,
    *,
    incarnation: int,
    report: Report = silent,
    serving: Callable[[str], None] | None = None,
    rendezvous: Rendezvous | None = None,
    leave: asyncio.Event | None = None,
) -> None:
    """Runs a worker until cancelled, then drains it. `incarnation`: the time of the process's start, in nanoseconds.

    `serving` is called with the worker's address once it listens. `rendezvous`: where the other ranks come to, if the
    worker has several; without one they are started here, as processes beside this one. Once `leave` is set the worker
    drains at its leisure (`controller.drain_limit_s`), and this returns.
    Raises TandemErrors for what cannot be loaded or listened on, and whatever the loop crashed with: then nothing of
    the worker is left running.
    """
    config = worker_config(config, spec.role)
    files = await asyncio.to_thread(resolve, config.engine.model, report)
    run = partial(_run_engine, spec, config, files, incarnation, serving, leave)
    if config.engine.ranks == 1 or rendezvous is not None:
        await run(rendezvous)
        return
    check_ranks(config.engine, files)
    async with rank_processes(config) as others:
        worker, watch = asyncio.create_task(run(others.rendezvous)), asyncio.create_task(others.watch())
        try:
            done, _ = await asyncio.wait([worker, watch], return_when=asyncio.FIRST_COMPLETED)
            # Of two errors, the rank's own tells more than that it is missed. A worker that has left takes them along.
            has_left = worker.done() and not worker.cancelled() and worker.exception() is None
            (watch if watch in done and not has_left else worker).result()
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
    leave: asyncio.Event | None,
    rendezvous: Rendezvous | None,
) -> None:
    ranks = None
    if rendezvous is not None and config.engine.ranks > 1:
        ranks = Ranks(Member(0, *config.engine.parallel, rendezvous.host), rendezvous)
    engine = await asyncio.to_thread(load_engine, _bound(spec, config), files, ranks)
    name = served_name(config.engine.model, files)
    transport = GrpcPrefillTransport(Channels(keepalive=KeepAlive.within(config.cluster.lease_s)))
    try:
        worker = flexible_worker(spec, config, engine, transport)
        await serve_worker(spec, config, worker, name, incarnation, serving, leave)
    finally:
        await transport.close()
        await engine.runner.close()


def flexible_worker(
    spec: WorkerSpec, config: TandemConfig, engine: Engine, transport: PrefillTransport
) -> FlexibleWorker:
    """The loops of both roles over one engine. What steps have taught of its speed outlives a change of role.

    Raises ConfigError for a `cluster.profile` that is none.
    """
    cost = predictor(config, engine)
    # Not those that a predecessor at this address had.
    leases = count(secrets.randbits(62))

    def make_prefill() -> PrefillWorker:
        return PrefillWorker(
            engine.runner,
            config.prefill,
            worker_id=spec.worker_id,
            prefix_cache=config.engine.prefix_cache,
            cost=cost,
            note_events=config.engine.prefix_cache,
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
        )

    drain_limit_s = config.cluster.controller.drain_limit_s
    return FlexibleWorker(make_prefill, make_decode, spec.role, worker_id=spec.worker_id, drain_limit_s=drain_limit_s)


def predictor(config: TandemConfig, engine: Engine) -> CostModel:
    """What the worker thinks of its own steps before it has run any."""
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
    serving: Callable[[str], None] | None = None,
    leave: asyncio.Event | None = None,
) -> None:
    """Serves a worker that is loaded, until cancelled or asked to leave; then drains it. Raises what its loop crashed
    with."""
    keepalive = KeepAlive.within(config.cluster.lease_s)
    services = [prefill_service(worker), decode_service(worker)]
    server = await start_server(f"{spec.host}:{spec.port}", services, keepalive=keepalive)
    if serving is not None:
        serving(server.address)
    reporter = Reporter(
        worker,
        address=f"{spec.reached_at or spec.host}:{server.port}",
        incarnation=incarnation,
        model=model,
        local_only=is_colocated(spec.worker_id),
        tells_cache=config.engine.prefix_cache,
    )
    channels = Channels()
    send = partial(send_heartbeat, channels.get(spec.gateway))
    beats = partial(report_forever, reporter.collect, send, changed=worker.changed, answered=reporter.answered)
    loop = asyncio.create_task(worker.run(), name=f"{spec.worker_id} loop")
    heart = asyncio.create_task(beats(rng=random.Random(incarnation)), name=f"{spec.worker_id} heartbeats")
    asked = asyncio.create_task((leave or asyncio.Event()).wait(), name=f"{spec.worker_id} leave")
    limit_s = config.cluster.stop_timeout_s
    try:
        await asyncio.wait([loop, heart, asked], return_when=asyncio.FIRST_COMPLETED)
        if loop.done() or heart.done():
            # Neither ever returns: whichever is done has crashed, and its error is the worker's.
            (loop if loop.done() else heart).result()
            raise AssertionError(f"{spec.worker_id}: the loop ended by itself")
        limit_s = config.cluster.controller.drain_limit_s
    finally:
        reporter.leave()
        await server.set_ready(False)
        await _say_goodbye(reporter, heart)
        if not loop.done():
            await _drain(worker, limit_s, is_leaving=asked.done())
        await _close(server, [loop, heart, asked], channels)


async def _say_goodbye(reporter: Reporter, heart: asyncio.Task[None]) -> None:
    """Waits until the gateway knows of the draining: from then on no request is sent here."""
    known = asyncio.create_task(reporter.left.wait())
    await asyncio.wait([known, heart], timeout=GOODBYE_S, return_when=asyncio.FIRST_COMPLETED)
    if not known.done():
        _log.info("the gateway was not told that %s leaves", reporter.worker.worker_id)
    known.cancel()
    await asyncio.wait([known])


async def _drain(worker: FlexibleWorker, timeout_s: float, *, is_leaving: bool) -> None:
    """Waits until nothing runs or waits here, for at most `timeout_s`."""
    quiet_s = QUIET_S if is_leaving else 0.0
    if not await worker.drained(timeout_s, quiet_s):
        _log.warning("%d requests were cut off after %g s", worker.unfinished_count, timeout_s)


async def _close(server: RpcServer, tasks: Sequence[asyncio.Task[Any]], channels: Channels) -> None:
    await server.stop(CLOSE_GRACE_S)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await channels.close()
