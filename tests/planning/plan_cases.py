"""Small plans: a cost model per parallelism, a trace, and a judge that adds up instead of emulating."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.planning.arrangement import Parallel
from cluster.planning.bounds import PlanCost, arrangement_bound, decode_bound, lengths_of, prefill_bound
from cluster.planning.placement import Links
from cluster.planning.plan import Judgement, PlanSpec, Question
from cluster.planning.planner import LinkRates
from cluster.planning.trace import Trace, TraceRequest
from engine.errors import ConfigError
from engine.objectives import Objectives
from tests.planning.linear_cost import LinearCost

LINKS = LinkRates(4e11, 2e10)
OBJECTIVES = Objectives(0.4, 0.03)


def cost_of(profile: str, parallel: Parallel) -> PlanCost:
    """Ranks share the work with a loss; four of them is the most that this model's heads divide into."""
    if parallel.tp > 4:
        raise ConfigError(f"tp: got {parallel.tp}, expected a divisor of 4 heads")
    share = parallel.tp**0.8
    return LinearCost(
        token_s=5e-5 / share,
        row_s=1e-4 / share,
        context_s=2e-7 / share,
        kv_capacity_tokens=50_000 * parallel.gpus,
        gpus=parallel.gpus,
        token_bytes=100_000,
    )


def small_trace(count: int = 60, prompt: int = 800, output: int = 60, seed: int = 3) -> Trace:
    rng = random.Random(seed)
    return Trace(
        tuple(
            TraceRequest(
                index * 0.2, max(8, round(rng.gauss(prompt, prompt / 4))), max(2, round(rng.gauss(output, output / 4)))
            )
            for index in range(count)
        )
    )


def small_spec(**changes: object) -> PlanSpec:
    values: dict[str, object] = {
        "profile": "test",
        "model": "linear",
        "gpus": 8,
        "gpus_per_node": 8,
        "objectives": OBJECTIVES,
        "allow_local": False,
    }
    return PlanSpec(**{**values, **changes})  # type: ignore[arg-type]


@dataclass
class AddingJudge:
    """An arrangement carries a fixed part of its bound: `shares` by kind, and a little less for many workers."""

    spec: PlanSpec
    trace: Trace
    shares: dict[str, float] = field(default_factory=lambda: {"disaggregated": 0.8, "colocated": 0.6})
    asked: list[Question] = field(default_factory=list)

    def __call__(self, questions: Sequence[Question]) -> list[Judgement]:
        self.asked += questions
        return [self.judge(question) for question in questions]

    def judge(self, question: Question) -> Judgement:
        return Judgement(self.rps(question), 0.9, 0.3, 0.02, 0.015)

    def rps(self, question: Question) -> float:
        lengths = lengths_of(self.trace)
        costs = {Parallel(tp): cost_of("test", Parallel(tp)) for tp in (1, 2, 4)}
        objectives = self.spec.objectives
        if question.phase == "prefill":
            objectives = Objectives(objectives.ttft_s, None)
        links = Links(question.link_bytes_s, 100_000 * lengths.mean_kv)
        bound = arrangement_bound(question.arrangement, costs, lengths, objectives, links, self.spec.target)
        if question.phase != "both":
            return 0.8 * self.phase_rps(question, costs, objectives)
        return self.shares[question.arrangement.kind] * bound.rps

    def phase_rps(self, question: Question, costs: dict[Parallel, PlanCost], objectives: Objectives) -> float:
        lengths = lengths_of(self.trace)
        pool = question.arrangement.prefill
        assert pool is not None
        cost = costs[pool.parallel]
        if question.phase == "prefill":
            return prefill_bound(cost, lengths, objectives.ttft_s, self.spec.target).rps
        return decode_bound(cost, lengths, objectives.tpot_s, self.spec.target).rps


def slow_cost_of(profile: str, parallel: Parallel) -> PlanCost:
    """A fortieth of the speed: few requests fill a worker, so that emulating it takes little."""
    share = parallel.tp**0.8
    return LinearCost(
        fixed_s=2e-2,
        token_s=2e-3 / share,
        row_s=8e-3 / share,
        context_s=1e-6 / share,
        kv_capacity_tokens=50_000 * parallel.gpus,
        gpus=parallel.gpus,
        token_bytes=100_000,
    )
