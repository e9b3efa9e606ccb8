"""Many decode steps as one event: when each would end, without running them one by one.

    steps     |0|1|2| … |31|32| … |63|64| …          each reads `rows` tokens of KV more than the one before
    segments  [──────────)[───────────)[── …          step times are exact at a segment's first step, linear inside

The sum of a linear segment has a closed form, so a segment costs two questions to the cost model and one timer. Over
32 steps a sequence grows by 32 tokens; where the cost model is linear over that span, this is exact.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from engine.step_cost import StepCost, StepWork

SEGMENT_STEPS = 32


class LongRun:
    """`max_steps` decode steps of `rows` sequences that begin now. `ended` resolves with the number of steps run.

    `context`: tokens of KV that the first step reads. `loop_s` is added to each step. `noise` is drawn for each step,
    which is then a segment of its own.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        cost: StepCost,
        rows: int,
        context: int,
        max_steps: int,
        loop_s: float = 0.0,
        noise: Callable[[], float] | None = None,
    ) -> None:
        assert max_steps >= 1, "a run has at least one step"
        self.ended: asyncio.Future[int] = loop.create_future()
        self._loop = loop
        self._cost = cost
        self._rows = rows
        self._context = context
        self._max_steps = max_steps
        self._loop_s = loop_s
        self._noise = noise
        self._cut: int | None = None
        # The segment under way: steps [first, last) from `begin_s` on, the first of `step_s`, each `growth_s` longer.
        self._first = self._last = 0
        self._begin_s = self._end_s = loop.time()
        self._step_s = self._growth_s = 0.0
        self._timer = self._enter_segment()

    def cut_short(self) -> int:
        """See MultiStepRunner.cut_short."""
        if self._cut is None:
            now = self._loop.time()
            # The first step that ends now or later. Ends only grow: by bisection.
            low, high = max(1, self._first), self._last
            while low < high:
                middle = (low + high) // 2
                if self._ends_at(middle) >= now:
                    high = middle
                else:
                    low = middle + 1
            self._cut = low
            self._timer.cancel()
            self._timer = self._loop.call_at(self._ends_at(low), self._finish, low)
        return self._cut

    def stop(self) -> None:
        """No event of this run comes any more."""
        self._timer.cancel()

    def _enter_segment(self) -> asyncio.TimerHandle:
        self._first, self._begin_s = self._last, self._end_s
        count = min(1 if self._noise else SEGMENT_STEPS, self._max_steps - self._first)
        self._last = self._first + count
        self._step_s = self._at(self._first)
        self._growth_s = (self._at(self._last - 1) - self._step_s) / (count - 1) if count > 1 else 0.0
        if self._noise is not None:
            self._step_s *= self._noise()
        self._step_s += self._loop_s
        self._end_s = self._ends_at(self._last)
        if self._last == self._max_steps:
            return self._loop.call_at(self._end_s, self._finish, self._last)
        return self._loop.call_at(self._end_s, self._go_on)

    def _go_on(self) -> None:
        self._timer = self._enter_segment()

    def _finish(self, steps: int) -> None:
        self._cut = steps
        if not self.ended.done():
            self.ended.set_result(steps)

    def _at(self, step: int) -> float:
        """Seconds of step number `step` by the cost model."""
        return self._cost.step_s(StepWork((), self._rows, self._context + step * self._rows))

    def _ends_at(self, steps: int) -> float:
        """When so many steps of the run have ended; within the segment under way."""
        count = steps - self._first
        return self._begin_s + count * self._step_s + self._growth_s * (count * (count - 1) / 2)
