"""How long workers held something for a peer that a fault had taken from them, from their notes. Pure.

    opened ──────── fault on either end ──────── closed, unfinished
                             └──── held_s ────────────┘

A lease is a stream, at either of its ends: what is held for it is given back when it closes, within a step. One that
was opened to a peer who was away already counts from then. Of a worker that is cut off from everybody it is also seen
when it holds no block any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cluster.chaos.faults import Happened
from cluster.chaos.hub import Note

# Faults that take a peer from others.
TAKING = ("kill", "stop", "partition")


@dataclass(frozen=True, slots=True)
class _Open:
    request_id: str
    peer: str
    since_s: float


@dataclass(frozen=True, slots=True)
class _Broken:
    """A stream that closed unfinished; `peer` "" where it is not known."""

    worker_id: str
    peer: str
    since_s: float
    until_s: float


class LeaseBook:
    """What the workers of a run noted. `name_of` says who listens at an address. Times are those of the arrival."""

    def __init__(self, name_of: Callable[[str], str]) -> None:
        self._name_of = name_of
        self._open: dict[str, dict[int, _Open]] = {}
        self._broken: list[_Broken] = []
        # Who asked for the KV of a request's attempt. Of a prefill worker's streams nothing else says who is there.
        self._pulls: dict[str, str] = {}
        self._blocks: dict[str, list[tuple[float, int]]] = {}

    def noted(self, worker_id: str, note: Note, now: float) -> None:
        """Takes a note; {} says that the worker's process is gone, and with it whatever it held."""
        if not note:
            self._open.pop(worker_id, None)
            self._blocks.setdefault(worker_id, []).append((now, 0))
        match note:
            case {"opened": number, "request": request_id, "peer": peer}:
                self._open.setdefault(worker_id, {})[number] = _Open(request_id, peer, now)
                if peer and request_id:
                    self._pulls[request_id] = worker_id
            case {"closed": number, "is_broken": is_broken}:
                lease = self._open[worker_id].pop(number)
                if is_broken:
                    peer = self._name_of(lease.peer) if lease.peer else self._pulls.get(lease.request_id, "")
                    self._broken.append(_Broken(worker_id, peer, lease.since_s, now))
            case {"held": blocks}:
                self._blocks.setdefault(worker_id, []).append((now, blocks))

    def held_s(self, happened: Iterable[Happened]) -> dict[str, float]:
        """By the kind of the fault: the longest time from a fault until all that it had broken was given back. Of a
        worker that was stopped itself the time counts from when it went on."""
        faults = [fault for fault in happened if fault.kind in TAKING]
        found: dict[str, float] = {}
        for broken in self._broken:
            within = [fault for fault in faults if _may_have_broken(fault, broken)]
            if within:
                fault = max(within, key=lambda fault: fault.time_s)
                is_own_stop = fault.kind == "stop" and fault.worker_id == broken.worker_id
                start_s = min(fault.until_s, broken.until_s) if is_own_stop else max(fault.time_s, broken.since_s)
                found[fault.kind] = max(found.get(fault.kind, 0.0), broken.until_s - start_s)
        for fault in faults:
            if fault.kind == "partition" and fault.peer == "any":
                empty_s = self.empty_s(fault.worker_id, fault.time_s, fault.until_s)
                found["partition"] = max(found.get("partition", 0.0), empty_s)
        return found

    def empty_s(self, worker_id: str, start_s: float, end_s: float) -> float:
        """How long after `start_s` a worker still held a block, `end_s - start_s` where it did so all the time."""
        blocks, held_s = 0, 0.0
        for time_s, after in self._blocks.get(worker_id, []):
            if time_s > end_s:
                break
            if time_s > start_s and blocks:
                held_s = time_s - start_s
            blocks = after
        return end_s - start_s if blocks else held_s


def _may_have_broken(fault: Happened, broken: _Broken) -> bool:
    return (
        fault.worker_id in (broken.worker_id, broken.peer)
        and broken.since_s <= fault.until_s
        and fault.time_s <= broken.until_s
    )
