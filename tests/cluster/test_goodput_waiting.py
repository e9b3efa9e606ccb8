"""The goodput policy while every worker is busy: who waits at the gateway, in whose place, and what is promised."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.routing.booking import Booking
from cluster.routing.goodput import TOLD_WITHIN_S
from cluster.routing.query import Defer, Reject, Route
from engine.urgency import LATE_TURN
from tests.cluster.routing_bench import NOW, Bench, prefill_s, query


def test_while_every_queue_is_longer_than_the_lead_a_request_is_kept_back_then_routed() -> None:
    bench = Bench("p0", "p1", "d", allow_local=False, lead_s=0.1)
    for name in ("p0", "p1"):
        bench.report(name, queued_tokens=8000, queued_s=0.4)
    question = query(ttft_s=1.0, tpot_s=0.05)
    answer = bench.ask(question)
    assert isinstance(answer, Defer)
    assert answer.for_all
    assert answer.until_s == pytest.approx(NOW + 0.3)
    assert answer.latest_start_s == pytest.approx(NOW + 1.0 - prefill_s(1000))
    assert answer.work_s == pytest.approx(prefill_s(1000))
    assert isinstance(bench.ask(question, now=NOW + 0.31), Route)


def test_those_that_wait_at_the_gateway_and_have_less_slack_go_first() -> None:
    bench = Bench("p", "d", allow_local=False, lead_s=0.1)
    bench.view.waiting.enter(1, NOW + 0.2, 0.5)
    behind = bench.ask(query(ttft_s=1.0, tpot_s=0.05))
    assert isinstance(behind, Defer)
    assert behind.until_s == pytest.approx(NOW + 0.4)
    assert isinstance(bench.ask(query(ttft_s=0.4, tpot_s=0.05)), Reject)
    before = bench.route(query(ttft_s=0.2, tpot_s=0.05))
    assert before.predicted_ttft_s == pytest.approx(prefill_s(1000))


def test_a_newcomer_that_would_make_those_who_wait_late_is_refused() -> None:
    bench = Bench("p", "d", allow_local=False, lead_s=0.1)
    for ticket in range(3):
        bench.view.waiting.enter(ticket, NOW + 1.0 + 0.01 * ticket, 0.01)
    # 1 s of work before three that can wait for 1 s.
    answer = bench.ask(query(20_000, ttft_s=1.9, tpot_s=0.05))
    assert isinstance(answer, Reject)
    assert answer.reason == "it would make others miss their objectives"


def test_one_that_was_promised_a_place_is_refused_at_once_or_never() -> None:
    """Then a late answer is better than a late refusal."""
    bench = Bench("p", "d", allow_local=False, min_worth=1.0)
    question = query(ttft_s=1.0, tpot_s=0.05)
    assert isinstance(bench.ask(question), Reject)
    promised = query(ttft_s=1.0, tpot_s=0.05, was_deferred=True)
    assert isinstance(bench.ask(promised), Route)
    assert isinstance(bench.ask(promised, now=NOW + 0.999), Route)
    hasty = query(ttft_s=TOLD_WITHIN_S + 0.001, tpot_s=0.05, was_deferred=True)
    assert isinstance(bench.ask(hasty, now=NOW + TOLD_WITHIN_S), Reject)
    assert isinstance(bench.ask(hasty, now=NOW + TOLD_WITHIN_S + 0.001), Route)


def test_one_that_was_promised_nothing_is_refused_however_long_it_waited() -> None:
    """For a place at the gateway, or for a worker to come: it would only cost work."""
    bench = Bench("p", "d", allow_local=False)
    assert isinstance(bench.ask(query(ttft_s=1.0, tpot_s=0.05), now=NOW + 0.999), Reject)


def test_a_place_is_promised_only_when_that_is_more_likely_kept_than_not() -> None:
    bench = Bench("p", "d", allow_local=False, lead_s=0.1)
    bench.report("p", queued_tokens=8000, queued_s=0.7)
    done_s = 0.7 + prefill_s(1000)
    assert isinstance(bench.ask(query(ttft_s=1.05 * done_s, tpot_s=0.05)), Defer)
    hardly = bench.ask(query(ttft_s=0.95 * done_s, tpot_s=0.05))
    assert isinstance(hardly, Reject)
    assert hardly.reason.startswith("the first token would take about")
    # Who need not wait is tried with less: nothing was promised.
    bench.report("p", queued_tokens=0, queued_s=0.0, now=NOW + 0.1)
    assert isinstance(bench.ask(query(ttft_s=0.95 * prefill_s(1000), arrived_s=NOW + 0.1), now=NOW + 0.1), Route)


def test_one_whose_promise_has_failed_does_not_wait_for_an_empty_queue() -> None:
    """At the gateway it would stand in front of all, at a worker it gives way."""
    bench = Bench("p", "d", allow_local=False, lead_s=0.1)
    bench.report("p", queued_tokens=8000, queued_s=0.7, now=NOW + 0.95)
    promised = query(ttft_s=1.0, tpot_s=0.05, was_deferred=True)
    assert isinstance(bench.ask(promised, now=NOW + 0.95), Route)


def test_promises_at_the_gateway_are_judged_by_how_such_promises_were_kept() -> None:
    """What a short way from a worker to the client takes says little of how long one waits at the gateway."""
    bench = Bench("p", "d", allow_local=False, lead_s=0.1)
    bench.report("p", queued_tokens=8000, queued_s=0.7)
    question = query(ttft_s=1.0, tpot_s=0.05)
    promise = bench.ask(question)
    assert isinstance(promise, Defer)
    assert promise.predicted_ttft_s == pytest.approx(0.7 + prefill_s(1000))
    promised = replace(question, was_deferred=True, promised_s=promise.predicted_ttft_s)
    for _ in range(100):
        # Routed late, but as soon as it is routed all goes as predicted.
        route = bench.route(promised, now=NOW + 0.9)
        bench.router.learn_ttft(Booking(promised, route, NOW + 1.4), NOW + 1.4 + route.predicted_first_s)
    assert isinstance(bench.ask(question), Reject)
    idle = Bench("p", "d", allow_local=False, lead_s=0.1)
    idle.router = bench.router
    assert isinstance(idle.ask(question), Route), "one that need not wait is judged as before"


def test_a_promise_that_is_taken_back_was_not_kept() -> None:
    bench = Bench("p", "d", allow_local=False, lead_s=0.1)
    hasty = query(ttft_s=TOLD_WITHIN_S, tpot_s=0.05, was_deferred=True, promised_s=0.001)
    for _ in range(100):
        assert isinstance(bench.ask(hasty, now=NOW + 0.999 * TOLD_WITHIN_S), Reject)
    question = query(ttft_s=1.0, tpot_s=0.05)
    bench.report("p", queued_tokens=8000, queued_s=0.5)
    assert isinstance(bench.ask(question), Reject)


def test_who_has_no_objective_waits_behind_all_and_says_nothing_of_promises() -> None:
    bench = Bench("p", "d", allow_local=False, lead_s=0.1)
    patient = query(was_deferred=True, promised_s=0.5)
    bench.router.learn_ttft(Booking(patient, bench.route(patient), NOW + 9.0), NOW + 10.0)
    assert bench.router.calibration.promise.count == 0
    hasty = query(ttft_s=1.0, was_deferred=True, promised_s=0.5)
    bench.router.learn_ttft(Booking(hasty, bench.route(hasty), NOW), NOW + 0.5)
    assert bench.router.calibration.promise.count == 1


def test_those_that_are_late_already_give_way_but_for_every_so_many_steps() -> None:
    bench = Bench("p", "d", allow_local=False, lead_s=10.0)
    late = [bench.send(query(8000, ttft_s=1.3)) for _ in range(3)]
    timely = bench.send(query(2000, ttft_s=9.0))
    # Nobody has had a first token: something holds the worker up.
    bench.report("p", queued_tokens=26_000, queued_s=1.0, now=NOW + 1.4)
    route = bench.route(query(ttft_s=19.0, arrived_s=NOW + 1.4), now=NOW + 1.4)
    turns_s = timely.work_s / (LATE_TURN - 1)
    assert timely.work_s + turns_s < 1.0 < sum(booking.work_s for booking in late)
    assert route.predicted_first_s == pytest.approx(timely.work_s + turns_s + prefill_s(1000))
