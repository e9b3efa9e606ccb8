"""Signs of life of one worker's runner, as its loop sees them.

A step that begins and ends is one. A loop that has nothing to compute runs a canary when none has come for a while: one
token through the model, in a block of its own. So whoever looks on knows that steps end and that blocks can be had,
however little there is to do.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import TypeVar

from engine.batch import Batch, Row, Runner, SampleSpec
from engine.block_pool import BlockPool
from engine.inbox import Inbox
from engine.sampling import SamplingParams
from engine.step_cost import StepWork, work_of

CANARY = "canary"
Message = TypeVar("Message")
_GREEDY = SamplingParams(temperature=0.0, max_tokens=1)


class Pulse:
    """One per runner; the loops of a worker that changes its role share it. Times are of the loop's clock.

    `canary_s`: how long without a step until a canary is due; inf for never. `work`: of the step that runs now, None
    between steps. `signs` counts what has begun and ended, and the times that the loop found nothing to run, nor a
    block for a canary. `is_proven` is set when a first step has ended, or nobody asks for one.
    """

    def __init__(self, canary_s: float = math.inf) -> None:
        self.canary_s = canary_s
        self.work: StepWork | None = None
        self.signs = 0
        self.is_proven = asyncio.Event()
        # Before the first step one is due at once.
        self._rested_s = -math.inf
        if math.isinf(canary_s):
            self._rested_s = 0.0
            self.is_proven.set()

    def begins(self, work: StepWork) -> None:
        """A step runs from now on."""
        self.work = work
        self.signs += 1

    def ends(self, now: float) -> None:
        """The step that ran has ended."""
        self.work = None
        self.signs += 1
        self.is_proven.set()
        self._rested_s = now

    async def rest(
        self, runner: Runner, pool: BlockPool, inbox: Inbox[Message], handle: Callable[[Message], None]
    ) -> None:
        """What a loop does that has nothing to compute: waits for mail, and runs a canary when one is due."""
        due_s = self._rested_s + self.canary_s
        if asyncio.get_running_loop().time() >= due_s:
            await inbox.serve_while(self._run_canary(runner, pool), handle)
        else:
            await inbox.wait(due_s)

    async def _run_canary(self, runner: Runner, pool: BlockPool) -> None:
        """Runs one token through the model. Without a block there is nothing to run: whoever holds them all is about
        to compute, or to have them fetched. Nothing is booked of it: neither its time nor its token."""
        loop = asyncio.get_running_loop()
        pool.new(CANARY)
        try:
            if pool.append(CANARY, 1) is None:
                self.signs += 1
                self._rested_s = loop.time()
                return
            row = Row(CANARY, (0,), 0, pool.table(CANARY), SampleSpec(_GREEDY, seed=0, step=0))
            batch = Batch((row,))
            self.begins(work_of(batch))
            try:
                await runner.run(batch)
            finally:
                self.ends(loop.time())
        finally:
            pool.free(CANARY)
