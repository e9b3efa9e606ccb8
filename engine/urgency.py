"""Which prompt must be computed first: by its objective for the first token, else by its patience.

    timely      has an objective, and can still meet it         earliest due time first
    the others  have none, or have missed it                    least slack of their patience first; after the timely,
                                                                but for every `LATE_TURN`th step

Earliest due time first meets every objective if any order does (Jackson 1955), and does not change its mind between
two prompts while it computes them, as least slack first does: that would begin all of a burst and end none in time.
When not all can be met it makes all of them late, one dragging the next. So whoever is late gives way to those who are
not, and is only kept from starving.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.step_cost import StepCost, StepWork

# How long a prompt may take, queue and all, as a multiple of what it takes alone: equal patience per token means equal
# slowdown for short and long prompts. A deadline that comes earlier counts instead.
STRETCH = 10.0
# What a prompt token takes where no cost model says, for comparing prompts with one another.
TOKEN_S = 0.001
# A first token has three hops to go to its client; planned without these, a prompt that is just in time is too late.
WAY_BACK_S = 0.005
# Every so many steps, one whose patience is over goes before the timely ones.
LATE_TURN = 4


@dataclass(frozen=True, slots=True)
class Urgency:
    """`patient_until_s`: when the prompt should have started by its patience. `due_s`: when it should be computed by
    its objective, inf without one. Times of the loop."""

    patient_until_s: float
    due_s: float = math.inf

    def late_after_s(self, left_s: float) -> float:
        """Until when the objective can be met with `left_s` seconds of work to go; −inf without one."""
        return -math.inf if self.due_s == math.inf else self.due_s - left_s

    def rank(self, left_s: float, now: float, is_late_turn: bool) -> tuple[int, float]:
        """Sorts prompts, the most urgent first."""
        if now <= self.late_after_s(left_s):
            return 1, self.due_s
        return 0 if is_late_turn and self.patient_until_s <= now else 2, self.patient_until_s


def urgency(
    arrived_s: float, ttft_due_s: float | None, deadline_s: float | None, work_s: float, *, is_predicted: bool
) -> Urgency:
    """Of a prompt that takes `work_s` alone. `ttft_due_s` and `deadline_s` are absolute times, None for none. Unless
    `work_s` is predicted by a cost model nobody can say who is late, and an objective is a short patience."""
    patience_s = arrived_s + STRETCH * work_s
    if not is_predicted:
        ends_s = [time for time in (patience_s, ttft_due_s, deadline_s) if time is not None]
        return Urgency(min(ends_s) - work_s)
    patience_s = patience_s if deadline_s is None else min(patience_s, deadline_s)
    due_s = math.inf if ttft_due_s is None else ttft_due_s - WAY_BACK_S
    return Urgency(patience_s - work_s, due_s if deadline_s is None or due_s == math.inf else min(due_s, deadline_s))


def prompt_s(cost: StepCost | None, new_tokens: int, context: int) -> float:
    """What the rest of a prompt takes: `new_tokens` tokens after `context` others."""
    if new_tokens <= 0:
        return 0.0
    return new_tokens * TOKEN_S if cost is None else cost.step_s(StepWork(((new_tokens, context),)))
