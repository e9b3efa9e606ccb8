"""Attainment against rate: one panel for each pair of objectives or arrangement, one line for each arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.report import PAGE
from cluster.loadtest.plots import COLOURS, MARKERS

PANEL_INCHES = (4.2, 3.4)
DPI = 110
MOST_COLUMNS = 3
TARGET = 0.9
# Beside the page that shows them.
PLOTS = PAGE.parent / "plots"


@dataclass(frozen=True, slots=True)
class Panel:
    """`lines`: by arm, (requests per second, attainment) in order of rate."""

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def draw_panels(panels: Sequence[Panel], path: Path) -> None:
    """Writes a PNG."""
    width, height = PANEL_INCHES
    columns = min(MOST_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.4), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        for name, points in panel.lines.items():
            place = names.index(name)
            axes.plot(
                [rate for rate, _ in points],
                [100 * share for _, share in points],
                color=COLOURS[place % len(COLOURS)],
                marker=MARKERS[place % len(MARKERS)],
                label=name,
            )
        axes.axhline(100 * TARGET, color="grey", linestyle=":", linewidth=1)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel("requests per second")
        axes.set_ylim(0, 103)
        axes.grid(alpha=0.25)
        axes.set_ylabel("requests that met both objectives, %", fontsize=8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def image(name: str, panels: Sequence[Panel], what: str) -> str:
    """Draws the panels beside docs/performance.md; what shows them there."""
    draw_panels(panels, PLOTS / f"{name}.png")
    return f"![{what}](plots/{name}.png)"
