"""What bench/emulator_against_reality.py found: cells side by side, and the goodput that follows from them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.plots import Panel
from bench.report import table
from cluster.loadtest.results import describe
from engine.objectives import Objectives

TARGET = 0.9


@dataclass(frozen=True, slots=True)
class Cell:
    """One rate of one arrangement: attainment by seed, real and emulated, and requests that were refused."""

    arrangement: str
    rate_rps: float
    real: tuple[float, ...]
    emulated: tuple[float, ...]
    refused: tuple[int, float]

    @property
    def points(self) -> float:
        """How far the emulation is off, in points."""
        return 100.0 * (statistics.fmean(self.emulated) - statistics.fmean(self.real))


def goodput(points: Sequence[tuple[float, float]]) -> float:
    """Where attainment crosses the target, by straight lines between (rate, attainment); the highest rate where it
    never does, 0.0 where the lowest rate is too much."""
    found = 0.0
    for place, (rate, share) in enumerate(points):
        if share >= TARGET:
            found = rate
        elif place and points[place - 1][1] >= TARGET:
            before, above = points[place - 1]
            return before + (rate - before) * (above - TARGET) / (above - share)
    return found


def report(cells: Sequence[Cell], objectives: Objectives) -> str:
    """Two tables in Markdown: cells, and goodput."""
    heads = ["arrangement", "req/s", "attainment, real (by seed)", "emulated (by seed)", "off by, points", "refused"]
    rows = [
        [
            cell.arrangement,
            f"{cell.rate_rps:g}",
            shares(cell.real),
            shares(cell.emulated),
            f"{cell.points:+.1f}",
            f"{cell.refused[0]} / {cell.refused[1]:.0f}",
        ]
        for cell in cells
    ]
    lines = []
    for name in dict.fromkeys(cell.arrangement for cell in cells):
        own = [cell for cell in cells if cell.arrangement == name]
        real = goodput([(cell.rate_rps, statistics.fmean(cell.real)) for cell in own])
        emulated = goodput([(cell.rate_rps, statistics.fmean(cell.emulated)) for cell in own])
        lines.append([name, f"{real:.2f}", f"{emulated:.2f}", f"{emulated / real - 1:+.1%}" if real else "–"])
    title = f"Objectives {describe(objectives)}; refused: real / emulated."
    return "\n\n".join([title, table(heads, rows), table(["goodput, req/s", "real", "emulated", "off by"], lines)])


def shares(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({' '.join(f'{value:.2f}' for value in values)})"


def panels_of(cells: Sequence[Cell]) -> list[Panel]:
    """A panel for each arrangement."""
    panels = []
    for name in dict.fromkeys(cell.arrangement for cell in cells):
        own = [cell for cell in cells if cell.arrangement == name]
        real = [(cell.rate_rps, statistics.fmean(cell.real)) for cell in own]
        emulated = [(cell.rate_rps, statistics.fmean(cell.emulated)) for cell in own]
        panels.append(Panel(name, {"real": real, "emulated": emulated}))
    return panels
