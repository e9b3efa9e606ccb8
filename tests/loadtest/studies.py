"""Studies on virtual time, and a watch that remembers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from cluster.loadtest.load import Load
from cluster.loadtest.prompts import RandomTokens
from cluster.loadtest.record import Record
from cluster.loadtest.results import Results
from cluster.loadtest.study import Study, StudyPlan
from cluster.loadtest.target import Finished, Target, Tokens
from cluster.planning import virtual_loop
from engine.errors import Overloaded
from engine.objectives import Objectives
from tests.loadtest.fake_targets import Script, ScriptedTarget, even_load

GOAL = Objectives(0.5000001, 0.05)
PLAN = StudyPlan(GOAL, (1.0,), warm_up=0)


class Watched:
    """A watch that keeps the titles of runs, and how many records each has had."""

    def __init__(self) -> None:
        self.runs: dict[str, int] = {}
        self.lines: list[str] = []

    @contextmanager
    def run(self, title: str, count: int, objectives: Objectives) -> Iterator[Callable[[Record], None]]:
        self.runs[title] = 0

        def add(record: Record) -> None:
            self.runs[title] += 1

        yield add

    def line(self, text: str) -> None:
        self.lines.append(text)


def studied(targets: Sequence[Target], load: Load | None = None, **changes: Any) -> Study:
    """A study that has run."""
    study = Study(replace(PLAN, **changes), load or even_load(20), RandomTokens(50_000), targets, Watched())
    virtual_loop.run(study.run())
    return study


def results_of(study: Study, **changes: Any) -> Results:
    targets = {target.name: {"url": target.url, "model": "fake"} for target in study.targets}
    load = {"requests": study.load.count, "arrivals": "fixed", "cv": None}
    results = Results(
        "2025-01-02", study.plan.objectives, 0.9, load, targets, tuple(study.points), tuple(study.goodputs)
    )
    return replace(results, **changes)


def phased_target(name: str = "tandem", seed: int = 0) -> ScriptedTarget:
    """Answers of eight tokens with receipts; every ninth request is rejected, waits grow with the index."""
    rng = random.Random(seed)

    def script(index: int) -> Script:
        if index % 9 == 8:
            return [(0.005, Overloaded("no pair of workers can meet it", 2.0))]
        waited, prefill, gap = (
            0.004 * (index % 20) * rng.random() * 8,
            0.1 + 0.1 * rng.random(),
            0.03 + 0.02 * rng.random(),
        )
        receipt = {
            "gateway_queue_s": 0.01,
            "prefill_queue_s": waited,
            "prefill_s": prefill,
            "kv_exposed_s": 0.02,
            "decode_queue_s": 0.015,
            "decode_s": 7 * gap,
        }
        tokens: Script = [(gap, Tokens(1)) for _ in range(7)]
        return [
            (0.01 + waited + prefill, Tokens(1)),
            (0.035, Tokens(1)),
            *tokens[1:],
            (0.0, Finished(4, 0, 8, receipt)),
        ]

    return ScriptedTarget(script, name)
