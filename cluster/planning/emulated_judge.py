"""The planner's judge: the emulator, one goodput search for each question, several side by side in processes.

A phase alone is judged with the other one for free: prefill with answers of one token, decode behind a prefill worker
that takes no time. Then a first token is late only where prompts wait for decode to make room.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from cluster.gateway_config import GatewayConfig, Policy, RouterConfig
from cluster.planning.arrangement import Arrangement
from cluster.planning.arrivals import arrivals
from cluster.planning.emulated_cluster import decode_config, prefill_config
from cluster.planning.emulation_result import Ending, percentile
from cluster.planning.emulation_spec import EmulationSpec, WorkerCost
from cluster.planning.forked import forked
from cluster.planning.goodput import Goodput, find_goodput
from cluster.planning.plan import Judgement, PlanSpec, Question
from cluster.planning.planner import CostOf
from cluster.planning.trace import Trace
from engine.objectives import Objectives
from engine.step_cost import StepWork

# A run lasts this many times TTFT at least: a queue may grow for as long before anybody misses.
SPAN_TTFTS = 20.0
SHORTEST_SPAN_S = 20.0
# Searches end within these parts of the answer: of a worker alone, and of a whole arrangement.
PHASE_TOLERANCE, WHOLE_TOLERANCE = 0.06, 0.03
# A step of the phase that is for free, in seconds, and its memory: so many of the longest requests.
FREE_STEP_S = 1e-6
FREE_REQUESTS = 64
# Larger blocks than workers have by default: fewer to keep account of, for 2 % of the memory of a sequence of 1,000.
BLOCK_SIZE = 64
# Places of a gateway that leaves it to the router who waits.
MOST_RUNNING = 1 << 20


@dataclass(frozen=True, slots=True)
class FreeCost:
    """A worker of the same model, with steps that take no time worth speaking of."""

    token_bytes: int
    kv_capacity_tokens: int
    saturation_tokens: int = 8192
    gpus: int = 1

    def step_s(self, work: StepWork) -> float:
        return FREE_STEP_S

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learns nothing."""

    def prefill_s(self, new_tokens: int, context: int = 0, chunk_tokens: int | None = None) -> float:
        return FREE_STEP_S

    def decode_s(self, rows: int, context_tokens: int) -> float:
        return FREE_STEP_S

    def kv_bytes(self, tokens: int) -> int:
        return tokens * self.token_bytes

    def transfer_s(self, tokens: int, bytes_per_s: float) -> float:
        return self.kv_bytes(tokens) / bytes_per_s


class EmulatedJudge:
    """Answers the planner's questions about one spec and trace. `tell` hears of each answer: they take their time."""

    def __init__(
        self,
        spec: PlanSpec,
        trace: Trace,
        cost_of: CostOf,
        tell: Callable[[Question, Judgement], None] | None = None,
    ) -> None:
        self._spec = spec
        self._trace = timed(trace, spec.seed)
        self._cost_of = cost_of
        self._tell = tell

    def __call__(self, questions: Sequence[Question]) -> list[Judgement]:
        if self._spec.processes == 1 or len(questions) == 1:
            return self._told(questions, map(self.answer, questions))
        with forked(self.answer, min(self._spec.processes, len(questions))) as answers:
            return self._told(questions, answers(questions))

    def _told(self, questions: Sequence[Question], answers: Iterable[Judgement]) -> list[Judgement]:
        judged = []
        for question, answer in zip(questions, answers, strict=True):
            judged.append(answer)
            if self._tell is not None:
                self._tell(question, answer)
        return judged

    def answer(self, question: Question) -> Judgement:
        spec, trace = self.emulation(question)
        goodput = find_goodput(
            spec,
            trace,
            self._spec.target,
            tolerance=WHOLE_TOLERANCE if question.phase == "both" and _workers(question) > 1 else PHASE_TOLERANCE,
            start_rps=question.expected_rps,
            min_span_s=self._span_s(trace),
        )
        return judgement(goodput)

    def emulation(self, question: Question) -> tuple[EmulationSpec, Trace]:
        """What is emulated for a question."""
        arrangement, spec = question.arrangement, self._spec
        objectives = spec.objectives
        trace = self._trace.head(min(len(self._trace), spec.requests * _workers(question)))
        if arrangement.colocated is not None:
            cost = self._cost_of(spec.colocated_profile or spec.profile, arrangement.colocated.parallel)
            return self._colocated(arrangement, cost), trace
        assert arrangement.prefill is not None
        assert arrangement.decode is not None
        prefill_cost: WorkerCost = self._cost_of(spec.profile, arrangement.prefill.parallel)
        decode_cost: WorkerCost = self._cost_of(spec.profile, arrangement.decode.parallel)
        free_tokens = FREE_REQUESTS * max(each.prompt_tokens + each.output_tokens for each in trace.requests)
        if question.phase == "prefill":
            decode_cost = FreeCost(prefill_cost.kv_bytes(1), free_tokens)
            objectives = Objectives(objectives.ttft_s, None)
            trace = Trace(tuple(replace(request, output_tokens=1) for request in trace.requests))
        elif question.phase == "decode":
            # One free worker sends all that the decode worker can take in.
            prefill_cost = FreeCost(decode_cost.kv_bytes(1), free_tokens, gpus=decode_cost.gpus)
        may_stay = question.phase == "both" and self._spec.allow_local
        emulated = EmulationSpec(
            prefill=arrangement.prefill.count * arrangement.units,
            decode=arrangement.decode.count * arrangement.units,
            model=spec.model,
            router=spec.router,
            objectives=objectives,
            seed=spec.seed,
            prefill_cost=prefill_cost,
            decode_cost=decode_cost,
            link_bytes_s=question.link_bytes_s,
            block_size=BLOCK_SIZE,
            gateway_config=None if may_stay else _never_local(spec.router, prefill_cost, question.link_bytes_s),
        )
        return emulated, trace

    def _colocated(self, arrangement: Arrangement, cost: WorkerCost) -> EmulationSpec:
        pool, spec = arrangement.colocated, self._spec
        assert pool is not None
        budget = arrangement.chunk_tokens or max(request.prompt_tokens for request in self._trace.requests)
        return EmulationSpec(
            colocated=pool.count * arrangement.units,
            model=spec.model,
            router=spec.router,
            objectives=spec.objectives,
            seed=spec.seed,
            prefill_cost=cost,
            decode_cost=cost,
            block_size=BLOCK_SIZE,
            decode_config=decode_config(cost).model_copy(update={"local_token_budget": budget}),
        )

    def _span_s(self, trace: Trace) -> float:
        """How long a run should be."""
        objectives = self._spec.objectives
        mean_output = sum(request.output_tokens for request in trace.requests) / len(trace)
        answer_s = (objectives.ttft_s or 0.0) + mean_output * (objectives.tpot_s or 0.0)
        return max(SHORTEST_SPAN_S, self._spec.span_answers * answer_s, SPAN_TTFTS * (objectives.ttft_s or 0.0))


def timed(trace: Trace, seed: int) -> Trace:
    """The trace itself, or with Poisson arrivals of one request a second where it has lengths only."""
    if trace.has_arrivals:
        return trace
    return trace.arriving(arrivals(1.0, len(trace), "poisson", 1.0, random.Random(seed)))


def judgement(goodput: Goodput) -> Judgement:
    """A search's answer, with the percentiles of the run that it found."""
    result = goodput.result
    done = [record for record in result.records if record.ending is Ending.DONE]
    ttfts = sorted(record.ttft_s for record in done if record.ttft_s is not None)
    tpots = sorted(record.tpot_s for record in done if record.tpot_s is not None and record.output_tokens > 1)
    note = ""
    if goodput.rps == 0.0 and result.endings:
        reason, count = result.endings.most_common(1)[0]
        note = f"(at {result.rate_rps:.2g} req/s {result.attainment:.0%} attained; most often {reason}, {count} times)"
    return Judgement(
        goodput.rps,
        result.attainment,
        percentile(ttfts, 90) if ttfts else None,
        percentile(tpots, 90) if tpots else None,
        percentile(tpots, 50) if tpots else None,
        note,
    )


def _never_local(router: str, prefill_cost: WorkerCost, link_bytes_s: float) -> GatewayConfig:
    """A gateway that sends every prompt to a prefill worker, also where the decode worker would do it for free."""
    return GatewayConfig(
        max_running=MOST_RUNNING,
        max_waiting=MOST_RUNNING,
        router=RouterConfig(
            policy=cast(Policy, router),
            allow_local=False,
            default_link_bytes_per_s=link_bytes_s * prefill_cost.gpus,
            prefill_chunk_tokens=prefill_config(prefill_cost).token_budget,
        ),
    )


def _workers(question: Question) -> int:
    arrangement = question.arrangement
    pools = (arrangement.prefill, arrangement.decode, arrangement.colocated)
    if question.phase != "both":
        return 1
    return arrangement.units * max(pool.count for pool in pools if pool is not None)
