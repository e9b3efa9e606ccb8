"""Servers that take turns: each, seed after seed, is started, given every rate, and stopped before the next one
starts.

Only one server is alive at a time: some spin while they are idle. The requests of a (rate, seed) are the same for all.
A server that acts on objectives has a run for each pair of them; another's one run is judged by all pairs. Every run
is a line of a file as soon as it has ended, so that a study that was interrupted goes on where it was.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

from bench.engine_processes import ArmFailed
from cluster.loadtest.load import Load
from cluster.loadtest.play import Clock, play
from cluster.loadtest.point import Point, Run
from cluster.loadtest.prompts import PromptSource
from cluster.loadtest.record import Record, from_json, to_json
from cluster.loadtest.request import LoadRequest
from cluster.loadtest.target import Target
from engine.objectives import NO_OBJECTIVES, Objectives

Say = Callable[[str], None]
# One after another, before a server's first run: what is compiled or mapped in then is not measured.
WARM_UP_REQUESTS = 4
UNLOADED_REQUESTS = 5


@dataclass(frozen=True, slots=True)
class Arm:
    """`start` runs the server while its context lasts, and gives its address; `target` makes the client of one. `acts`:
    it is told the objectives, and may act on them. `rates_rps`: its own rates under some
    objectives that it is told (NO_OBJECTIVES for one that is told none), where they are not those of all."""

    name: str
    start: Callable[[], AbstractAsyncContextManager[str]]
    target: Callable[[str], Target]
    acts: bool
    rates_rps: Mapping[Objectives, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cell:
    """One run. `objectives`: what the server was told; NO_OBJECTIVES for one that is told none. A rate of 0: one
    request after another, to see the server unloaded."""

    arm: str
    seed: int
    rate_rps: float
    objectives: Objectives


@dataclass(frozen=True, slots=True)
class Turns:
    """`source` makes the prompts of a run, which has a name: those of two runs must differ. An arm's rates, ascending,
    end early in a turn once a run attains less than `stop_below` of every pair of objectives that it is judged by."""

    arms: Sequence[Arm]
    pairs: Sequence[Objectives]
    rates_rps: Sequence[float]
    seeds: Sequence[int]
    load: Load
    source: Callable[[str], PromptSource]
    timeout_s: float = 300.0
    pause_s: float = 2.0
    clock: Clock = time.perf_counter
    stop_below: float = 0.6

    @property
    def all_rates_rps(self) -> list[float]:
        """Every rate that some arm is tried at."""
        own = (rate for arm in self.arms for rates in arm.rates_rps.values() for rate in rates)
        return sorted({*self.rates_rps, *own})

    def rates_of(self, arm: Arm, told: Objectives) -> list[float]:
        return sorted(arm.rates_rps.get(told, self.rates_rps))


class Store:
    """Runs by cell, kept in a file of one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.cells: dict[Cell, tuple[Record, ...]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                values = json.loads(line)
                objectives = Objectives(values["ttft_s"], values["tpot_s"])
                cell = Cell(values["arm"], values["seed"], values["rate_rps"], objectives)
                self.cells[cell] = tuple(map(from_json, values["records"]))

    def add(self, cell: Cell, records: Sequence[Record]) -> None:
        lines = [to_json(record, with_gaps=True) for record in records]
        # As they will be read again: a study gives the same figures whether it was interrupted or not.
        self.cells[cell] = tuple(map(from_json, lines))
        values = {
            "arm": cell.arm,
            "seed": cell.seed,
            "rate_rps": cell.rate_rps,
            "ttft_s": cell.objectives.ttft_s,
            "tpot_s": cell.objectives.tpot_s,
            "records": lines,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def point(self, arm: Arm, rate_rps: float, objectives: Objectives, seeds: Sequence[int]) -> Point | None:
        """The runs of all seeds, judged by `objectives`; None while one is missing."""
        told = objectives if arm.acts else NO_OBJECTIVES
        runs = [
            Run(seed, records)
            for seed in seeds
            if (records := self.cells.get(Cell(arm.name, seed, rate_rps, told))) is not None
        ]
        if len(runs) < len(seeds):
            return None
        return Point(arm.name, rate_rps, 1.0, objectives, arm.acts, tuple(runs))

    def unloaded(self, arm: Arm) -> list[Record]:
        """Its requests that had the server to themselves."""
        return [
            record
            for cell, records in self.cells.items()
            if cell.arm == arm.name and cell.rate_rps == 0.0
            for record in records
        ]


async def take_turns(turns: Turns, store: Store, say: Say) -> None:
    """Fills `store`. Raises ArmFailed for a server that does not start or does not answer."""
    for seed, arm in itertools.product(turns.seeds, turns.arms):
        if not _is_done(turns, store, arm, seed):
            await _turn(turns, store, arm, seed, say)


async def _turn(turns: Turns, store: Store, arm: Arm, seed: int, say: Say) -> None:
    started_s = turns.clock()
    async with arm.start() as address:
        say(f"{arm.name}: ready after {turns.clock() - started_s:.0f} s")
        target = arm.target(address)
        try:
            await target.facts()
            await _unloaded(turns, store, arm, target, seed)
            for told, judged in _judges(turns, arm):
                await _rates(turns, store, arm, target, seed, told, judged, say)
        finally:
            await target.close()


async def _unloaded(turns: Turns, store: Store, arm: Arm, target: Target, seed: int) -> None:
    """The first requests warm up, the others are kept."""
    count = WARM_UP_REQUESTS + UNLOADED_REQUESTS
    requests = turns.load.head(count).requests(1.0, seed, "unloaded", turns.source(f"{seed} unloaded"))
    records: list[Record] = []
    for request in requests:
        alone = LoadRequest(request.index, 0.0, request.prompt, request.prompt_tokens, request.output_tokens)
        records += await play(target, [alone], objectives=NO_OBJECTIVES, timeout_s=turns.timeout_s, clock=turns.clock)
        if records[-1].ending != "answered":
            raise ArmFailed(f"{arm.name}: an unloaded request was {records[-1].ending}: {records[-1].error}")
    cell = Cell(arm.name, seed, 0.0, NO_OBJECTIVES)
    if cell not in store.cells:
        store.add(cell, records[WARM_UP_REQUESTS:])


async def _rates(
    turns: Turns,
    store: Store,
    arm: Arm,
    target: Target,
    seed: int,
    told: Objectives,
    judged: Sequence[Objectives],
    say: Say,
) -> None:
    for rate_rps in turns.rates_of(arm, told):
        cell = Cell(arm.name, seed, rate_rps, told)
        if cell not in store.cells:
            # Arms get the same requests, and one that runs once for each pair gets new prompts for each.
            run = f"{rate_rps:g} {turns.pairs.index(told) if arm.acts else 0}"
            requests = turns.load.requests(rate_rps, seed, run, turns.source(f"{seed} {run}"))
            records = await play(target, requests, objectives=told, timeout_s=turns.timeout_s, clock=turns.clock)
            store.add(cell, records)
            await asyncio.sleep(turns.pause_s)
        shares = [_attainment(store.cells[cell], objectives) for objectives in judged]
        say(f"{arm.name} seed {seed} {rate_rps:g} req/s: " + " ".join(f"{share:.2f}" for share in shares))
        if max(shares) < turns.stop_below:
            return


def _judges(turns: Turns, arm: Arm) -> list[tuple[Objectives, Sequence[Objectives]]]:
    """What an arm is told in each series of its runs, and what these are judged by."""
    return [(pair, [pair]) for pair in turns.pairs] if arm.acts else [(NO_OBJECTIVES, turns.pairs)]


def _is_done(turns: Turns, store: Store, arm: Arm, seed: int) -> bool:
    for told, judged in _judges(turns, arm):
        for rate_rps in turns.rates_of(arm, told):
            records = store.cells.get(Cell(arm.name, seed, rate_rps, told))
            if records is None:
                return False
            if max(_attainment(records, objectives) for objectives in judged) < turns.stop_below:
                break
    return True


def _attainment(records: Sequence[Record], objectives: Objectives) -> float:
    return sum(record.is_met(objectives) for record in records) / len(records)
