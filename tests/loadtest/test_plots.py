"""The pictures: there when there is something to draw, and not empty."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from cluster.loadtest.plots import BARS_MAX, phase_figure, rate_figure, save_plots, scale_figure
from tests.loadtest.fake_targets import QueueTarget, even_load
from tests.loadtest.studies import phased_target, results_of, studied


def colours_of(path: Path) -> int:
    """How many different colours cover more than 20 pixels."""
    pixels = (imread(path)[:, :, :3] * 255).astype(np.uint32)
    _, counts = np.unique(pixels @ np.array([65536, 256, 1], np.uint32), return_counts=True)
    return int((counts > 20).sum())


def test_all_three(tmp_path: Path) -> None:
    targets = [phased_target(), phased_target("other", 1)]
    study = studied(targets, even_load(40, 8), rates_rps=(1.0, 2.0, 4.0), scales=(0.5, 0.75, 1.0, 2.0))
    assert save_plots(results_of(study), tmp_path) == ["attainment_rate.png", "attainment_slo_scale.png", "phases.png"]
    for name in ("attainment_rate.png", "attainment_slo_scale.png", "phases.png"):
        assert colours_of(tmp_path / name) > 4, name
        height, width, _ = imread(tmp_path / name).shape
        assert height > 400
        assert width > 800


def test_what_there_is_nothing_to_draw_of() -> None:
    results = results_of(studied([QueueTarget(0.5)]))
    assert rate_figure(results) is None
    assert scale_figure(results) is None
    assert phase_figure(results) is None
    assert phase_figure(results_of(studied([QueueTarget(0.5)]), points=())) is None


def test_lines_hold_the_points() -> None:
    study = studied([QueueTarget(0.5)], even_load(60), rates_rps=(1.0, 2.0, 4.0))
    figure = rate_figure(results_of(study))
    assert figure is not None
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert list(lines["queue"].get_xdata()) == [1.0, 2.0, 4.0]
    assert list(lines["queue"].get_ydata()) == pytest.approx([100 * point.attainment for point in study.points])


def test_a_long_run_shows_the_worst_part_of_it() -> None:
    figure = phase_figure(results_of(studied([phased_target()], even_load(200, 8), rates_rps=(5.0,))))
    assert figure is not None
    assert f"{BARS_MAX} of 200 requests" in figure.get_suptitle()
    for axes in figure.axes:
        rejected = sum(line.get_marker() == "x" for line in axes.get_lines())
        # Of 60 neighbours every ninth is rejected.
        assert rejected in (6, 7)
        assert len(axes.patches) == 6 * (BARS_MAX - rejected)
