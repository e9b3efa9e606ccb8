"""One worker of either role, from its model's files to its last heartbeat. Ray actors and plain processes run this.

    load engine ─▶ loop + gRPC server (service, health, reflection) ─▶ heartbeats … until cancelled
    cancelled ─▶ draining, NOT_SERVING ─▶ what runs is finished, for a bounded time ─▶ server, loop and engine end

A worker of several ranks is this in the leader's process; the others only compute (cluster/rank_process.py).
Loads torch, so it is imported only where a worker really runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from cluster.config import TandemConfig
from cluster.heartbeat import report_forever
from cluster.rank_process import rank_processes
from cluster.registry import HeartbeatReply, WorkerReport
from cluster.registry_server import send_heartbeat
from cluster.served_model import served_name
from cluster.worker_spec import WorkerSpec, cpus_of
from decode_worker.config import DecodeConfig
from decode_worker.server import decode_service
from decode_worker.worker import DecodeWorker
from engine.config import EngineConfig
from engine.device_runner import DeviceRunner
from engine.engine import Engine, check_ranks, load_engine
from engine.errors import TandemError
from engine.model_source import ModelFiles, Report, resolve, silent
from engine.ranks import Member, Ranks, Rendezvous
from engine.stats import LoopStats
from kvtransfer.grpc_transport import GrpcPrefillTransport
from kvtransfer.rpc_channel import Channels
from kvtransfer.rpc_server import RpcServer, RpcService, start_server
from prefill_worker.server import prefill_service
from prefill_worker.worker import PrefillWorker

# How long a worker that leaves tries to tell its gateway.
GOODBYE_S = 1.0
# How often a worker that is draining looks whether it is done.
DRAIN_POLL_S = 0.02
# Streams that are only idle (health watchers, a gateway's token stream) are cut after this.
CLOSE_GRACE_S = 0.5

_log = logging.getLogger(__name__)


class Worker(Protocol):
    """What both roles have in common."""

    async def run(self) -> None: ...

    def stats(self) -> LoopStats: ...


async def run_worker(
    spec: WorkerSpec,
    config: TandemConfig,
    *,
    incarnation: int,
    report: Report = silent,
    serving: Callable[[str], None] | None = None,
    rendezvous: Rendezvous | None = None,
) -> None:
    """Runs a worker until cancelled, then drains it. `incarnation`: the time of the process's start, in nanoseconds.

    `serving` is called with the worker's address once it listens. `rendezvous`: where the other ranks come to, if the
    worker has several; without one they are started here, as processes beside this one.
    Raises TandemErrors for what cannot be loaded or listened on, and whatever the loop crashed with: then nothing of
    the worker is left running.
    """
    files = await asyncio.to_thread(resolve, config.engine.model, report)
    run = partial(_run_engine, spec, config, files, incarnation, serving)
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
    rendezvous: Rendezvous | None,
) -> None:
    ranks = None
    if rendezvous is not None and config.engine.ranks > 1:
        ranks = Ranks(Member(0, *config.engine.parallel, rendezvous.host), rendezvous)
    engine = await asyncio.to_thread(load_engine, _bound(spec, config), files, ranks)
    name = served_name(config.engine.model, files)
    try:
        async with _worker(spec, config, engine) as (worker, service):
            await serve_worker(spec, config, worker, service, name, incarnation, serving)
    finally:
        await engine.runner.close()


@asynccontextmanager
async def _worker(
    spec: WorkerSpec, config: TandemConfig, engine: Engine
) -> AsyncIterator[tuple[PrefillWorker | DecodeWorker, RpcService]]:
    if spec.role == "prefill":
        prefill = PrefillWorker(
            engine.runner, config.prefill, worker_id=spec.worker_id, prefix_cache=config.engine.prefix_cache
        )
        yield prefill, prefill_service(prefill)
        return
    transport = GrpcPrefillTransport()
    decode = DecodeWorker(
        engine.runner,
        _decode_config(config.decode, engine),
        transport,
        worker_id=spec.worker_id,
        eos_token_ids=frozenset(engine.model.eos_token_ids),
        max_context=engine.model.max_context,
        prefix_cache=config.engine.prefix_cache,
    )
    try:
        yield decode, decode_service(decode)
    finally:
        await transport.close()


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


@dataclass(slots=True)
class _Reporter:
    """Collects what a heartbeat says."""

    spec: WorkerSpec
    address: str
    incarnation: int
    model: str
    worker: Worker
    draining: bool = False

    def collect(self) -> WorkerReport:
        stats = replace(self.worker.stats(), draining=self.draining)
        return WorkerReport(self.spec.worker_id, self.spec.role, self.address, self.incarnation, self.model, stats)


async def serve_worker(
    spec: WorkerSpec,
    config: TandemConfig,
    worker: Worker,
    service: RpcService,
    model: str,
    incarnation: int,
    serving: Callable[[str], None] | None = None,
) -> None:
    """Serves a worker that is loaded, until cancelled; then drains it. Raises what its loop crashed with."""
    server = await start_server(f"{spec.host}:{spec.port}", [service])
    if serving is not None:
        serving(server.address)
    reporter = _Reporter(spec, f"{spec.reached_at or spec.host}:{server.port}", incarnation, model, worker)
    channels = Channels()
    send = partial(send_heartbeat, channels.get(spec.gateway))
    loop = asyncio.create_task(worker.run(), name=f"{spec.worker_id} loop")
    heart = asyncio.create_task(
        report_forever(reporter.collect, send, changed=asyncio.Event(), rng=random.Random(incarnation)),
        name=f"{spec.worker_id} heartbeats",
    )
    try:
        await asyncio.wait([loop, heart], return_when=asyncio.FIRST_COMPLETED)
        # Neither ever returns: whichever is done has crashed, and its error is the worker's.
        (loop if loop.done() else heart).result()
        raise AssertionError(f"{spec.worker_id}: the loop ended by itself")
    finally:
        reporter.draining = True
        await server.set_ready(False)
        await _say_goodbye(send, reporter)
        if not loop.done():
            await _drain(worker, config.cluster.stop_timeout_s)
        await _close(server, [loop, heart], channels)


async def _say_goodbye(send: Callable[[WorkerReport], Awaitable[HeartbeatReply]], reporter: _Reporter) -> None:
    """Tells the gateway of the draining and waits until it knows: from then on no request is sent here."""
    try:
        async with asyncio.timeout(GOODBYE_S):
            await send(reporter.collect())
    except (TandemError, TimeoutError) as error:
        _log.info("the gateway was not told that %s leaves: %s", reporter.spec.worker_id, error)


async def _drain(worker: Worker, timeout_s: float) -> None:
    """Waits until nothing runs or waits here, for at most `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            # Only asked for at the end of a worker's life: not worth an event in the loops' steps.
            while _unfinished(worker):  # noqa: ASYNC110
                await asyncio.sleep(DRAIN_POLL_S)
    except TimeoutError:
        _log.warning("%d requests were cut off after %g s", _unfinished(worker), timeout_s)


def _unfinished(worker: Worker) -> int:
    stats = worker.stats()
    return stats.running + stats.waiting


async def _close(server: RpcServer, tasks: list[asyncio.Task[None]], channels: Channels) -> None:
    await server.stop(CLOSE_GRACE_S)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await channels.close()
