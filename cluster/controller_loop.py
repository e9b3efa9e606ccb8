"""The controller at work, beside a gateway: looks, decides, and sees to it that what was decided is done.

    arrivals, answers ─▶ DemandMeter ─┐                    ┌─ Flip  ─▶ wanted role ─▶ the answer to a heartbeat
    heartbeats        ─▶ registry     ├─▶ Controller ──────┤
    outcomes          ─▶ attainment  ─┘   (controller.py)  └─ Scale ─▶ fleet: one worker more, or one that leaves

A worker is told its wanted role, drains, and is told once more when the gateway has sent it nothing that has not come
back: then it changes. One that does not manage within its limit goes on as before, and is let alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cluster.controller import Attained, ClusterState, Controller, Flip, Scale, WorkerState, by_burden
from cluster.controller_config import ControllerConfig
from cluster.demand import DemandMeter
from cluster.outcomes import Outcome, Outcomes
from cluster.registry import KnownWorker, Registry, Role
from cluster.routing.view import ClusterView
from engine.errors import TandemError
from engine.objectives import Objectives

# A worker that has said nothing of a flip for so long beyond its drain limit never will.
SLACK_S = 10.0
# An added worker that has not reported within this time never will: it loads a model in less.
COMING_S = 600.0
# A fleet that could not add or remove a worker is not asked again for this long.
RETRY_S = 60.0

ActionKind = Literal["flip", "add", "remove"]

_log = logging.getLogger(__name__)


class Scaling(Protocol):
    """Of cluster.fleet.Fleet, what is used here."""

    def has(self, worker_id: str) -> bool: ...

    async def add(self, role: Role) -> str: ...

    async def remove(self, worker_id: str) -> None: ...


class Observed(Protocol):
    """Of cluster.gateway.Gateway, what is looked at here."""

    @property
    def outcomes(self) -> Outcomes: ...

    @property
    def view(self) -> ClusterView: ...


@dataclass(frozen=True, slots=True)
class Sight:
    """What a gateway lets be seen. `outcomes` gives the requests that ended lately, at a time of the loop's clock;
    `on_its_way` how many requests the gateway has sent to a worker that still have something to do there; `drains` has
    it send no more there."""

    registry: Registry
    outcomes: Callable[[float], Sequence[Outcome]]
    on_its_way: Callable[[str], int]
    drains: Callable[[str], None]


def sight_of(gateway: Observed, registry: Registry) -> Sight:
    """What a gateway that works with `registry` lets be seen."""

    def on_its_way(worker_id: str) -> int:
        prefill, decode = gateway.view.prefills.get(worker_id), gateway.view.decodes.get(worker_id)
        prompts = 0 if prefill is None else len(prefill.backlog.bookings)
        return prompts + (0 if decode is None else decode.row_count)

    return Sight(registry, gateway.outcomes.recent, on_its_way, gateway.view.drains)


@dataclass(slots=True)
class _Wish:
    """A role that a worker was asked to take, since `asked_s`. `has_drained`: it was seen draining for it."""

    role: Role
    asked_s: float
    has_drained: bool = False


class ControllerLoop:
    """Hand it to the gateway, which asks `wanted_role` for every heartbeat and tells of `arrived` and `answered`; then
    `run` it beside. `workers`: prefill and decode workers that the cluster starts with. Without a fleet nothing is
    scaled."""

    def __init__(
        self, config: ControllerConfig, meter: DemandMeter, workers: int, fleet: Scaling | None = None
    ) -> None:
        self._config = config
        self._meter = meter
        self._controller = Controller(config, workers)
        self._fleet = fleet
        self._sight: Sight | None = None
        self._wishes: dict[str, _Wish] = {}
        # A flip that came to nothing costs a worker's time while it drains: the next is not tried at once.
        self._flips_again_s = 0.0
        self._scaling: asyncio.Task[None] | None = None
        self._coming: str | None = None
        self._coming_until_s = 0.0
        self._retry_s = 0.0
        self.flip_count = 0
        self.actions: list[tuple[float, Flip | Scale]] = []
        self.action_counts: Counter[tuple[ActionKind, Role]] = Counter()

    # ── what the gateway calls ───────────────────────────────────────────────────────────────────────────────────────

    def wanted_role(self, worker_id: str) -> Role | Literal[""]:
        """What to answer the worker whose report the registry has just taken."""
        if self._sight is None:
            return ""
        now, wish = asyncio.get_running_loop().time(), self._wishes.get(worker_id)
        report = self._sight.registry.report_of(worker_id)
        if report is None or (wish is not None and report.role == wish.role):
            return ""
        if wish is None or not self._can_do_without(report.role, now):
            # Forgotten while it was silent, or others were lost meanwhile: it goes on as it is.
            return report.role if report.stats.draining else ""
        # Asked first; and then released, once nothing more can come.
        if report.stats.draining and self._sight.on_its_way(worker_id):
            return ""
        return wish.role

    def _can_do_without(self, role: Role, now: float) -> bool:
        """Whether enough of the role are left that have not been asked to leave it."""
        assert self._sight is not None, "asked by a gateway"
        fewest = self._config.min_decode if role == "decode" else self._config.min_prefill
        fresh = self._sight.registry.fresh(role, now)
        return sum(not self._state(worker).is_changing for worker in fresh) >= fewest

    def arrived(self, prompt_tokens: int, max_tokens: int, objectives: Objectives) -> None:
        """A request came in good order; `max_tokens` of all its choices together."""
        self._meter.arrived(prompt_tokens, max_tokens, objectives, asyncio.get_running_loop().time())

    def answered(self, prompt_tokens: int, cached_tokens: int, max_tokens: int, answer_tokens: int) -> None:
        """A request was answered whole."""
        self._meter.ended(prompt_tokens, cached_tokens, max_tokens, answer_tokens)

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self, sight: Sight) -> None:
        """Decides every `interval_s`. Runs until cancelled; what the fleet is doing then is cancelled too."""
        self._sight = sight
        loop = asyncio.get_running_loop()
        try:
            while True:
                await asyncio.sleep(self._config.interval_s)
                for action in self._decide(sight, loop.time()):
                    self._act(action, sight, loop.time())
        finally:
            if self._scaling is not None:
                self._scaling.cancel()
                await asyncio.wait([self._scaling])

    def _decide(self, sight: Sight, now: float) -> Sequence[Flip | Scale]:
        known = [*sight.registry.fresh("prefill", now), *sight.registry.fresh("decode", now)]
        self._grant(known, now)
        flexible = [worker.report.stats for worker in known if not worker.report.stats.local_only]
        decodes = [worker.report.stats for worker in known if worker.report.role == "decode"]
        if not flexible or not decodes:
            return ()
        # A worker measures what it does: of the other role it has nothing to say.
        prefills = [worker.report.stats for worker in known if worker.report.role == "prefill"] or flexible
        scales = (
            sum(stats.prefill_scale for stats in prefills) / len(prefills),
            sum(stats.decode_scale for stats in decodes) / len(decodes),
        )
        kv_tokens = sum(stats.blocks_total * stats.block_size for stats in decodes) // len(decodes)
        state = ClusterState(
            workers=tuple(self._state(worker) for worker in known),
            demand=self._meter.demand(now, kv_tokens, scales),
            attained=attained(sight.outcomes(now)),
            is_held=now < self._flips_again_s or self._is_scaling({worker.report.worker_id for worker in known}, now),
        )
        actions = self._controller.decide(state, now)
        return [action for action in actions if isinstance(action, Flip) or self._may_scale(now)]

    def _state(self, worker: KnownWorker) -> WorkerState:
        report = worker.report
        wish = self._wishes.get(report.worker_id)
        is_changing = report.stats.draining or wish is not None
        becomes = None if wish is None else wish.role
        return WorkerState(report.worker_id, report.role, report.stats, is_changing, becomes)

    def _grant(self, known: Sequence[KnownWorker], now: float) -> None:
        """Forgets wishes that have come true, and those that never will."""
        reports = {worker.report.worker_id: worker.report for worker in known}
        for worker_id, wish in list(self._wishes.items()):
            report = reports.get(worker_id)
            is_over = now - wish.asked_s > self._config.flip_limit_s + SLACK_S
            if report is not None and report.role == wish.role:
                self.flip_count += 1
                del self._wishes[worker_id]
            elif report is not None and report.stats.draining:
                wish.has_drained = True
            elif is_over or wish.has_drained or report is None:
                _log.warning("%s does not become a %s worker", worker_id, wish.role)
                self._flips_again_s = now + self._config.flip_limit_s
                del self._wishes[worker_id]

    def _act(self, action: Flip | Scale, sight: Sight, now: float) -> None:
        _log.info("controller: %s", action)
        self.actions.append((now, action))
        self.action_counts[_kind(action), action.role] += 1
        if isinstance(action, Flip):
            self._wishes[action.worker_id] = _Wish(action.role, now)
            # It hears of it at its next report only. What is sent there until then would come back.
            sight.drains(action.worker_id)
            return
        assert self._fleet is not None, "without a fleet nothing is scaled"
        change = self._add(action.role) if action.count > 0 else self._remove(action.role, sight)
        self._scaling = asyncio.create_task(change, name="scaling")

    # ── scaling ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _may_scale(self, now: float) -> bool:
        return self._fleet is not None and now >= self._retry_s

    def _is_scaling(self, known: set[str], now: float) -> bool:
        """Until a worker that was added has reported, and one that was removed is gone."""
        if self._scaling is not None and self._scaling.done():
            self._scaling.result()
            self._scaling = None
        if self._coming is not None and self._fleet is not None:
            is_gone = not self._fleet.has(self._coming)
            if is_gone or self._coming in known or now > self._coming_until_s:
                self._coming = None
        return self._scaling is not None or self._coming is not None

    async def _add(self, role: Role) -> None:
        assert self._fleet is not None
        try:
            self._coming = await self._fleet.add(role)
            self._coming_until_s = asyncio.get_running_loop().time() + COMING_S
        except TandemError as error:
            self._give_up(f"no {role} worker more: {error}")

    async def _remove(self, role: Role, sight: Sight) -> None:
        assert self._fleet is not None
        now = asyncio.get_running_loop().time()
        # Workers that somebody started by hand are theirs to end.
        own = [worker for worker in sight.registry.fresh(role, now) if self._fleet.has(worker.report.worker_id)]
        able = by_burden([self._state(worker) for worker in own], role)
        if not able:
            self._give_up(f"no {role} worker can leave: those there are were not started by this service")
            return
        worker_id = able[0]
        try:
            await self._fleet.remove(worker_id)
            sight.registry.remove(worker_id)
        except TandemError as error:
            self._give_up(f"{worker_id} stays: {error}")

    def _give_up(self, what: str) -> None:
        _log.warning("%s", what)
        self._retry_s = asyncio.get_running_loop().time() + RETRY_S


def _kind(action: Flip | Scale) -> ActionKind:
    if isinstance(action, Flip):
        return "flip"
    return "add" if action.count > 0 else "remove"


def attained(outcomes: Sequence[Outcome]) -> Attained:
    """Of those that ended lately. A rejected request says nothing of which objective it would have missed."""
    tried = [outcome for outcome in outcomes if outcome.reason in ("finished", "expired")]
    finished = [outcome for outcome in outcomes if outcome.reason == "finished"]
    if not outcomes or not tried:
        return Attained()
    met_ttft = sum(outcome.ttft_s is not None and outcome.objectives.has_ttft(outcome.ttft_s) for outcome in tried)
    met_tpot = sum(outcome.met_tpot for outcome in finished)
    return Attained(
        requests=len(outcomes),
        ttft=met_ttft / len(tried),
        tpot=met_tpot / len(finished) if finished else 1.0,
        total=sum(outcome.met_ttft and outcome.met_tpot for outcome in outcomes) / len(outcomes),
    )
