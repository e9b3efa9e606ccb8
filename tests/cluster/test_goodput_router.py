"""The goodput policy, one term of its sum at a time, in cases that can be worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cluster.prefix_index import BlockNames
from cluster.routing.booking import Booking
from cluster.routing.query import Defer, Impossible, Reject, Route
from tests.cluster.routing_bench import ANSWER, NOW, Bench, prefill_s, query

PROMPT = tuple(range(1000))


# ── the terms ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_idle_pair_costs_its_prompt_and_then_steps_of_one_row() -> None:
    route = Bench("p", "d", allow_local=False).route()
    assert (route.prefill_id, route.prefill_address, route.decode_id, route.decode_address) == ("p", "p:1", "d", "d:1")
    assert route.work_s == pytest.approx(prefill_s(1000))
    assert route.predicted_ttft_s == pytest.approx(prefill_s(1000))
    # One row with the prompt and half of the answer in its context, on average.
    assert route.predicted_tpot_s == pytest.approx(2e-3 + 1e-4 + 2e-7 * (1000 + ANSWER / 2))


def test_what_is_queued_at_a_prefill_worker_costs_time_and_less_of_it_the_older_the_report() -> None:
    bench = Bench("p0", "p1", "d", allow_local=False, lead_s=10.0)
    bench.report("p0", queued_tokens=4000, queued_s=0.2)
    bench.report("p1", queued_tokens=4000, queued_s=0.3)
    route = bench.route()
    assert route.prefill_id == "p0"
    assert route.predicted_ttft_s == pytest.approx(0.2 + prefill_s(1000))
    assert bench.route(now=NOW + 0.15).predicted_first_s == pytest.approx(0.05 + prefill_s(1000))
    assert bench.route(now=NOW + 1.0).predicted_first_s == pytest.approx(prefill_s(1000))


def test_what_was_sent_since_the_report_counts_until_its_first_token() -> None:
    bench = Bench("p0", "p1", "d", allow_local=False, lead_s=10.0)
    first = bench.send(query(4000))
    second = bench.send(query(3000))
    assert {first.route.prefill_id, second.route.prefill_id} == {"p0", "p1"}
    third = bench.route()
    assert third.prefill_id == second.route.prefill_id
    assert third.predicted_ttft_s == pytest.approx(prefill_s(3000) + prefill_s(1000))
    bench.view.first_token(first, NOW + 0.01)
    assert bench.route(now=NOW + 0.01).prefill_id == first.route.prefill_id


def test_one_with_less_slack_passes_those_with_more() -> None:
    bench = Bench("p", "d", allow_local=False, lead_s=10.0)
    bench.send(query(4000, ttft_s=5.0))
    assert bench.route(query(1000, ttft_s=1.0)).predicted_ttft_s == pytest.approx(prefill_s(1000))
    assert bench.route(query(1000, ttft_s=9.0)).predicted_ttft_s == pytest.approx(prefill_s(4000) + prefill_s(1000))


def test_a_prefix_hit_is_worth_a_queue_that_is_shorter_than_what_it_saves() -> None:
    prompt = BlockNames(PROMPT)
    bench = Bench("p0", "p1", "d", allow_local=False)
    bench.holds("p0", prompt, 800)
    hit_s = prefill_s(200)
    bench.report("p0", queued_tokens=400, queued_s=0.02)
    bench.holds("p0", prompt, 800, sequence=2)
    route = bench.route(query(names=prompt))
    assert (route.prefill_id, route.cached_tokens) == ("p0", 800)
    assert route.predicted_ttft_s == pytest.approx(0.02 + hit_s)
    bench.report("p0", queued_tokens=4000, queued_s=0.1)
    bench.holds("p0", prompt, 800, sequence=2)
    assert bench.route(query(names=prompt)).prefill_id == "p1"


def test_another_tenants_prefix_is_no_hit() -> None:
    bench = Bench("p0", "p1", "d", allow_local=False)
    bench.holds("p1", BlockNames(PROMPT, b"one"), 800)
    assert bench.route(query(names=BlockNames(PROMPT, b"one"))).prefill_id == "p1"
    assert bench.route(query(names=BlockNames(PROMPT, b"two"))).cached_tokens == 0


def test_a_prompt_that_was_just_routed_is_counted_on_before_any_event_tells_of_it() -> None:
    prompt = BlockNames(PROMPT)
    bench = Bench("p0", "p1", "p2", "d", allow_local=False)
    first = bench.send(query(names=prompt))
    bench.view.first_token(first, NOW + 0.06)
    again = bench.route(query(names=prompt), now=NOW + 0.07)
    assert (again.prefill_id, again.cached_tokens) == (first.route.prefill_id, 992)


def test_a_slow_link_changes_the_decode_worker() -> None:
    bench = Bench("p", allow_local=False)
    # 1.024 MB: 0.1 s and 0.001 s, of which 54 ms pass while the prompt is computed.
    bench.report("d0", links={"p:1": 1.024e7})
    bench.report("d1", links={"p:1": 1.024e9}, running=1, context_tokens=1000)
    fast = bench.route()
    assert fast.decode_id == "d1"
    bench.report("d1", links={"p:1": 1.024e7}, running=1, context_tokens=1000)
    slow = bench.route()
    assert slow.decode_id == "d0"
    exposed_s = 0.1 - prefill_s(1000)
    assert slow.predicted_tpot_s == pytest.approx(2.1e-3 + 2e-7 * 1050 + exposed_s / (ANSWER - 1))


def test_what_the_decode_worker_holds_is_not_sent() -> None:
    prompt = BlockNames(PROMPT)
    bench = Bench("p", allow_local=False)
    for name in ("d0", "d1"):
        bench.report(name, links={"p:1": 5e6})
    bench.holds("d1", prompt, 800)
    assert bench.route(query(names=prompt)).decode_id == "d1"


def test_full_blocks_cost_the_time_until_some_are_free() -> None:
    bench = Bench("p", allow_local=False)
    # 1,600 slots, 1,060 of them held, a block to grow for each row: 460 are missing, which turn over while the ten rows
    # draw their answers. What the rows will hold when they have grown keeps no prompt out.
    bench.report("d0", blocks_total=100, running=10, context_tokens=900, decode_step_s=5e-3)
    route = bench.route()
    held = 900 + 16 * 10
    missing = 1000 - (1600 - held)
    assert route.predicted_ttft_s == pytest.approx(missing / held * ANSWER * 5e-3)
    bench.report("d1", running=10, context_tokens=500, decode_step_s=5e-3)
    assert bench.route().decode_id == "d1"


def test_decode_load_is_judged_as_it_will_be_when_the_prompt_is_done() -> None:
    """Rows that draw the last of their answers now will be gone; those that are on their way will be there."""
    bench = Bench("p0", "p1", "d0", "d1", allow_local=False, lead_s=10.0)
    bench.report("p0", queued_tokens=40_000, queued_s=2.0)
    bench.report("p1", queued_tokens=40_000, queued_s=2.0)
    bench.report("d0", running=20, context_tokens=20_000, decode_step_s=8e-3)
    on_their_way = Route("p0", "p0:1", "d1", "d1:1", predicted_first_s=1.0, work_s=0.0)
    for _ in range(12):
        bench.book(on_their_way)
    # Twenty rows live for 0.8 s on average: after 2 s one or two are left, beside the twelve that have joined.
    assert bench.route().decode_id == "d0"
    # A short prompt joins before those twelve do, with all twenty still there.
    bench.report("p1")
    assert bench.route().decode_id == "d1"


# ── local prefill ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_local_wins_when_the_prefill_workers_are_busy_and_the_pace_allows_it() -> None:
    bench = Bench("p", "d")
    bench.report("p", queued_tokens=20_000, queued_s=1.0)
    bench.report("d", running=4, context_tokens=4000, decode_step_s=3.2e-3)
    lax = bench.ask(query(ttft_s=0.5, tpot_s=0.05))
    assert isinstance(lax, Route)
    assert lax.is_local
    # 50 ms in two steps, of which the decode rows' own part is not the prompt's.
    assert lax.taken_s == pytest.approx(prefill_s(1000) - 2 * (2e-3 + 1e-4 + 2e-7))


def test_but_not_where_it_would_make_the_running_rows_late() -> None:
    bench = Bench("p", "d", lead_s=10.0)
    bench.report("p", queued_tokens=40_000, queued_s=1.7)
    bench.report("d", running=30, context_tokens=30_000, decode_step_s=11e-3)
    assert bench.route(query(4000, ttft_s=2.2, tpot_s=10.0)).is_local
    bench = Bench("p", "d", lead_s=10.0)
    bench.report("p", queued_tokens=40_000, queued_s=1.7)
    for _ in range(30):
        row = bench.book(Route("p", "p:1", "d", "d:1", 0.01, work_s=0.0), query(tpot_s=13e-3))
        bench.view.first_token(row, NOW)
    bench.report("d", running=30, context_tokens=30_000, decode_step_s=11e-3)
    # Thirty rows at 11 ms, and an answer of each would take 2 ms a token longer for the sake of this prompt.
    assert not bench.route(query(4000, ttft_s=2.2, tpot_s=10.0)).is_local


def test_colocated_workers_get_local_routes_only() -> None:
    bench = Bench("c0", "c1")
    assert bench.route().is_local
    bench = Bench("c0", "p")
    for _ in range(5):
        route = bench.send().route
        assert route.is_local
        assert route.decode_id == "c0"


def test_without_a_cost_model_local_is_only_for_want_of_a_prefill_worker() -> None:
    bench = Bench("p", "d", cost=None, lead_s=1000.0)
    bench.report("p", queued_tokens=100_000, prefill_tokens_per_s=1000.0)
    assert bench.route().prefill_id == "p"
    assert Bench("d", cost=None).route().is_local


# ── refusals and waiting ─────────────────────────────────────────────────────────────────────────────────────────────


def test_what_cannot_be_in_time_is_refused_with_the_reason_and_when_to_come_again() -> None:
    bench = Bench("p", "d", allow_local=False)
    bench.report("p", queued_tokens=60_000, queued_s=3.0)
    answer = bench.ask(query(ttft_s=0.5, tpot_s=0.05))
    assert isinstance(answer, Reject)
    assert answer.reason == "the first token would take about 3.1 s, the objective is 0.5 s"
    assert answer.retry_after_s == pytest.approx(3.0)
    answer = bench.ask(query(ttft_s=30.0, tpot_s=1e-3))
    assert isinstance(answer, Reject)
    assert answer.reason == "a token would take about 2.31 ms, the objective is 1 ms"


def test_without_objectives_nobody_is_refused() -> None:
    bench = Bench("p", "d", allow_local=False, lead_s=100.0)
    bench.report("p", queued_tokens=60_000, queued_s=50.0)
    assert bench.route(query()).predicted_ttft_s > 50.0


def test_one_without_objectives_waits_while_it_would_make_others_late_but_not_for_ever() -> None:
    bench = Bench("p", "d", allow_local=False, patience_s=5.0)
    for _ in range(40):
        row = bench.book(Route("p", "p:1", "d", "d:1", 0.01, work_s=0.0), query(tpot_s=14e-3))
        bench.view.first_token(row, NOW)
    bench.report("d", running=40, context_tokens=40_000, decode_step_s=14e-3)
    heavy = query(30_000)
    answer = bench.ask(heavy)
    assert isinstance(answer, Defer)
    assert answer.reason == "others would miss their objectives"
    assert not answer.for_all
    assert NOW < answer.until_s <= NOW + 5.0
    bench.report("p", now=NOW + 5.1)
    bench.report("d", now=NOW + 5.1, running=40, context_tokens=40_000, decode_step_s=14e-3)
    assert isinstance(bench.ask(heavy, now=NOW + 5.1), Route)


def test_under_lasting_overload_heavy_work_is_refused_and_light_work_is_not() -> None:
    """1.6 times of what one prefill worker can do; two thirds of it comes from one request in 26. Each alone could be
    in time, and first come, first served would lose a third of all."""
    bench = Bench("p", "d", allow_local=False, lead_s=100.0)
    tick_s, queue = 0.02, list[Booking]()
    outcomes: dict[int, list[bool]] = {200: [], 10_000: []}
    done_s = 0.0
    for number in range(1500):
        now = NOW + tick_s * number
        tokens = 10_000 if number % 26 == 25 else 200
        question = query(tokens, ttft_s=2.0, tpot_s=0.5, arrived_s=now)
        answer = bench.ask(question, now)
        if isinstance(answer, Route):
            queue.append(bench.book(answer, question, now))
        outcomes[tokens].append(isinstance(answer, Route))
        done_s += tick_s
        queue.sort(key=lambda booking: booking.latest_start_s)
        while queue and done_s >= queue[0].work_s:
            booking = queue.pop(0)
            done_s -= booking.work_s
            bench.view.first_token(booking, now)
            assert now - booking.query.arrived_s <= 2.0
            bench.view.end(booking, now)
        done_s = done_s if queue else 0.0
        for name in ("p", "d") if number % 50 == 0 else ():
            bench.report(name, now, **({"queued_tokens": 1, "queued_s": 9.0} if name == "p" and queue else {}))
    light, heavy = ([*map(int, outcomes[tokens][len(outcomes[tokens]) // 4 :])] for tokens in (200, 10_000))
    assert sum(light) > 0.97 * len(light)
    assert sum(heavy) < 0.5 * len(heavy)


@pytest.mark.parametrize(
    ("names", "config", "reason"),
    [
        ((), {}, "no decode worker"),
        (("p",), {}, "no decode worker"),
        (("d",), {"allow_local": False}, "no prefill worker"),
    ],
)
def test_defers_while_nobody_can_take_it(names: tuple[str, ...], config: dict[str, object], reason: str) -> None:
    answer = Bench(*names, **config).ask(query(ttft_s=0.1, tpot_s=0.1))
    assert isinstance(answer, Defer)
    assert reason in answer.reason
    assert (answer.until_s, answer.for_all) == (math.inf, True)


@pytest.mark.parametrize("policy", ["goodput", "round_robin"])
def test_who_fits_only_a_worker_that_is_not_there_waits_alone(policy: str) -> None:
    bench = Bench("p", policy=policy)
    bench.report("d0", blocks_total=20)
    bench.report("d1", draining=True)
    assert bench.ask(query(300)) == Defer("no worker with room for 400 tokens is available")
    assert bench.route(query(200)).decode_id == "d0"


@pytest.mark.parametrize("policy", ["goodput", "round_robin"])
def test_an_answer_under_way_that_has_outgrown_the_pools_waits_for_them(policy: str) -> None:
    """Its request was a good one: a client that has read half of its answer is not told that it asked for too much."""
    bench = Bench("d", policy=policy, allow_local=False)
    bench.report("p", blocks_total=20)
    assert isinstance(bench.ask(query(400)), Impossible)
    assert bench.ask(query(400, is_resumed=True)) == Defer("no worker with room for 500 tokens is available")
    bench = Bench("d", policy=policy)
    bench.report("p", blocks_total=20)
    assert bench.route(query(400, is_resumed=True)).is_local


def test_draining_and_silent_workers_get_nothing() -> None:
    bench = Bench("p0", "p1", "d0", "d1", lead_s=10.0)
    bench.report("p0", draining=True)
    bench.report("d1", draining=True)
    for _ in range(8):
        route = bench.send().route
        assert route.prefill_id in ("", "p1")
        assert route.decode_id == "d0"
    bench.report("p1", now=NOW + 3.5)
    bench.view.expire(NOW + 3.5)
    assert isinstance(bench.ask(now=NOW + 3.5), Defer)


def test_what_fits_nowhere_is_impossible() -> None:
    bench = Bench("p")
    bench.report("d", blocks_total=19)
    assert bench.ask(query(220)) == Impossible(
        "prompt + max_tokens", "320 tokens", "at most 304: no worker has KV blocks for more"
    )
    bench.report("d", blocks_total=20)
    assert isinstance(bench.ask(query(220)), Route)
    bench.report("small", now=NOW + 3.5, blocks_total=19)
    bench.report("p", now=NOW + 3.5)
    bench.view.expire(NOW + 3.5)
    assert isinstance(bench.ask(query(220), now=NOW + 3.5), Defer), "the one with room is silent, and may be back"
    bench.view.expire(NOW + 61.0)
    bench.report("small", now=NOW + 61.0, blocks_total=19)
    bench.report("p", now=NOW + 61.0)
    assert isinstance(bench.ask(query(220), now=NOW + 61.0), Impossible)
    bench = Bench("d", allow_local=False)
    bench.report("p", blocks_total=9)
    assert bench.ask(query(160)) == Impossible("prompt", "160 tokens", "at most 144: no worker has KV blocks for more")


def test_a_large_prompt_finds_the_one_worker_that_can_hold_it() -> None:
    bench = Bench(*(f"d{index}" for index in range(30)), allow_local=False)
    bench.report("p", blocks_total=8192)
    bench.report("d7", blocks_total=8192)
    assert bench.route(query(70_000)).decode_id == "d7"


def test_equal_requests_between_two_reports_are_spread() -> None:
    bench = Bench("p0", "p1", "d0", "d1", lead_s=10.0)
    sent = [bench.send() for _ in range(8)]
    for role in ("prefill_id", "decode_id"):
        picked = [getattr(booking.route, role) for booking in sent]
        assert max(picked.count(name) for name in picked if name) <= 4


def test_what_was_predicted_is_learned_from() -> None:
    bench = Bench("p", "d", allow_local=False)
    question = query(ttft_s=0.1, tpot_s=0.05)
    assert isinstance(bench.ask(question), Route)
    for _ in range(100):
        booking = Booking(question, bench.route(query()), NOW)
        # Everything takes twice as long as predicted.
        bench.router.learn_ttft(booking, NOW + 2 * booking.route.predicted_first_s)
        bench.router.learn_tpot(booking, 2 * booking.route.predicted_tpot_s, ANSWER)
    answer = bench.ask(question)
    assert isinstance(answer, Reject)


def test_an_answer_of_one_token_has_no_pace_to_miss() -> None:
    bench = Bench("p", "d")
    for _ in range(40):
        bench.view.first_token(bench.book(Route("p", "p:1", "d", "d:1", 0.01, work_s=0.0), query()), NOW)
    slow = query(tpot_s=5e-3)
    assert isinstance(bench.ask(slow), Reject)
    assert isinstance(bench.ask(replace(slow, total_tokens=slow.prompt_tokens + 1)), Route)


def test_large_requests_are_spread_over_the_large_workers_however_many_small_ones_are_idle() -> None:
    names = [f"d{number:02}" for number in range(20)]
    bench = Bench("p", *names)
    for name in names[:10]:
        bench.report(name, blocks_total=64, blocks_free=64)
    used = {bench.send(query(4000)).route.decode_id for _ in range(10)}
    assert len(used) >= 8
    assert used <= set(names[10:])
