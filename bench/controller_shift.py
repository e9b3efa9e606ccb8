"""A workload that turns from prefill-heavy to decode-heavy and back, and the controller that follows it.

    python -m bench.controller_shift                       both tables, in Markdown
    python -m bench.controller_shift --phase-s 300 --json  shorter phases; JSON

On the emulator: Llama-3.1-8B on 16 L4s; long prompts with short answers, then the reverse, then the first again.
For each kind of load the goodput of every fixed split near the best one is found by bisection. Then the controller
goes through all three phases at shares of the best splits' goodput, from the first phase's best split. The largest
share at which 90 % of every phase's requests meet their objectives, those that arrive while workers change over
included, is the part of the fixed splits' goodput that it reaches. With --no-local decode workers compute no prompts:
then the split has to follow the load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from cluster.controller import Controller, Flip
from cluster.controller_config import ControllerConfig
from cluster.demand import DemandMeter
from cluster.gateway_config import GatewayConfig, RouterConfig
from cluster.planning.arrivals import arrivals
from cluster.planning.cost_model import cost_model
from cluster.planning.emulated_cluster import MAX_BATCH, MAX_QUEUED
from cluster.planning.emulation_result import EmulationResult
from cluster.planning.emulation_spec import EmulationSpec
from cluster.planning.emulator import emulate
from cluster.planning.forked import forked
from cluster.planning.goodput import find_goodput
from cluster.planning.trace import Trace, TraceRequest
from engine.objectives import Objectives

PROFILE, MODEL, WORKERS = "l4", "llama-3.1-8b", 16
OBJECTIVES = Objectives(ttft_s=4.0, tpot_s=0.12)
TARGET = 0.9
# Spread of lengths: standard deviation of their logarithm.
SIGMA = 0.4
PROMPT_MAX, ANSWER_MAX = 6000, 2000
# A goodput search ends within this part of the answer.
TOLERANCE = 0.04
# No run of the search is shorter: of a rate that is kept for one minute a tenth may be too much for five.
SPAN_S = 300.0


@dataclass(frozen=True, slots=True)
class Load:
    """Mean lengths of one kind of traffic."""

    name: str
    prompt_tokens: int
    answer_tokens: int

    def requests(self, rps: float, seconds: float, start_s: float, rng: random.Random) -> list[TraceRequest]:
        """Poisson arrivals, lognormal lengths."""
        times = arrivals(rps, max(2, round(rps * seconds * 1.5)), "poisson", 1.0, rng)
        return [
            TraceRequest(
                start_s + at_s, _draw(rng, self.prompt_tokens, PROMPT_MAX), _draw(rng, self.answer_tokens, ANSWER_MAX)
            )
            for at_s in times
            if at_s < seconds
        ]


PREFILL_HEAVY = Load("prefill-heavy", 2000, 60)
DECODE_HEAVY = Load("decode-heavy", 300, 400)
PHASES = (PREFILL_HEAVY, DECODE_HEAVY, PREFILL_HEAVY)


@dataclass(frozen=True, slots=True)
class BestSplit:
    """Goodput of a load in requests per second, by number of prefill workers."""

    load: Load
    rps: dict[int, float]

    @property
    def prefill(self) -> int:
        return max(self.rps, key=lambda prefill: (self.rps[prefill], -prefill))

    @property
    def best_rps(self) -> float:
        return self.rps[self.prefill]


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a run: attainment of the requests that came in it, and of those that came in its second half."""

    load: str
    rps: float
    attainment: float
    second_half: float


@dataclass(frozen=True, slots=True)
class Run:
    """One run of all phases. `flips`: (seconds, the role taken)."""

    share: float
    phases: tuple[Phase, ...]
    flips: tuple[tuple[float, str], ...]
    least_flips: int

    @property
    def is_attained(self) -> bool:
        return all(phase.attainment >= TARGET for phase in self.phases)


class FlipLog(logging.Handler):
    """Takes down the flips that a controller decides on, by its log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.flips: list[tuple[float, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        args = record.args if isinstance(record.args, tuple) else ()
        for action in args:
            if isinstance(action, Flip):
                self.flips.append((asyncio.get_running_loop().time(), action.role))


def router_of(options: argparse.Namespace) -> RouterConfig:
    return RouterConfig(policy=options.router, allow_local=not options.no_local)


def spec_of(prefill: int, options: argparse.Namespace, controller: ControllerConfig | None = None) -> EmulationSpec:
    places = WORKERS * MAX_QUEUED
    return EmulationSpec(
        profile=PROFILE,
        model=MODEL,
        prefill=prefill,
        decode=WORKERS - prefill,
        router=options.router,
        objectives=OBJECTIVES,
        gateway_config=GatewayConfig(max_running=places, max_waiting=places, router=router_of(options)),
        controller=controller,
    )


def modelled_split(load: Load, options: argparse.Namespace) -> int:
    """What the controller itself would take for the best split of a steady load."""
    cost = cost_model(PROFILE, MODEL)
    meter = DemandMeter(cost, cost, 1000.0, MAX_BATCH, has_local=router_of(options).has_local)
    for request in load.requests(20.0, 50.0, 0.0, random.Random(0)):
        assert request.arrival_s is not None
        meter.ended(request.prompt_tokens, 0, request.output_tokens, request.output_tokens)
        meter.arrived(request.prompt_tokens, request.output_tokens, OBJECTIVES, request.arrival_s)
    demand = meter.demand(50.0, cost.kv_capacity_tokens)
    return Controller(ControllerConfig(), WORKERS).best_prefill(demand, WORKERS, WORKERS // 2)


def goodput_of(load: Load, options: argparse.Namespace, prefill: int) -> float:
    requests = load.requests(20.0, options.search_requests / 20.0, 0.0, random.Random(options.seed))
    spec, trace = spec_of(prefill, options), Trace(tuple(requests))
    rps = find_goodput(spec, trace, TARGET, tolerance=TOLERANCE, start_rps=15.0, min_span_s=SPAN_S).rps
    print(f"{load.name}: {prefill}P + {WORKERS - prefill}D: {rps:.1f} req/s", file=sys.stderr, flush=True)
    return rps


def best_split(load: Load, options: argparse.Namespace) -> BestSplit:
    middle, beside = modelled_split(load, options), options.beside
    splits = [prefill for prefill in range(middle - beside, middle + beside + 1) if 1 <= prefill < WORKERS]
    with forked(partial(goodput_of, load, options), options.processes) as rates:
        return BestSplit(load, dict(zip(splits, rates(splits), strict=True)))


def run_phases(bests: Sequence[BestSplit], options: argparse.Namespace, share: float) -> Run:
    phase_s, rng = options.phase_s, random.Random(options.seed + 1)
    requests = [
        request
        for index, best in enumerate(bests)
        for request in best.load.requests(share * best.best_rps, phase_s, index * phase_s, rng)
    ]
    log = FlipLog()
    logger = logging.getLogger("cluster.controller_loop")
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        result = emulate(spec_of(bests[0].prefill, options, ControllerConfig(enabled=True)), Trace(tuple(requests)))
    finally:
        logger.removeHandler(log)
    splits = [best.prefill for best in bests]
    least = sum(abs(later - earlier) for earlier, later in pairwise(splits))
    phases = tuple(_phase(result, best, share, index * phase_s, phase_s) for index, best in enumerate(bests))
    return Run(share, phases, tuple(log.flips), least)


def _phase(result: EmulationResult, best: BestSplit, share: float, start_s: float, seconds: float) -> Phase:
    def attained(begin_s: float) -> float:
        met = [record.meets(OBJECTIVES) for record in result.records if begin_s <= record.arrival_s < start_s + seconds]
        return sum(met) / max(1, len(met))

    return Phase(best.load.name, share * best.best_rps, attained(start_s), attained(start_s + seconds / 2))


def _draw(rng: random.Random, mean: int, most: int) -> int:
    return max(2, min(most, round(mean * rng.lognormvariate(-(SIGMA**2) / 2, SIGMA))))


def markdown(bests: Sequence[BestSplit], runs: Sequence[Run]) -> list[str]:
    lines = ["| load | " + "goodput of fixed splits, req/s, by prefill workers | best |", "|---|---|---|"]
    for best in bests:
        rates = ", ".join(f"{prefill}: {rps:.1f}" for prefill, rps in sorted(best.rps.items()))
        name = f"{best.load.name} ({best.load.prompt_tokens} in, {best.load.answer_tokens} out)"
        lines.append(f"| {name} | {rates} | {best.prefill}P + {WORKERS - best.prefill}D |")
    lines += ["", "| share of the best fixed goodput | attainment by phase (second half) | flips (least) | attained |"]
    lines.append("|---|---|---|---|")
    for run in runs:
        phases = ", ".join(f"{phase.attainment:.1%} ({phase.second_half:.1%})" for phase in run.phases)
        is_attained = "yes" if run.is_attained else "no"
        lines.append(f"| {run.share:.0%} | {phases} | {len(run.flips)} ({run.least_flips}) | {is_attained} |")
    return lines


def as_json(bests: Sequence[BestSplit], runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "splits": [{"load": best.load.name, "prefill": best.prefill, "rps": best.rps} for best in bests],
        "runs": [
            {
                "share": run.share,
                "attainment": [phase.attainment for phase in run.phases],
                "second_half": [phase.second_half for phase in run.phases],
                "flips": run.flips,
                "least_flips": run.least_flips,
            }
            for run in runs
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase-s", type=float, default=600.0, help="length of each phase")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.95, 1.0], help="of the best fixed goodput")
    parser.add_argument("--router", default="goodput")
    parser.add_argument("--no-local", action="store_true", help="prompts are computed by prefill workers only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="emulations that are run side by side")
    parser.add_argument("--beside", type=int, default=2, help="splits on either side of the load model's best")
    parser.add_argument("--search-requests", type=int, default=1500, help="requests of a run of the goodput search")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    found = {load: best_split(load, options) for load in dict.fromkeys(PHASES)}
    bests = [found[load] for load in PHASES]
    with forked(partial(run_phases, bests, options), options.processes) as phases:
        runs = list(phases(options.shares))
    if options.json:
        print(json.dumps(as_json(bests[:2], runs)))
    else:
        print("\n".join(markdown(bests[:2], runs)))


if __name__ == "__main__":
    main()
