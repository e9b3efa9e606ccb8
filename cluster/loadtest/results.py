"""A study's results as one JSON object, and back.

{"schema": 1, "date", "objectives", "load", "targets", "warnings",
 "points":   [{"target", "rate_rps", "scale", "objectives", "sent", "is_cut", "attainment_by_seed", ...the summary,
               "runs": [{"seed", "records": [...]}]}],
 "goodput":  {target: {"rate_rps", "is_bracketed", "probes": [[rate_rps, attainment], ...]}},
 ...and at the top level the summary of the point that answers the question: the first target's, at its goodput where
 that was searched or at its highest rate with enough attainment, else at its lowest rate}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.loadtest.point import Goodput, Point, Run, best_rate, scaled
from cluster.loadtest.record import from_json as record_from_json
from cluster.loadtest.record import to_json as record_to_json
from cluster.loadtest.summary import LATE_WARN_S
from engine.errors import ConfigError
from engine.objectives import Objectives

SCHEMA = 1
# A run shorter than so many TTFT objectives says little: a server may be behind for all of it, and yet in time.
PATIENCES = 10


@dataclass(frozen=True, slots=True)
class Results:
    """`load` and `targets` describe what was sent and to whom, in plain values. `attainment`: what goodput asks for."""

    date: str
    objectives: Objectives
    attainment: float
    load: Mapping[str, Any]
    targets: Mapping[str, Mapping[str, Any]]
    points: tuple[Point, ...]
    goodputs: tuple[Goodput, ...] = ()
    notes: tuple[str, ...] = field(default=())
    is_whole: bool = True

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before believing the figures."""
        found = list(self.notes)
        if not self.is_whole:
            found.append("the study was interrupted: some points are missing")
        for target in dict.fromkeys(point.target for point in self.points):
            # Other scales are often the same records.
            mine = [point for point in self.points if point.target == target and point.scale == 1.0]
            found += _warnings_of(target, mine, is_exact=bool(self.load.get("ignore_eos", True)))
        for goodput in self.goodputs:
            least_s = PATIENCES * (self.objectives.ttft_s or 0.0)
            count = self.load.get("requests", 0)
            if goodput.rate_rps and count / goodput.rate_rps < least_s:
                found.append(
                    f"{goodput.target}: at {goodput.rate_rps:g} req/s all {count} requests of a run arrive within "
                    f"{PATIENCES} times the TTFT objective: queues had no time to grow, send more"
                )
        return found

    def answer(self) -> Point | None:
        """The point that the top level shows; None without any."""
        if not self.points:
            return None
        target = self.points[0].target
        rate = self.shown_rate(target)
        return next(p for p in self.points if (p.target, p.rate_rps, p.scale) == (target, rate, 1.0))

    def shown_rate(self, target: str) -> float:
        """A target's goodput where it was searched; else its highest rate with enough attainment, else its lowest."""
        mine = [point for point in self.points if point.target == target and point.scale == 1.0]
        searched = {goodput.target: goodput.rate_rps for goodput in self.goodputs}
        rate = searched.get(target) or best_rate(mine, self.attainment)
        return rate or min(point.rate_rps for point in mine)


def _warnings_of(target: str, points: Sequence[Point], *, is_exact: bool) -> Iterator[str]:
    """`is_exact`: answers were to be as long as asked for."""
    summaries = [(point.rate_rps, point.summary) for point in points]
    late = [(times.p99, rate) for rate, summary in summaries if (times := summary.late_ms) is not None]
    if late and max(late)[0] > 1e3 * LATE_WARN_S:
        yield f"{target}: at {max(late)[1]:g} req/s the generator itself was late by {max(late)[0]:.1f} ms (p99)"
    short = sum(summary.short_answers for _, summary in summaries)
    if short and is_exact:
        yield f"{target}: {short} answers are shorter than asked for"


def as_json(results: Results, *, with_gaps: bool) -> dict[str, Any]:
    """`with_gaps`: every gap between chunks too, which are most of the bytes."""
    answer = results.answer()
    return {
        "schema": SCHEMA,
        "date": results.date,
        **({} if answer is None else answer.summary.as_json() | {"rate_rps": answer.rate_rps}),
        "objectives": _objectives(results.objectives),
        "attainment_target": results.attainment,
        "load": dict(results.load),
        "targets": {name: dict(facts) for name, facts in results.targets.items()},
        "goodput": {
            found.target: {"rate_rps": found.rate_rps, "is_bracketed": found.is_bracketed, "probes": found.probes}
            for found in results.goodputs
        },
        "points": [_point(point, with_gaps) for point in results.points],
        "is_whole": results.is_whole,
        "notes": list(results.notes),
        "warnings": results.warnings,
    }


def read_results(path: Path) -> Results:
    """What `as_json` gave, from a file. Raises ConfigError naming the file and what is wrong."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--reslo {path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--reslo {path}: is not JSON: {error}") from None
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        raise ConfigError(f"--reslo {path}: is no results.json of tandem bench (schema {SCHEMA})")
    try:
        return _results(values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--reslo {path}: is no whole results.json: {type(error).__name__}: {error}") from None


def _results(values: Mapping[str, Any]) -> Results:
    points = [
        Point(
            point["target"],
            point["rate_rps"],
            point["scale"],
            _objectives_of(point["objectives"]),
            point["sent"],
            tuple(Run(run["seed"], tuple(map(record_from_json, run["records"]))) for run in point["runs"]),
            point["is_cut"],
        )
        for point in values["points"]
    ]
    goodputs = [
        Goodput(target, found["rate_rps"], found["is_bracketed"], tuple((r, a) for r, a in found["probes"]))
        for target, found in values["goodput"].items()
    ]
    return Results(
        values["date"],
        _objectives_of(values["objectives"]),
        values["attainment_target"],
        values["load"],
        values["targets"],
        tuple(points),
        tuple(goodputs),
        tuple(values["notes"]),
        values["is_whole"],
    )


def rejudged(results: Results, objectives: Objectives, scales: Sequence[float]) -> Results:
    """The same records judged by other objectives and scales of them. Points that were run with scaled objectives of
    their own are left out, and cut ones, whose missing requests nobody can judge."""
    kept = [point for point in results.points if not point.is_cut and (point.scale == 1.0)]
    points = [
        point.judged_by(scaled(objectives, scale), scale) for scale in dict.fromkeys((1.0, *scales)) for point in kept
    ]
    notes = [f"judged again; the runs' own objectives were {describe(results.objectives)}"]
    if acted := sorted({point.target for point in kept if point.sent}):
        notes.append(f"{', '.join(acted)} acted on the objectives it was told: by others this is no measure of it")
    if cut := sum(point.is_cut for point in results.points):
        notes.append(f"left out: {cut} points that had been cut short")
    targets = dict.fromkeys(point.target for point in points)
    goodputs = []
    for target in targets:
        mine = sorted((p for p in points if p.target == target and p.scale == 1.0), key=lambda p: p.rate_rps)
        probes = tuple((point.rate_rps, point.attainment) for point in mine)
        best = best_rate(mine, results.attainment)
        goodputs.append(Goodput(target, best, best < mine[-1].rate_rps, probes))
    return Results(
        results.date,
        objectives,
        results.attainment,
        results.load,
        results.targets,
        tuple(points),
        tuple(goodputs),
        (*results.notes, *notes),
        results.is_whole,
    )


def describe(objectives: Objectives) -> str:
    """ "TTFT 1500 ms, TPOT 90 ms" """
    parts = [("TTFT", objectives.ttft_s), ("TPOT", objectives.tpot_s)]
    return ", ".join(f"{name} {1e3 * value:g} ms" for name, value in parts if value is not None) or "no objective"


def _point(point: Point, with_gaps: bool) -> dict[str, Any]:
    return {
        "target": point.target,
        "rate_rps": point.rate_rps,
        "scale": point.scale,
        "objectives": _objectives(point.objectives),
        "sent": point.sent,
        "is_cut": point.is_cut,
        "attainment_by_seed": {str(seed): share for seed, share in point.attainment_by_seed.items()},
        **point.summary.as_json(),
        "runs": [
            {"seed": run.seed, "records": [record_to_json(record, with_gaps=with_gaps) for record in run.records]}
            for run in point.runs
        ],
    }


def _objectives(objectives: Objectives) -> dict[str, float | None]:
    return {
        "ttft_ms": None if objectives.ttft_s is None else round(1e3 * objectives.ttft_s, 6),
        "tpot_ms": None if objectives.tpot_s is None else round(1e3 * objectives.tpot_s, 6),
    }


def _objectives_of(values: Mapping[str, float | None]) -> Objectives:
    ttft_ms, tpot_ms = values["ttft_ms"], values["tpot_ms"]
    return Objectives(None if ttft_ms is None else ttft_ms / 1e3, None if tpot_ms is None else tpot_ms / 1e3)
