"""Workers as Ray actors: on a Ray of this service's own, or on an existing cluster.

    open   start or join Ray
    start  one placement group with a bundle per rank ─▶ one actor per bundle ─▶ `run`, watched
    died   Ray starts the actor again (at most `max_restarts` times); `run` is called anew, on all ranks of the worker
    close  stop ─▶ kill ─▶ give the bundles back ─▶ leave Ray, which ends a Ray of our own

All calls of Ray are made in one thread that lives as long as Ray does. Ray asks the kernel to kill its servers when the
thread that started them ends, so a thread of a pool that may shrink would take the whole cluster with it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import ray
import ray.exceptions
import ray.util
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors import RankActor, WorkerActor
from cluster.config import TandemConfig, to_json
from cluster.environment import worker_variables
from cluster.fleet import Log
from cluster.worker_spec import WorkerSpec, worker_names
from engine.errors import ConfigError, TandemError, Unavailable

CONNECT_TIMEOUT_S = 5.0
# For a Ray of our own, which has its resources at once; a cluster may have to start machines first.
PLACE_LOCAL_S = 20.0
# Nothing but a few small messages goes through Ray, so its object store stays near the least that it accepts.
OBJECT_STORE_BYTES = 80 << 20
RESTART_PAUSE_S = 0.5
# After the workers' own time to finish what runs.
KILL_AFTER_S = 5.0

Value = TypeVar("Value")


class RayFleet:
    """Implements cluster.fleet.Fleet."""

    def __init__(self, config: TandemConfig, log: Log) -> None:
        self._config = config
        self._log = log
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self._group: PlacementGroup | None = None
        self._actors: dict[str, Any] = {}
        # The other ranks of each worker, where it has several.
        self._followers: dict[str, list[Any]] = {}
        self._watchers: list[asyncio.Task[None]] = []
        self._failure: TandemError | None = None

    async def open(self) -> str:
        if self._config.cluster.is_remote:
            await _check_reachable(self._config.cluster.address)
            await self._call(self._join)
            return str(await self._call(ray.util.get_node_ip_address))
        await self._call(self._start_local)
        return "127.0.0.1"

    async def start(self, gateway: str) -> None:
        names, ranks = worker_names(self._config.cluster), self._config.engine.ranks
        bundle = await self._call(self._bundle, len(names) * ranks)
        self._group = await self._call(self._place, [bundle] * (len(names) * ranks))
        for index, (role, worker_id) in enumerate(names):
            spec = WorkerSpec(role, worker_id, gateway)
            first = index * ranks
            self._actors[worker_id] = await self._call(self._create, self._group, first, bundle, WorkerActor, spec)
            self._followers[worker_id] = [
                await self._call(self._create, self._group, first + rank, bundle, RankActor, rank)
                for rank in range(1, ranks)
            ]
        for worker_id in self._actors:
            self._watchers.append(asyncio.create_task(self._watch(worker_id), name=worker_id))

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def close(self) -> None:
        try:
            for actor in self._actors.values():
                await self._call(actor.stop.remote)
            if self._watchers:
                await asyncio.wait(self._watchers, timeout=self._config.cluster.stop_timeout_s + KILL_AFTER_S)
        finally:
            for watcher in self._watchers:
                watcher.cancel()
            await asyncio.gather(*self._watchers, return_exceptions=True)
            await self._call(self._leave)
            self._thread.shutdown()

    async def _call(self, function: Callable[..., Value], *args: object) -> Value:
        """Calls Ray in its thread. A cancelled call is waited for: Ray cannot be interrupted half-way."""
        call = asyncio.get_running_loop().run_in_executor(self._thread, function, *args)
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            await asyncio.wait([call])
            raise

    # ── in Ray's thread ──────────────────────────────────────────────────────────────────────────────────────────────

    def _start_local(self) -> None:
        cluster = self._config.cluster
        bundles = len(worker_names(cluster)) * self._config.engine.ranks
        try:
            ray.init(
                address="local",
                # Bundles are bookkeeping: two workers do share one core where there is only one.
                num_cpus=max(1, math.ceil(bundles * cluster.cpus_per_worker)),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
            )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ConfigError(f"--address ray: cannot start a local Ray: {_first_line(error)}") from error

    def _join(self) -> None:
        address = self._config.cluster.address
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ConfigError(f"--address {address}: cannot join this Ray cluster: {_first_line(error)}") from error

    def _bundle(self, count: int) -> dict[str, float]:
        cluster = self._config.cluster
        there = _resources().get("GPU", 0.0)
        gpus = cluster.gpus_per_worker
        if gpus is None:
            gpus = 0.0 if self._config.engine.device == "cpu" else min(1.0, there / count)
        bundle = {"CPU": cluster.cpus_per_worker, "GPU": gpus}
        return {name: amount for name, amount in bundle.items() if amount > 0}

    def _place(self, bundles: list[dict[str, float]]) -> PlacementGroup:
        cluster = self._config.cluster
        if not bundles[0]:
            raise ConfigError("cluster.cpus_per_worker: got 0, expected more than 0 where workers get no GPU")
        what = "workers" if self._config.engine.ranks == 1 else "ranks of workers"
        too_many = ConfigError(
            f"cluster: got {len(bundles)} {what} of {bundles[0]} each ({cluster.placement}), expected no more than "
            f"the Ray cluster can place: it has {_resources()}"
        )
        needed = {name: amount * len(bundles) for name, amount in bundles[0].items()}
        # A Ray of our own never grows, so there is nothing to wait for.
        if not cluster.is_remote and any(_resources().get(name, 0.0) < amount for name, amount in needed.items()):
            raise too_many
        group: PlacementGroup = placement_group(bundles, strategy=cluster.placement)
        if not group.wait(cluster.start_timeout_s if cluster.is_remote else PLACE_LOCAL_S):
            remove_placement_group(group)
            raise too_many
        return group

    def _create(
        self,
        group: PlacementGroup,
        index: int,
        bundle: dict[str, float],
        actor: type[WorkerActor | RankActor],
        who: WorkerSpec | int,
    ) -> Any:  # noqa: ANN401
        return (
            ray.remote(actor)
            .options(
                num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
                max_restarts=self._config.cluster.max_restarts,
                max_concurrency=2,
                runtime_env={"env_vars": worker_variables(self._config.engine.threads)},
            )
            .remote(who, to_json(self._config), self._config.cluster.is_remote)
        )

    def _leave(self) -> None:
        if not ray.is_initialized():
            return
        for actor in [*self._actors.values(), *itertools.chain(*self._followers.values())]:
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)
        ray.shutdown()

    # ── supervision ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _watch(self, worker_id: str) -> None:
        """Keeps one worker running for as long as Ray brings its actor back."""
        while True:
            try:
                problem = await self._run_once(worker_id)
            except ray.exceptions.RayTaskError as error:
                self._log(f"worker {worker_id} crashed: {error.cause}")
            except ray.exceptions.ActorUnavailableError:
                self._log(f"worker {worker_id} died; Ray starts it again")
            except ray.exceptions.RayError as error:
                # Also a first death is told in this way when Ray will not restart the actor.
                self._log(f"worker {worker_id} died too often; giving it up")
                self._failure = Unavailable(f"worker {worker_id} died: {_first_line(error)}")
                return
            else:
                if problem:
                    self._failure = ConfigError(f"worker {worker_id}: {problem}")
                return
            await asyncio.sleep(RESTART_PAUSE_S)

    async def _run_once(self, worker_id: str) -> str:
        """What the worker's `run` returns or raises. Its other ranks run beside it: all of them, or none."""
        leader, followers = self._actors[worker_id], self._followers[worker_id]
        others = set()
        if followers:
            for follower in followers:
                await self._wait_for(follower)
            address = await self._future(leader.rendezvous.remote)
            others = {asyncio.ensure_future(self._future(follower.run.remote, address)) for follower in followers}
        run = asyncio.ensure_future(self._future(leader.run.remote))
        try:
            running = others
            while running and not run.done():
                done, running = await asyncio.wait({run, *running}, return_when=asyncio.FIRST_COMPLETED)
                running.discard(run)
                if any(other.exception() for other in done - {run}):
                    await self._call(leader.crash.remote)
                    break
            return str(await run)
        finally:
            run.cancel()
            # They end when the leader does.
            if others:
                await asyncio.wait(others, timeout=KILL_AFTER_S)
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _future(self, method: Callable[..., Any], *args: object) -> Any:  # noqa: ANN401 - Ray has no types
        """Calls a method of an actor and waits for what it returns."""
        reference = await self._call(method, *args)
        return await asyncio.wrap_future(reference.future())

    async def _wait_for(self, follower: Any) -> None:  # noqa: ANN401 - Ray has no types
        """Until an actor that Ray is starting again is there. Raises RayError when Ray has given it up."""
        while True:
            try:
                await self._future(follower.wait.remote)
            except ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(RESTART_PAUSE_S)
            else:
                return


def _resources() -> dict[str, float]:
    """CPUs and GPUs of the whole cluster, in use or not."""
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return {name: amount for name, amount in there.items() if name in ("CPU", "GPU")}


async def _check_reachable(address: str) -> None:
    """Ray itself retries for a minute and then ends the process."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except TimeoutError:
        raise ConfigError(f"--address {address}: nothing answers there within {CONNECT_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise ConfigError(f"--address {address}: no Ray cluster there: {error.strerror or error}") from error
    writer.close()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
