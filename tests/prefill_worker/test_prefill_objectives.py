"""The prefill scheduler with a cost model, by hand: 2 ms a step, and 1 ms for every 20 tokens."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.batch import Sampled, StepOutput
from engine.block_pool import BlockPool
from engine.errors import Overloaded
from engine.step_cost import StepCost
from engine.urgency import WAY_BACK_S
from prefill_worker.config import PrefillConfig
from prefill_worker.job import Job, JobState
from prefill_worker.scheduler import CAUTION, PrefillBatch, PrefillScheduler
from tests.emulated import call
from tests.planning.linear_cost import LinearCost

BLOCK = 20


def make(saturation: int = 400, num_blocks: int = 200, **limits: int) -> PrefillScheduler:
    cost: StepCost = LinearCost(saturation_tokens=saturation)
    config = PrefillConfig(**{"token_budget": 400, "max_batch_prompts": 0, **limits})
    return PrefillScheduler(BlockPool(num_blocks, BLOCK), config, cost)


def arrive(scheduler: PrefillScheduler, key: str, tokens: int, due_s: float | None = None, now: float = 0.0) -> Job:
    """A prompt that shares nothing with others. It should be computed `due_s` from now; its token has a way to go."""
    ttft_due_s = None if due_s is None else due_s + WAY_BACK_S
    job = Job(key, call([hash(key) % 1000, *range(1, tokens)], ttft_due_s=ttft_due_s), now, None)
    scheduler.arrive(job, now)
    return job


def spans(batch: PrefillBatch | None) -> list[tuple[str, int, int]]:
    assert batch is not None
    return [(chunk.job.key, chunk.start, chunk.end) for chunk in batch.chunks]


def finish(scheduler: PrefillScheduler, batch: PrefillBatch | None) -> list[str]:
    assert batch is not None
    ends = [chunk.end == chunk.job.prompt_tokens for chunk in batch.chunks]
    out = StepOutput(tuple((Sampled(1),) if end else () for end in ends))
    return [finished.job.key for finished in scheduler.complete(batch, out)]


def test_the_earliest_objective_goes_first_and_those_without_one_last() -> None:
    scheduler = make(max_batch_prompts=1)
    for key, due_s in (("patient", None), ("later", 0.5), ("sooner", 0.2)):
        arrive(scheduler, key, 100, due_s)
    order = []
    for _ in range(3):
        batch = scheduler.schedule(0.0)
        order += [key for key, _, _ in spans(batch)]
        finish(scheduler, batch)
    assert order == ["sooner", "later", "patient"]


def test_who_cannot_be_in_time_goes_behind_who_can() -> None:
    scheduler = make(max_batch_prompts=1)
    # 1,000 tokens take 52 ms alone, so after 0.2 − 0.052 there is no hope.
    arrive(scheduler, "long", 1000, 0.2)
    arrive(scheduler, "short", 100, 0.3)
    assert spans(scheduler.schedule(0.147))[0][0] == "long"
    scheduler = make(max_batch_prompts=1)
    arrive(scheduler, "long", 1000, 0.2)
    arrive(scheduler, "short", 100, 0.3)
    assert spans(scheduler.schedule(0.149))[0][0] == "short"


def test_a_running_prompt_that_becomes_late_gives_way_and_is_not_forgotten() -> None:
    scheduler = make(max_batch_prompts=1)
    arrive(scheduler, "long", 1000, 0.2)
    first = scheduler.schedule(0.0)
    finish(scheduler, first)
    # The other 600 tokens would take 32 ms.
    arrive(scheduler, "short", 100, 0.1, now=0.18)
    batch = scheduler.schedule(0.18)
    assert spans(batch) == [("short", 0, 100)]
    finish(scheduler, batch)
    assert spans(scheduler.schedule(0.19)) == [("long", 400, 800)]


def test_a_late_prompt_gets_every_fourth_step_once_its_patience_is_over() -> None:
    scheduler = make(max_batch_prompts=1, num_blocks=2000)
    arrive(scheduler, "late", 100, 0.001)
    steps = []
    for step in range(8):
        # Always somebody else in time. The patience of 10 times 7 ms is over at 0.07 − 0.007.
        now = 0.02 * step
        arrive(scheduler, f"new{step}", 100, 1.0, now=now)
        batch = scheduler.schedule(now)
        steps += [key for key, _, _ in spans(batch)]
        finish(scheduler, batch)
    assert steps.index("late") == 7, "step number 4 came before its patience was over"


def test_a_late_one_s_turn_is_cut_such_that_the_urgent_one_can_start_in_time() -> None:
    def turn(due_s: float) -> list[tuple[str, int, int]]:
        scheduler = make(max_batch_prompts=1)
        for number in range(3):
            arrive(scheduler, f"first{number}", 20, 1.0)
            finish(scheduler, scheduler.schedule(0.0))
        arrive(scheduler, "late", 400, 0.001)
        # 100 tokens take 7 ms.
        arrive(scheduler, "urgent", 100, due_s, now=1.0)
        return spans(scheduler.schedule(1.0))

    def due(step_s: float) -> float:
        return 0.007 + CAUTION * step_s

    assert turn(due(0.023)) == [("late", 0, 400)], "22 ms, and 7 for the other: in time"
    assert turn(due(0.0211)) == [("late", 0, 380)], "21.1 ms are left for it"
    assert turn(due(0.0051)) == [("late", 0, 60)], "5.1 ms"
    assert turn(0.008) == [("late", 0, 20)], "never below a block"


def test_a_step_is_filled_up_below_the_saturation_length_only() -> None:
    def first_step(saturation: int, **limits: int) -> list[tuple[str, int, int]]:
        scheduler = make(saturation, **limits)
        for number in range(5):
            arrive(scheduler, f"r{number}", 100, 1.0)
        return spans(scheduler.schedule(0.0))

    assert first_step(300) == [(f"r{n}", 0, 100) for n in range(3)]
    assert first_step(350) == [*((f"r{n}", 0, 100) for n in range(3)), ("r3", 0, 40)], "whole blocks of it"
    assert first_step(300, max_batch_prompts=2) == [("r0", 0, 100), ("r1", 0, 100)]
    assert first_step(300, max_batch_prompts=1) == [("r0", 0, 100)]
    assert first_step(50) == [("r0", 0, 100)], "one prompt may be longer"
    assert first_step(900) == [(f"r{n}", 0, 100) for n in range(4)], "the token budget is the hard limit"


def test_a_prompt_that_ends_in_a_step_is_not_made_late_by_the_others_in_it() -> None:
    def first_step(due_s: float) -> list[tuple[str, int, int]]:
        scheduler = make()
        arrive(scheduler, "urgent", 100, due_s)
        arrive(scheduler, "other", 280, 1.0)
        return spans(scheduler.schedule(0.0))

    # Alone 7 ms, with 280 tokens more 21.
    assert first_step(CAUTION * 0.0211) == [("urgent", 0, 100), ("other", 0, 280)]
    assert first_step(CAUTION * 0.0151) == [("urgent", 0, 100), ("other", 0, 160)]
    assert first_step(0.0075) == [("urgent", 0, 100)]


def test_without_a_cost_model_no_limit_on_prompts_means_what_fits_the_budget() -> None:
    scheduler = PrefillScheduler(BlockPool(200, BLOCK), PrefillConfig(token_budget=250, max_batch_prompts=0))
    for number in range(4):
        arrive(scheduler, f"r{number}", 100, 1.0)
    assert spans(scheduler.schedule(0.0)) == [("r0", 0, 100), ("r1", 0, 100), ("r2", 0, 40)]
    assert scheduler.queued_s == 0.0


def test_what_is_queued_is_told_in_tokens_and_seconds() -> None:
    scheduler = make(max_batch_prompts=1)
    job = arrive(scheduler, "a", 500, 1.0)
    assert (scheduler.queued_tokens, scheduler.queued_s) == (500, pytest.approx(0.027))
    batch = scheduler.schedule(0.0)
    assert job.state is JobState.RUNNING
    finish(scheduler, batch)
    assert (scheduler.queued_tokens, scheduler.queued_s) == (100, pytest.approx(0.007))
    finish(scheduler, scheduler.schedule(0.0))
    assert (scheduler.queued_tokens, scheduler.queued_s) == (0, 0.0)
    # Its KV is cached now: all but the last of 25 blocks, whose last token is computed again.
    same = Job("again", job.call, 0.0, None)
    scheduler.arrive(same, 0.0)
    assert (scheduler.queued_tokens, scheduler.queued_s) == (500, pytest.approx(0.003))
    assert spans(scheduler.schedule(0.0)) == [("again", 480, 500)]
    assert scheduler.queued_tokens == 20


class Scheduling(RuleBasedStateMachine):
    """Prompts come and go in any order; the books are right at every moment, and in the end everybody is served."""

    @initialize(
        saturation=st.sampled_from([30, 100, 400]),
        budget=st.sampled_from([25, 100]),
        prompts=st.sampled_from([0, 1, 3]),
    )
    def begin(self, saturation: int, budget: int, prompts: int) -> None:
        self.desk = make(saturation, 24, token_budget=budget, max_batch_prompts=prompts, max_queued=8)
        self.jobs: list[Job] = []
        self.under_way: PrefillBatch | None = None
        self.now = 0.0
        self.count = 0

    @rule(
        tokens=st.integers(1, 240), prefix=st.sampled_from([0, 1, 2]), due_s=st.sampled_from([None, 0.001, 0.02, 1.0])
    )
    def arrive(self, tokens: int, prefix: int, due_s: float | None) -> None:
        asked = call([prefix, *range(1, tokens)], ttft_due_s=due_s)
        self.count += 1
        job = Job(f"r{self.count}", asked, self.now, None)
        try:
            self.desk.arrive(job, self.now)
            self.jobs.append(job)
        except Overloaded:
            assert self.desk.waiting_count == 8

    @rule(passed_s=st.sampled_from([0.001, 0.01, 0.1]))
    def step(self, passed_s: float) -> None:
        if self.under_way is None:
            self.under_way = self.desk.schedule(self.now)
            return
        chunks, self.now = self.under_way.chunks, self.now + passed_s
        ends = [chunk.job for chunk in chunks if chunk.end == chunk.job.prompt_tokens]
        finish(self.desk, self.under_way)
        self.under_way = None
        assert all(job.state is JobState.DONE for job in ends)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def depart(self, data: st.DataObject) -> None:
        self.desk.depart(self.jobs.pop(data.draw(st.integers(0, len(self.jobs) - 1))).key)

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "desk"):
            return
        self.desk.pool.check()
        if self.under_way is None:
            self.desk.release()
            left = [job for job in self.jobs if job.state is not JobState.DONE]
            assert self.desk.queued_tokens == sum(job.prompt_tokens - job.computed for job in left)
            assert self.desk.queued_s == pytest.approx(sum(job.left_s for job in left), abs=1e-9)

    def teardown(self) -> None:
        if not hasattr(self, "desk"):
            return
        for _ in range(2000):
            self.step(0.01)
            for job in [job for job in self.jobs if job.state is JobState.DONE]:
                self.jobs.remove(job)
                self.desk.depart(job.key)
            if not self.jobs and self.under_way is None:
                break
        assert not self.jobs, f"{[job.key for job in self.jobs]} are never served"
        self.desk.release()
        assert self.desk.is_empty
        assert not self.desk.pool.owners
        assert self.desk.pool.available_count == self.desk.pool.num_blocks


TestScheduling = Scheduling.TestCase
