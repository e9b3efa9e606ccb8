"""Workers as Ray actors: on a Ray of this service's own, or on an existing cluster.

    open   start or join Ray
    start  one placement group with a bundle per rank ─▶ one actor per bundle ─▶ `run`, watched
    add    the bundles of one that was removed, else a placement group of its own ─▶ as above
    remove stop ─▶ drained ─▶ kill; restart: the same, and new actors on the same bundles
    died   Ray starts the actor again (at most `max_restarts` times in a row); `run` is called anew, on all its ranks
    close  stop ─▶ kill ─▶ give the bundles back ─▶ leave Ray, which ends a Ray of our own

All calls of Ray are made in one thread that lives as long as Ray does. Ray asks the kernel to kill its servers when the
thread that started them ends, so a thread of a pool that may shrink would take the whole cluster with it.
"""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
import ray.util
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors import RankActor, WorkerActor
from cluster.config import TandemConfig, to_json
from cluster.environment import worker_variables
from cluster.fleet import Log
from cluster.ray_address import check_reachable, find_address
from cluster.ray_seats import RaySeats, Seat
from cluster.ray_thread import RayThread
from cluster.registry import Role
from cluster.restarts import Restarts
from cluster.worker_config import most_ranks, worker_config
from cluster.worker_spec import WorkerNames, WorkerSpec, worker_names
from engine.errors import ConfigError, NotFound, TandemError, Unavailable

# Nothing but a few small messages goes through Ray, so its object store stays near the least that it accepts.
OBJECT_STORE_BYTES = 80 << 20
RESTART_PAUSE_S = 0.5
# A worker ends itself within ten seconds after `drain_s`, whatever hangs (cluster/watchdog.py).
KILL_AFTER_S = 15.0


@dataclass(slots=True, eq=False)
class _Hand:
    """One worker: its actors, the other ranks' as `followers`, and the task that keeps it running. `is_extra`: added
    later, so that the service goes on without it. `is_ending`: told to end, so that its death is none."""

    role: Role
    worker_id: str
    seat: Seat
    leader: Any
    followers: list[Any]
    is_extra: bool = False
    is_ending: bool = False
    watcher: asyncio.Task[None] | None = None


class RayFleet:
    """Implements cluster.fleet.Fleet."""

    def __init__(self, config: TandemConfig, log: Log) -> None:
        self._config = config
        self._log = log
        self._ray = RayThread()
        self._seats = RaySeats(config, self._ray)
        self._hands: dict[str, _Hand] = {}
        # Seats of workers that were removed.
        self._free: list[Seat] = []
        self._names = WorkerNames(config.cluster)
        self._gateway = ""
        self._failure: TandemError | None = None

    async def open(self) -> str:
        if self._config.cluster.is_remote:
            address = await self._ray.call(find_address, self._config.cluster.address)
            await check_reachable(address)
            await self._ray.call(self._join, address)
            return str(await self._ray.call(ray.util.get_node_ip_address))
        await self._ray.call(self._start_local)
        return "127.0.0.1"

    async def start(self, gateway: str) -> None:
        self._gateway = gateway
        names = worker_names(self._config.cluster)
        seats = await self._seats.take([role for role, _ in names])
        for (role, worker_id), seat in zip(names, seats, strict=True):
            await self._seat(role, worker_id, seat)
        for hand in self._hands.values():
            self._watch(hand)

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def worker_ids(self) -> list[str]:
        return list(self._hands)

    def has(self, worker_id: str) -> bool:
        return worker_id in self._hands

    async def add(self, role: Role) -> str:
        seat = next((seat for seat in self._free if self._seats.suits(seat, role)), None)
        if seat is None:
            there = sum(hand.seat.ranks for hand in self._hands.values())
            (seat,) = await self._seats.take([role], there)
        else:
            self._free.remove(seat)
        hand = await self._seat(role, self._names.next(role), seat, is_extra=True)
        self._watch(hand)
        return hand.worker_id

    async def remove(self, worker_id: str) -> None:
        hand = self._hand(worker_id)
        del self._hands[worker_id]
        await self._end(hand)
        self._free.append(hand.seat)
        self._log(f"worker {worker_id} has left")

    async def restart(self, worker_id: str) -> None:
        hand = self._hand(worker_id)
        await self._end(hand)
        self._watch(await self._seat(hand.role, worker_id, hand.seat, is_extra=hand.is_extra))

    async def close(self) -> None:
        watchers = [hand.watcher for hand in self._hands.values() if hand.watcher is not None]
        try:
            for hand in list(self._hands.values()):
                hand.is_ending = True
                await self._ray.call(hand.leader.stop.remote)
            if watchers:
                await asyncio.wait(watchers, timeout=self._config.cluster.drain_s + KILL_AFTER_S)
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
            await self._ray.call(self._leave)
            self._ray.close()

    def _hand(self, worker_id: str) -> _Hand:
        if worker_id not in self._hands:
            raise NotFound("worker", worker_id, ", ".join(self._hands))
        return self._hands[worker_id]

    async def _end(self, hand: _Hand) -> None:
        """Drains a worker, for its time at most, and ends its actors."""
        assert hand.watcher is not None, "a worker is watched as long as it is known"
        hand.is_ending = True
        try:
            await self._ray.call(hand.leader.stop.remote)
            await asyncio.wait([hand.watcher], timeout=self._config.cluster.drain_s + KILL_AFTER_S)
        finally:
            hand.watcher.cancel()
            await asyncio.gather(hand.watcher, return_exceptions=True)
            await self._ray.call(self._kill, hand)

    async def _seat(self, role: Role, worker_id: str, seat: Seat, *, is_extra: bool = False) -> _Hand:
        """Creates a worker's actors."""
        config = to_json(worker_config(self._config, role))
        spec = WorkerSpec(role, worker_id, self._gateway)
        leader = await self._ray.call(self._create, seat, 0, WorkerActor, spec, config)
        followers = [
            await self._ray.call(self._create, seat, rank, RankActor, rank, config) for rank in range(1, seat.ranks)
        ]
        hand = self._hands[worker_id] = _Hand(role, worker_id, seat, leader, followers, is_extra)
        return hand

    def _watch(self, hand: _Hand) -> None:
        hand.watcher = asyncio.create_task(self._keep_running(hand), name=hand.worker_id)

    # ── in Ray's thread ──────────────────────────────────────────────────────────────────────────────────────────────

    def _start_local(self) -> None:
        cpus = math.ceil(most_ranks(self._config) * self._config.cluster.cpus_per_worker)
        self._connect(
            "local",
            "--address ray: cannot start a local Ray",
            # Bundles are bookkeeping: two workers do share one core where there is only one.
            num_cpus=max(1, cpus),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
        )

    def _join(self, address: str) -> None:
        self._connect(address, f"--address {address}: cannot join this Ray cluster")

    @staticmethod
    def _connect(address: str, problem: str, **options: Any) -> None:  # noqa: ANN401 - as Ray takes them
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ConfigError(f"{problem}: {_first_line(error)}") from error

    def _create(
        self, seat: Seat, rank: int, actor: type[WorkerActor | RankActor], who: WorkerSpec | int, config: str
    ) -> Any:  # noqa: ANN401
        place = PlacementGroupSchedulingStrategy(seat.group, placement_group_bundle_index=seat.first + rank)
        return (
            ray.remote(actor)
            .options(
                num_cpus=seat.bundle.get("CPU", 0),
                num_gpus=seat.bundle.get("GPU", 0),
                scheduling_strategy=place,
                max_restarts=-1,  # `_keep_running` counts them
                max_concurrency=2,
                runtime_env={"env_vars": worker_variables(self._config.engine.threads)},
            )
            .remote(who, config, self._config.cluster.is_remote)
        )

    def _kill(self, hand: _Hand) -> None:
        for actor in (hand.leader, *hand.followers):
            ray.kill(actor)

    def _leave(self) -> None:
        if not ray.is_initialized():
            return
        for hand in self._hands.values():
            self._kill(hand)
        self._seats.give_back()
        ray.shutdown()

    # ── supervision ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _keep_running(self, hand: _Hand) -> None:
        """Keeps one worker running until it has died too often. Ray starts its actors again whenever they die."""
        worker_id, clock = hand.worker_id, asyncio.get_running_loop().time
        restarts = Restarts(self._config.cluster.max_restarts, clock())
        while True:
            try:
                await self._wait_for(hand.leader)
                problem = await self._run_once(hand.leader, hand.followers)
            except ray.exceptions.RayTaskError as error:
                what, may_start = f"crashed: {error.cause}", restarts.died(clock())
            except ray.exceptions.ActorUnavailableError:
                what, may_start = "died", restarts.died(clock())
            except ray.exceptions.RayError as error:
                what, may_start = f"is gone: {_first_line(error)}", False
            else:
                if problem:
                    await self._fail(hand, ConfigError(f"worker {worker_id}: {problem}"))
                return
            if hand.is_ending:
                return
            self._log(f"worker {worker_id} {what}; {restarts.then(may_start)}")
            if not may_start:
                await self._fail(hand, Unavailable(f"worker {worker_id} died too often: it {what}"))
                return
            await asyncio.sleep(RESTART_PAUSE_S)

    async def _fail(self, hand: _Hand, error: TandemError) -> None:
        if hand.is_extra:
            self._log(f"{error}; going on without it")
        else:
            self._failure = error
        # Its place is for the next, unless somebody removes it at this moment.
        if self._hands.pop(hand.worker_id, None) is not None:
            await self._ray.call(self._kill, hand)
            self._free.append(hand.seat)

    async def _run_once(self, leader: Any, followers: list[Any]) -> str:  # noqa: ANN401 - Ray has no types
        """What the worker's `run` returns or raises. Its other ranks run beside it: all of them, or none."""
        others = set()
        if followers:
            for follower in followers:
                await self._wait_for(follower)
            address = await self._ray.future(leader.rendezvous.remote)
            others = {asyncio.ensure_future(self._ray.future(follower.run.remote, address)) for follower in followers}
        run = asyncio.ensure_future(self._ray.future(leader.run.remote))
        try:
            running = others
            while running and not run.done():
                done, running = await asyncio.wait({run, *running}, return_when=asyncio.FIRST_COMPLETED)
                running.discard(run)
                if any(other.exception() for other in done - {run}):
                    await self._ray.call(leader.crash.remote)
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

    async def _wait_for(self, follower: Any) -> None:  # noqa: ANN401 - Ray has no types
        """Until an actor that Ray is starting again is there. Raises RayError when Ray has given it up."""
        while True:
            try:
                await self._ray.future(follower.wait.remote)
                return
            except ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(RESTART_PAUSE_S)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
