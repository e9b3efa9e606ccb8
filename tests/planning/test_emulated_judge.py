"""The planner with the emulator as its judge: small, and whole."""

from __future__ import annotations

import random

import pytest

from cluster.planning.arrangement import Arrangement, Parallel, Pool
from cluster.planning.arrivals import arrivals
from cluster.planning.bounds import colocated_bound, decode_bound, lengths_of, prefill_bound
from cluster.planning.emulated_judge import EmulatedJudge, timed
from cluster.planning.plan import PlanSpec, Question
from cluster.planning.planner import plan
from cluster.planning.trace import Trace, TraceRequest
from engine.objectives import Objectives
from tests.planning.plan_cases import LINKS, slow_cost_of, small_spec, small_trace

# A prompt takes 0.8 s alone, a step of 10 rows 0.1 s.
OBJECTIVES = Objectives(2.0, 0.2)
TRACE = small_trace(40, prompt=400, output=12)
ONE = Arrangement(Pool(Parallel(1), 1), Pool(Parallel(1), 1))


def a_spec(**changes: object) -> PlanSpec:
    return small_spec(objectives=OBJECTIVES, requests=40, **changes)


@pytest.mark.nightly
def test_plans_whole_on_three_gpus() -> None:
    """40 requests: what it chose is no worse than anything else that it judged, and nothing passes its bound."""
    spec = a_spec(gpus=3, gpus_per_node=4, keep=1, max_tp=1, chunks=(512,), allow_local=True)
    result = plan(spec, TRACE, slow_cost_of, LINKS, EmulatedJudge(spec, TRACE, slow_cost_of))
    assert result.chosen is not None
    assert {arm.arrangement.kind for arm in result.arms} == {"disaggregated", "colocated"}
    assert result.chosen.goodput_rps == max(arm.goodput_rps for arm in result.arms)
    for arm in result.arms:
        assert 0 < arm.goodput_rps <= arm.bound_rps
        assert arm.judgement.attainment >= spec.target
    assert [phase.phase for phase in result.phases] == ["prefill", "decode", "both"]


@pytest.mark.nightly
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_phase_alone_comes_near_its_bound_and_not_beyond(phase: str) -> None:
    """The other phase is for free, so only this one's objective can be missed. The bounds are of Poisson arrivals, in
    the long run: evenly spaced requests bear more."""
    long = small_trace(400, prompt=400, output=12)
    trace = long.arriving(arrivals(1.0, len(long), "poisson", 1.0, random.Random(5)))
    spec = small_spec(objectives=OBJECTIVES, requests=len(trace))
    cost, lengths = slow_cost_of("test", Parallel(1)), lengths_of(trace)
    if phase == "prefill":
        bound = prefill_bound(cost, lengths, OBJECTIVES.ttft_s, spec.target)
    else:
        bound = decode_bound(cost, lengths, OBJECTIVES.tpot_s, spec.target)
    judge = EmulatedJudge(spec, trace, slow_cost_of)
    (judged,) = judge([Question(ONE, phase, bound.rps, LINKS.nvlink_bytes_s)])  # type: ignore[arg-type]
    assert 0.5 * bound.rps < judged.goodput_rps <= bound.rps


def test_a_colocated_worker_is_judged_within_its_bound() -> None:
    spec, cost, lengths = a_spec(), slow_cost_of("test", Parallel(1)), lengths_of(TRACE)
    bound = colocated_bound(cost, lengths, OBJECTIVES, spec.target)
    single = Arrangement(colocated=Pool(Parallel(1), 1), chunk_tokens=512)
    (judged,) = EmulatedJudge(spec, TRACE, slow_cost_of)([Question(single, "both", 0.6 * bound.rps, 4e11)])
    # The bound is of the long run: a few dozen requests may be luckier than that.
    assert 0.3 * bound.rps < judged.goodput_rps <= 1.1 * bound.rps
    assert judged.attainment >= spec.target
    assert judged.ttft_p90_s is not None


@pytest.mark.nightly
def test_a_slow_link_is_felt() -> None:
    """40 MB of KV for each request: at 10 MB/s hardly one in four seconds, at 400 GB/s it is no matter."""
    spec = a_spec(allow_local=False)
    judge = EmulatedJudge(spec, TRACE, slow_cost_of)
    fast, slow = judge([Question(ONE, "both", 1.0, 4e11), Question(ONE, "both", 0.2, 1e7)])
    assert slow.goodput_rps < 0.3
    assert fast.goodput_rps > 0.6


@pytest.mark.nightly
def test_processes_change_nothing() -> None:
    questions = [
        Question(Arrangement(colocated=Pool(Parallel(1), 1), chunk_tokens=chunk), "both", 0.8, 4e11)
        for chunk in (256, None)
    ]
    alone = EmulatedJudge(a_spec(), TRACE, slow_cost_of)(questions)
    beside = EmulatedJudge(a_spec(processes=2), TRACE, slow_cost_of)(questions)
    assert alone == beside


def test_lengths_only_come_at_random() -> None:
    lengths = Trace(tuple(TraceRequest(None, 100, 10) for _ in range(50)))
    times = timed(lengths, 1).arrivals_s
    assert len(set(times)) == 50
    assert times == timed(lengths, 1).arrivals_s
    known = small_trace(5)
    assert timed(known, 1) is known
