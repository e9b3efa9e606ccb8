"""A study's results as a Markdown page, with its pictures beside it."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.loadtest.phases import PHASES, mean_phases
from cluster.loadtest.point import Point
from cluster.loadtest.results import Results, describe
from cluster.loadtest.summary import Percentiles

DEFINITIONS = """\
TTFT: first chunk with tokens − request sent. TPOT: (last chunk − first chunk) / (tokens − 1). ITL: gaps between chunks
that carried tokens. Attainment: requests that met both objectives, of all that were sent; rejects, time-outs and
failures are misses. Goodput of a point: requests per second that met both, from the first arrival to the last end."""


def page(results: Results, pictures: Sequence[str]) -> str:
    """`pictures` are file names beside the page."""
    parts = [f"# tandem bench, {results.date}", _head(results), DEFINITIONS]
    parts += [f"**Warning**: {warning}" for warning in results.warnings]
    if results.goodputs:
        parts += ["## Goodput", _goodput_table(results)]
    # Points of other scales are often the same records, and have a table of their own.
    points = [point for point in results.points if point.scale == 1.0]
    parts += ["## Points", _point_table(points)]
    if len(points) < len(results.points):
        parts += ["## Attainment by scale of both objectives", _scale_table(results.points)]
    parts += ["## Latencies (ms, p50 / p90 / p99)", _latency_table(points)]
    if phases := _phase_table(points):
        parts += ["## Where the time went (mean ms of answered requests)", phases]
    if errors := _error_table(points):
        parts += ["## What went wrong", errors]
    parts += [f"![{name}]({name})" for name in pictures]
    return "\n\n".join(parts) + "\n"


def _head(results: Results) -> str:
    load = ", ".join(f"{key} {value}" for key, value in results.load.items() if value is not None)
    targets = "; ".join(
        f"{name} ({facts['url']}, {facts['model']}"
        + (", told the objectives)" if facts.get("acts_on_objectives") else ")")
        for name, facts in results.targets.items()
    )
    return f"Objectives: {describe(results.objectives)}. Load: {load}. Targets: {targets}."


def _goodput_table(results: Results) -> str:
    rows = []
    for found in results.goodputs:
        probes = ", ".join(f"{rate:g}: {share:.1%}" for rate, share in sorted(found.probes))
        bound = "" if found.is_bracketed else " (no failure close above it)"
        rows.append([found.target, f"{found.rate_rps:g}{bound}", probes])
    return _table(["target", f"req/s with ≥ {results.attainment:.0%}", "rates tried: attainment"], rows)


def _point_table(points: Sequence[Point]) -> str:
    heads = ["target", "req/s", "requests", "attainment", "TTFT met", "TPOT met", "by seed", "goodput/s", "cached"]
    rows = []
    for point in points:
        summary = point.summary
        by_seed = " ".join(f"{share:.2f}" for share in point.attainment_by_seed.values())
        rows.append(
            [
                point.target,
                f"{point.rate_rps:g}",
                f"{summary.requests}{' (cut short)' if point.is_cut else ''}",
                f"{summary.attainment:.1%}",
                f"{summary.attainment_ttft:.1%}",
                f"{summary.attainment_tpot:.1%}",
                by_seed,
                f"{summary.goodput_rps:.3g}",
                f"{summary.cached_share:.0%}",
            ]
        )
    return _table(heads, rows)


def _scale_table(points: Sequence[Point]) -> str:
    scales = sorted({point.scale for point in points})
    found = {(point.target, point.rate_rps, point.scale): point.attainment for point in points}
    rows = []
    for target, rate in dict.fromkeys((point.target, point.rate_rps) for point in points if point.scale != 1.0):
        shares = [found.get((target, rate, scale)) for scale in scales]
        rows.append([target, f"{rate:g}", *("–" if share is None else f"{share:.1%}" for share in shares)])
    return _table(["target", "req/s", *(f"× {scale:g}" for scale in scales)], rows)


def _latency_table(points: Sequence[Point]) -> str:
    heads = ["target", "req/s", "TTFT", "TPOT", "ITL", "end to end", "reject", "sent late"]
    rows = []
    for point in points:
        summary = point.summary
        times = (summary.ttft_ms, summary.tpot_ms, summary.itl_ms, summary.e2e_ms, summary.reject_ms, summary.late_ms)
        rows.append([point.target, f"{point.rate_rps:g}", *map(_three, times)])
    return _table(heads, rows)


def _phase_table(points: Sequence[Point]) -> str:
    rows = [
        [point.target, f"{point.rate_rps:g}", *(f"{1e3 * phases[phase]:.1f}" for phase in PHASES)]
        for point in points
        if (phases := mean_phases(point)) is not None
    ]
    return _table(["target", "req/s", *PHASES.values()], rows) if rows else ""


def _error_table(points: Sequence[Point]) -> str:
    rows = []
    for point in points:
        summary = point.summary
        ending = ", ".join(f"{count} {kind}" for kind, count in summary.ending.items() if kind != "answered")
        if ending:
            first = next(iter(summary.errors), "").replace("|", "\\|")
            rows.append([point.target, f"{point.rate_rps:g}", ending, first])
    return _table(["target", "req/s", "not answered", "most frequent reason"], rows) if rows else ""


def _three(times: Percentiles | None) -> str:
    return "–" if times is None else f"{times.p50:.4g} / {times.p90:.4g} / {times.p99:.4g}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
