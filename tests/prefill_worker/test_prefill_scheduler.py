"""The prefill scheduler driven by hand: schedule, a made-up forward pass, complete."""

from __future__ import annotations

import pytest

from engine.batch import Sampled, StepOutput
from engine.block_pool import BlockPool
from engine.errors import InvalidArgument, Overloaded
from prefill_worker.config import PrefillConfig
from prefill_worker.job import Job
from prefill_worker.scheduler import Finished, PrefillBatch, PrefillScheduler
from tests.emulated import call

BLOCK = 4


def make(num_blocks: int = 8, **limits: int) -> PrefillScheduler:
    return PrefillScheduler(BlockPool(num_blocks, BLOCK), PrefillConfig(**{"token_budget": 8, **limits}))


def job(key: str, tokens: int, deadline_s: float | None = None, first: int = 0) -> Job:
    """Prompts with different `first` tokens share no prefix."""
    return Job(key, call([first, *range(1, tokens)]), 0.0, deadline_s)


def finish(scheduler: PrefillScheduler, batch: PrefillBatch) -> list[Finished]:
    ends = [chunk.end == len(chunk.job.call.token_ids) for chunk in batch.chunks]
    return scheduler.complete(batch, StepOutput(tuple((Sampled(1),) if end else () for end in ends)))


def spans(batch: PrefillBatch | None) -> list[tuple[str, int, int]]:
    assert batch is not None
    return [(chunk.job.key, chunk.start, chunk.end) for chunk in batch.chunks]


def test_a_long_prompt_runs_in_chunks_that_end_on_blocks() -> None:
    scheduler = make(token_budget=7)
    scheduler.arrive(job("a", 15), 0.0)
    seen = []
    while (batch := scheduler.schedule(0.0)) is not None:
        seen += spans(batch)
        finished = finish(scheduler, batch)
    assert seen == [("a", 0, 4), ("a", 4, 8), ("a", 8, 15)]
    assert [done.job.key for done in finished] == ["a"]


def test_a_second_prompt_gets_what_the_first_leaves_of_the_budget() -> None:
    scheduler = make(max_batch_prompts=2)
    scheduler.arrive(job("a", 3, first=1), 0.0)
    scheduler.arrive(job("b", 9, first=2), 0.0)
    assert spans(scheduler.schedule(0.0)) == [("a", 0, 3), ("b", 0, 4)]


def test_the_prompt_with_the_least_slack_goes_first() -> None:
    scheduler = make()
    scheduler.arrive(job("patient", 4, first=1), 0.0)
    scheduler.arrive(job("late", 4, deadline_s=0.03, first=2), 0.0)
    scheduler.arrive(job("urgent", 4, deadline_s=0.01, first=3), 0.0)
    order = []
    while (batch := scheduler.schedule(0.0)) is not None:
        order += [key for key, _, _ in spans(batch)]
        finish(scheduler, batch)
    assert order == ["urgent", "late", "patient"]


def test_a_short_prompt_passes_a_long_one_between_chunks() -> None:
    scheduler = make(num_blocks=16)
    scheduler.arrive(job("document", 40, first=1), 0.0)
    first = scheduler.schedule(0.0)
    assert first is not None
    scheduler.arrive(job("question", 4, first=2), 0.01)
    finish(scheduler, first)
    second = scheduler.schedule(0.01)
    assert spans(second) == [("question", 0, 4)]
    assert second is not None
    assert [done.job.key for done in finish(scheduler, second)] == ["question"]
    assert spans(scheduler.schedule(0.02)) == [("document", 8, 16)]


def test_a_long_prompt_that_has_waited_is_not_passed_any_more() -> None:
    scheduler = make(num_blocks=16)
    scheduler.arrive(job("document", 40, first=1), 0.0)
    late = Job("question", call(4), 1.0, None)
    scheduler.arrive(late, 1.0)
    assert spans(scheduler.schedule(1.0)) == [("document", 0, 8)]


def test_finished_prompts_hold_the_pool_until_their_streams_end() -> None:
    # 4 blocks: "a" takes 3 of them and keeps them when done, so "b" waits; nobody overtakes it.
    scheduler = make(num_blocks=4, token_budget=16)
    scheduler.arrive(job("a", 12, first=1), 0.0)
    batch = scheduler.schedule(0.0)
    assert batch is not None
    scheduler.arrive(job("b", 8, first=2), 0.0)
    scheduler.arrive(Job("c", call(1), 1.0, None), 1.0)
    finish(scheduler, batch)
    assert scheduler.schedule(0.0) is None
    scheduler.depart("a")
    assert spans(scheduler.schedule(0.0)) == [("b", 0, 8)]


def test_a_job_that_leaves_while_it_runs_keeps_its_blocks_until_the_step_ends() -> None:
    scheduler = make()
    scheduler.arrive(job("a", 8), 0.0)
    batch = scheduler.schedule(0.0)
    assert batch is not None
    scheduler.depart("a")
    assert scheduler.pool.owners == ("a",), "freed under a running forward pass"
    assert finish(scheduler, batch) == []
    assert scheduler.schedule(0.0) is None
    assert scheduler.pool.owners == ()
    scheduler.pool.check()


@pytest.mark.parametrize("state", ["waiting", "running", "done"])
def test_leaving_in_any_state_frees_everything(state: str) -> None:
    scheduler = make(token_budget=4)
    scheduler.arrive(job("a", 8), 0.0)
    steps = {"waiting": 0, "running": 1, "done": 2}[state]
    for _ in range(steps):
        batch = scheduler.schedule(0.0)
        assert batch is not None
        finish(scheduler, batch)
    scheduler.depart("a")
    scheduler.release()
    assert scheduler.pool.owners == ()
    assert (scheduler.waiting_count, scheduler.running_count, scheduler.queued_tokens) == (0, 0, 0)
    scheduler.pool.check()


def test_a_cached_prefix_is_not_computed_again() -> None:
    scheduler = make(token_budget=32)
    for key in ("a", "b"):
        scheduler.arrive(job(key, 10), 0.0)
        batch = scheduler.schedule(0.0)
        assert batch is not None
        last = spans(batch)
        finish(scheduler, batch)
    assert last == [("b", 8, 10)]


def test_what_can_never_fit_is_refused_and_what_is_too_much_is_overload() -> None:
    scheduler = make(num_blocks=2, max_queued=1)
    with pytest.raises(InvalidArgument, match="prompt: got '9 tokens', expected at most 8 on this worker"):
        scheduler.arrive(job("a", 9), 0.0)
    scheduler.arrive(job("b", 8), 0.0)
    with pytest.raises(Overloaded, match="1 prompts wait for prefill"):
        scheduler.arrive(job("c", 1), 0.0)
