"""The planner: which arrangement of the GPUs there are carries most requests within their objectives.

splits that fit ─▶ bounds by arithmetic ─▶ workers of each phase, judged alone ─▶ counts (placement) ─▶ whole
arrangements, judged, disaggregated and colocated alike ─▶ Plan

DistServe's searches (cluster/planning/placement.py) with this project's emulator as the judge. What a bound already
excludes is not emulated, and the plan says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.planning.arrangement import Arrangement, Parallel, Pool
from cluster.planning.bounds import (
    Bound,
    PlanCost,
    arrangement_bound,
    colocated_bound,
    decode_bound,
    lengths_of,
    prefill_bound,
)
from cluster.planning.placement import Affinity, Candidate, Links, colocated, high_affinity, low_affinity, replicas
from cluster.planning.plan import Arm, Judge, Judgement, Phase, PhaseArm, Plan, PlanSpec, Pruned, Question
from cluster.planning.splits import chunk_sizes, splits
from cluster.planning.trace import Trace
from engine.errors import ConfigError

# A parallelism whose bound for each GPU is below this part of the best judged one is not judged: no counts make up
# for it.
WORTH_JUDGING = 0.7
# What a worker usually reaches of its bound: where a search of its goodput begins.
USUAL_SHARE = 0.7
# Of a phase that has nothing to do: answers of one token take no decode step.
UNBOUNDED_RPS = 1e6
# Whole arrangements are judged in waves of this many, so that what one wave finds can spare the next.
WAVE = 2
# KV between nodes may take this part of TTFT before it is kept within nodes.
NOTICEABLE_TRANSFER = 0.05

# A worker's cost model, for a profile and a parallelism. Raises ConfigError where the model does not split or fit so.
CostOf = Callable[[str, Parallel], PlanCost]


@dataclass(frozen=True, slots=True)
class LinkRates:
    """Bytes a second that one GPU sends: to another of its node, and to another node's."""

    nvlink_bytes_s: float
    network_bytes_s: float


def plan(
    spec: PlanSpec,
    trace: Trace,
    cost_of: CostOf,
    link_rates: LinkRates,
    judge: Judge,
    clock: Callable[[], float] | None = None,
) -> Plan:
    """The best arrangement for requests like those of `trace`. The same arguments give the same plan, unless the time
    budget ends the search; `clock` (seconds) is for that alone.

    Raises ConfigError when the model fits no split of the GPUs.
    """
    return _Search(spec, trace, cost_of, link_rates, judge, clock).run()


@dataclass
class _Search:
    """One run of the search. `costs` and `other_costs` (of the colocated workers) are by parallelism."""

    spec: PlanSpec
    trace: Trace
    cost_of: CostOf
    link_rates: LinkRates
    judge: Judge
    clock: Callable[[], float] | None
    costs: dict[Parallel, PlanCost] = field(default_factory=dict)
    other_costs: dict[Parallel, PlanCost] = field(default_factory=dict)
    pruned: list[Pruned] = field(default_factory=list)
    phases: list[PhaseArm] = field(default_factory=list)
    arms: list[Arm] = field(default_factory=list)
    answers: dict[tuple[Arrangement, Phase], Judgement] = field(default_factory=dict)

    def run(self) -> Plan:
        self.began_s = self.clock() if self.clock else 0.0
        self.lengths = lengths_of(self.trace)
        self.costs = self._fitting(self.spec.profile)
        other = self.spec.colocated_profile
        self.other_costs = self._fitting(other) if other else self.costs
        if not self.costs:
            raise ConfigError(f"model {self.spec.model}: fits no split of {self.spec.gpus} GPUs: {self._reasons()}")
        self.affinity, self.links = self._reach()
        candidates = self._candidates()
        for start in range(0, len(candidates), WAVE):
            self._judge_whole(candidates[start : start + WAVE])
        return self._answer()

    # ── what fits ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _fitting(self, profile: str) -> dict[Parallel, PlanCost]:
        """Splits whose memory holds the weights and the trace's longest request."""
        fitting: dict[Parallel, PlanCost] = {}
        for parallel in splits(self.spec.gpus, min(self.spec.gpus_per_node, self.spec.max_tp or self.spec.gpus)):
            if parallel.pp > 1 and any(known.gpus <= parallel.gpus for known in fitting):
                self._prune(parallel, "stages of one batch run one after another: only for a model that fits no node")
                continue
            try:
                cost = self.cost_of(profile, parallel)
            except ConfigError as error:
                self._prune(parallel, str(error))
                continue
            if cost.kv_capacity_tokens < self.lengths.longest:
                room = f"{cost.kv_capacity_tokens} tokens of KV, the longest request has {self.lengths.longest}"
                self._prune(parallel, f"memory: {room}")
                continue
            fitting[parallel] = cost
        return fitting

    def _reach(self) -> tuple[Affinity, Links]:
        """How far KV may travel, and over what."""
        cost = next(iter(self.costs.values()))
        kv_bytes = float(cost.kv_bytes(round(self.lengths.mean_kv)))
        within = Links(self.link_rates.nvlink_bytes_s, kv_bytes)
        if self.spec.gpus <= self.spec.gpus_per_node:
            return self.spec.affinity or "high", within
        between = Links(self.link_rates.network_bytes_s, kv_bytes)
        affinity = self.spec.affinity
        if affinity is None:
            ttft_s = self.spec.objectives.ttft_s or 0.0
            affinity = "low" if kv_bytes / between.bytes_s > NOTICEABLE_TRANSFER * ttft_s else "high"
        return affinity, between if affinity == "high" else within

    # ── one worker at a time ─────────────────────────────────────────────────────────────────────────────────────────

    def _candidates(self) -> list[Candidate]:
        """Whole arrangements, disaggregated and colocated in turn, best estimates first."""
        target, objectives = self.spec.target, self.spec.objectives
        # The other pool needs GPUs too; where KV stays inside a node, there.
        shared = self.spec.gpus if self.affinity == "high" else min(self.spec.gpus, self.spec.gpus_per_node)
        room = shared - min(parallel.gpus for parallel in self.costs)
        beside = {parallel: cost for parallel, cost in self.costs.items() if parallel.gpus <= room}
        prefill_bounds = {
            parallel: prefill_bound(cost, self.lengths, objectives.ttft_s, target) for parallel, cost in beside.items()
        }
        decode_bounds = {
            parallel: decode_bound(cost, self.lengths, objectives.tpot_s, target) for parallel, cost in beside.items()
        }
        pairs = self._paired(
            self._phase("prefill", {(p, None): bound for p, bound in prefill_bounds.items()}),
            self._phase("decode", {(p, None): bound for p, bound in decode_bounds.items()}),
        )
        singles = colocated(
            self.spec.gpus, self.spec.gpus_per_node, self._phase("both", self._colocated_bounds()), keep=self.spec.keep
        )
        if self.spec.goal == "gpu":
            singles = [_one_worker(candidate) for candidate in singles]
        longest = max(len(pairs), len(singles))
        turns = ((pairs[i : i + 1] + singles[i : i + 1]) for i in range(longest))
        return [candidate for turn in turns for candidate in turn]

    def _paired(
        self, prefill: Mapping[tuple[Parallel, int | None], float], decode: Mapping[tuple[Parallel, int | None], float]
    ) -> list[Candidate]:
        spec = self.spec
        prefill_rps = {parallel: rps for (parallel, _), rps in prefill.items()}
        decode_rps = {parallel: rps for (parallel, _), rps in decode.items()}
        if self.affinity == "high":
            return high_affinity(spec.gpus, prefill_rps, decode_rps, self.links, keep=spec.keep, goal=spec.goal)
        return low_affinity(
            spec.gpus, spec.gpus_per_node, prefill_rps, decode_rps, self.links, keep=spec.keep, goal=spec.goal
        )

    def _colocated_bounds(self) -> dict[tuple[Parallel, int | None], Bound]:
        bounds: dict[tuple[Parallel, int | None], Bound] = {}
        for parallel, cost in self.other_costs.items():
            bound = colocated_bound(cost, self.lengths, self.spec.objectives, self.spec.target)
            for chunk_tokens in self.spec.chunks or chunk_sizes(cost, self.lengths, self.spec.objectives.tpot_s or 0.0):
                bounds[parallel, chunk_tokens] = bound
        return bounds

    def _phase(
        self, phase: Phase, bounds: Mapping[tuple[Parallel, int | None], Bound]
    ) -> dict[tuple[Parallel, int | None], float]:
        """Requests a second of one worker of each parallelism (and chunk size), where its bound is worth the look."""
        rates: dict[tuple[Parallel, int | None], float] = {}
        best_per_gpu = 0.0
        order = sorted(bounds.items(), key=lambda item: -item[1].rps / item[0][0].gpus)
        waves = [order[start : start + WAVE] for start in range(0, len(order), WAVE)]
        for wave in waves:
            asked: list[tuple[tuple[Parallel, int | None], Question]] = []
            for key, bound in wave:
                parallel, chunk_tokens = key
                if math.isinf(bound.rps):
                    rates[key] = UNBOUNDED_RPS
                    continue
                question = self._question(_worker(phase, parallel, chunk_tokens), phase, USUAL_SHARE * bound.rps)
                if bound.rps / parallel.gpus <= WORTH_JUDGING * best_per_gpu or bound.rps == 0.0:
                    beside = f"; one judged carries {best_per_gpu:.3g} per GPU" if best_per_gpu else ""
                    reason = f"{bound.reason}: at most {bound.rps / parallel.gpus:.3g} req/s per GPU{beside}"
                    self.pruned.append(Pruned(question.label, reason))
                else:
                    asked.append((key, question))
            for (key, question), judgement in zip(asked, self._ask([q for _, q in asked]), strict=True):
                self.phases.append(PhaseArm(question.phase, question.label, key[0].gpus, judgement.goodput_rps))
                if judgement.goodput_rps > 0:
                    rates[key] = judgement.goodput_rps
                    best_per_gpu = max(best_per_gpu, judgement.goodput_rps / key[0].gpus)
                else:
                    self.pruned.append(
                        Pruned(question.label, f"keeps the objective at no rate {judgement.note}".rstrip())
                    )
        return rates

    # ── whole arrangements ───────────────────────────────────────────────────────────────────────────────────────────

    def _judge_whole(self, wave: Sequence[Candidate]) -> None:
        """Judges those of a wave that may be better than what was judged before it."""
        asked = [(candidate, bound) for candidate in wave if (bound := self._worth(candidate)) is not None]
        questions = [
            self._question(candidate.arrangement, "both", min(candidate.estimate_rps, bound.rps))
            for candidate, bound in asked
        ]
        for (candidate, bound), judgement in zip(asked, self._ask(questions), strict=True):
            self.arms.append(Arm(candidate.arrangement, judgement, candidate.estimate_rps, bound.rps))

    def _worth(self, candidate: Candidate) -> Bound | None:
        """Its bound, or None when it need not be judged. The first of either kind always is: a user is told what both
        carry."""
        arrangement, spec = candidate.arrangement, self.spec
        costs = self.other_costs if arrangement.colocated is not None else self.costs
        bound = arrangement_bound(
            arrangement,
            costs,
            self.lengths,
            spec.objectives,
            self.links,
            spec.target,
            allow_local=spec.allow_local,
        )
        if all(arm.arrangement.kind != arrangement.kind for arm in self.arms):
            return bound
        best = max(self._value(arm.goodput_rps, arm.arrangement) for arm in self.arms)
        limit = self._value(bound.rps, arrangement)
        if limit < best:
            reason = f"{bound.reason}: at most {limit:.3g} req/s, best is {best:.3g}"
            self.pruned.append(Pruned(arrangement.label, reason))
            return None
        if self._is_late:
            self.pruned.append(Pruned(arrangement.label, "the time budget was spent"))
            return None
        return bound

    def _value(self, rate_rps: float, arrangement: Arrangement) -> float:
        return rate_rps if self.spec.goal == "cluster" else rate_rps / arrangement.gpus

    @property
    def _is_late(self) -> bool:
        budget_s = self.spec.time_budget_s
        return self.clock is not None and budget_s is not None and self.clock() - self.began_s > budget_s

    def _question(self, arrangement: Arrangement, phase: Phase, expected_rps: float) -> Question:
        return Question(arrangement, phase, expected_rps, self.links.bytes_s)

    def _ask(self, questions: Sequence[Question]) -> Sequence[Judgement]:
        """Asks the judge what was not asked before."""
        new = [question for question in questions if (question.arrangement, question.phase) not in self.answers]
        for question, judgement in zip(new, self.judge(new) if new else (), strict=True):
            self.answers[question.arrangement, question.phase] = judgement
        return [self.answers[question.arrangement, question.phase] for question in questions]

    def _answer(self) -> Plan:
        ranked = sorted(
            self.arms,
            key=lambda arm: (
                -self._value(arm.goodput_rps, arm.arrangement),
                arm.arrangement.gpus,
                arm.arrangement.label,
            ),
        )
        chosen = ranked[0] if ranked and ranked[0].goodput_rps > 0 else None
        pair = next((arm.arrangement for arm in ranked if arm.arrangement.kind == "disaggregated"), None)
        notes = sorted({arm.judgement.note for arm in ranked if arm.judgement.note}) + self._own_rate()
        return Plan(
            spec=self.spec,
            affinity=self.affinity,
            chosen=chosen,
            arms=tuple(ranked),
            phases=tuple(self.phases),
            pruned=tuple(self.pruned),
            trace_requests=len(self.trace),
            trace_rps=self.trace.rate_rps if self.trace.has_arrivals else None,
            mean_prompt_tokens=self.lengths.mean_kv,
            mean_output_tokens=self.lengths.mean_output,
            transfer_s=self.links.transfer_s(pair) if pair is not None else 0.0,
            notes=tuple(notes),
        )

    def _own_rate(self) -> list[str]:
        """DistServe's answer for a given rate, the trace's own: its best worker of each phase, as often as needed."""
        rate_rps = self.trace.rate_rps if self.trace.has_arrivals else 0.0
        best: dict[Phase, tuple[float, float, Parallel]] = {}
        for (arrangement, phase), judgement in self.answers.items():
            pool = arrangement.prefill if phase == "prefill" else arrangement.decode
            if pool is not None and phase != "both" and judgement.goodput_rps > 0:
                rated = (judgement.goodput_rps / pool.parallel.gpus, judgement.goodput_rps, pool.parallel)
                best[phase] = max(best.get(phase, rated), rated)
        if not rate_rps or len(best) < 2:
            return []
        (_, prefill_rps, prefill), (_, decode_rps, decode) = best["prefill"], best["decode"]
        prefills, decodes = replicas(rate_rps, prefill_rps, decode_rps)
        needed = Arrangement(Pool(prefill, prefills), Pool(decode, decodes))
        return [f"the trace's own {rate_rps:.3g} req/s takes {needed.label} by these workers alone: {needed.gpus} GPUs"]

    def _prune(self, parallel: Parallel, reason: str) -> None:
        pruned = Pruned(str(parallel), reason)
        if pruned not in self.pruned:
            self.pruned.append(pruned)

    def _reasons(self) -> str:
        return "; ".join(f"{pruned.label}: {pruned.reason}" for pruned in self.pruned)


def _worker(phase: Phase, parallel: Parallel, chunk_tokens: int | None) -> Arrangement:
    if phase == "both":
        return Arrangement(colocated=Pool(parallel, 1), chunk_tokens=chunk_tokens)
    return Arrangement(Pool(parallel, 1), Pool(parallel, 1))


def _one_worker(candidate: Candidate) -> Candidate:
    """For the best rate of each GPU one worker is enough."""
    arrangement = candidate.arrangement
    pool = arrangement.colocated
    assert pool is not None
    single = Arrangement(colocated=Pool(pool.parallel, 1), chunk_tokens=arrangement.chunk_tokens)
    return Candidate(single, candidate.estimate_rps / pool.count)
