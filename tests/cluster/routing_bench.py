"""A cluster view filled by hand, for tests of the policies: cost is linear, so every prediction can be worked out."""

from __future__ import annotations

import random
from dataclasses import replace

from cluster.gateway_config import RouterConfig
from cluster.prefix_index import BlockNames, PrefixIndex
from cluster.registry import KVEvents, WorkerReport
from cluster.routing.booking import Booking
from cluster.routing.costs import worker_costs
from cluster.routing.make_router import make_router
from cluster.routing.query import Answer, Route, RouteQuery
from cluster.routing.view import ClusterView
from engine.objectives import Objectives
from engine.stats import LoopStats
from tests.planning.linear_cost import LinearCost

NOW = 100.0
# A step takes 2 ms, 50 µs a prompt token, 0.1 ms a row and 0.2 µs a token of context.
COST = LinearCost(fixed_s=2e-3, token_s=5e-5, row_s=1e-4, context_s=2e-7, token_bytes=1024, saturation_tokens=512)
CONFIG = RouterConfig(typical_answer_tokens=100)
IDLE = LoopStats(
    running=0,
    waiting=0,
    queued_tokens=0,
    blocks_total=4096,
    blocks_free=4096,
    blocks_cached=0,
    block_size=16,
    steps=1,
)
ANSWER = 100


def query(prompt_tokens: int = 1000, ttft_s: float | None = None, tpot_s: float | None = None, **changes) -> RouteQuery:
    base = RouteQuery(
        prompt_tokens=prompt_tokens,
        total_tokens=prompt_tokens + ANSWER,
        objectives=Objectives(ttft_s, tpot_s),
        arrived_s=NOW,
    )
    return replace(base, **changes)


def prefill_s(tokens: int) -> float:
    """A prompt alone, in steps of 512 tokens."""
    return -(-tokens // 512) * 2e-3 + tokens * 5e-5


class Bench:
    """One policy over one view. Names that start with p are prefill workers, with c colocated ones."""

    def __init__(self, *names: str, policy: str = "goodput", cost: LinearCost | None = COST, **config: object) -> None:
        self.config = CONFIG.model_copy(update={"policy": policy, **config})
        costs = worker_costs(cost, self.config)
        self.view = ClusterView(costs, 3.0, 60.0, self.config.typical_answer_tokens, PrefixIndex())
        self.router = make_router(self.config)
        self.rng = random.Random(0)
        for name in names:
            self.report(name)

    def report(self, name: str, now: float = NOW, links: dict[str, float] | None = None, **stats: float) -> bool:
        stats = {"local_only": name.startswith("c"), **stats}
        role = "prefill" if name.startswith("p") else "decode"
        report = WorkerReport(
            name, role, f"{name}:1", 1, "m", replace(IDLE, **stats), tuple((links or {}).items()), KVEvents(0, True)
        )
        return self.view.report(report, now)

    def holds(self, name: str, prompt: BlockNames, tokens: int, sequence: int = 1) -> None:
        """The worker has told that it holds the first `tokens` of the prompt."""
        stored = tuple(prompt.name(index, 16) for index in range(tokens // 16))
        self.view.prefix_index.apply(name, KVEvents(sequence, False, stored))

    def ask(self, question: RouteQuery | None = None, now: float = NOW) -> Answer:
        return self.router.route(question or query(), self.view, now, self.rng)

    def route(self, question: RouteQuery | None = None, now: float = NOW) -> Route:
        answer = self.ask(question, now)
        assert isinstance(answer, Route), answer
        return answer

    def book(self, route: Route, question: RouteQuery | None = None, now: float = NOW) -> Booking:
        booking = Booking(question or query(), route, now)
        self.view.book(booking, now)
        return booking

    def send(self, question: RouteQuery | None = None, now: float = NOW) -> Booking:
        return self.book(self.route(question, now), question, now)
