"""One prompt on its way through a prefill worker, and whose turn it is in a step.

WAITING ──▶ RUNNING ──▶ DONE
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto

from engine.slack_queue import SlackQueue
from engine.urgency import Urgency
from kvtransfer.transport import PrefillCall

NO_HURRY = Urgency(math.inf)


class JobState(Enum):
    WAITING = auto()
    RUNNING = auto()
    DONE = auto()


LEGAL_MOVES = {(JobState.WAITING, JobState.RUNNING), (JobState.RUNNING, JobState.DONE)}


@dataclass(slots=True, eq=False)
class Job:
    """One prompt on its way through. `key` is unique per stream: a retried request may overlap its predecessor.

    Times are seconds of the loop's clock. `computed` counts tokens whose KV is in the pool, cached ones included;
    `left_s` is what the rest takes alone, by the cost model or as a rough measure. `urgency` is set on arrival.
    `finished_s` is when the first token was drawn, `sent_s` when the stream's last frame was asked for, None before.
    """

    key: str
    call: PrefillCall
    arrived_s: float
    deadline_s: float | None
    state: JobState = JobState.WAITING
    cached: int = 0
    computed: int = 0
    started_s: float = 0.0
    finished_s: float | None = None
    sent_s: float | None = None
    left_s: float = 0.0
    urgency: Urgency = NO_HURRY

    @property
    def prompt_tokens(self) -> int:
        return len(self.call.token_ids)

    @property
    def ttft_due_s(self) -> float | None:
        """When its first token should be there by its objective."""
        return None if self.call.ttft_due_s is None else self.arrived_s + self.call.ttft_due_s

    def is_timely(self, now: float) -> bool:
        """Whether it has an objective that it can meet."""
        return now <= self.urgency.late_after_s(self.left_s)

    def rank(self, now: float, is_late_turn: bool) -> tuple[int, float]:
        return self.urgency.rank(self.left_s, now, is_late_turn)

    def move(self, state: JobState) -> None:
        assert (self.state, state) in LEGAL_MOVES, f"{self.key} cannot go from {self.state.name} to {state.name}"
        self.state = state


class Turn:
    """The jobs of one step, the most urgent first: those that run, and those that `start` gives blocks to.

    Who waits is not passed by others that wait: a short prompt that overtook a long one, for which there are too few
    blocks, could keep it waiting for ever.
    """

    def __init__(
        self,
        running: Iterable[Job],
        waiting: SlackQueue[Job],
        start: Callable[[Job], bool],
        now: float,
        *,
        is_late_turn: bool,
    ) -> None:
        self._running = deque(sorted(running, key=lambda job: job.rank(now, is_late_turn)))
        self._waiting = waiting
        self._start = start
        self._now = now
        self._is_late_turn = is_late_turn
        self._has_blocks = True
        self.started: list[Job] = []

    def take(self) -> Job | None:
        """The next job, None when there is no other that can have a chunk."""
        job = self._first_waiting()
        if job is not None and (not self._running or self._rank(job) < self._rank(self._running[0])):
            if self._start(job):
                self._waiting.pop(self._now, is_late_turn=self._is_late_turn)
                self.started.append(job)
                return job
            self._has_blocks = False
        return self._running.popleft() if self._running else None

    def latest_start_s(self) -> float:
        """When the most urgent of the others has to start to meet its objective; inf when none can."""
        others = [*self._running, *filter(None, (self._waiting.peek(self._now),) if self._has_blocks else ())]
        timely = [job for job in others if job.is_timely(self._now)]
        return min((job.urgency.due_s - job.left_s for job in timely), default=math.inf)

    def _first_waiting(self) -> Job | None:
        return self._waiting.peek(self._now, is_late_turn=self._is_late_turn) if self._has_blocks else None

    def _rank(self, job: Job) -> tuple[int, float]:
        return job.rank(self._now, self._is_late_turn)
