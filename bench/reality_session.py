"""What one service really did in a series of runs, and the trace that lets an emulation meet the same requests.

requests alone | run at rate 1 | run at rate 2 | …          one service, and one clock, `Run.started_s`
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.loadtest.record import Record, from_json, to_json
from cluster.planning.emulation_result import RequestRecord
from cluster.planning.trace import Trace, TraceRequest


@dataclass(frozen=True, slots=True)
class Run:
    """Requests at one rate. `started_s` since the session's first run; records count from their run's start."""

    rate_rps: float
    seed: int
    started_s: float
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Session:
    """All runs of one service in the order in which they were played, and the requests that it served one by one."""

    alone: tuple[Record, ...]
    runs: tuple[Run, ...]

    def cut(self, records: Sequence[RequestRecord]) -> list[Sequence[RequestRecord]]:
        """Of an emulation of all runs, which has its records in order of arrival: those of each run."""
        ends = [0]
        for run in self.runs:
            ends.append(ends[-1] + len(run.records))
        if ends[-1] != len(records):
            raise ValueError(f"records: got {len(records)}, but the runs had {ends[-1]} requests")
        return [records[start:end] for start, end in itertools.pairwise(ends)]

    def to_json(self) -> dict[str, Any]:
        runs = [
            {"rate_rps": run.rate_rps, "seed": run.seed, "started_s": run.started_s, "records": _rows(run.records)}
            for run in self.runs
        ]
        return {"alone": _rows(self.alone), "runs": runs}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Session:
        runs = [Run(run["rate_rps"], run["seed"], run["started_s"], _records(run["records"])) for run in values["runs"]]
        return cls(_records(values["alone"]), tuple(runs))


def as_sent(runs: Sequence[Run]) -> Trace:
    """The requests when they were really sent, and as long as they were asked for, all on one clock."""
    return Trace(
        tuple(
            TraceRequest(run.started_s + r.arrival_s + max(0.0, r.late_s), r.prompt_tokens, r.asked_tokens)
            for run in runs
            for r in run.records
        )
    )


def _rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [to_json(record, with_gaps=False) for record in records]


def _records(rows: Sequence[dict[str, Any]]) -> tuple[Record, ...]:
    return tuple(from_json(row) for row in rows)
