"""Which prompts the prefill worker computes next. Pure: values in, values out, `now` is an argument.

A job's life, and what it holds in the block pool:

    WAITING ──▶ RUNNING ──▶ DONE ──▶ (gone)
    nothing     all blocks   all blocks, pinned for the stream that sends them
       └───────────┴──────────▶ (gone)    its stream was closed: cancel, deadline, a dead peer

Every step runs chunks of the most urgent jobs (engine/urgency.py). A job that is more urgent than those that run starts
at once and passes them, so a short question does not wait for a long document; patience ends, so nobody starves. With a
cost model a step is

- filled up with further prompts only below the saturation length: beyond it each gets only the sum of all;
- short enough for a prompt that it completes to meet its objective: the further chunks are cut for that;
- short enough, when it is the turn of one that is late or has no objective, that the most urgent one can still start in
  time after it.

A job takes all blocks of its prompt when it starts, so a running job never waits for memory. When there are too few, it
waits for streams to end: finished prompts whose KV is not yet pulled hold the pool, and that is the back-pressure.
`depart` only notes who leaves; blocks go back in `schedule`, between steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.batch import Batch, Row, Sampled, SampleSpec, StepOutput
from engine.block_pool import BlockPool
from engine.chunking import longest_chunk, next_chunk
from engine.errors import InvalidArgument, Overloaded
from engine.slack_queue import SlackQueue
from engine.step_cost import StepCost, StepWork
from engine.urgency import LATE_TURN, prompt_s, urgency
from prefill_worker.config import PrefillConfig
from prefill_worker.job import Job, JobState, Turn

# A step that must end in time is planned with this much more: predictions err by some percent.
CAUTION = 1.05
# A prompt with tokens of a worker that was lost is due after so many times what it takes.
RESUMED_WITHIN = 2.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a prompt in a running batch: tokens [start, end) of `job`, whose blocks are `block_ids`."""

    job: Job
    start: int
    end: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """What to run, what it is made of (in row order), and which jobs start with it."""

    batch: Batch
    chunks: tuple[Chunk, ...]
    started: tuple[Job, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """A prompt is computed: its first token, one per choice, or why there is none."""

    job: Job
    sampled: tuple[Sampled, ...]
    problem: InvalidArgument | None = None


class PrefillScheduler:
    """Admits prompts while the pool has room, in order of slack, and cuts them into chunks under the token budget.

    `queued_tokens`: prompt tokens accepted and not yet computed; `queued_s`: what they take by the cost model, or 0.0.
    """

    def __init__(self, pool: BlockPool, config: PrefillConfig, cost: StepCost | None = None) -> None:
        self.pool = pool
        self._config = config
        self._cost = cost
        self._waiting: SlackQueue[Job] = SlackQueue()
        self._running: dict[str, Job] = {}
        self._done: dict[str, Job] = {}
        self._leaving: list[str] = []
        self._steps = 0
        self.queued_tokens = 0
        self._left_s = 0.0

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def queued_s(self) -> float:
        return 0.0 if self._cost is None else self._left_s

    @property
    def is_empty(self) -> bool:
        """Whether it knows no job: neither one to compute nor one whose KV is yet to be fetched."""
        return not (self._waiting or self._running or self._done)

    @property
    def is_starved(self) -> bool:
        """Whether prompts wait for blocks that nobody is here to give back. Ask after `schedule` has found nothing."""
        return bool(self._waiting) and not (self._running or self._done)

    def waiting_keys(self) -> list[str]:
        """Of the jobs that have no block yet."""
        return [job.key for job in self._waiting]

    def arrive(self, job: Job, now: float) -> None:
        """Raises InvalidArgument for a prompt that can never fit, Overloaded when too many wait."""
        need = self.pool.blocks_for(job.prompt_tokens)
        if need > self.pool.num_blocks:
            limit = self.pool.num_blocks * self.pool.block_size
            raise InvalidArgument("prompt", f"{job.prompt_tokens} tokens", f"at most {limit} on this worker")
        if len(self._waiting) >= self._config.max_queued:
            raise Overloaded(f"{len(self._waiting)} prompts wait for prefill")
        # A guess: by the time it starts, more may be cached, or less.
        cached = self.pool.lookup(job.call.token_ids, job.call.salt) if self._cost is not None else 0
        self.queued_tokens += job.prompt_tokens
        self._measure(job, cached)
        is_predicted = self._cost is not None
        # Whose client reads already is due as soon as it can be, and so before nearly all others.
        due_s = now + RESUMED_WITHIN * job.left_s if job.call.prompt_tokens and is_predicted else job.ttft_due_s
        job.urgency = urgency(job.arrived_s, due_s, job.deadline_s, job.left_s, is_predicted=is_predicted)
        self._waiting.push(
            job.key,
            job,
            now,
            job.urgency.patient_until_s,
            objective_s=job.urgency.due_s,
            late_after_s=job.urgency.late_after_s(job.left_s),
        )

    def depart(self, key: str) -> None:
        """The job's stream has ended, however: all it holds goes back at the next `schedule`."""
        job = self._waiting.remove(key)
        if job is None:
            self._leaving.append(key)
        else:
            self._forget(job)

    def release(self) -> None:
        """Gives back what departed jobs held. Only between steps."""
        for key in self._leaving:
            running = self._running.pop(key, None)
            if running is not None:
                self._forget(running)
            if (running or self._done.pop(key, None)) is not None:
                self.pool.free(key)
        self._leaving.clear()

    def schedule(self, now: float) -> PrefillBatch | None:
        """The next batch, None when there is nothing to compute. Call only between steps."""
        self.release()
        if not self._waiting and not self._running:
            return None
        self._steps += 1
        turn = Turn(
            self._running.values(),
            self._waiting,
            lambda job: self._start(job, now),
            now,
            is_late_turn=self._steps % LATE_TURN == 0,
        )
        chunks: list[Chunk] = []
        budget = self._config.token_budget
        while budget > 0 and (job := turn.take()) is not None:
            count = next_chunk(job.computed, job.prompt_tokens, budget, self.pool.block_size)
            count = self._short_enough(chunks, job, count, turn, now)
            end = job.computed + count
            # What is left is less than a block: a chunk that ended inside one would leave an odd rest.
            is_sliver = end < job.prompt_tokens and end % self.pool.block_size > 0
            if not count or (chunks and is_sliver):
                break
            chunks.append(Chunk(job, job.computed, end, self.pool.table(job.key)))
            if len(chunks) == self._config.max_batch_prompts:
                break
            budget -= count
            if self._cost is not None:
                computed = sum(chunk.end - chunk.start for chunk in chunks)
                budget = min(budget, self._cost.saturation_tokens - computed)
        if not chunks:
            assert not self._running, "running prompts must get a chunk in every step"
            return None
        batch = Batch(tuple(self._row(chunk) for chunk in chunks))
        return PrefillBatch(batch, tuple(chunks), tuple(turn.started))

    def complete(self, batch: PrefillBatch, out: StepOutput) -> list[Finished]:
        """Books a finished step; returns the prompts that it completed. Jobs that left meanwhile are passed over."""
        finished: list[Finished] = []
        for row, chunk, sampled in zip(batch.batch.rows, batch.chunks, out.sampled, strict=True):
            job = chunk.job
            self._advance(job, chunk.end)
            self.pool.seal(job.key, job.call.token_ids, chunk.end)
            if chunk.end == job.prompt_tokens:
                job.move(JobState.DONE)
                self._done[job.key] = self._running.pop(job.key)
                self._forget(job)
                if job.key not in self._leaving:
                    assert row.sample is not None, "a prompt's end draws"
                    finished.append(Finished(job, sampled, row.sample.problem(sampled)))
        return finished

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _start(self, job: Job, now: float) -> bool:
        """Gives a waiting job all its blocks. False when there are too few."""
        cached = self.pool.new(job.key, job.call.token_ids, job.call.salt)
        if self.pool.append(job.key, job.prompt_tokens - cached) is None:
            self.pool.free(job.key)
            return False
        job.move(JobState.RUNNING)
        job.cached = cached
        job.started_s = now
        self.pool.counts.looked_up(job.prompt_tokens, cached)
        self._advance(job, cached)
        self._running[job.key] = job
        return True

    def _short_enough(self, chunks: list[Chunk], job: Job, count: int, turn: Turn, now: float) -> int:
        """At most `count` tokens of `job` beside `chunks`: so many that the step is as short as it should be."""
        cost = self._cost
        if cost is None:
            return count
        before = tuple((chunk.end - chunk.start, chunk.start) for chunk in chunks)
        if chunks:
            ending = [chunk.job for chunk in chunks if chunk.end == chunk.job.prompt_tokens]
            end_s = min((other.urgency.due_s for other in ending if other.is_timely(now)), default=math.inf)
        else:
            end_s = math.inf if job.is_timely(now) else turn.latest_start_s()
        if end_s == math.inf:
            return count

        def is_short_enough(tokens: int) -> bool:
            step_s = cost.step_s(StepWork((*before, (tokens, job.computed))))
            return now + CAUTION * step_s <= end_s

        size = self.pool.block_size
        short = longest_chunk(job.computed, count, size, is_short_enough)
        return short if short or chunks else min(count, size - job.computed % size)

    def _measure(self, job: Job, computed: int) -> None:
        """Without a cost model a prompt's work stays what it was: an exact rest would not change the order much."""
        left_s = prompt_s(self._cost, job.prompt_tokens - (computed if self._cost is not None else 0), computed)
        self._left_s += left_s - job.left_s
        job.left_s = left_s

    def _advance(self, job: Job, computed: int) -> None:
        self.queued_tokens -= computed - job.computed
        job.computed = computed
        self._measure(job, computed)

    def _forget(self, job: Job) -> None:
        """Nothing more is computed of it."""
        self.queued_tokens -= job.prompt_tokens - job.computed
        self._left_s -= job.left_s
        job.left_s = 0.0
        if not self._waiting and not self._running:
            # Rounding does not add up over a worker's life.
            self._left_s = 0.0

    @staticmethod
    def _row(chunk: Chunk) -> Row:
        call = chunk.job.call
        sample = None
        if chunk.end == len(call.token_ids):
            count = call.prompt_count
            prompt_ids, output_ids = call.token_ids[:count], call.token_ids[count:]
            choices = tuple(range(call.params.n))
            sample = SampleSpec(call.params, call.seed, len(output_ids), choices, prompt_ids, output_ids)
        return Row(chunk.job.key, call.token_ids[chunk.start : chunk.end], chunk.start, chunk.block_ids, sample)
