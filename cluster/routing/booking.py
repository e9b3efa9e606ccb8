"""One request that was sent to its workers, and what it is expected to do there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.routing.query import Route, RouteQuery


@dataclass(slots=True, eq=False)
class Booking:
    """Lives as long as its request runs. `first_s` is when its first token came, None before. `delayed_s`: work of
    those that were booked later and pass it. `tokens_drawn` so far are `drawn` of each of its answers, the last at
    `drawn_s`."""

    query: RouteQuery
    route: Route
    routed_s: float
    first_s: float | None = None
    delayed_s: float = 0.0
    tokens_drawn: int = 0
    is_answered: bool = False
    drawn: int = 0
    drawn_s: float = 0.0

    @property
    def work_s(self) -> float:
        return self.route.work_s

    @property
    def tokens(self) -> int:
        """Prompt tokens that its decode worker will read in every step."""
        return self.query.prompt_tokens * self.query.rows

    @property
    def latest_start_s(self) -> float:
        """When its prompt must start to be in time: the prefill worker's queue is ordered by the same."""
        return self.query.due_s - self.route.work_s

    @property
    def predicted_first_s(self) -> float:
        """From `routed_s` to its first token, by what is known now."""
        return self.route.predicted_first_s + self.delayed_s

    @property
    def expected_first_s(self) -> float:
        """When its first token was expected when it was booked."""
        return self.routed_s + self.route.predicted_first_s

    @property
    def tpot_objective_s(self) -> float:
        tpot_s = self.query.objectives.tpot_s
        return math.inf if tpot_s is None else tpot_s
