"""Which prompts the prefill worker computes next. Pure: values in, values out, `now` is an argument.

A job's life, and what it holds in the block pool:

    WAITING ──▶ RUNNING ──▶ DONE ──▶ (gone)
    nothing     all blocks   all blocks, pinned for the stream that sends them
       └───────────┴──────────▶ (gone)    its stream was closed: cancel, deadline, a dead peer

Every step runs chunks of the jobs with the least slack. A job with less slack than those that run starts at once and
passes them, so a short question does not wait for a long document; waiting costs slack, so nobody starves.

A job takes all blocks of its prompt when it starts, so a running job never waits for memory. When there are too few, it
waits for streams to end: finished prompts whose KV is not yet pulled hold the pool, and that is the back-pressure.
`depart` only notes who leaves; blocks go back in `schedule`, between steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from engine.batch import Batch, Row, Sampled, SampleSpec, StepOutput
from engine.block_pool import BlockPool
from engine.chunking import next_chunk
from engine.errors import InvalidArgument, Overloaded
from engine.slack_queue import SlackQueue
from kvtransfer.transport import PrefillCall
from prefill_worker.config import PrefillConfig

# How long a prompt may take, queue and all, as a multiple of what it takes alone: equal patience per token means equal
# slowdown for short and long prompts. A deadline that comes earlier counts instead.
STRETCH = 10.0
# What a prompt token takes, for comparing prompts with one another; an exact figure would not change their order much.
TOKEN_S = 0.001


class JobState(Enum):
    WAITING = auto()
    RUNNING = auto()
    DONE = auto()


LEGAL_MOVES = {(JobState.WAITING, JobState.RUNNING), (JobState.RUNNING, JobState.DONE)}


@dataclass(slots=True, eq=False)
class Job:
    """One prompt on its way through. `key` is unique per stream: a retried request may overlap its predecessor.

    Times are seconds of the loop's clock. `computed` counts tokens whose KV is in the pool, cached ones included.
    """

    key: str
    call: PrefillCall
    arrived_s: float
    deadline_s: float | None
    state: JobState = JobState.WAITING
    cached: int = 0
    computed: int = 0
    started_s: float = 0.0

    @property
    def work_s(self) -> float:
        """What the prompt takes alone."""
        return len(self.call.token_ids) * TOKEN_S

    @property
    def due_s(self) -> float:
        """When its first token should be there: by its deadline, or when its patience ends."""
        patient_s = self.arrived_s + STRETCH * self.work_s
        return patient_s if self.deadline_s is None else min(patient_s, self.deadline_s)

    @property
    def latest_start_s(self) -> float:
        """When it would have to start, alone, to be in time. The queue orders by the same."""
        return self.due_s - self.work_s

    def move(self, state: JobState) -> None:
        assert (self.state, state) in LEGAL_MOVES, f"{self.key} cannot go from {self.state.name} to {state.name}"
        self.state = state


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
    """A prompt is computed: its first token, one per choice."""

    job: Job
    sampled: tuple[Sampled, ...]


class PrefillScheduler:
    """Admits prompts while the pool has room, in order of slack, and cuts them into chunks under the token budget."""

    def __init__(self, pool: BlockPool, config: PrefillConfig) -> None:
        self.pool = pool
        self._config = config
        self._waiting: SlackQueue[Job] = SlackQueue()
        self._running: dict[str, Job] = {}
        self._done: dict[str, Job] = {}
        self._leaving: list[str] = []

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens accepted and not yet computed."""
        return sum(len(job.call.token_ids) - job.computed for job in (*self._waiting, *self._running.values()))

    def arrive(self, job: Job, now: float) -> None:
        """Raises InvalidArgument for a prompt that can never fit, Overloaded when too many wait."""
        need = self.pool.blocks_for(len(job.call.token_ids))
        if need > self.pool.num_blocks:
            limit = self.pool.num_blocks * self.pool.block_size
            raise InvalidArgument("prompt", f"{len(job.call.token_ids)} tokens", f"at most {limit} on this worker")
        if len(self._waiting) >= self._config.max_queued:
            raise Overloaded(f"{len(self._waiting)} prompts wait for prefill")
        self._waiting.push(job.key, job, now, job.due_s, job.work_s)

    def depart(self, key: str) -> None:
        """The job's stream has ended, however: all it holds goes back at the next `schedule`."""
        if self._waiting.remove(key) is None:
            self._leaving.append(key)

    def release(self) -> None:
        """Gives back what departed jobs held. Only between steps."""
        for key in self._leaving:
            if self._running.pop(key, None) or self._done.pop(key, None):
                self.pool.free(key)
        self._leaving.clear()

    def schedule(self, now: float) -> PrefillBatch | None:
        """The next batch, None when there is nothing to compute. Call only between steps."""
        self.release()
        started = self._admit(now)
        budget = self._config.token_budget
        chunks: list[Chunk] = []
        most_urgent = sorted(self._running.values(), key=lambda job: job.latest_start_s)
        for job in most_urgent[: self._config.max_batch_prompts]:
            count = next_chunk(job.computed, len(job.call.token_ids), budget, self.pool.block_size)
            if count:
                chunks.append(Chunk(job, job.computed, job.computed + count, self.pool.table(job.key)))
                budget -= count
        if not chunks:
            assert not self._running, "running prompts must get a chunk in every step"
            return None
        return PrefillBatch(Batch(tuple(self._row(chunk) for chunk in chunks)), tuple(chunks), started)

    def complete(self, batch: PrefillBatch, out: StepOutput) -> list[Finished]:
        """Books a finished step; returns the prompts that it completed. Jobs that left meanwhile are passed over."""
        finished: list[Finished] = []
        for chunk, sampled in zip(batch.chunks, out.sampled, strict=True):
            job = chunk.job
            job.computed = chunk.end
            self.pool.seal(job.key, job.call.token_ids, chunk.end)
            if chunk.end == len(job.call.token_ids):
                job.move(JobState.DONE)
                self._done[job.key] = self._running.pop(job.key)
                if job.key not in self._leaving:
                    finished.append(Finished(job, sampled))
        return finished

    def _admit(self, now: float) -> tuple[Job, ...]:
        started: list[Job] = []
        while (job := self._waiting.peek()) is not None and self._is_wanted(job):
            job.cached = self.pool.new(job.key, job.call.token_ids, job.call.salt)
            if self.pool.append(job.key, len(job.call.token_ids) - job.cached) is None:
                # No skipping ahead: a short prompt that overtook this one could keep it waiting for ever.
                self.pool.free(job.key)
                break
            self._waiting.pop()
            job.move(JobState.RUNNING)
            job.computed = job.cached
            job.started_s = now
            self._running[job.key] = job
            started.append(job)
        return tuple(started)

    def _is_wanted(self, job: Job) -> bool:
        """Whether a waiting job would get a chunk in the next step."""
        ahead = sum(other.latest_start_s <= job.latest_start_s for other in self._running.values())
        return ahead < self._config.max_batch_prompts

    @staticmethod
    def _row(chunk: Chunk) -> Row:
        call = chunk.job.call
        sample = None
        if chunk.end == len(call.token_ids):
            sample = SampleSpec(call.params, call.seed, 0, tuple(range(call.params.n)), call.token_ids)
        return Row(chunk.job.key, call.token_ids[chunk.start : chunk.end], chunk.start, chunk.block_ids, sample)
