"""Which prompt goes first: objectives that can be met, then patience; and chunks that are short enough."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.chunking import longest_chunk
from engine.slack_queue import SlackQueue
from engine.step_cost import StepCost, StepWork
from engine.urgency import STRETCH, TOKEN_S, WAY_BACK_S, Urgency, prompt_s, urgency
from tests.planning.linear_cost import LinearCost


def test_without_a_cost_model_an_objective_is_a_short_patience() -> None:
    def latest_start(ttft_due_s: float | None, deadline_s: float | None) -> float:
        found = urgency(5.0, ttft_due_s, deadline_s, 0.1, is_predicted=False)
        assert found.late_after_s(0.1) == -math.inf
        return found.patient_until_s

    assert latest_start(None, None) == pytest.approx(5.0 + STRETCH * 0.1 - 0.1)
    assert latest_start(5.5, None) == pytest.approx(5.4)
    assert latest_start(5.5, 5.3) == pytest.approx(5.2)
    assert latest_start(99.0, 98.0) == pytest.approx(5.0 + STRETCH * 0.1 - 0.1), "patience ends before"


def test_with_one_patience_counts_once_the_objective_is_missed() -> None:
    found = urgency(5.0, 5.5, None, 0.1, is_predicted=True)
    due_s = 5.5 - WAY_BACK_S
    assert found == Urgency(pytest.approx(5.9), due_s)
    assert found.late_after_s(0.1) == pytest.approx(due_s - 0.1)
    assert found.rank(0.1, due_s - 0.101, is_late_turn=False) == (1, due_s)
    assert found.rank(0.1, 5.42, is_late_turn=True) == (2, pytest.approx(5.9)), "late, but still patient"
    assert found.rank(0.1, 5.91, is_late_turn=False) == (2, pytest.approx(5.9))
    assert found.rank(0.1, 5.91, is_late_turn=True) == (0, pytest.approx(5.9))
    assert found.rank(0.02, 5.42, is_late_turn=False) == (1, due_s), "most of it is done: in time after all"


def test_a_deadline_ends_both() -> None:
    assert urgency(5.0, 5.5, 5.3, 0.1, is_predicted=True) == Urgency(pytest.approx(5.2), 5.3)
    assert urgency(5.0, None, 5.3, 0.1, is_predicted=True) == Urgency(pytest.approx(5.2), math.inf)


def test_work_is_what_the_cost_model_says_or_a_rough_measure() -> None:
    cost: StepCost = LinearCost()
    assert prompt_s(cost, 100, 20) == cost.step_s(StepWork(((100, 20),)))
    assert prompt_s(cost, 0, 20) == prompt_s(None, 0, 20) == 0.0
    assert prompt_s(None, 100, 20) == 100 * TOKEN_S


def queue_of(*entries: tuple[str, float, float, float]) -> SlackQueue[str]:
    """Name, latest start by patience, objective, and when it is too late for that."""
    queue: SlackQueue[str] = SlackQueue()
    for name, patient_s, objective_s, late_after_s in entries:
        queue.push(name, name, 0.0, patient_s, objective_s=objective_s, late_after_s=late_after_s)
    return queue


NEVER = (math.inf, -math.inf)


def test_objectives_go_before_patience_the_earliest_first() -> None:
    queue = queue_of(("patient", 1.0, *NEVER), ("later", 9.0, 4.0, 3.5), ("sooner", 9.0, 3.0, 2.0))
    assert [queue.pop(0.0) for _ in range(3)] == ["sooner", "later", "patient"]


def test_who_is_late_goes_behind_and_gets_a_turn_when_patience_ends() -> None:
    queue = queue_of(("late", 2.0, 1.0, 0.5), ("timely", 9.0, 4.0, 3.5), ("patient", 1.8, *NEVER))
    assert queue.peek(0.4) == "late"
    assert queue.peek(0.6) == "timely"
    assert queue.peek(0.6, is_late_turn=True) == "timely", "nobody's patience is over"
    assert queue.peek(1.9, is_late_turn=True) == "patient"
    assert queue.pop(2.5, is_late_turn=True) == "patient"
    assert queue.pop(2.5, is_late_turn=True) == "late"
    assert queue.pop(2.5) == "timely"


def test_a_removed_entry_that_was_late_is_gone() -> None:
    queue = queue_of(("late", 2.0, 1.0, 0.5), ("timely", 9.0, 4.0, 3.5))
    assert queue.peek(0.6) == "timely"
    assert queue.remove("late") == "late"
    queue.push("late", "late again", 0.7, 3.0)
    assert [queue.pop(0.8), queue.pop(0.8)] == ["timely", "late again"]


@given(
    st.lists(st.tuples(st.floats(0, 9), st.one_of(st.none(), st.floats(0, 9)), st.floats(0, 2)), max_size=12),
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=12, max_size=12),
)
def test_the_queue_agrees_with_the_ranks(
    entries: list[tuple[float, float | None, float]], steps: list[tuple[float, bool]]
) -> None:
    """A heap that moves entries as time passes, against sorting all of them each time."""
    queue: SlackQueue[int] = SlackQueue()
    wishes: dict[int, tuple[Urgency, float]] = {}
    for number, (patient_s, due_s, left_s) in enumerate(entries):
        wish = Urgency(patient_s, math.inf if due_s is None else due_s)
        wishes[number] = wish, left_s
        late_after_s = wish.late_after_s(left_s)
        queue.push(str(number), number, 0.0, patient_s, objective_s=wish.due_s, late_after_s=late_after_s)
    now = 0.0
    for passed_s, is_late_turn in steps:
        now += passed_s
        if not wishes:
            break
        first = min(wishes, key=lambda n: (wishes[n][0].rank(wishes[n][1], now, is_late_turn), n))
        # An entry deep in the heap may be late unseen: it is passed over when it surfaces, so ranks agree on top.
        assert queue.pop(now, is_late_turn=is_late_turn) == first
        del wishes[first]


@given(st.integers(0, 40), st.integers(1, 60), st.sampled_from([1, 4, 16]), st.integers(0, 70))
def test_the_longest_chunk_that_is_short_enough(start: int, count: int, block_size: int, limit: int) -> None:
    found = longest_chunk(start, count, block_size, lambda tokens: tokens <= limit)
    ends = [end for end in range(start + 1, start + count) if end % block_size == 0] + [start + count]
    assert found == max((end - start for end in ends if end - start <= limit), default=0)
