"""Scheduling while a step is under way, by hand: who gets a row, what becomes of it, and when blocks go back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from decode_worker.flight import DecodeBatch
from decode_worker.stream import Delta, Done
from engine.batch import PENDING_TOKEN
from engine.request import FinishReason
from engine.sampling import SamplingParams
from tests.decode_worker.by_hand import BLOCK, EOS, GREEDY, MAX_CONTEXT, Bench

PROMPT = (1, 2, 3, 4, 5, 6)
PENALISED = replace(GREEDY, frequency_penalty=0.5)


def bench(num_blocks: int = 32, **limits: int) -> Bench:
    return Bench(num_blocks, **limits)


def rows_of(batch: DecodeBatch | None) -> list[tuple[str, int, int | None]]:
    """Name, position and followed draw of each row."""
    assert batch is not None
    return [(row.seq_id, row.start, row.follows) for row in batch.batch.rows]


def started(desk: Bench, count: int = 1, params: SamplingParams = GREEDY) -> list:
    """So many requests whose first token is 9, with a step under way that computes it."""
    requests = [desk.submit((*PROMPT[:-1], 7 + number), params, pulled=True) for number in range(count)]
    for request in requests:
        desk.receive(request, (9,) * params.n)
    desk.schedule()
    return requests


def finish(desk: Bench) -> None:
    """Lets every step draw the end of its sequences, until nothing is left."""
    while desk.under_way or desk.schedule():
        names = [row.seq_id for batch in desk.under_way for row in batch.batch.rows]
        desk.complete({name: [EOS] * 8 for name in names})
    desk.schedule()
    desk.pool.check()
    assert desk.scheduler.is_empty
    assert not desk.pool.owners


def test_a_running_choice_follows_the_draw_under_way():
    desk = bench()
    started(desk, 3)
    batch = desk.schedule()
    assert rows_of(batch) == [("r1/0", 7, 0), ("r2/0", 7, 1), ("r3/0", 7, 2)]
    assert {row.token_ids for row in batch.batch.rows} == {(PENDING_TOKEN,)}
    assert [row.sample.step for row in batch.batch.rows] == [2, 2, 2]
    desk.complete({"r1/0": [20], "r2/0": [21], "r3/0": [22]})
    events = desk.complete({"r1/0": [30], "r2/0": [31], "r3/0": [32]})
    assert [event.tokens[0].token_id for _, event in events] == [30, 31, 32]
    assert [request.lead.token_ids[-3:] for request, _ in events] == [[9, 20, 30], [9, 21, 31], [9, 22, 32]]
    finish(desk)


def test_draws_are_numbered_over_rows_and_choices():
    desk = bench()
    forked = desk.submit(PROMPT, replace(GREEDY, n=3, max_tokens=1))
    single = desk.submit((*PROMPT, 8))
    assert rows_of(desk.schedule()) == [("r1/0", 0, None), ("r2/0", 0, None)]
    # Three draws belong to the first row, and end there; the second row's is number 3.
    assert rows_of(desk.schedule()) == [("r2/0", 7, 3)]
    desk.complete({"r1/0": [5, 6, 7], "r2/0": [8]})
    assert [choice.token_ids[-1] for choice in forked.choices] == [5, 6, 7]
    assert single.lead.token_ids[-1] == 8
    finish(desk)


def test_what_follows_the_end_of_a_sequence_is_passed_over_and_never_cached():
    desk = bench()
    # Six prompt tokens, the first one drawn: the end of sequence would complete the second block.
    (request,) = started(desk)
    assert rows_of(desk.schedule()) == [("r1/0", 7, 0)]
    events = desk.complete({"r1/0": [EOS]})
    assert [type(event) for _, event in events] == [Delta, Done]
    assert events[0][1].finish_reason is FinishReason.STOP
    held = set(desk.pool.table("r1/0"))
    assert desk.schedule() is None
    assert held <= desk.held(), "its blocks are still being written"
    assert desk.complete({"r1/0": [33]}) == []
    assert not desk.pool.owners, "and go back when that step has ended"
    assert desk.pool.lookup((*request.lead.token_ids, 1)) == BLOCK
    finish(desk)


def test_a_choice_that_has_ended_is_passed_over_while_the_others_go_on():
    desk = bench()
    (request,) = started(desk, params=replace(GREEDY, n=2))
    desk.schedule()
    (_, ended), (_, going) = desk.complete({"r1/0": [EOS], "r1/1": [8]})
    assert (ended.finish_reason, going.finish_reason) == (FinishReason.STOP, None)
    assert rows_of(desk.schedule()) == [("r1/1", 8, 1)]
    (only,) = desk.complete({"r1/0": [33], "r1/1": [8]})
    assert (only[1].choice, request.lead.token_ids[-1]) == (1, EOS)
    assert not desk.pool.owns("r1/0")
    finish(desk)


@pytest.mark.parametrize("stop", [{"max_tokens": 2}, {"max_tokens": 100}], ids=["max_tokens", "max_context"])
def test_a_choice_that_surely_ends_gets_no_row(stop: dict[str, int]):
    desk = bench(64)
    length = 6 if stop["max_tokens"] == 2 else MAX_CONTEXT - 2
    request = desk.submit(tuple(range(1, length + 1)), replace(GREEDY, **stop), pulled=True)
    desk.receive(request, (9,))
    desk.schedule()
    assert desk.schedule() is None
    events = desk.complete({"r1/0": [8]})
    assert events[0][1].finish_reason is FinishReason.LENGTH
    finish(desk)


def test_penalties_wait_for_their_history():
    desk = bench()
    plain, penalised = desk.submit(PROMPT, pulled=True), desk.submit((*PROMPT, 7), PENALISED, pulled=True)
    for request in (plain, penalised):
        desk.receive(request, (9,))
    desk.schedule()
    assert desk.schedule() is None, "nobody is scheduled ahead: the penalised one would fall behind"
    desk.complete({"r1/0": [8], "r2/0": [8]})
    batch = desk.schedule()
    assert rows_of(batch) == [("r1/0", 7, None), ("r2/0", 8, None)]
    assert list(batch.batch.rows[1].sample.output_ids) == [9, 8]
    desk.cancel(penalised)
    assert rows_of(desk.schedule()) == [("r1/0", 8, 0)], "the other one goes on alone"
    finish(desk)


def test_a_penalised_choice_that_joins_meanwhile_needs_no_waiting():
    desk = bench()
    started(desk)
    desk.receive(desk.submit((*PROMPT, 7), PENALISED, pulled=True), (9,))
    assert rows_of(desk.schedule()) == [("r1/0", 7, 0), ("r2/0", 7, None)]
    finish(desk)


def test_a_prompt_goes_on_chunk_by_chunk_and_straight_into_decoding():
    desk = bench(local_token_budget=8)
    prompt = tuple(range(1, 19))
    request = desk.submit(prompt)
    assert rows_of(desk.schedule()) == [("r1/0", 0, None)]
    assert rows_of(desk.schedule()) == [("r1/0", 8, None)]
    assert desk.complete({}) == []
    assert rows_of(desk.schedule()) == [("r1/0", 16, None)]
    desk.complete({})
    assert rows_of(desk.schedule()) == [("r1/0", 18, 0)], "the prompt's end is still under way"
    assert request.lead.output_count == 0
    desk.complete({"r1/0": [7]})
    assert request.lead.token_ids == [*prompt, 7]
    desk.complete({"r1/0": [8]})
    assert request.lead.token_ids == [*prompt, 7, 8]
    finish(desk)


def test_a_prompt_of_several_choices_is_forked_before_they_go_on():
    desk = bench()
    started(desk)
    desk.submit((11, 12, 13, 14, 15, 16, 17), replace(GREEDY, n=2))
    assert rows_of(desk.schedule()) == [("r1/0", 7, 0), ("r2/0", 0, None)]
    desk.complete({"r1/0": [8]})
    assert desk.schedule() is None
    desk.complete({"r1/0": [8], "r2/0": [10, 11]})
    batch = desk.schedule()
    assert rows_of(batch) == [("r1/0", 8, None), ("r2/0", 7, None), ("r2/1", 7, None)]
    assert len(batch.batch.copies) == 1
    finish(desk)


def test_whoever_joins_meanwhile_gets_a_row():
    desk = bench()
    started(desk)
    desk.receive(desk.submit((*PROMPT, 7), pulled=True), (9,))
    desk.submit((8, 8, 8))
    assert rows_of(desk.schedule()) == [("r1/0", 7, 0), ("r2/0", 7, None), ("r3/0", 0, None)]
    finish(desk)


def test_a_batch_has_no_more_rows_than_without():
    desk = bench(max_batch=2)
    started(desk, 4, replace(GREEDY, max_tokens=3))
    assert rows_of(desk.schedule()) == [("r1/0", 7, 0), ("r2/0", 7, 1)]
    desk.complete({"r1/0": [8], "r2/0": [8]})
    assert rows_of(desk.schedule()) == [("r3/0", 6, None), ("r4/0", 6, None)], "the first two surely end"
    finish(desk)


def test_without_blocks_nothing_is_scheduled_ahead_and_then_the_youngest_gives_way():
    # Two prompts of 8 with a token each have 3 blocks of 4 tokens each: full after four more.
    desk = bench(6)
    params = replace(GREEDY, max_tokens=12)
    old, young = (desk.submit(tuple(range(first, first + 8)), params, pulled=True) for first in (10, 20))
    for request in (old, young):
        desk.receive(request, (9,))
    desk.schedule()
    for _ in range(3):
        assert desk.schedule() is not None
        desk.complete({"r1/0": [8], "r2/0": [8]})
    before = desk.held()
    assert desk.schedule() is None
    assert desk.held() == before
    assert young.preemptions == 0
    desk.complete({"r1/0": [8], "r2/0": [8]})
    batch = desk.schedule()
    assert rows_of(batch) == [("r1/0", 12, None)]
    assert (old.preemptions, young.preemptions) == (0, 1)
    finish(desk)


def test_copies_of_a_forked_tail_are_reckoned_with():
    # r1 has two blocks of five, the prompt that joins another two, and its three choices need two for copies.
    desk = bench(5)
    params = replace(GREEDY, max_tokens=10)
    started(desk, params=params)
    desk.receive(desk.submit((11, 12, 13, 14, 15, 16), replace(params, n=3), pulled=True), (9, 9, 9))
    assert desk.schedule() is None
    desk.complete({"r1/0": [8]})
    batch = desk.schedule()
    assert rows_of(batch) == [("r1/0", 7, None), ("r2/0", 6, None), ("r2/1", 6, None)]
    assert len(batch.batch.copies) == 1
    finish(desk)


def test_a_cancelled_requests_blocks_wait_for_both_steps():
    desk = bench()
    first, second = started(desk, 2)
    desk.schedule()
    desk.cancel(first)
    named = set(desk.pool.table("r1/0"))
    assert rows_of(desk.under_way[1]) == [("r1/0", 7, 0), ("r2/0", 7, 1)]
    events = desk.complete({"r1/0": [8], "r2/0": [8]})
    assert [request for request, _ in events] == [second]
    assert rows_of(desk.schedule()) == [("r2/0", 8, 1)]
    assert named <= desk.held()
    desk.complete({"r1/0": [8], "r2/0": [8]})
    assert not desk.pool.owns("r1/0")
    assert not named & desk.held() - set(desk.pool.table("r2/0"))
    finish(desk)


def test_blocks_under_way_are_not_granted():
    # The waiting prompt needs what the cancelled one still holds.
    desk = bench(6)
    (running,) = started(desk, params=replace(GREEDY, max_tokens=10))
    big = desk.submit(tuple(range(30, 50)), replace(GREEDY, max_tokens=4), pulled=True)
    desk.scheduler.start_pulls()
    desk.scheduler.began(big, 0, 0)
    desk.schedule()
    desk.cancel(running)
    assert desk.scheduler.grant(desk.now) == []
    desk.complete({"r1/0": [8]})
    assert desk.scheduler.grant(desk.now) == [], "a step that names them is still to run"
    assert desk.schedule() is None
    desk.complete({"r1/0": [8]})
    assert desk.scheduler.grant(desk.now) == [big]
    desk.arrive(big, (9,))
    finish(desk)


def test_the_source_of_a_copy_stays_until_it_is_copied():
    """With room for one row, only the first of two choices copies the tail that they share. The step that does so names
    the tail for nobody: its other reader is not in it."""
    desk = bench(max_batch=1)
    request = desk.submit(PROMPT, replace(GREEDY, n=2), pulled=True)
    desk.receive(request, (9, 9))
    desk.submit((8, 8, 8))
    ((tail, _),) = desk.schedule().batch.copies
    desk.cancel(request)
    assert rows_of(desk.schedule()) == [("r2/0", 3, 1)]
    assert tail in desk.held()
    desk.complete({"r1/0": [8], "r2/0": [8]})
    assert tail not in desk.held()
    finish(desk)


def test_whoever_left_before_a_copy_was_scheduled_waits_for_it():
    """A pulled prompt whose lead ended with its first token: the lead leaves, its blocks are forked by the others, and
    these copy its tail in the next step. The lead must not go before that step, which does not name it."""
    desk = bench()
    started(desk)
    forked = desk.submit((*PROMPT, 7), replace(GREEDY, n=2), pulled=True)
    desk.receive(forked, (EOS, 9))
    tail = desk.pool.table("r2/0")[-1]
    batch = desk.schedule()
    assert rows_of(batch) == [("r1/0", 7, 0), ("r2/1", 7, None)]
    assert [source for source, _ in batch.batch.copies] == [tail]
    desk.complete({"r1/0": [8]})
    assert tail in desk.held(), "the copy has not run yet"
    desk.complete({"r1/0": [8], "r2/1": [8]})
    assert not desk.pool.owns("r2/0")
    finish(desk)


def test_times_are_those_of_the_steps_not_of_their_scheduling():
    desk = bench()
    local = desk.submit((1, 2, 3), replace(GREEDY, max_tokens=3))
    desk.schedule()
    later = desk.submit((4, 5, 6), replace(GREEDY, max_tokens=3))
    desk.schedule()
    assert later.times.compute_started_s is None, "it is scheduled, and waits for a step under way"
    desk.complete({"r1/0": [7]})
    assert (local.times.first_token_s, local.times.first_step_s) == (1.0, 1.0)
    assert later.times.compute_started_s == 1.0
    desk.schedule()
    desk.complete({"r1/0": [7], "r2/0": [7]})
    assert (later.times.first_token_s, later.times.first_step_s) == (2.0, 2.0)
    desk.schedule()
    desk.complete({"r1/0": [7], "r2/0": [7]})
    receipts = [request.receipt() for request in (local, later)]
    assert [receipt.prefill_queue_s for receipt in receipts] == [0.0, 1.0]
    assert [receipt.prefill_s for receipt in receipts] == [1.0, 1.0]
    assert [receipt.decode_queue_s for receipt in receipts] == [0.0, 0.0]
    finish(desk)


def test_at_most_two_steps_in_order():
    desk = bench()
    started(desk)
    desk.schedule()
    with pytest.raises(AssertionError, match="nobody can follow two steps under way"):
        desk.schedule()
    first, second = desk.under_way
    with pytest.raises(AssertionError, match="a step was completed before an older one"):
        desk.scheduler.complete(second, [desk.memory.execute(first, {"r1/0": [8]})], 1.0)


def test_nobody_is_demoted_while_a_step_is_under_way():
    desk = bench()
    started(desk)
    with pytest.raises(AssertionError, match="somebody may have blocks after the step under way"):
        desk.scheduler.make_room(0.0)
