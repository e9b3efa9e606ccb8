"""The steps that a decode worker's runner has: one that runs, and perhaps one that waits behind it."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from decode_worker.flight import MAX_UNDER_WAY, DecodeBatch
from engine.batch import Runner, StepOutput
from engine.running_average import RunningAverage

# How long before the end of a running step the next one is scheduled: the larger of these, seconds and share of the
# step. Whoever arrives before that moment still joins the next step, as if nothing were scheduled ahead. Scheduling
# takes some 0.3 ms for eight sequences; steps of one batch differ by some percent from one another.
LEAD_S = 0.005
LEAD_SHARE = 0.2


@dataclass(slots=True, eq=False)
class _Step:
    batch: DecodeBatch
    run: asyncio.Task[StepOutput]


class Pipeline:
    """Hands batches to the runner and takes their outputs in order. With `is_ahead` it has room for a second one.

    `steps` counts forward passes that have ended. A step's time counts from its launch, or from the end of the one
    before it where that came later.
    """

    def __init__(self, runner: Runner, is_ahead: bool) -> None:
        self._runner = runner
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

    async def launch(self, batch: DecodeBatch) -> None:
        """Returns when the runner has the batch."""
        loop = asyncio.get_running_loop()
        if self.is_empty:
            self._began_s = loop.time()
        self._under_way.append(_Step(batch, loop.create_task(self._runner.run(batch.batch))))
        if self.has_room:
            # A task's first part runs in the loop's next round; scheduling another step must not come before it.
            await asyncio.sleep(0)

    async def almost_over(self) -> bool:
        """Returns when it is time to schedule the next step: True while the running one is under way, False when it
        has ended earlier than its like before it."""
        run, expected_s = self._under_way[0].run, self._expected_s(self._under_way[0].batch)
        due_s = self._began_s + expected_s - max(LEAD_S, LEAD_SHARE * expected_s)
        left_s = due_s - asyncio.get_running_loop().time()
        if left_s > 0:
            await asyncio.wait([run], timeout=left_s)
        return not run.done()

    async def oldest_ended(self) -> None:
        """Cancelling this leaves the step as it is."""
        await asyncio.wait([self._under_way[0].run])

    def land(self) -> tuple[DecodeBatch, StepOutput, float]:
        """The oldest step, which has ended: batch, output, and the time. Raises what its forward pass raised."""
        step = self._under_way[0]
        out = step.run.result()
        self._under_way.popleft()
        now = asyncio.get_running_loop().time()
        self.steps += 1
        self._measure(step.batch, now - self._began_s)
        self._began_s = now
        return step.batch, out, now

    async def call_off(self) -> None:
        """Cancels all steps and returns when none of them touches a block any more."""
        for step in self._under_way:
            step.run.cancel()
        # Errors are taken note of: a step fails when the one that it follows has failed.
        await asyncio.gather(*(step.run for step in self._under_way), return_exceptions=True)

    def _measure(self, batch: DecodeBatch, step_s: float) -> None:
        if _has_prompt(batch):
            self.tokens_per_s.add(batch.batch.token_count / max(step_s, 1e-9))
        else:
            self.step_s.add(step_s)

    def _expected_s(self, batch: DecodeBatch) -> float:
        """From the steps of its kind before it; 0.0 for the first."""
        if not _has_prompt(batch):
            return self.step_s.value
        return batch.batch.token_count / self.tokens_per_s.value if self.tokens_per_s.value else 0.0


def _has_prompt(batch: DecodeBatch) -> bool:
    """Whether some row is a chunk of a prompt, and more than its last token."""
    return batch.batch.token_count > len(batch.batch.rows)
