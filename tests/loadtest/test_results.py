"""results.json, its way back, other objectives on the same records, and the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.loadtest.markdown import page
from cluster.loadtest.results import as_json, read_results, rejudged
from engine.errors import ConfigError
from engine.objectives import Objectives
from tests.loadtest.fake_targets import QueueTarget, ScriptedTarget, answer, even_load
from tests.loadtest.studies import phased_target, results_of, studied

PERCENTILES = {"p50", "p90", "p99", "max", "count"}


def written(results, tmp_path: Path) -> Path:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(as_json(results, with_gaps=True)), encoding="utf-8")
    return path


def test_the_schema() -> None:
    study = studied([phased_target()], even_load(27, 8), rates_rps=(1.0, 2.0), seeds=(0, 1))
    values = json.loads(json.dumps(as_json(results_of(study), with_gaps=True)))
    assert values["schema"] == 1
    assert values["objectives"] == {"ttft_ms": 500.0001, "tpot_ms": 50.0}
    # At the top: as `tandem emulate` has it.
    assert {"attainment", "attainment_ttft", "attainment_tpot", "rejected", "goodput_rps"} <= set(values)
    assert values["rejected"] == 6
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "reject_ms", "late_ms"):
        assert set(values[name]) == PERCENTILES
    assert values["reject_ms"]["p99"] == pytest.approx(5.0)
    assert len(values["points"]) == 2
    point = values["points"][0]
    assert {"target", "rate_rps", "scale", "sent", "is_cut", "attainment", "runs", "attainment_by_seed"} <= set(point)
    assert [run["seed"] for run in point["runs"]] == [0, 1]
    record = point["runs"][0]["records"][0]
    assert set(record) == {
        *("index", "arrival_s", "ending", "prompt_tokens", "cached_tokens", "output_tokens", "asked_tokens", "error"),
        *("late_ms", "end_ms", "ttft_ms", "tpot_ms", "gaps_ms", "receipt"),
    }
    assert len(record["gaps_ms"]) == 7


def test_and_back(tmp_path: Path) -> None:
    study = studied([QueueTarget(0.5)], even_load(20, 1), rates_rps=(1.0,), find_goodput=True)
    results = results_of(study, notes=("a note",), is_whole=False)
    back = read_results(written(results, tmp_path))
    again = json.loads(json.dumps(as_json(back, with_gaps=True)))
    first = json.loads(json.dumps(as_json(results, with_gaps=True)))
    assert again["goodput"] == first["goodput"]
    assert again["warnings"] == first["warnings"] == ["a note", "the study was interrupted: some points are missing"]
    assert [point["attainment"] for point in again["points"]] == [point["attainment"] for point in first["points"]]
    assert again["ttft_ms"] == first["ttft_ms"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 1, "points": [{}]}'])
def test_what_is_no_results_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"--reslo .*x\.json: is no"):
        read_results(path)


def test_other_objectives_on_the_same_records() -> None:
    targets = [ScriptedTarget(lambda index: answer(0.39 if index % 4 else 0.1, 0.03, 4), name) for name in "ab"]
    results = results_of(studied(targets, rates_rps=(1.0, 2.0)))
    assert {point.attainment for point in results.points} == {1.0}
    again = rejudged(results, Objectives(0.2, 0.05), (2.0, 0.5))
    assert {(point.target, point.scale, point.attainment) for point in again.points} == {
        ("a", 1.0, 0.25),
        ("b", 1.0, 0.25),
        ("a", 2.0, 1.0),
        ("b", 2.0, 1.0),
        ("a", 0.5, 0.0),
        ("b", 0.5, 0.0),
    }
    assert [goodput.rate_rps for goodput in again.goodputs] == [0.0, 0.0]
    looser = rejudged(results, Objectives(None, 0.03001), ())
    assert [(goodput.rate_rps, goodput.is_bracketed) for goodput in looser.goodputs] == [(2.0, False), (2.0, False)]


def test_targets_that_acted_on_objectives_are_told_apart_and_cut_points_left_out() -> None:
    target = QueueTarget(0.5, acts_on_objectives=True)
    results = results_of(studied([target], even_load(60), rates_rps=(1.9,), find_goodput=True))
    cut = sum(point.is_cut for point in results.points)
    assert cut
    again = rejudged(results, Objectives(10.0, 1.0), ())
    assert len(again.points) == len(results.points) - cut
    assert "queue acted on the objectives it was told: by others this is no measure of it" in again.warnings
    assert f"left out: {cut} points that had been cut short" in again.warnings


def test_the_answer_is_the_highest_rate_that_attains() -> None:
    study = studied([QueueTarget(0.5)], even_load(60), rates_rps=(4.0, 1.0, 1.5, 8.0))
    results = results_of(study)
    answer_ = results.answer()
    assert answer_ is not None
    assert answer_.rate_rps == 1.5
    hopeless = results_of(studied([QueueTarget(0.5)], even_load(60), rates_rps=(8.0, 4.0))).answer()
    assert hopeless is not None
    assert hopeless.rate_rps == 4.0


def test_the_page_says_it_all() -> None:
    study = studied([phased_target()], even_load(27, 9), rates_rps=(1.0, 2.0), find_goodput=False)
    text = page(results_of(study), ["phases.png"])
    assert "Objectives: TTFT 500 ms, TPOT 50 ms" in text
    assert "| tandem | 1 | 3 rejected | no pair of workers can meet it; retry after 2 s |" in text
    assert "48 answers are shorter than asked for" in text
    assert "| gateway queue |" in text
    assert "![phases.png](phases.png)" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(line.split("|")) > 4 for line in table)


def test_a_run_too_short_to_judge_a_rate_is_warned_of() -> None:
    study = studied([QueueTarget(0.5)], even_load(8, 1), rates_rps=(1.5,), find_goodput=True)
    [goodput] = study.goodputs
    [warning] = results_of(study).warnings
    assert warning.startswith(f"queue: at {goodput.rate_rps:g} req/s all 8 requests of a run arrive within 10 times")
    longer = studied([QueueTarget(0.5)], even_load(80, 1), rates_rps=(1.5,), find_goodput=True)
    assert not results_of(longer).warnings


def test_a_late_generator_is_warned_of() -> None:
    study = studied([QueueTarget(0.5)], even_load(20, 1))
    [point] = study.points
    assert not results_of(study).warnings
    late = tuple(replace(record, late_s=0.006) for record in point.runs[0].records)
    worse = replace(point, runs=(replace(point.runs[0], records=late),))
    assert results_of(study, points=(worse,)).warnings == [
        "queue: at 1 req/s the generator itself was late by 6.0 ms (p99)"
    ]
