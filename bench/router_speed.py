"""How long one routing decision takes, by policy and by the number of workers.

    python -m bench.router_speed [--workers 1000] [--decisions 3000] [--policies goodput …]

Half of the workers prefill, half decode. Each has a load of its own, told by a heartbeat; the prefix index holds chains
of several hundred blocks of a hundred prompts at a few workers each. Timed is `Router.route` alone, on one core, for
prompts of which some share a prefix and some do not; beside it what a heartbeat costs, and a booking from its route to
its end: CPU time of the one thread, as other programs' turns on the core are not the router's. The virtual clock goes
on, so that queues drain as they would. The first WARM_UP decisions fill the cost tables and are not counted; objects
made before them are set aside from the garbage collector, as in any process that has started up.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, get_args

from bench.report import stamp, table
from cluster.gateway_config import Policy, RouterConfig
from cluster.planning.cost_model import cost_model
from cluster.prefix_index import BlockNames, PrefixIndex
from cluster.registry import KVEvents, WorkerReport
from cluster.routing.booking import Booking
from cluster.routing.costs import worker_costs
from cluster.routing.make_router import make_router
from cluster.routing.query import Route, RouteQuery
from cluster.routing.view import ClusterView
from engine.objectives import Objectives
from engine.stats import LoopStats

Result = TypeVar("Result")
BLOCK_SIZE = 16
SHARED_PROMPTS, SHARED_BLOCKS, HOLDERS = 100, 400, 4
OBJECTIVES = Objectives(1.0, 0.03)
# Requests a second that one worker gets: most of them are busy, none is lost.
RATE_PER_WORKER = 2.0
WARM_UP = 1500


@dataclass(slots=True)
class Timing:
    """Microseconds of each call."""

    route: list[float]
    booking: list[float]
    heartbeat: list[float]
    answers: dict[str, int]


class Cluster:
    """A view full of workers, and requests for it."""

    def __init__(self, workers: int, policy: Policy, seed: int) -> None:
        self.rng = random.Random(seed)
        config = RouterConfig(policy=policy, default_link_bytes_per_s=5e10)
        costs = worker_costs(cost_model("h200", "llama-3.1-8b"), config)
        self.view = ClusterView(costs, 3.0, 60.0, config.typical_answer_tokens, PrefixIndex())
        self.router = make_router(config)
        self.reports = [
            self._report(f"{role[0]}{index}", role) for role in ("prefill", "decode") for index in range(workers // 2)
        ]
        self.prompts = [
            tuple(self.rng.randrange(32_000) for _ in range(BLOCK_SIZE * SHARED_BLOCKS)) for _ in range(SHARED_PROMPTS)
        ]
        for report in self.reports:
            self.view.report(report, 0.0)
        for prompt in self.prompts:
            names = BlockNames((*prompt, 0))
            stored = tuple(names.name(index, BLOCK_SIZE) or 0 for index in range(SHARED_BLOCKS))
            for report in self.rng.sample(self.reports, HOLDERS):
                self.view.prefix_index.apply(report.worker_id, KVEvents(1, False, stored))

    def _report(self, name: str, role: str) -> WorkerReport:
        running = self.rng.randrange(5, 40)
        queued = self.rng.choice([0, 0, 500, 2000])
        stats = LoopStats(
            running=running if role == "decode" else 0,
            waiting=1,
            queued_tokens=queued if role == "prefill" else 0,
            queued_s=queued * 2e-5 if role == "prefill" else 0.0,
            blocks_total=60_000,
            blocks_free=50_000,
            blocks_cached=10_000,
            block_size=BLOCK_SIZE,
            steps=1,
            decode_step_s=7e-3,
            context_tokens=1500 * running if role == "decode" else 0,
        )
        return WorkerReport(name, "prefill" if role == "prefill" else "decode", f"{name}:1", 1, "m", stats)

    def query(self, now: float) -> RouteQuery:
        """A prompt whose block names nobody has computed yet; a third of them begin like one that is known."""
        own = tuple(self.rng.randrange(32_000) for _ in range(self.rng.randrange(50, 2000)))
        shared = self.rng.choice(self.prompts)[: BLOCK_SIZE * self.rng.randrange(20, SHARED_BLOCKS)]
        prompt = (*shared, *own) if self.rng.random() < 1 / 3 else own
        return RouteQuery(len(prompt), len(prompt) + 500, 1, OBJECTIVES, now, BlockNames(prompt))


def measure(workers: int, policy: Policy, decisions: int, seed: int = 0) -> Timing:
    """Decides, books, lets requests move on and end, and takes heartbeats, as they would come."""
    cluster = Cluster(workers, policy, seed)
    view, router, rng = cluster.view, cluster.router, cluster.rng
    timing = Timing([], [], [], {})
    running: list[Booking] = []
    now = 0.0
    gc.collect()
    gc.freeze()
    for number in range(WARM_UP + decisions):
        now += 1.0 / (RATE_PER_WORKER * workers)
        question = cluster.query(now)
        answer, route_us = _timed(partial(router.route, question, view, now, rng))
        booking_us = 0.0
        if isinstance(answer, Route):
            booking, booking_us = _timed(partial(_book, view, question, answer, now))
            running.append(booking)
        if len(running) > workers:
            _, end_us = _timed(partial(_end, view, running.pop(rng.randrange(len(running))), now))
            booking_us += end_us
        report = cluster.reports[number % len(cluster.reports)]
        _, heartbeat_us = _timed(partial(view.report, report, now))
        if number >= WARM_UP:
            timing.route.append(route_us)
            timing.booking.append(booking_us)
            timing.heartbeat.append(heartbeat_us)
            kind = type(answer).__name__
            timing.answers[kind] = timing.answers.get(kind, 0) + 1
    gc.unfreeze()
    return timing


def _book(view: ClusterView, question: RouteQuery, route: Route, now: float) -> Booking:
    booking = Booking(question, route, now)
    view.book(booking, now)
    return booking


def _end(view: ClusterView, booking: Booking, now: float) -> None:
    view.first_token(booking, now)
    view.end(booking, now)


def _timed(call: Callable[[], Result]) -> tuple[Result, float]:
    start = time.thread_time()
    result = call()
    return result, (time.thread_time() - start) * 1e6


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[16, 128, 1000])
    parser.add_argument("--decisions", type=int, default=3000)
    parser.add_argument("--policies", nargs="+", default=list(get_args(Policy)), choices=get_args(Policy))
    arguments = parser.parse_args()
    rows = []
    for policy in arguments.policies:
        for workers in arguments.workers:
            timing = measure(workers, policy, arguments.decisions)
            figures = [percentile(timing.route, share) for share in (0.5, 0.99)]
            figures += [percentile(timing.booking, 0.5), percentile(timing.heartbeat, 0.5)]
            answers = ", ".join(f"{kind} {count}" for kind, count in sorted(timing.answers.items()))
            rows.append([policy, str(workers), *(f"{figure:.0f}" for figure in figures), answers])
    heads = ["policy", "workers", "route p50, µs", "route p99, µs", "booking p50, µs", "heartbeat p50, µs", "answers"]
    print(stamp("one core"))
    print()
    print(table(heads, rows))


if __name__ == "__main__":
    main()
