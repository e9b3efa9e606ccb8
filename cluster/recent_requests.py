"""The requests that ended last, each with its receipt, for whoever asks where the time of one went. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from cluster.endings import Ended
from engine.sampling import SamplingParams

MAX_RECENT = 1000
# Of what a request broke off with: errors may quote what they were given.
MAX_PROBLEM_CHARS = 500
NO_PARAMS = SamplingParams()


@dataclass(frozen=True, slots=True)
class Recent:
    """`number` counts all that have ended since the start: ids may come again, numbers do not."""

    number: int
    ended: Ended

    @property
    def verdict(self) -> str:
        """How it ended, in one word: a finished one has met its objectives or missed one."""
        outcome = self.ended.outcome
        if outcome.reason != "finished":
            return outcome.reason
        return "met" if outcome.met_ttft and outcome.met_tpot else "missed"


VERDICTS = ("met", "missed", "rejected", "failed", "expired", "cancelled", "invalid")


class RecentRequests:
    """Implements cluster.endings.Observer. Each takes some 2 KiB at most, all of them some 2 MiB."""

    def __init__(self, limit: int = MAX_RECENT) -> None:
        self._recent: deque[Recent] = deque(maxlen=limit)
        self.count = 0

    def ended(self, request: Ended) -> None:
        self.count += 1
        problem = request.problem
        if len(problem) > MAX_PROBLEM_CHARS:
            problem = problem[: MAX_PROBLEM_CHARS - 1] + "…"
        # What was asked for is shown to nobody, and may be long.
        self._recent.append(Recent(self.count, replace(request, problem=problem, params=NO_PARAMS, attempts=())))

    def newest(self, limit: int, *, tenant: str | None = None, part: str = "", verdict: str = "") -> list[Recent]:
        """At most `limit` requests, newest first: of `tenant` (None: of all), whose id contains `part`, that ended with
        `verdict` ("": however they did)."""
        wanted = (
            recent for recent in self._of(tenant) if part in recent.ended.request_id and verdict in ("", recent.verdict)
        )
        return list(islice(wanted, limit))

    def with_id(self, request_id: str, *, tenant: str | None = None) -> list[Recent]:
        """All that had this id, newest first."""
        return [recent for recent in self._of(tenant) if recent.ended.request_id == request_id]

    def _of(self, tenant: str | None) -> Iterator[Recent]:
        return (recent for recent in reversed(self._recent) if tenant in (None, recent.ended.tenant))
