"""Pictures of a study: attainment against rate, attainment against the objectives' scale, and a time line of phases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from cluster.loadtest.phases import PHASES, phases_of
from cluster.loadtest.point import Point
from cluster.loadtest.record import Record
from cluster.loadtest.results import Results, describe

# Okabe and Ito's colours, which the colour-blind can tell apart too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PHASE_COLOURS = ("#999999", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9", "#0072B2")
MISS_COLOUR = "#CC0000"
MARKERS = "osD^vP*"
WIDTH_IN = 8.0
DPI = 130
# More bars than this cannot be told apart.
BARS_MAX = 60


def save_plots(results: Results, folder: Path) -> list[str]:
    """Writes the pictures that the results have something for; returns their names."""
    drawn: list[str] = []
    for name, figure in (
        ("attainment_rate.png", rate_figure(results)),
        ("attainment_slo_scale.png", scale_figure(results)),
        ("phases.png", phase_figure(results)),
    ):
        if figure is not None:
            FigureCanvasAgg(figure)
            figure.savefig(folder / name, format="png")
            drawn.append(name)
    return drawn


def rate_figure(results: Results) -> Figure | None:
    """Attainment against rate, a line per target, thin ones for each objective alone. None for fewer than two rates."""
    points = [point for point in results.points if point.scale == 1.0]
    if len({point.rate_rps for point in points}) < 2:
        return None
    figure, axes = _figure("request rate (1/s)")
    for index, target in enumerate(dict.fromkeys(point.target for point in points)):
        mine = sorted((point for point in points if point.target == target), key=lambda point: point.rate_rps)
        rates = [point.rate_rps for point in mine]
        summaries = [point.summary for point in mine]
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(rates, [100 * s.attainment_ttft for s in summaries], colour, linestyle="--", linewidth=1, alpha=0.7)
        axes.plot(rates, [100 * s.attainment_tpot for s in summaries], colour, linestyle=":", linewidth=1.2, alpha=0.7)
        both = [100 * s.attainment for s in summaries]
        axes.plot(rates, both, colour, marker=MARKERS[index % len(MARKERS)], linewidth=2, label=target, markersize=6)
        for point in mine:
            each = [100 * share for share in point.attainment_by_seed.values()]
            axes.scatter([point.rate_rps] * len(each), each, s=10, color=colour, alpha=0.5)
        if found := next((found for found in results.goodputs if found.target == target), None):
            axes.axvline(found.rate_rps, color=colour, linewidth=0.8, alpha=0.6)
    axes.set_title(f"Attainment against rate: {describe(results.objectives)}", fontsize=11)
    styles = [
        Line2D([], [], color="#444444", linestyle="--", linewidth=1, label="TTFT alone"),
        Line2D([], [], color="#444444", linestyle=":", linewidth=1.2, label="TPOT alone"),
        Line2D([], [], color="#444444", marker=".", linestyle="", label="one seed"),
    ]
    _finish(axes, results.attainment, styles)
    return figure


def scale_figure(results: Results) -> Figure | None:
    """Attainment against the objectives' scale, a line per target at its best rate. None for fewer than two scales."""
    if len({point.scale for point in results.points}) < 2:
        return None
    figure, axes = _figure("scale of both objectives")
    for index, target in enumerate(dict.fromkeys(point.target for point in results.points)):
        rate_rps = results.shown_rate(target)
        mine = [point for point in results.points if (point.target, point.rate_rps) == (target, rate_rps)]
        mine.sort(key=lambda point: point.scale)
        axes.plot(
            [point.scale for point in mine],
            [100 * point.attainment for point in mine],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            linewidth=2,
            label=f"{target} at {rate_rps:g}/s",
        )
    axes.set_title(f"Attainment against SLO scale; 1 is {describe(results.objectives)}", fontsize=11)
    _finish(axes, results.attainment, [])
    return figure


def phase_figure(results: Results) -> Figure | None:
    """The requests of the results' answer, a bar each, coloured by phase: on the run's clock, and beside it from each
    one's sending on. None without receipts."""
    point = results.answer()
    if point is None:
        return None
    records, left_out = _window(point)
    if not any(phases_of(record.receipt) for record in records):
        return None
    figure = Figure(figsize=(WIDTH_IN, 2.0 + 0.105 * len(records)), dpi=DPI, layout="constrained")
    clock, aligned = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
    for row, record in enumerate(records):
        _bar(clock, row, record, record.arrival_s + record.late_s)
        _bar(aligned, row, record, 0.0)
    if point.objectives.ttft_s is not None:
        aligned.axvline(point.objectives.ttft_s, color=MISS_COLOUR, linewidth=1, linestyle="--")
    clock.set_xlabel("seconds since the start of the run")
    aligned.set_xlabel("seconds since the request was sent")
    clock.set_ylabel("requests, by arrival")
    clock.set_ylim(len(records) - 0.4, -0.6)
    for axes in (clock, aligned):
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
    of = f", {len(records)} of {len(records) + left_out} requests around the slowest first token" if left_out else ""
    figure.suptitle(f"{point.target} at {point.rate_rps:g} req/s{of}", fontsize=11)
    used = [Patch(color=colour, label=label) for colour, label in zip(PHASE_COLOURS, PHASES.values(), strict=True)]
    marks = [
        Line2D([], [], color="black", marker="|", linestyle="", markersize=8, label="first token"),
        Line2D([], [], color=MISS_COLOUR, linestyle="--", linewidth=1, label="first token due"),
        Line2D([], [], color=MISS_COLOUR, marker="x", linestyle="", markersize=5, label="not answered"),
    ]
    figure.legend(handles=[*used, *marks], loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def _bar(axes: Axes, row: int, record: Record, sent_s: float) -> None:
    if record.ending != "answered":
        axes.plot([sent_s], [row], marker="x", color=MISS_COLOUR, markersize=5, clip_on=False)
        return
    left = sent_s
    for seconds, colour in zip((phases_of(record.receipt) or {}).values(), PHASE_COLOURS, strict=False):
        axes.barh(row, seconds, left=left, height=0.8, color=colour, linewidth=0)
        left += seconds
    if record.ttft_s is not None:
        axes.plot([sent_s + record.ttft_s], [row], marker="|", color="black", markersize=5)


def _window(point: Point) -> tuple[Sequence[Record], int]:
    """At most BARS_MAX neighbours by arrival of the first run, around its slowest first token; how many are not."""
    records = point.runs[0].records
    if len(records) <= BARS_MAX:
        return records, 0
    slowest = max(range(len(records)), key=lambda index: records[index].ttft_s or 0.0)
    first = min(max(0, slowest - BARS_MAX // 2), len(records) - BARS_MAX)
    return records[first : first + BARS_MAX], len(records) - BARS_MAX


def _figure(label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_IN, 4.8), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(label)
    axes.set_ylabel("requests within their objectives (%)")
    axes.set_ylim(-2, 102)
    axes.grid(alpha=0.25)
    return figure, axes


def _finish(axes: Axes, attainment: float, styles: Sequence[Line2D]) -> None:
    axes.axhline(100 * attainment, color="#888888", linewidth=1, linestyle="-.")
    axes.margins(x=0.04)
    handles, _ = axes.get_legend_handles_labels()
    goal = Line2D([], [], color="#888888", linewidth=1, linestyle="-.", label=f"{attainment:.0%}")
    axes.legend(handles=[*handles, *styles, goal], fontsize=8, loc="best", framealpha=0.9)
