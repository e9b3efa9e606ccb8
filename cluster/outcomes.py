"""How requests ended, and which share of them met their objectives lately.

A request counts from the moment it came in good order, or was turned away unread as too many long texts waited.
Rejected, failed and expired ones have met nothing; one that its client gave up, or that was found to be at fault itself
only then (by a worker, by the router, or as its id was taken already), counts as nothing at all.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

from engine.objectives import Objectives

Reason = Literal["finished", "rejected", "failed", "expired", "cancelled", "invalid"]
NOT_COUNTED = ("cancelled", "invalid")
MAX_OUTCOMES = 1 << 16


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request's end, in seconds. `ttft_s` and `tpot_s` are None where it did not get that far."""

    ended_s: float
    objectives: Objectives
    ttft_s: float | None
    tpot_s: float | None
    was_local: bool
    reason: Reason

    @property
    def met_ttft(self) -> bool:
        return self.reason == "finished" and self.ttft_s is not None and self.objectives.has_ttft(self.ttft_s)

    @property
    def met_tpot(self) -> bool:
        return self.reason == "finished" and self.tpot_s is not None and self.objectives.has_tpot(self.tpot_s)


@dataclass(frozen=True, slots=True)
class Attainment:
    """Shares of `count` requests that met both objectives, the TTFT and the TPOT; `local` went to one worker only.
    All are 0.0 where there was no request."""

    both: float
    ttft: float
    tpot: float
    local: float
    count: int


class Outcomes:
    """The requests that ended within the last `window_s` seconds. Adding one takes constant time on average."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._recent: deque[Outcome] = deque()
        self._both = self._ttft = self._tpot = self._local = 0
        self.finished_count = 0
        self.rejected_count = 0

    def add(self, outcome: Outcome) -> None:
        if outcome.reason in NOT_COUNTED:
            return
        self.finished_count += outcome.reason == "finished"
        self.rejected_count += outcome.reason == "rejected"
        self._recent.append(outcome)
        self._count(outcome, 1)
        self._forget(outcome.ended_s)

    def attainment(self, now: float) -> Attainment:
        self._forget(now)
        count = len(self._recent)
        if not count:
            return Attainment(0.0, 0.0, 0.0, 0.0, 0)
        return Attainment(self._both / count, self._ttft / count, self._tpot / count, self._local / count, count)

    def recent(self, now: float) -> tuple[Outcome, ...]:
        """All that count now, oldest first."""
        self._forget(now)
        return tuple(self._recent)

    def _forget(self, now: float) -> None:
        while self._recent and (now - self._recent[0].ended_s > self._window_s or len(self._recent) > MAX_OUTCOMES):
            self._count(self._recent.popleft(), -1)

    def _count(self, outcome: Outcome, change: int) -> None:
        met_ttft, met_tpot = outcome.met_ttft, outcome.met_tpot
        self._both += change * (met_ttft and met_tpot)
        self._ttft += change * met_ttft
        self._tpot += change * met_tpot
        self._local += change * outcome.was_local
