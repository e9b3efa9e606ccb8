"""Cells of real and emulated runs, and the goodput that follows."""

from __future__ import annotations

import pytest

from bench.reality_report import Cell, goodput, report
from engine.objectives import Objectives


@pytest.mark.parametrize(
    ("points", "found"),
    [
        ([(1.0, 1.0), (2.0, 0.8)], 1.5),
        ([(1.0, 1.0), (2.0, 0.95)], 2.0),
        ([(1.0, 0.89), (2.0, 0.5)], 0.0),
        # The first crossing counts, whatever a lucky higher rate does.
        ([(1.0, 1.0), (2.0, 0.8), (3.0, 0.95), (4.0, 0.1)], 1.5),
    ],
)
def test_goodput_is_where_attainment_crosses_the_target(points: list[tuple[float, float]], found: float) -> None:
    assert goodput(points) == pytest.approx(found)


def test_the_report_says_how_far_each_cell_is_off() -> None:
    cells = [
        Cell("1P + 1D", 1.0, (1.0, 0.98), (0.97, 0.99), (0, 1.5)),
        Cell("1P + 1D", 2.0, (0.5, 0.6), (0.6, 0.7), (40, 35.0)),
    ]
    text = report(cells, Objectives(1.5, 0.09))
    assert "| 1P + 1D | 1 | 0.990 (1.00 0.98) | 0.980 (0.97 0.99) | -1.0 | 0 / 2 |" in text
    assert "| 1P + 1D | 2 | 0.550 (0.50 0.60) | 0.650 (0.60 0.70) | +10.0 | 40 / 35 |" in text
    # 0.99 to 0.55 crosses 0.9 at 1.20; 0.98 to 0.65 at 1.24.
    assert "| 1P + 1D | 1.20 | 1.24 | +3.1% |" in text
