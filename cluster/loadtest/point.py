"""One point of a study: a target at a rate under objectives, with the records of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.loadtest.record import Record
from cluster.loadtest.summary import Summary, summarise
from engine.objectives import Objectives


@dataclass(frozen=True, slots=True)
class Run:
    """The records of one seed, in order of arrival."""

    seed: int
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """`objectives` judge it; `scale` is what they are of the study's own. `sent` says that the target was told
    objectives while it ran, so that no others can judge it. `is_cut`: ended early, its attainment is too low for
    certain."""

    target: str
    rate_rps: float
    scale: float
    objectives: Objectives
    sent: bool
    runs: tuple[Run, ...]
    is_cut: bool = False

    @property
    def summary(self) -> Summary:
        return summarise([run.records for run in self.runs], self.objectives)

    @property
    def attainment(self) -> float:
        return _attainment([record for run in self.runs for record in run.records], self.objectives)

    @property
    def attainment_by_seed(self) -> dict[int, float]:
        return {run.seed: _attainment(run.records, self.objectives) for run in self.runs}

    def judged_by(self, objectives: Objectives, scale: float = 1.0) -> Point:
        """The same records under other objectives."""
        return replace(self, objectives=objectives, scale=scale)


def scaled(objectives: Objectives, scale: float) -> Objectives:
    """Both times `scale`."""
    return Objectives(
        None if objectives.ttft_s is None else scale * objectives.ttft_s,
        None if objectives.tpot_s is None else scale * objectives.tpot_s,
    )


@dataclass(frozen=True, slots=True)
class Goodput:
    """The highest rate of a target with enough attainment: of those tried, below the lowest that had not. 0.0: none.
    `is_bracketed`: a rate close above it was tried and had not."""

    target: str
    rate_rps: float
    is_bracketed: bool
    probes: tuple[tuple[float, float], ...]


def best_rate(points: Sequence[Point], attainment: float) -> float:
    """The highest rate with `attainment` at it and at every lower rate of `points`, which are one target's; else 0."""
    best = 0.0
    for point in sorted(points, key=lambda point: point.rate_rps):
        if point.attainment < attainment:
            break
        best = point.rate_rps
    return best


def _attainment(records: Sequence[Record], objectives: Objectives) -> float:
    return sum(record.is_met(objectives) for record in records) / len(records)
