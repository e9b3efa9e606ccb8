"""Who waits at the gateway: order, work ahead, and who would be late because of a newcomer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.routing.waiting_room import WaitingRoom


def room(*waiting: tuple[float, float]) -> WaitingRoom:
    made = WaitingRoom()
    for ticket, (latest_start_s, work_s) in enumerate(waiting):
        made.enter(ticket, latest_start_s, work_s)
    return made


def test_least_slack_first_and_equals_in_order_of_arrival() -> None:
    waiting = room((5.0, 1.0), (3.0, 1.0), (5.0, 1.0), (4.0, 1.0))
    assert waiting.first(9) == [1, 3, 0, 2]
    assert waiting.first(2) == [1, 3]
    assert waiting.leave(3)
    assert not waiting.leave(3)
    assert waiting.first(9) == [1, 0, 2]
    assert len(waiting) == 3


def test_work_ahead_is_that_of_those_with_no_more_slack() -> None:
    waiting = room((5.0, 1.0), (3.0, 2.0), (5.0, 4.0))
    assert [waiting.ahead_s(latest_s) for latest_s in (2.0, 3.0, 4.9, 5.0)] == [0.0, 2.0, 2.0, 7.0]


def test_those_are_late_whose_slack_a_newcomer_uses_up() -> None:
    # At 0 s one server starts the first at 0, the second at 1, the third at 2; they could wait until 1, 1.2 and 9.
    waiting = room((1.0, 1.0), (1.2, 1.0), (9.0, 1.0))
    assert waiting.late_after(0.5, 0.1, 1, 0.0) == 0
    assert waiting.late_after(0.5, 0.3, 1, 0.0) == 1
    assert waiting.late_after(0.5, 1.5, 1, 0.0) == 2
    assert waiting.late_after(0.5, 1.5, 2, 0.0) == 1
    assert waiting.late_after(1.1, 1.5, 1, 0.0) == 1
    assert waiting.late_after(9.0, 1.5, 1, 0.0) == 0
    assert waiting.late_after(0.5, 1.5, 1, 5.0) == 0, "the first two are late already, the third can bear it"
    assert room().late_after(0.5, 1.5, 1, 0.0) == 0


@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 3)), max_size=12),
    st.floats(0, 10),
    st.floats(0, 5),
    st.integers(1, 4),
)
def test_late_is_what_two_plans_differ_by(
    waiting: list[tuple[float, float]], latest_s: float, work_s: float, servers: int
) -> None:
    def late(plan: list[tuple[float, float, bool]]) -> set[int]:
        now, found = 0.0, set()
        for place, (latest, work, is_new) in enumerate(plan):
            if now > latest and not is_new:
                found.add(place)
            now += work / servers
        return found

    order = sorted([(latest, work, False) for latest, work in waiting], key=lambda entry: entry[0])
    place = sum(latest <= latest_s for latest, _, _ in order)
    before = late(order)
    after = late([*order[:place], (latest_s, work_s, True), *order[place:]])
    moved = {number + (number >= place) for number in before}
    expected = len(after - moved)
    # Sums in another order may round apart where a start falls exactly on the last moment.
    assert abs(room(*waiting).late_after(latest_s, work_s, servers, 0.0) - expected) <= 1
