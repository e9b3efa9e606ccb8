"""Pictures of attainment against rate."""

from __future__ import annotations

from pathlib import Path

from matplotlib.image import imread

from bench.plots import Panel, draw_panels


def test_seven_panels_are_drawn_in_three_rows(tmp_path: Path) -> None:
    panels = [Panel(f"pair {n}", {"ours": [(1.0, 0.95), (2.0, 0.5)], "theirs": [(1.0, 0.2)]}) for n in range(7)]
    path = tmp_path / "plots" / "attainment.png"
    draw_panels(panels, path)
    height, width, _ = imread(path).shape
    assert 0.7 < height / width < 1.0
    draw_panels(panels[:1], path)
    height, width, _ = imread(path).shape
    assert 0.7 < height / width < 1.0


def test_an_arm_without_points_is_drawn_as_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    draw_panels([Panel("no runs yet", {"ours": []})], path)
    assert path.stat().st_size > 0
