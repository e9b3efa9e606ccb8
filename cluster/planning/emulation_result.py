"""What an emulation tells: one record per request, and the shares and percentiles that follow from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cluster.controller import Flip, Scale
from engine.objectives import Objectives
from engine.request import Receipt

PERCENTILES = (50, 90, 99)


class Ending(StrEnum):
    """How a request ended. `rejected`: turned away, by the gateway or a worker; `late`: its client gave up."""

    DONE = "done"
    REJECTED = "rejected"
    LATE = "late"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as its client saw it. Times are virtual seconds from the trace's start.

    `ttft_s` None: no token came; `tpot_s` None: it did not finish, 0.0 for a single token. `reason` is empty for one
    that was answered. `receipt` says where the time went and which workers did it (None unless answered): a route
    without a prefill worker is a local one. `cached_tokens`: prompt tokens that a prefix cache had.
    """

    index: int
    arrival_s: float
    ended_s: float
    prompt_tokens: int
    output_tokens: int
    ending: Ending
    ttft_s: float | None = None
    tpot_s: float | None = None
    reason: str = ""
    cached_tokens: int = 0
    receipt: Receipt | None = None

    def meets_ttft(self, objectives: Objectives) -> bool:
        """Whether it was answered, and in time. A client that gave up after its first token has missed both."""
        return self.ending is Ending.DONE and self.ttft_s is not None and objectives.has_ttft(self.ttft_s)

    def meets_tpot(self, objectives: Objectives) -> bool:
        return self.ending is Ending.DONE and self.tpot_s is not None and objectives.has_tpot(self.tpot_s)

    def meets(self, objectives: Objectives) -> bool:
        return self.meets_ttft(objectives) and self.meets_tpot(objectives)


@dataclass(frozen=True, slots=True)
class EmulationResult:
    """One run. `rate_rps`: requests offered per second; `gpus`: of all workers together; `events`: callbacks that the
    virtual loop ran. `is_whole`: False for a run that was ended early, because too many had missed already; requests
    that had not ended then are no part of `records`, and `offered` counts them all the same. `actions` are the
    controller's, with their virtual times."""

    records: tuple[RequestRecord, ...]
    objectives: Objectives
    offered: int
    rate_rps: float
    gpus: int
    virtual_s: float
    wall_s: float
    events: int
    is_whole: bool = True
    actions: tuple[tuple[float, Flip | Scale], ...] = ()

    @property
    def attainment(self) -> float:
        """Share of all offered requests that met both objectives."""
        return self._share(record.meets(self.objectives) for record in self.records)

    @property
    def attainment_ttft(self) -> float:
        return self._share(record.meets_ttft(self.objectives) for record in self.records)

    @property
    def attainment_tpot(self) -> float:
        return self._share(record.meets_tpot(self.objectives) for record in self.records)

    @property
    def rejected(self) -> int:
        return sum(record.ending is Ending.REJECTED for record in self.records)

    @property
    def endings(self) -> Counter[str]:
        """Requests by how they ended, and why."""
        return Counter(f"{record.ending}: {record.reason}".removesuffix(": ") for record in self.records)

    @property
    def met_rps_per_gpu(self) -> float:
        """Requests per second and GPU that met both objectives, at the rate offered."""
        return self.attainment * self.rate_rps / self.gpus

    def ttft_ms(self) -> dict[str, float | None]:
        return percentiles_ms(record.ttft_s for record in self.records)

    def tpot_ms(self) -> dict[str, float | None]:
        """Over requests of two tokens or more."""
        return percentiles_ms(record.tpot_s for record in self.records if record.output_tokens > 1)

    def as_json(self, goodput_rps_per_gpu: float | None = None) -> dict[str, Any]:
        """What `tandem emulate --json` prints. `goodput_rps_per_gpu`: of a search; without one, what met both
        objectives at the rate of this run."""
        goodput = self.met_rps_per_gpu if goodput_rps_per_gpu is None else goodput_rps_per_gpu
        return {
            "attainment": self.attainment,
            "attainment_ttft": self.attainment_ttft,
            "attainment_tpot": self.attainment_tpot,
            "goodput_rps_per_gpu": goodput,
            "rejected": self.rejected,
            "ttft_ms": self.ttft_ms(),
            "tpot_ms": self.tpot_ms(),
            "virtual_s": self.virtual_s,
            "wall_s": self.wall_s,
            "events": self.events,
            "requests": self.offered,
            "rate_rps": self.rate_rps,
            "gpus": self.gpus,
        }

    def _share(self, met: Iterable[bool]) -> float:
        return sum(met) / self.offered if self.offered else 0.0


def percentiles_ms(seconds: Iterable[float | None]) -> dict[str, float | None]:
    """p50, p90 and p99 of those that are there, in milliseconds; None where none is."""
    known = sorted(second for second in seconds if second is not None)
    return {f"p{percent}": percentile(known, percent) * 1e3 if known else None for percent in PERCENTILES}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of sorted values, with straight lines between neighbours."""
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
