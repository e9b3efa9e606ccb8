"""Turns, searches and scales, on virtual time against targets whose limits are known."""

from __future__ import annotations

from itertools import pairwise

import pytest

from cluster.loadtest.point import Point, Run, best_rate
from cluster.loadtest.record import Record
from cluster.loadtest.request import LoadRequest
from engine.errors import ConfigError, Unavailable
from engine.objectives import Objectives
from tests.loadtest.fake_targets import QueueTarget, ScriptedTarget, answer, even_load
from tests.loadtest.studies import GOAL, Watched, studied


def sent(target: ScriptedTarget) -> list[LoadRequest]:
    return [request for _, request, _ in target.sent]


def test_targets_take_turns_on_the_same_requests() -> None:
    targets = [ScriptedTarget(lambda index: answer(0.1, 0.01, 4), name) for name in "ab"]
    study = studied(targets, rates_rps=(1.0, 2.0), seeds=(5, 6))
    assert isinstance(study.watch, Watched)
    assert list(study.watch.runs) == [
        f"{name} {rate} req/s seed {seed}" for rate in (1, 2) for seed in (5, 6) for name in "ab"
    ]
    assert set(study.watch.runs.values()) == {20}
    assert sent(targets[0]) == sent(targets[1])
    prompts = [request.prompt for request in sent(targets[0])]
    assert len(set(prompts)) == len(prompts) == 80
    # One run after the other: the second target is not sent anything while the first still answers.
    assert targets[1].sent[0][0] > targets[0].sent[19][0] + 0.1
    assert [(point.target, point.rate_rps, len(point.runs)) for point in study.points] == [
        ("a", 1.0, 2),
        ("b", 1.0, 2),
        ("a", 2.0, 2),
        ("b", 2.0, 2),
    ]


@pytest.mark.parametrize("start", [0.3, 2.0, 17.0])
def test_goodput_is_found(start: float) -> None:
    """No slack of half a second: more than two a second cannot be in time. Each target has a limit of its own."""
    targets = [QueueTarget(0.5, "slow"), QueueTarget(0.2, "fast")]
    study = studied(targets, even_load(60), rates_rps=(start,), find_goodput=True, max_probes=20)
    found = {goodput.target: goodput for goodput in study.goodputs}
    assert 2.0 / 1.06 <= found["slow"].rate_rps <= 2.0
    # The fast one has 0.3 s of slack, which 60 requests slightly above its limit do not use up: 54 of them are in time
    # when the last of these has waited 0.3 s = 53 × (0.2 − 1 / rate).
    assert 5.146 / 1.06 <= found["fast"].rate_rps <= 5.147
    assert all(goodput.is_bracketed for goodput in study.goodputs)
    for goodput in study.goodputs:
        assert all((share >= 0.9) == (rate <= goodput.rate_rps) for rate, share in goodput.probes)


def test_a_hopeless_probe_is_cut_short_and_still_below() -> None:
    target = QueueTarget(0.5)
    study = studied([target], even_load(200), rates_rps=(8.0,), seeds=(1, 2), find_goodput=True)
    first = study.points[0]
    assert first.is_cut
    # 20 % of one seed's requests may miss when the other's all meet; then no second seed is played.
    assert len(first.runs) == 1
    assert sum(not record.is_met(GOAL) for record in first.runs[0].records if record.ending == "answered") == 41
    assert first.attainment < 0.9
    assert not any(point.is_cut for point in study.points if point.attainment >= 0.9)


def test_scales_of_a_target_that_does_not_know_objectives_are_judged_on_its_records() -> None:
    target = ScriptedTarget(lambda index: answer(0.4 if index % 2 else 0.8, 0.01, 4))
    study = studied([target], scales=(0.5, 1.0, 2.0))
    assert len(target.sent) == 20
    assert {point.scale: point.attainment for point in study.points} == {1.0: 0.5, 0.5: 0.0, 2.0: 1.0}


def test_scales_of_a_target_that_acts_on_objectives_are_run() -> None:
    target = ScriptedTarget(lambda index: answer(0.4, 0.01, 4), acts_on_objectives=True)
    study = studied([target], scales=(0.5, 2.0))
    told = [objectives for _, _, objectives in target.sent]
    assert told == [GOAL] * 20 + [Objectives(GOAL.ttft_s * 0.5, 0.025)] * 20 + [Objectives(GOAL.ttft_s * 2, 0.1)] * 20
    assert len({request.prompt for request in sent(target)}) == 60
    assert {point.scale: point.attainment for point in study.points} == {1.0: 1.0, 0.5: 0.0, 2.0: 1.0}


def test_scales_after_a_search_are_of_the_rate_found() -> None:
    study = studied([QueueTarget(0.5)], rates_rps=(1.0,), find_goodput=True, scales=(0.5, 2.0))
    [goodput] = study.goodputs
    assert {point.rate_rps for point in study.points if point.scale != 1.0} == {goodput.rate_rps}
    assert {point.scale for point in study.points if point.scale != 1.0} == {0.5, 2.0}


def test_warm_up_is_one_after_another_and_not_counted() -> None:
    target = ScriptedTarget(lambda index: answer(3.0, 0.01, 4))
    study = studied([target], even_load(20), warm_up=3)
    times = [time for time, _, _ in target.sent]
    assert all(after - before > 3.0 for before, after in pairwise(times[:4]))
    assert len(target.sent) == 23
    assert study.points[0].summary.requests == 20


def test_a_target_that_cannot_answer_is_said_before_the_study() -> None:
    target = ScriptedTarget(lambda index: [(0.0, Unavailable("no worker"))])
    with pytest.raises(ConfigError, match="--url fake:1: a warm-up request was failed: Unavailable: no worker"):
        studied([target], warm_up=1)


def test_the_best_rate_has_no_failure_below_it() -> None:
    def point(rate: float, met: bool) -> Point:
        record = Record(0, 0.0, 0.0, "answered", 1.0, ttft_s=0.1 if met else 9.0)
        return Point("a", rate, 1.0, GOAL, False, (Run(0, (record,)),))

    assert best_rate([point(1.0, True), point(3.0, True), point(2.0, False)], 0.9) == 1.0
    assert best_rate([point(1.0, False), point(2.0, True)], 0.9) == 0.0
