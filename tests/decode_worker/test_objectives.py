"""The decode scheduler with a cost model, by hand: a step takes 10 ms, 1 ms a row, and 1 ms a token of a prompt."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from decode_worker.flight import DecodeBatch
from decode_worker.local_prompts import STARVED_STEPS
from decode_worker.selection import MARGIN, MAX_PAUSE_S, due_s, select
from decode_worker.sequence import Choice, Request, Timeline
from decode_worker.stream import Submit
from engine.step_cost import StepWork
from tests.decode_worker.by_hand import BLOCK, GREEDY, MAX_CONTEXT, Bench
from tests.planning.linear_cost import LinearCost

COST = LinearCost(fixed_s=0.010, token_s=0.001, row_s=0.001, context_s=0.0, saturation_tokens=40)
LONG = replace(GREEDY, max_tokens=100, ignore_eos=True)


def choice(number: int, tpot_s: float | None, first_s: float = 0.0, tokens: int = 1, last_s: float = 0.0) -> Choice:
    """One that has given `tokens` tokens, the first at `first_s`, the last at `last_s`."""
    request = Request(
        f"r{number}", number, Submit(f"r{number}", (1, 2), LONG, 0, "p", tpot_s=tpot_s), None, Timeline(0)
    )
    request.accept(frozenset(), MAX_CONTEXT)
    request.times.first_token_s = first_s
    found = request.choices[0]
    found.token_ids += [7] * tokens
    found.last_token_s = last_s
    return found


def names(choices: list[Choice]) -> list[int]:
    return [each.request.serial for each in choices]


def test_each_token_has_its_due_time() -> None:
    assert due_s(choice(0, 0.05, first_s=1.0, tokens=1)) == pytest.approx(1.05)
    assert due_s(choice(0, 0.05, first_s=1.0, tokens=4)) == pytest.approx(1.2)
    assert due_s(choice(0, 0.05, first_s=1.0, tokens=4), ahead=1) == pytest.approx(1.25)
    assert due_s(choice(0, None)) == math.inf


def test_without_a_cost_model_or_objectives_the_oldest_run() -> None:
    paced, free = [choice(n, 0.001) for n in range(3)], [choice(n, None) for n in range(3)]
    for found in (select(paced, None, 2, 5.0), select(free, COST, 2, 5.0)):
        assert names(list(found.choices)) == [0, 1]
        assert (found.work, found.limit_s, found.steady_s) == (StepWork((), 2, 6), math.inf, math.inf)


def test_all_run_while_their_slack_allows() -> None:
    # Ten rows take 20 ms. One has given 5 tokens in 30 ms, so its sixth is due 30 ms from now; the others are slower.
    rows = [choice(n, 1.0) for n in range(9)] + [choice(9, 0.012, tokens=5)]
    found = select(rows, COST, 64, 0.030)
    assert len(found.choices) == 10
    assert found.limit_s == pytest.approx(MARGIN * 0.030)
    assert found.steady_s == pytest.approx(MARGIN * 0.012), "a step is longer than that: slack is used up"


def test_rows_well_ahead_wait_when_the_step_would_be_too_long_for_others() -> None:
    # 12 rows take 22 ms; the tight ones must have a token every 16 ms, which leaves 5 rows beside the fixed 10 ms.
    tight = [choice(n, 0.016) for n in range(3)]
    ahead = [choice(n, 0.016, tokens=20) for n in range(3, 12)]
    found = select([*tight, *ahead], COST, 64, 0.001)
    assert found.steady_s == 0.0
    assert names(list(found.choices)) == [0, 1, 2, 3, 4], "10 + 5 ms within 95 % of 16"
    assert COST.step_s(found.work) <= MARGIN * 0.016


def test_those_in_time_stay_in_time_and_the_late_get_what_is_left() -> None:
    in_time = [choice(n, 0.016, first_s=1.0) for n in range(2, 5)]
    late = [choice(n, 0.016, first_s=0.9 + 0.01 * n, last_s=0.99) for n in range(2)]
    found = select([*late, *in_time, *(choice(n, 0.016, 0.8, last_s=0.99) for n in range(5, 9))], COST, 64, 1.001)
    assert names(list(found.choices)) == [0, 1, 2, 3, 4], "and of the late ones those that are least late"


def test_who_is_beyond_hope_does_not_shorten_the_steps_of_others() -> None:
    # 98 tokens to go gain 98 · (16 − 11) ms at best, and it is a second late.
    lost = choice(0, 0.016, first_s=-1.0, last_s=0.0)
    others = [choice(n, 1.0) for n in range(1, 9)]
    found = select([lost, *others], COST, 64, 0.001)
    assert len(found.choices) == 9
    assert found.limit_s == pytest.approx(select(others, COST, 64, 0.001).limit_s, abs=0.02)


def test_nobody_starves() -> None:
    tight = [choice(n, 0.012, first_s=10.0, last_s=10.0) for n in range(1, 4)]
    paused = choice(0, None, last_s=10.0 - MAX_PAUSE_S)
    assert names(list(select([paused, *tight], COST, 64, 10.0).choices)) == [1]
    assert names(list(select([paused, *tight], COST, 64, 10.001).choices)) == [0]


def test_a_step_has_at_least_one_row() -> None:
    assert names(list(select([choice(0, 0.001), choice(1, 0.001)], COST, 64, 0.0).choices)) == [0]


# ── local prompts ────────────────────────────────────────────────────────────────────────────────────────────────────


def desk_with(tpot_s: float | None, rows: int = 1, **limits: int) -> Bench:
    """`rows` running choices whose first token came just now, and room for a lot."""
    desk = Bench(200, COST, **{"local_token_budget": 32, "max_steps": 16, **limits})
    for number in range(rows):
        desk.receive(desk.submit((1, 2, 3, 10 + number), LONG, pulled=True, tpot_s=tpot_s), (9,))
    return desk


def chunks(batch: DecodeBatch | None) -> list[tuple[str, int, int]]:
    assert batch is not None
    return [(row.seq_id, row.start, row.end) for row in batch.batch.rows[batch.decode_rows :]]


def step(desk: Bench, now: float) -> list[tuple[str, int, int]]:
    """Schedules at `now`, and lets the step end at once; every row draws 9."""
    desk.now = now
    found = chunks(desk.schedule())
    desk.complete({row.seq_id: [9] for row in desk.under_way[0].batch.rows})
    return found


def prompt(number: int, tokens: int) -> tuple[int, ...]:
    return tuple(range(100 * number, 100 * number + tokens))


def test_a_chunk_is_as_long_as_the_running_choice_can_afford() -> None:
    # A step takes 11 ms for the row and 1 ms a token. What it holds the row up for, the row must have made up for by
    # its 16th token, in steps without a prompt: 15 times the pace less 11 ms.
    for tpot_s, tokens in ((1.0, 32), (0.0125, 20), (0.0118, 8), (0.012, 12)):
        desk = desk_with(tpot_s)
        desk.submit(prompt(1, 60))
        assert chunks(desk.schedule()) == [("r2/0", 0, tokens)]


def test_a_choice_that_ends_soon_has_fewer_tokens_to_make_up_for_a_chunk_with() -> None:
    last = select([choice(0, 0.0125, tokens=98)], COST, 64, 97 * 0.0125)
    assert last.limit_s == pytest.approx(MARGIN * (0.0125 + 0.0015))
    early = select([choice(0, 0.0125, tokens=50)], COST, 64, 49 * 0.0125)
    assert early.limit_s == pytest.approx(MARGIN * (0.0125 + 15 * 0.0015))


def test_who_is_beyond_hope_does_not_make_a_chunk_short() -> None:
    lost = choice(0, 0.0125, first_s=-10.0, tokens=50)
    steady = choice(1, 0.020, tokens=50)
    alone, beside = (select(rows, COST, 64, 49 * 0.020) for rows in ([steady], [lost, steady]))
    assert beside.limit_s == pytest.approx(alone.limit_s, abs=0.02)


def test_a_first_token_on_its_way_has_not_waited_for_the_next() -> None:
    tight = [choice(0, 0.001, first_s=9.0, last_s=9.5), choice(1, 0.001, first_s=9.0, last_s=9.0)]
    coming = choice(2, 0.001)
    coming.request.times.first_token_s = None
    assert 1 in names(list(select([*tight, coming], COST, 64, 10.1).choices)), "it has waited for more than a second"


def test_slack_that_a_choice_has_saved_up_is_used() -> None:
    desk = desk_with(0.016)
    for _ in range(4):
        assert step(desk, 0.0) == []
    desk.submit(prompt(1, 60))
    desk.now = 0.0
    assert chunks(desk.schedule()) == [("r2/0", 0, 32)], "its sixth token is due in 80 ms"


def test_local_prompts_get_a_block_every_so_often_however_tight_the_pace_is() -> None:
    desk = desk_with(0.012)
    desk.submit(prompt(1, 12))
    found = []
    for number in range(1, 3 * STARVED_STEPS + 4):
        desk.now = 0.012 * number - 1.0
        found.append(step(desk, 0.012 * number))
    with_chunk = [index for index, each in enumerate(found) if each]
    assert with_chunk == [STARVED_STEPS, 2 * STARVED_STEPS + 1, 3 * STARVED_STEPS + 2]
    assert {each[0][2] - each[0][1] for each in found if each} == {BLOCK}


def test_without_objectives_the_budget_is_all_that_counts() -> None:
    desk = desk_with(None)
    desk.submit(prompt(1, 60))
    assert chunks(desk.schedule()) == [("r2/0", 0, 32)]


def test_local_prompts_run_in_the_order_of_their_objectives() -> None:
    desk = desk_with(None, local_token_budget=16)
    desk.submit(prompt(1, 16))
    desk.submit(prompt(2, 16), ttft_due_s=5.0)
    desk.submit(prompt(3, 16), ttft_due_s=2.0)
    hopeless = desk.submit(prompt(4, 16), ttft_due_s=0.020)
    order = [found[0][0] for found in (step(desk, 0.0) for _ in range(4))]
    assert order == ["r4/0", "r3/0", "r2/0", "r5/0"], "16 tokens take 26 ms, so nobody can have them after 20"
    assert hopeless.lead.output_count == 1


def test_beyond_saturation_there_is_no_second_prompt() -> None:
    def first(**limits: int) -> list[tuple[str, int, int]]:
        desk = desk_with(None, **limits)
        for number in range(3):
            desk.submit(prompt(number, 24))
        return chunks(desk.schedule())

    assert first(local_token_budget=100) == [("r2/0", 0, 24), ("r3/0", 0, 16)], "40 tokens saturate it"
    assert first(local_token_budget=30) == [("r2/0", 0, 24), ("r3/0", 0, 4)], "and no odd rest of a block"


def test_preempted_choices_are_recomputed_before_any_prompt() -> None:
    # Two running choices fill 4 blocks of 5; at 9 tokens each needs a third.
    desk = Bench(5, COST, local_token_budget=16)
    short = replace(LONG, max_tokens=10)
    old, young = (desk.submit(prompt(n, 6), short, pulled=True) for n in (1, 2))
    for request in (old, young):
        desk.receive(request, (9,))
    desk.submit(prompt(3, 4), short, ttft_due_s=0.1)
    for _ in range(3):
        step(desk, 0.0)
    assert young.preemptions + old.preemptions == 1
    desk.cancel(old)
    found = step(desk, 0.0)
    assert found[0][0] == "r2/0"


def test_what_is_queued_is_told_in_tokens_and_seconds() -> None:
    desk = desk_with(None)
    assert (desk.scheduler.queued_tokens, desk.scheduler.queued_s) == (0, 0.0)
    desk.submit(prompt(1, 40))
    desk.submit(prompt(2, 10))
    assert desk.scheduler.queued_tokens == 50
    assert desk.scheduler.queued_s == pytest.approx(0.050 + 0.020)
    # The short one's patience ends sooner: all of it, and what the budget leaves of the other.
    assert step(desk, 0.0) == [("r3/0", 0, 10), ("r2/0", 0, 20)]
    assert desk.scheduler.queued_tokens == 20
    assert desk.scheduler.queued_s == pytest.approx(0.030)
    step(desk, 0.0)
    assert (desk.scheduler.queued_tokens, desk.scheduler.queued_s) == (0, 0.0)


# ── runs of several steps ────────────────────────────────────────────────────────────────────────────────────────────


def run_length(desk: Bench) -> int:
    desk.schedule_run()
    return desk.repeat.max_steps if desk.repeat is not None else 1


def test_a_run_lasts_as_long_as_the_choices_would_be_chosen_alike() -> None:
    assert run_length(desk_with(None, rows=3)) == 16
    assert run_length(desk_with(1.0, rows=3)) == 16
    assert run_length(desk_with(0.014, rows=3)) == 16, "13 ms a step, and 95 % of 14 are enough"
    assert run_length(desk_with(0.0135, rows=3)) == 1, "at most 12.8 ms: somebody must be left out now and then"


def test_a_run_ends_before_its_steps_become_too_long() -> None:
    # Each step reads three tokens more, which takes 0.3 ms.
    cost = replace(COST, context_s=1e-4)
    desk = Bench(200, cost, max_steps=16)
    for number in range(3):
        desk.receive(desk.submit(prompt(number, 4), LONG, pulled=True, tpot_s=0.0165), (9,))
    # 14.5 ms the first, and 15.675 is the limit: the fourth takes 15.4, the fifth 15.7.
    assert run_length(desk) == 4


def test_nothing_is_repeated_while_a_local_prompt_waits() -> None:
    desk = desk_with(0.012)
    desk.submit(prompt(1, 12))
    assert run_length(desk) == 1
