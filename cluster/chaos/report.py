"""What a chaos run showed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cluster.chaos.clients import Asked
from cluster.chaos.faults import Happened


@dataclass(frozen=True, slots=True)
class ChaosReport:
    """`recovery_s`: from a fault to the next token of each stream that it hit, sorted. `leaks`: workers that hold
    something though nothing runs, in words."""

    seconds: float
    faults: dict[str, int]
    requests: int
    finished: int
    wrong: int
    retried: int
    errors: dict[str, int]
    recovery_s: tuple[float, ...]
    leaks: tuple[str, ...]

    @property
    def is_clean(self) -> bool:
        """Whether every request finished with the right tokens, and nothing is left."""
        return self.finished == self.requests > 0 and not self.wrong and not self.leaks

    def recovery(self, share: float) -> float:
        """The recovery that `share` of the streams hit needed at most; 0.0 where none was hit."""
        if not self.recovery_s:
            return 0.0
        return self.recovery_s[max(0, math.ceil(share * len(self.recovery_s)) - 1)]

    def as_json(self) -> dict[str, Any]:
        return {
            "seconds": round(self.seconds, 1),
            "faults": self.faults,
            "requests": self.requests,
            "finished": self.finished,
            "wrong": self.wrong,
            "retried": self.retried,
            "errors": self.errors,
            "recovery_s": {f"p{round(share * 100)}": round(self.recovery(share), 3) for share in (0.5, 0.9, 0.99)},
            "leaks": list(self.leaks),
            "clean": self.is_clean,
        }

    def lines(self) -> list[str]:
        faults = ", ".join(f"{count} × {kind}" for kind, count in self.faults.items()) or "no faults"
        found = [
            f"{self.seconds:.0f} s: {faults}",
            f"{self.finished} of {self.requests} requests finished, {self.retried} of them by another worker, "
            f"{self.wrong} with a wrong token",
        ]
        if self.recovery_s:
            found.append(
                f"from a fault to the next token of {len(self.recovery_s)} streams that it hit: p50 "
                f"{self.recovery(0.5):.2f} s, p90 {self.recovery(0.9):.2f} s, p99 {self.recovery(0.99):.2f} s"
            )
        found += [f"{count} × {error}" for error, count in self.errors.items()]
        return [*found, *self.leaks]


def make_report(
    asked: Sequence[Asked], happened: Sequence[Happened], leaks: Sequence[str], seconds: float
) -> ChaosReport:
    recoveries = sorted(pause for request in asked for pause in _recoveries(request, happened))
    return ChaosReport(
        seconds=seconds,
        faults=dict(Counter(fault.kind for fault in happened)),
        requests=len(asked),
        finished=sum(not request.error for request in asked),
        wrong=sum(not request.is_right for request in asked),
        retried=sum(request.retries > 0 for request in asked),
        errors=dict(Counter(request.error for request in asked if request.error)),
        recovery_s=tuple(recoveries),
        leaks=tuple(leaks),
    )


def _recoveries(request: Asked, happened: Sequence[Happened]) -> list[float]:
    """Of a request that was tried again: its longest pauses, as many as there were retries, each from the last fault
    within it."""
    times = [request.sent_s, *request.token_s]
    pauses = sorted(pairwise(times), key=lambda pause: pause[0] - pause[1])[: request.retries]
    found = []
    for start_s, end_s in pauses:
        within = [fault.time_s for fault in happened if start_s <= fault.time_s < end_s]
        found.append(end_s - max(within, default=start_s))
    return found
