"""Runs a whole study: rates, seeds, scales of the objectives, and targets that take turns.

For every rate, every seed is played to one target after the other, the same requests to each, so that whatever else the
machine does hits all of them alike. A target that acts on objectives is run anew for each scale of them; the others'
records are judged by every scale.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from cluster.loadtest.load import Load
from cluster.loadtest.play import Clock, play
from cluster.loadtest.point import Goodput, Point, Run, scaled
from cluster.loadtest.prompts import PromptSource
from cluster.loadtest.record import Record
from cluster.loadtest.request import LoadRequest
from cluster.loadtest.search import GoodputSearch
from cluster.loadtest.target import Target
from engine.errors import ConfigError
from engine.objectives import Objectives


class Watch(Protocol):
    """Sees a study go by."""

    def run(self, title: str, count: int, objectives: Objectives) -> AbstractContextManager[Callable[[Record], None]]:
        """Around a run of `count` requests, judged by `objectives`; what it yields is told of each that ends."""

    def line(self, text: str) -> None:
        """One line of news."""


@dataclass(frozen=True, slots=True)
class StudyPlan:
    """`rates_rps` are tried in turn; with `find_goodput` the first one only is, and the search goes on from there.
    `warm_up` requests go to each target first, one after another, and are not counted. `cut_hopeless` ends a run of
    the search once it cannot attain its target any more."""

    objectives: Objectives
    rates_rps: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    scales: tuple[float, ...] = (1.0,)
    find_goodput: bool = False
    attainment: float = 0.9
    tolerance: float = 0.05
    max_probes: int = 12
    cut_hopeless: bool = True
    timeout_s: float = 300.0
    pause_s: float = 1.0
    warm_up: int = 2


@dataclass(slots=True)
class Study:
    """Points are added as they are measured, so that an interrupted study keeps what it has."""

    plan: StudyPlan
    load: Load
    source: PromptSource
    targets: Sequence[Target]
    watch: Watch
    clock: Clock | None = None
    points: list[Point] = field(default_factory=list)
    goodputs: list[Goodput] = field(default_factory=list)

    async def run(self) -> None:
        """Raises ConfigError when a target does not answer a warm-up request."""
        await self._warm_up()
        if self.plan.find_goodput:
            await self._search()
        else:
            for rate_rps in self.plan.rates_rps:
                await self._turns([(target, rate_rps) for target in self.targets], 1.0)
        await self._scales()

    async def _warm_up(self) -> None:
        requests = self.load.head(self.plan.warm_up).requests(1.0, 0, "warm-up", self.source)
        for target in self.targets:
            for request in requests:
                first = LoadRequest(0, 0.0, request.prompt, request.prompt_tokens, request.output_tokens)
                [record] = await play(
                    target, [first], objectives=Objectives(), timeout_s=self.plan.timeout_s, clock=self.clock
                )
                if record.ending != "answered":
                    raise ConfigError(f"--url {target.url}: a warm-up request was {record.ending}: {record.error}")

    async def _search(self) -> None:
        plan = self.plan
        searches = [
            (target, GoodputSearch(plan.rates_rps[0], plan.attainment, plan.tolerance, plan.max_probes))
            for target in self.targets
        ]
        while asked := [(target, rate, search) for target, search in searches if (rate := search.next_rps())]:
            points = await self._turns([(target, rate) for target, rate, _ in asked], 1.0)
            for point, (_, rate, search) in zip(points, asked, strict=True):
                search.add(rate, point.attainment)
        for target, search in searches:
            found = Goodput(target.name, search.passed_rps, search.is_bracketed, tuple(search.probes))
            self.goodputs.append(found)
            self.watch.line(f"{target.name}: goodput {found.rate_rps:g} req/s")

    async def _scales(self) -> None:
        """The other scales: at the goodput of each target when that was searched, else at every rate."""
        for scale in self.plan.scales:
            if scale == 1.0:
                continue
            again: list[tuple[Target, float]] = []
            for target in self.targets:
                base = [point for point in self.points if point.target == target.name and point.scale == 1.0]
                found = {goodput.rate_rps for goodput in self.goodputs if goodput.target == target.name}
                if self.plan.find_goodput:
                    base = [point for point in base if point.rate_rps in found]
                if target.acts_on_objectives:
                    again += [(target, point.rate_rps) for point in base]
                else:
                    self.points += [point.judged_by(scaled(point.objectives, scale), scale) for point in base]
            for rate_rps in dict.fromkeys(rate for _, rate in again):
                await self._turns([(target, rate) for target, rate in again if rate == rate_rps], scale)

    async def _turns(self, cells: Sequence[tuple[Target, float]], scale: float) -> list[Point]:
        """One point per (target, rate), seed by seed in turns."""
        plan = self.plan
        objectives = scaled(plan.objectives, scale)
        can_cut = plan.find_goodput and plan.cut_hopeless and scale == 1.0
        allowed = int((1 - plan.attainment) * self.load.count * len(plan.seeds) + 1e-9)
        runs: list[list[Run]] = [[] for _ in cells]
        left = [allowed for _ in cells]
        for seed in plan.seeds:
            made: dict[float, tuple[LoadRequest, ...]] = {}
            for index, (target, rate_rps) in enumerate(cells):
                if can_cut and left[index] < 0:
                    continue
                if rate_rps not in made:
                    made[rate_rps] = self.load.requests(rate_rps, seed, f"{rate_rps:g} {scale:g}", self.source)
                requests = made[rate_rps]
                title = (
                    f"{target.name} {rate_rps:g} req/s" + (f" × {scale:g}" if scale != 1.0 else "") + f" seed {seed}"
                )
                with self.watch.run(title, len(requests), objectives) as on_record:
                    records = await play(
                        target,
                        requests,
                        objectives=objectives,
                        timeout_s=plan.timeout_s,
                        clock=self.clock,
                        on_record=on_record,
                        misses_allowed=left[index] if can_cut else None,
                    )
                runs[index].append(Run(seed, tuple(records)))
                left[index] -= sum(not record.is_met(objectives) for record in records)
                await asyncio.sleep(plan.pause_s)
        points = [
            Point(
                target.name,
                rate_rps,
                scale,
                objectives,
                sent=target.acts_on_objectives,
                runs=tuple(runs[index]),
                is_cut=can_cut and left[index] < 0,
            )
            for index, (target, rate_rps) in enumerate(cells)
        ]
        self.points += points
        return points
