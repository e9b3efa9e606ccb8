"""What a chaos run showed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cluster.chaos.clients import Asked
from cluster.chaos.faults import Happened
from cluster.chaos.leases import TAKING
from cluster.chaos.load import Load

# Faults after which a request may have to be tried again.
HARMFUL = (*TAKING, "clock")
# Of retries before the first such fault.
UNEXPLAINED = "unexplained"


@dataclass(frozen=True, slots=True)
class ChaosReport:
    """By the kind of the fault: `recovery_s`, sorted, from a fault to the next token of each stream that it hit;
    `held_s`, see LeaseBook. `flips` are bits, `unread` those in streams that were left before their end. `leaks`: what
    did not end or is still held though nothing runs, in words."""

    seconds: float
    faults: dict[str, int]
    requests: int
    finished: int
    wrong: int
    retried: int
    errors: dict[str, int]
    longest_pause_s: float
    recovery_s: dict[str, tuple[float, ...]]
    held_s: dict[str, float]
    lease_s: float
    flips: int
    unread: int
    kv_faults: int
    leaks: tuple[str, ...]

    @property
    def is_clean(self) -> bool:
        """Whether every request finished with the right tokens, nothing is left, nothing was held for longer than it
        may be, and every bit that was flipped was noticed."""
        is_in_time = all(held_s <= self.lease_s for held_s in self.held_s.values())
        is_all_there = self.finished == self.requests > 0 and not self.wrong and not self.leaks
        return is_all_there and is_in_time and self.has_seen_flips

    @property
    def has_seen_flips(self) -> bool:
        """Each counts as one fault, but for those in streams that were left before their end: they may not have been
        read. Of runs in which workers are lost, with all that they had counted, nothing is demanded."""
        if any(kind in TAKING for kind in self.faults):
            return True
        return self.flips - self.unread <= self.kv_faults <= self.flips

    def as_json(self) -> dict[str, Any]:
        every = sorted(pause for pauses in self.recovery_s.values() for pause in pauses)
        return {
            "seconds": round(self.seconds, 1),
            "faults": self.faults,
            "requests": self.requests,
            "finished": self.finished,
            "wrong": self.wrong,
            "retried": self.retried,
            "errors": self.errors,
            "longest_pause_s": round(self.longest_pause_s, 3),
            "recovery_s": _percentiles(every),
            "recovery_by_fault": {
                kind: {"streams": len(pauses), **_percentiles(pauses)} for kind, pauses in self.recovery_s.items()
            },
            "held_s": {kind: round(held_s, 3) for kind, held_s in self.held_s.items()},
            "lease_s": self.lease_s,
            "flips": self.flips,
            "unread": self.unread,
            "kv_faults": self.kv_faults,
            "leaks": list(self.leaks),
            "clean": self.is_clean,
        }

    def lines(self) -> list[str]:
        faults = ", ".join(f"{count} × {kind}" for kind, count in self.faults.items()) or "no faults"
        found = [
            f"{self.seconds:.0f} s: {faults}",
            f"{self.finished} of {self.requests} requests finished, {self.retried} of them by another worker, "
            f"{self.wrong} with a wrong token; no client waited longer than {self.longest_pause_s:.2f} s for a token",
        ]
        for kind, pauses in self.recovery_s.items():
            found.append(
                f"{kind}: to the next token of {len(pauses)} streams that it hit p50 {percentile(pauses, 0.5):.2f} s, "
                f"p90 {percentile(pauses, 0.9):.2f} s, p99 {percentile(pauses, 0.99):.2f} s"
            )
        for kind, held_s in self.held_s.items():
            found.append(
                f"{kind}: what it took a peer from was held for {held_s:.2f} s more at most, of {self.lease_s:g}"
            )
        if self.flips or self.kv_faults:
            found.append(
                f"{self.flips} bits flipped, {self.unread} of them in streams that were left before their end; "
                f"{self.kv_faults} damaged KV frames reported"
            )
        found += [f"{count} × {error}" for error, count in self.errors.items()]
        return [*found, *self.leaks]


def make_report(
    load: Load,
    happened: Sequence[Happened],
    held_s: Mapping[str, float],
    *,
    lease_s: float,
    flips: int = 0,
    unread: int = 0,
    kv_faults: int = 0,
) -> ChaosReport:
    asked = load.asked
    return ChaosReport(
        seconds=load.seconds,
        faults=dict(Counter(fault.kind for fault in happened)),
        requests=len(asked),
        finished=sum(not request.error for request in asked),
        wrong=sum(not request.is_right for request in asked),
        retried=sum(request.retries > 0 for request in asked),
        errors=dict(Counter(request.error for request in asked if request.error)),
        longest_pause_s=max((pause[1] - pause[0] for request in asked for pause in _pauses(request)), default=0.0),
        recovery_s=_recoveries(asked, happened),
        held_s=dict(held_s),
        lease_s=lease_s,
        flips=flips,
        unread=unread,
        kv_faults=kv_faults,
        leaks=load.leaks,
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The least that `share` of the values do not exceed; 0.0 without any."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def _percentiles(ordered: Sequence[float]) -> dict[str, float]:
    return {f"p{round(share * 100)}": round(percentile(ordered, share), 3) for share in (0.5, 0.9, 0.99)}


def _pauses(request: Asked) -> list[tuple[float, float]]:
    """Between what a client saw of a request, from its sending on."""
    return list(pairwise([request.sent_s, *request.token_s]))


def _recoveries(asked: Sequence[Asked], happened: Sequence[Happened]) -> dict[str, tuple[float, ...]]:
    """Of requests that were tried again: their longest pauses, as many as there were retries, each from the last fault
    before its end, or from its own beginning where that was later: who is away still gets requests until it is
    missed."""
    found: dict[str, list[float]] = {}
    for request in asked:
        pauses = sorted(_pauses(request), key=lambda pause: pause[0] - pause[1])[: request.retries]
        for start_s, end_s in pauses:
            before = [fault for fault in happened if fault.kind in HARMFUL and fault.time_s < end_s]
            fault = max(before, key=lambda fault: fault.time_s, default=None)
            kind, time_s = (fault.kind, fault.time_s) if fault is not None else (UNEXPLAINED, start_s)
            found.setdefault(kind, []).append(end_s - max(start_s, time_s))
    return {kind: tuple(sorted(pauses)) for kind, pauses in sorted(found.items())}
