"""The planner: what it chooses, what it leaves out, and that it says why."""

from __future__ import annotations

import itertools
import math

import pytest

from cluster.planning.arrangement import Arrangement, Parallel, Pool
from cluster.planning.bounds import lengths_of
from cluster.planning.plan import Plan, PlanSpec, Question
from cluster.planning.planner import LinkRates, plan
from cluster.planning.splits import chunk_sizes, splits
from cluster.planning.trace import Trace
from engine.errors import ConfigError
from engine.objectives import Objectives
from tests.planning.plan_cases import LINKS, AddingJudge, cost_of, small_spec, small_trace


def planned(spec: PlanSpec, trace: Trace | None = None, links: LinkRates = LINKS, **shares: float) -> Plan:
    trace = trace or small_trace()
    judge = AddingJudge(spec, trace)
    judge.shares |= shares
    return plan(spec, trace, cost_of, links, judge)


def test_chooses_what_looking_at_everything_would() -> None:
    spec, trace = small_spec(), small_trace()
    judge = AddingJudge(spec, trace)
    chosen = plan(spec, trace, cost_of, LINKS, judge).chosen
    assert chosen is not None
    best = 0.0
    for p, d in itertools.product((1, 2, 4), repeat=2):
        for prefills, decodes in itertools.product(range(1, 8), repeat=2):
            arrangement = Arrangement(Pool(Parallel(p), prefills), Pool(Parallel(d), decodes))
            if arrangement.gpus <= 8:
                best = max(best, judge.rps(Question(arrangement, "both", 1.0, LINKS.nvlink_bytes_s)))
    for tp in (1, 2, 4):
        single = Arrangement(colocated=Pool(Parallel(tp), 8 // tp))
        best = max(best, judge.rps(Question(single, "both", 1.0, LINKS.nvlink_bytes_s)))
    assert chosen.goodput_rps == pytest.approx(best)


def test_says_so_when_disaggregation_does_not_pay() -> None:
    """The same search with a judge that likes colocated workers better."""
    yes = planned(small_spec(), disaggregated=0.9, colocated=0.2)
    assert yes.chosen is not None
    assert yes.chosen.arrangement.kind == "disaggregated"
    assert yes.answer.startswith("Disaggregate: ")
    no = planned(small_spec(), disaggregated=0.2, colocated=0.9)
    assert no.chosen is not None
    assert no.chosen.arrangement.kind == "colocated"
    assert no.answer.startswith("Do not disaggregate: ")
    pair = no.best("disaggregated")
    assert pair is not None
    assert pair.arrangement.label in no.answer
    assert f"{pair.goodput_rps / no.chosen.goodput_rps:.2f} times" in no.answer


def test_the_same_question_has_the_same_answer() -> None:
    assert planned(small_spec()) == planned(small_spec())


def test_what_a_bound_excludes_is_not_judged_and_named() -> None:
    """Colocated workers that reach their bound leave nothing to judge among those whose bound is lower."""
    spec, trace = small_spec(keep=6), small_trace()
    judge = AddingJudge(spec, trace, {"disaggregated": 1.0, "colocated": 1.0})
    result = plan(spec, trace, cost_of, LINKS, judge)
    judged = {question.arrangement.label for question in judge.asked if question.phase == "both"}
    left_out = [pruned for pruned in result.pruned if "best is" in pruned.reason]
    assert left_out
    assert not {pruned.label for pruned in left_out} & judged
    best = result.arms[0].goodput_rps
    assert all(arm.bound_rps >= arm.goodput_rps for arm in result.arms)
    assert all(arm.goodput_rps <= best for arm in result.arms)


def test_splits_that_do_not_fit_are_named() -> None:
    result = planned(small_spec(gpus=8))
    reasons = {pruned.label: pruned.reason for pruned in result.pruned}
    assert reasons["tp8"] == "tp: got 8, expected a divisor of 4 heads"
    assert "only for a model that fits no node" in reasons["tp1 pp2"]


def test_memory_rules_out_workers_that_cannot_hold_the_longest_request() -> None:
    long = small_trace(prompt=800)
    request = long.requests[0]
    big = Trace((*long.requests, type(request)(99.0, 60_000, 10)))
    result = planned(small_spec(objectives=Objectives(4.0, 0.03)), big)
    reasons = {pruned.label: pruned.reason for pruned in result.pruned}
    assert reasons["tp1"] == "memory: 50000 tokens of KV, the longest request has 60010"
    assert all("tp1" not in arm.arrangement.label for arm in result.arms)


def test_nothing_fits() -> None:
    def none(profile: str, parallel: Parallel) -> object:
        raise ConfigError("weights: 140 GB, expected at most 80 GB")

    spec, trace = small_spec(), small_trace()
    with pytest.raises(ConfigError, match="fits no split of 8 GPUs: tp1: weights: 140 GB"):
        plan(spec, trace, none, LINKS, AddingJudge(spec, trace))  # type: ignore[arg-type]


def test_objectives_that_nothing_keeps() -> None:
    result = planned(small_spec(objectives=Objectives(0.001, 0.03)))
    assert result.chosen is None
    assert result.answer == "No arrangement keeps TTFT 1 ms and TPOT 30 ms for 90% at any rate."
    assert any("M/D/1" in pruned.reason for pruned in result.pruned)


def test_affinity_follows_from_the_links() -> None:
    """A request's KV is 80 MB here: 4 ms at 20 GB/s, 80 ms at 1 GB/s, of 400 ms to the first token."""
    spec = small_spec(gpus=16, gpus_per_node=8)
    assert planned(spec).affinity == "high"
    slow = planned(spec, links=LinkRates(4e11, 1e9))
    assert slow.affinity == "low"
    pair = slow.best("disaggregated")
    assert pair is not None
    assert pair.arrangement.units == 2
    assert pair.arrangement.unit_gpus <= 8
    assert planned(small_spec(gpus=16, gpus_per_node=8, affinity="low")).affinity == "low"


def test_the_time_budget_ends_the_search_and_says_so() -> None:
    spec, trace = small_spec(time_budget_s=10.0, keep=4), small_trace()
    ticks = itertools.count(0.0, 20.0)
    result = plan(spec, trace, cost_of, LINKS, AddingJudge(spec, trace), lambda: next(ticks))
    assert {arm.arrangement.kind for arm in result.arms} == {"disaggregated", "colocated"}
    assert any(pruned.reason == "the time budget was spent" for pruned in result.pruned)


def test_goodput_for_each_gpu_needs_only_one_unit() -> None:
    """DistServe's search: the best pair, not the best use of all GPUs."""
    result = planned(small_spec(goal="gpu"))
    assert result.chosen is not None
    assert result.chosen.rps_per_gpu == max(arm.rps_per_gpu for arm in result.arms)
    single = result.best("colocated")
    assert single is not None
    assert single.arrangement.gpus in (1, 2, 4)


def test_splits_are_powers_of_two_that_fit() -> None:
    assert splits(6, 4) == [
        Parallel(1), Parallel(2), Parallel(4), Parallel(1, 2), Parallel(2, 2), Parallel(1, 4),
    ]  # fmt: skip


def test_chunks_that_suggest_themselves() -> None:
    """A step of 64 rows takes 2 + 6.4 + 10.6 ms, and 50 us a token: TPOT 30 ms leaves room for 219 tokens."""
    sizes = chunk_sizes(cost_of("test", Parallel(1)), lengths_of(small_trace()), 0.03)
    assert sizes == [128, 512, None]


def test_bad_specs_are_named() -> None:
    with pytest.raises(ConfigError, match="gpus_per_node: got 0"):
        small_spec(gpus_per_node=0)
    with pytest.raises(ConfigError, match=r"objectives\.tpot_s: got None"):
        small_spec(objectives=Objectives(1.0, None))


def test_says_how_many_workers_the_traces_own_rate_takes() -> None:
    """As many of the best worker of each phase as carry it, whatever GPUs there are."""
    slow, fast = planned(small_spec()), planned(small_spec(), small_trace().scaled(16.0))
    assert slow.notes == ("the trace's own 5 req/s takes 1P tp1 + 1D tp1 by these workers alone: 2 GPUs",)
    prefill_rps, decode_rps = (
        max(arm.rps for arm in fast.phases if arm.phase == phase and arm.gpus == 1) for phase in ("prefill", "decode")
    )
    prefills, decodes = math.ceil(80 / prefill_rps), math.ceil(80 / decode_rps)
    assert prefills > 1
    assert fast.notes[0].startswith(f"the trace's own 80 req/s takes {prefills}P tp1 + {decodes}D tp1 ")
