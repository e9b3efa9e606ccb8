"""The steps that a decode worker's runner has: one that runs, and perhaps one that waits behind it; or one run of
several steps."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from decode_worker.flight import MAX_UNDER_WAY, DecodeBatch
from decode_worker.repeat import Repeat
from engine.batch import Runner, StepOutput
from engine.multi_step import MultiStepRunner
from engine.pulse import Pulse
from engine.running_average import RunningAverage

# How long before the end of a running step the next one is scheduled: the larger of these, seconds and share of the
# step. Whoever arrives before that moment still joins the next step, as if nothing were scheduled ahead. Scheduling
# takes some 0.3 ms for eight sequences; steps of one batch differ by some percent from one another.
LEAD_S = 0.005
LEAD_SHARE = 0.2
# So many equal samples leave nothing of those before them in a running average.
SETTLED_SAMPLES = 50


@dataclass(slots=True, eq=False)
class _Step:
    batch: DecodeBatch
    run: asyncio.Task[list[StepOutput]]
    is_repeated: bool = False


@dataclass(frozen=True, slots=True)
class Landed:
    """A batch that has ended at `now`, after `seconds`: one output per step."""

    batch: DecodeBatch
    outs: list[StepOutput]
    now: float
    seconds: float


class Pipeline:
    """Hands batches to the runner and takes their outputs in order. With `is_ahead` it has room for a second one.

    `steps` counts forward passes that have ended. A step's time counts from its launch, or from the end of the one
    before it where that came later.
    """

    def __init__(self, runner: Runner, is_ahead: bool, pulse: Pulse) -> None:
        self._runner = runner
        self._pulse = pulse
        self._repeater = runner if isinstance(runner, MultiStepRunner) else None
        self._depth = MAX_UNDER_WAY if is_ahead else 1
        self._under_way: deque[_Step] = deque()
        self._began_s = 0.0
        self.steps = 0
        self.step_s = RunningAverage()
        self.tokens_per_s = RunningAverage()

    @property
    def is_empty(self) -> bool:
        return not self._under_way

    @property
    def has_room(self) -> bool:
        return len(self._under_way) < self._depth

    @property
    def running(self) -> DecodeBatch | None:
        """The oldest batch, which runs now."""
        return self._under_way[0].batch if self._under_way else None

    async def launch(self, batch: DecodeBatch, repeat: Repeat | None = None) -> None:
        """Returns when the runner has the batch."""
        loop = asyncio.get_running_loop()
        if self.is_empty:
            self._began_s = loop.time()
            self._pulse.begins(batch.work)
        run = self._run_many(repeat) if repeat is not None else self._run(batch)
        self._under_way.append(_Step(batch, loop.create_task(run), repeat is not None))
        if self.has_room or repeat is not None:
            # A task's first part runs in the loop's next round; scheduling another step, or cutting this one short,
            # must not come before it.
            await asyncio.sleep(0)

    def cut_short(self) -> tuple[DecodeBatch, int] | None:
        """Ends a run of several steps after the one that runs now: its batch, and the steps that it will have had.
        None when there is no such run."""
        if not self._under_way or not self._under_way[0].is_repeated:
            return None
        assert self._repeater is not None, "a batch is repeated by a runner that cannot"
        return self._under_way[0].batch, self._repeater.cut_short()

    async def almost_over(self) -> bool:
        """Returns when it is time to schedule the next step: True while the running one is under way, False when it
        has ended earlier than its like before it."""
        run, expected_s = self._under_way[0].run, self._expected_s(self._under_way[0].batch)
        due_s = self._began_s + expected_s - max(LEAD_S, LEAD_SHARE * expected_s)
        left_s = due_s - asyncio.get_running_loop().time()
        if left_s > 0:
            await asyncio.wait([run], timeout=left_s)
        return not run.done()

    @property
    def oldest(self) -> asyncio.Future[list[StepOutput]]:
        """Done when the oldest step has ended."""
        return self._under_way[0].run

    def land(self) -> Landed:
        """The oldest step, which has ended. Raises what its forward pass raised."""
        step = self._under_way[0]
        outs = step.run.result()
        self._under_way.popleft()
        now = asyncio.get_running_loop().time()
        landed = Landed(step.batch, outs, now, now - self._began_s)
        self.steps += len(outs)
        self._measure(landed)
        self._began_s = now
        self._pulse.ends(now)
        if self._under_way:
            self._pulse.begins(self._under_way[0].batch.work)
        return landed

    async def call_off(self) -> None:
        """Cancels all steps and returns when none of them touches a block any more."""
        for step in self._under_way:
            step.run.cancel()
        # Errors are taken note of: a step fails when the one that it follows has failed.
        await asyncio.gather(*(step.run for step in self._under_way), return_exceptions=True)

    async def _run(self, batch: DecodeBatch) -> list[StepOutput]:
        return [await self._runner.run(batch.batch)]

    async def _run_many(self, repeat: Repeat) -> list[StepOutput]:
        assert self._repeater is not None, "a batch is repeated by a runner that cannot"
        return await self._repeater.run_many(repeat.batch, repeat.max_steps)

    def _measure(self, landed: Landed) -> None:
        work = landed.batch.work
        if _has_prompt(landed.batch):
            self.tokens_per_s.add(work.token_count / max(landed.seconds, 1e-9))
            return
        step_s = landed.seconds / len(landed.outs)
        for _ in range(min(len(landed.outs), SETTLED_SAMPLES)):
            self.step_s.add(step_s)

    def _expected_s(self, batch: DecodeBatch) -> float:
        """From the steps of its kind before it; 0.0 for the first."""
        if not _has_prompt(batch):
            return self.step_s.value
        return batch.work.token_count / self.tokens_per_s.value if self.tokens_per_s.value else 0.0


def _has_prompt(batch: DecodeBatch) -> bool:
    """Whether some row is a chunk of a prompt, and more than its last token."""
    return any(tokens > 1 for tokens, _ in batch.work.prompts)
