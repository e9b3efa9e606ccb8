"""Whether a worker's runner still computes: watched from its event loop, which goes on when the runner hangs.

A hung GPU kernel, or a rank that is gone without a word, shows as a step that does not come back. Time counts only as
far as this loop has turned: a process that was stopped and goes on has not been hung for the time it was stopped.
"""

from __future__ import annotations

import asyncio

from engine.pulse import Pulse
from engine.step_cost import StepCost

TICK_S = 0.25
# A step may take so many times what the cost model thinks before it counts as hung. Neither a slow machine, nor others
# on its cores, nor the first steps of a kind, come near.
PATIENCE = 20.0


class Hung(Exception):
    """No step has ended for too long. The process is to end."""


async def watch_steps(pulse: Pulse, limit_s: float, cost: StepCost | None = None) -> None:
    """Watches until cancelled. Raises Hung when a step takes longer than `limit_s`, and PATIENCE times as long as
    `cost` predicts; or when the loop runs no canary for so long after one was due."""
    signs, age_s = -1, 0.0
    while True:
        await asyncio.sleep(TICK_S)
        if pulse.signs != signs:
            signs, age_s = pulse.signs, 0.0
            continue
        age_s += TICK_S
        work = pulse.work
        if work is None:
            if age_s > pulse.canary_s + limit_s:
                raise Hung(f"the worker's loop has begun no step for {age_s:.0f} s")
            continue
        predicted_s = cost.step_s(work) if cost is not None else 0.0
        if age_s > max(limit_s, PATIENCE * predicted_s):
            raise Hung(f"a step of {work.token_count} tokens has not come back for {age_s:.0f} s")
