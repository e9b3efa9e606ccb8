"""The view's sums and orders, kept up one event at a time, against what a walk over everything gives."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.routing.booking import Booking
from cluster.routing.load_order import LoadOrder
from cluster.routing.query import Route
from tests.cluster.routing_bench import ANSWER, CONFIG, COST, NOW, Bench, query

# ── one worker ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_backlog_shrinks_with_time_and_is_set_right_by_first_tokens() -> None:
    bench = Bench("p", "d")
    backlog = bench.view.prefills["p"].backlog
    first, second = (bench.book(Route("p", "p:1", "d", "d:1", work_s=work_s)) for work_s in (0.4, 0.2))
    assert backlog.wait_s(NOW) == pytest.approx(0.6)
    assert backlog.wait_s(NOW + 0.5) == pytest.approx(0.1)
    assert backlog.wait_s(NOW + 9.0) == 0.0
    # Later than thought: what is left is what was booked and has no first token yet.
    bench.view.first_token(first, NOW + 9.0)
    assert backlog.wait_s(NOW + 9.0) == pytest.approx(0.2)
    bench.view.end(second, NOW + 9.0)
    assert backlog.wait_s(NOW + 9.0) == 0.0
    assert (backlog.own_work_s, backlog.own_tokens) == (0.0, 0)


def test_who_was_passed_by_one_that_left_is_delayed_by_it_no_longer() -> None:
    bench = Bench("p", "d")
    route = Route("p", "p:1", "d", "d:1", predicted_first_s=0.5, work_s=0.1)
    waiting = bench.book(route, query(ttft_s=9.0))
    urgent = [bench.book(route, query(ttft_s=1.0)) for _ in range(3)]
    assert waiting.delayed_s == pytest.approx(0.3)
    bench.view.end(urgent[1], NOW)
    assert waiting.delayed_s == pytest.approx(0.2)
    # One that came to its first token has really passed.
    bench.view.first_token(urgent[0], NOW)
    bench.view.end(urgent[0], NOW)
    assert waiting.delayed_s == pytest.approx(0.2)


def test_who_was_booked_in_a_workers_last_life_leaves_those_of_this_one_alone() -> None:
    bench = Bench("p", "d")
    route = Route("p", "p:1", "d", "d:1", predicted_first_s=0.5, work_s=0.1)
    before = bench.book(route, query(ttft_s=0.5))
    bench.view.remove("p")
    bench.report("p")
    waiting = bench.book(route, query(ttft_s=9.0))
    bench.book(route, query(ttft_s=1.0))
    assert waiting.delayed_s == pytest.approx(0.1)
    bench.view.end(before, NOW)
    assert waiting.delayed_s == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("blocks", "prompt_tokens", "room_tokens"),
    [
        ((), 100, 4000),
        ((100, 99), 100, 1584),
        ((200, 80, 60), 100, 960),
        ((200, 80, 60), 300, 1280),
        ((200, 80, 60), 600, 3200),
        # Ample is what the context allows, and where none is, the largest must do.
        ((400, 250), 3500, 4000),
        ((60, 40), 100, 960),
    ],
)
def test_an_answer_of_any_length_has_room_on_more_workers_than_the_largest(
    blocks: tuple[int, ...], prompt_tokens: int, room_tokens: int
) -> None:
    bench = Bench("p")
    for index, count in enumerate(blocks):
        bench.report(f"d{index}", blocks_total=count)
    assert bench.view.answer_tokens == 100
    assert bench.view.room_tokens(prompt_tokens, max_context=4000) == room_tokens


def test_an_idle_decode_worker_is_no_short_queue_where_others_compute_prompts() -> None:
    bench = Bench("p", "c", "d")
    bench.report("p", queued_tokens=8000, queued_s=0.5)
    bench.report("c", queued_tokens=4000, queued_s=0.3)
    assert bench.view.shortest_queue_s(NOW) == pytest.approx(0.3)


def test_a_report_takes_the_place_of_what_was_known_but_for_what_may_be_on_its_way() -> None:
    bench = Bench("p", "d")
    backlog = bench.view.prefills["p"].backlog
    bench.book(Route("p", "p:1", "d", "d:1", work_s=0.4), now=NOW)
    bench.report("p", NOW + 0.3, queued_tokens=250, queued_s=0.1)
    assert backlog.wait_s(NOW + 0.3) == pytest.approx(0.1)
    bench.book(Route("p", "p:1", "d", "d:1", work_s=0.4), now=NOW + 0.99)
    bench.report("p", NOW + 1.0, queued_tokens=0)
    assert backlog.wait_s(NOW + 1.0) == pytest.approx(0.4)
    # Another gateway's work shows in the report alone.
    bench.report("p", NOW + 2.0, queued_tokens=100_000, queued_s=5.0)
    assert backlog.wait_s(NOW + 2.0) == 5.0


def test_rows_join_at_their_first_token_and_leave_at_their_end() -> None:
    bench = Bench("p", "d")
    load = bench.view.decodes["d"]
    route = Route("p", "p:1", "d", "d:1", predicted_first_s=0.5, work_s=0.1)
    booking = bench.book(route, query(300))
    assert (load.row_count, load.token_count) == (1, 300)
    assert load.state_at(NOW + 0.4, NOW, 0.01, 100).rows == 0
    assert load.state_at(NOW + 0.6, NOW, 0.01, 100).rows == 1
    bench.view.first_token(booking, NOW + 0.2)
    # Ten steps after its first token it has ten tokens more.
    assert load.state_at(NOW + 0.3, NOW + 0.3, 0.01, 100).context_tokens == pytest.approx(300 + 10)
    assert bench.view.on_its_way("d") == 1
    assert bench.view.on_its_way("p") == 0
    bench.view.end(booking, NOW + 1.0)
    assert (load.row_count, load.token_count, load.sample(9)) == (0, 0, [])


def test_running_rows_are_expected_to_end_with_the_mean_answer() -> None:
    bench = Bench("d")
    bench.report("d", running=10, context_tokens=1000)
    later = bench.view.decodes["d"].state_at(NOW + 2.0, NOW, 0.01, 100)
    # After twice the time of an answer.
    assert later.rows == pytest.approx(10 * math.exp(-2.0))
    assert later.context_tokens == pytest.approx(100 * later.rows)


def test_a_worker_that_starts_anew_has_nothing_of_what_it_had() -> None:
    bench = Bench("p", "d")
    booking = bench.book(Route("p", "p:1", "d", "d:1", work_s=0.4))
    for name, loads in (("p", bench.view.prefills), ("d", bench.view.decodes)):
        bench.view.report(replace(loads[name].report, incarnation=2), NOW)
    assert bench.view.prefills["p"].backlog.wait_s(NOW) == 0.0
    assert bench.view.decodes["d"].row_count == 0
    bench.view.first_token(booking, NOW)
    bench.view.end(booking, NOW)
    assert bench.view.decodes["d"].row_count == 0


def test_a_role_changes_hands() -> None:
    bench = Bench("p", "d")
    booking = bench.book(Route("p", "p:1", "d", "d:1", work_s=0.4))
    bench.view.report(replace(bench.view.prefills["p"].report, role="decode"), NOW)
    assert bench.view.prefill_order.ids == []
    assert bench.view.decode_order.ids == ["d", "p"]
    bench.view.first_token(booking, NOW)
    bench.view.end(booking, NOW)


def test_silent_workers_leave_the_orders_and_then_memory() -> None:
    bench = Bench("p0", "p1", "d")
    bench.report("p1", NOW + 2.0)
    bench.view.expire(NOW + 3.1)
    assert bench.view.prefill_order.ids == ["p1"]
    assert set(bench.view.prefills) == {"p0", "p1"}
    assert bench.view.prefill_capacities.total() == 2, "the other may be back in a moment"
    bench.report("p0", NOW + 5.1)
    assert bench.view.prefill_order.ids == ["p0"]
    bench.view.expire(NOW + 80.0)
    assert (bench.view.prefills, bench.view.decodes) == ({}, {})
    assert not bench.view.block_sizes


def test_mean_answers_start_from_the_guess_and_follow_what_is_seen() -> None:
    view = Bench("p").view
    assert view.expected_answer(1000) == CONFIG.typical_answer_tokens
    assert view.expected_answer(7) == 7
    for _ in range(500):
        view.answers.drew(400)
        view.answers.ended(1)
    assert 380 < view.expected_answer(1000) <= 400


# ── orders ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.none() | st.floats(0, 9)), max_size=60))
def test_a_load_order_is_a_sorted_list_of_what_was_put(changes: list[tuple[str, float | None]]) -> None:
    order, loads = LoadOrder(), dict[str, float]()
    for name, load in changes:
        if load is None:
            order.discard(name)
            loads.pop(name, None)
        else:
            order.put(name, load)
            loads[name] = load
    assert order.least(99) == [name for _, name in sorted((load, name) for name, load in loads.items())]
    assert order.ids == sorted(loads)
    assert len(order) == len(loads)
    assert all(order.load(name) == load for name, load in loads.items())


# ── many events ──────────────────────────────────────────────────────────────────────────────────────────────────────

NAMES = ("p0", "p1", "d0", "d1", "c0")


@dataclass
class World:
    """Everything that was done, kept as plain lists."""

    reported: dict[str, float] = field(default_factory=dict)
    draining: set[str] = field(default_factory=set)
    bookings: list[Booking] = field(default_factory=list)


steps = st.lists(
    st.tuples(
        st.sampled_from(["report", "drain", "book", "first", "end", "wait"]),
        st.integers(0, 30),
        st.integers(1, 4000),
    ),
    max_size=80,
)


@settings(max_examples=60)
@given(steps)
def test_every_sum_and_order_is_what_a_walk_over_all_bookings_gives(events: list[tuple[str, int, int]]) -> None:
    bench, world, now = Bench(), World(), NOW
    for kind, number, size in events:
        now += 0.01
        name = NAMES[number % len(NAMES)]
        if kind in ("report", "drain"):
            bench.report(name, now, draining=kind == "drain")
            world.reported[name] = now
            (world.draining.add if kind == "drain" else world.draining.discard)(name)
        elif kind == "book" and isinstance(answer := bench.ask(query(size), now), Route):
            world.bookings.append(bench.book(answer, query(size, tpot_s=0.1 * (1 + number % 2)), now))
        elif kind == "first" and (waiting := [b for b in world.bookings if b.first_s is None]):
            bench.view.first_token(waiting[number % len(waiting)], now)
        elif kind == "end" and world.bookings:
            bench.view.end(world.bookings.pop(number % len(world.bookings)), now)
        elif kind == "wait":
            now += number / 10
            bench.view.expire(now)
        check(bench, world, now)


def check(bench: Bench, world: World, now: float) -> None:
    view = bench.view
    fresh = {name for name, heard_s in world.reported.items() if now - heard_s <= 3.0}
    view.expire(now)
    usable = fresh - world.draining
    assert set(view.prefill_order.ids) == {name for name in usable if name.startswith("p")}
    assert set(view.local_order.ids) == {name for name in usable if not name.startswith("p")}
    assert set(view.decode_order.ids) == {name for name in usable if name.startswith("d")}
    assert set(view.colocated_order.ids) == {name for name in usable if name.startswith("c")}
    known = {name for name, heard_s in world.reported.items() if now - heard_s <= 60.0}
    assert view.block_sizes.total() == len(known)
    for name, prefill in view.prefills.items():
        own = [b for b in world.bookings if b.route.prefill_id == name and b.first_s is None]
        assert abs(prefill.backlog.own_work_s - sum(b.work_s for b in own)) < 1e-9
        assert prefill.backlog.own_tokens == sum(b.query.prompt_tokens for b in own)
        if name in usable:
            assert view.prefill_order.load(name) == prefill.backlog.busy_until_s
    for name, decode in view.decodes.items():
        own = [b for b in world.bookings if b.route.decode_id == name]
        assert (decode.row_count, decode.token_count) == (len(own), sum(b.tokens for b in own))
        assert set(decode.sample(len(own) + 1)) == set(own)
        rows = len(own)
        if name in usable and name.startswith("d"):
            tokens = decode.token_count + 0.5 * view.answer_tokens * rows
            assert view.decode_order.load(name) == pytest.approx(COST.decode_s(rows, tokens) if rows else 0.0)
    assert view.answer_tokens == ANSWER
