"""Measuring a device: the plan, the fit of known laws, and the whole way from a running model to a file."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.commands.profile import parse_cpus, profile
from cluster.config import TandemConfig
from cluster.planning.cost_model import cost_model
from cluster.planning.measure import Measurement, batch_of, typical
from cluster.planning.measure_loop import measure_loop
from cluster.planning.measured_law import MeasuredLaw, Rises, StepTerms, profile_json, value_at
from cluster.planning.measured_profile import make_profile, predicted_s, quantile
from cluster.planning.model_shape import model_shape
from cluster.planning.step_fit import Measured, fit, knots_for, non_negative_least_squares
from cluster.planning.step_law import WorkerFacts
from cluster.planning.step_plan import Limits, plan_steps
from engine.batch import KVLayout
from engine.engine import Engine
from engine.errors import ConfigError
from engine.model_source import ModelFiles
from engine.step_cost import StepWork, work_of
from engine.weights import open_weights
from tests.tiny_models import make_runner, save_model

LIMITS = Limits(rows=64, chunk=512, context=8192, pool_tokens=11648)
TERMS = StepTerms(
    tokens=Rises((0, 1, 8, 32, 512), (0.0, 0.02, 0.022, 0.08, 1.1)),
    drawn=Rises((0, 1, 64), (0.0, 0.005, 0.02)),
    prompt_step=0.004,
    prompt=1e-4,
    pair=8e-7,
    prompt_context=7e-6,
    decode_row=1e-4,
    decode_context=3e-6,
)


def test_plans_have_every_kind_of_step_and_fit_the_pool() -> None:
    for is_quick in (True, False):
        plan = plan_steps(LIMITS, random.Random(1), is_quick)
        assert plan == plan_steps(LIMITS, random.Random(1), is_quick)
        assert not set(plan.anchors) & set(plan.held_out)
        for works in (plan.anchors, plan.held_out):
            kinds = {(bool(work.prompts), bool(work.decode_rows)) for work in works}
            assert kinds == {(True, False), (False, True), (True, True)}
            assert len(set(works)) == len(works)
        assert any(len(work.prompts) > 1 for work in plan.anchors)


@given(
    limits=st.builds(
        Limits, st.integers(1, 300), st.integers(16, 4096), st.integers(64, 10**5), st.integers(64, 10**6)
    ),
    seed=st.integers(0, 99),
    is_quick=st.booleans(),
)
@settings(max_examples=30)
def test_every_planned_step_can_be_run(limits: Limits, seed: int, is_quick: bool) -> None:
    plan = plan_steps(limits, random.Random(seed), is_quick)
    assert plan.anchors
    for work in (*plan.anchors, *plan.held_out):
        assert work.decode_rows <= limits.rows
        assert work.decode_context >= work.decode_rows
        assert all(new <= limits.chunk and new + context <= limits.context for new, context in work.prompts)
        assert sum(new + context for new, context in work.prompts) + work.decode_context <= limits.pool_tokens


def test_a_batch_is_the_work_it_was_made_for() -> None:
    layout = KVLayout("m", 2, 1, 4, "float32", 4, 200)
    work = StepWork(((5, 11), (3, 0)), 6, 300)
    batch = batch_of(work, layout, 97, random.Random(0))
    made = work_of(batch)
    assert made.prompts == work.prompts
    assert made.decode_rows == 6
    assert 300 - 6 <= made.decode_context <= 300
    used = [block for row in batch.rows for block in row.block_ids]
    assert len(set(used)) == len(used)
    assert all(len(row.block_ids) == -(-row.end // 4) for row in batch.rows)


def test_typical_seconds_are_those_of_the_undisturbed_half() -> None:
    assert typical([3.0]) == 3.0
    assert typical([1.0, 9.0]) == 1.0
    assert typical([1.0, 1.2, 1.1, 7.0, 9.0]) == pytest.approx(1.1)


def test_least_squares_find_what_was_put_in_and_nothing_negative() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.uniform(0, 1, (60, 6))
    truth = np.array([1.0, 0.0, 3.0, 0.5, 0.0, 2.0])
    assert non_negative_least_squares(matrix, matrix @ truth) == pytest.approx(truth, abs=1e-4)
    found = non_negative_least_squares(matrix, matrix @ (truth - np.array([0, 1.0, 0, 0, 0, 0])))
    assert found.min() == 0.0
    assert found[1] == 0.0


@pytest.mark.parametrize("is_quick", [True, False])
def test_a_fit_finds_a_law_through_noise_and_disturbed_steps(is_quick: bool) -> None:
    rng, law = random.Random(3), MeasuredLaw(TERMS)
    plan = plan_steps(LIMITS, rng, is_quick)
    steps = [Measured(work, predicted_s(law, work) * rng.gauss(1.0, 0.02)) for work in plan.anchors]
    disturbed = [replace(step, seconds=step.seconds * 1.5) if rng.random() < 0.05 else step for step in steps]
    found = MeasuredLaw(fit(disturbed))
    errors = [abs(predicted_s(found, work) / predicted_s(law, work) - 1.0) for work in plan.held_out]
    assert quantile(errors, 0.5) < 0.02
    assert quantile(errors, 0.9) < 0.06


def test_lines_between_knots_and_on_beyond_them() -> None:
    line = Rises((0, 2, 10), (0.0, 4.0, 8.0))
    assert [value_at(line, count) for count in (0, 1, 2, 6, 10, 14)] == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert knots_for([1, 1, 30, 40], (0, 1, 8, 16, 32, 64)) == (0, 1, 32, 40)


def test_a_profile_is_judged_by_steps_that_it_did_not_see() -> None:
    law = MeasuredLaw(TERMS)
    plan = plan_steps(LIMITS, random.Random(5))
    anchors = [Measured(work, predicted_s(law, work)) for work in plan.anchors]
    # All of these take a tenth longer than the law of the others says.
    held_out = [Measured(work, s := 1.1 * predicted_s(law, work), (s,) * 5) for work in plan.held_out]
    facts = WorkerFacts(model_shape("smollm2-135m"), 1000, 4)
    measured, judged = make_profile(facts, "cpu", "by hand", anchors, held_out)
    assert len(judged) == len(held_out)
    assert measured.errors["all"][0] == pytest.approx(1 - 1 / 1.1, abs=0.01)
    assert measured.errors["all"][2] == len(held_out)
    assert np.median(measured.facts.decode_noise) == pytest.approx(1.1, abs=0.02)
    with pytest.raises(ConfigError, match="3 steps could be measured"):
        make_profile(facts, "cpu", "by hand", anchors[:3], held_out)


def test_a_file_predicts_for_its_own_model_alone(tmp_path: Path) -> None:
    law, plan = MeasuredLaw(TERMS), plan_steps(LIMITS, random.Random(5), is_quick=True)
    steps = [Measured(work, predicted_s(law, work)) for work in plan.anchors]
    facts = replace(WorkerFacts(model_shape("smollm2-135m"), 11648, 4), loop_step_s=2e-3, loop_row_s=1e-4)
    measured, _ = make_profile(facts, "cpu", "by hand", steps, [])
    path = tmp_path / "cpu.json"
    path.write_text(profile_json(measured))
    for cost in (cost_model(str(path), "smollm2-135m"), cost_model(str(path), "")):
        assert cost.kv_capacity_tokens == 11648
        assert cost.kv_bytes(1) == 30 * 2 * 3 * 64 * 4
        assert cost.loop_s(10) == pytest.approx(3e-3)
        assert cost.step_s(StepWork((), 8, 800)) == pytest.approx(law.decode_s(8, 800), rel=0.02)
        mixed = StepWork(((64, 0),), 8, 800)
        assert cost.step_s(mixed) == pytest.approx(law.prompt_s(mixed), rel=0.05)
    assert cost_model(str(path), "", kv_capacity=77).kv_capacity_tokens == 77
    with pytest.raises(ConfigError, match="was measured with smollm2-135m, whose num_layers is 30; qwen3-8b has 36"):
        cost_model(str(path), "qwen3-8b")
    with pytest.raises(ConfigError, match="tp 1, pp 1; got tp 3, pp 1"):
        cost_model(str(path), "smollm2-135m", 3)
    path.write_text(path.read_text().replace('"pair"', '"pears"'))
    with pytest.raises(ConfigError, match="pears"):
        cost_model(str(path), "")


def test_cpus_as_people_write_them() -> None:
    assert parse_cpus("0,2-4") == (0, 2, 3, 4)
    assert parse_cpus("") == ()
    with pytest.raises(ConfigError, match="--cpus"):
        parse_cpus("0-x")


async def test_a_running_model_becomes_a_file(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    files = ModelFiles("hf", folder)
    runner = make_runner(files, num_blocks=128)
    engine = Engine(open_weights(files).config, runner, files)
    plan = plan_steps(Limits(8, 32, 160, 128 * 4), random.Random(0), is_quick=True)
    rounds: list[tuple[int, int]] = []
    try:
        measurement = Measurement(engine.runner, engine.model.vocab_size, random.Random(0))
        until_s = time.perf_counter() + 20.0
        steps = await measurement.run(
            (*plan.anchors, *plan.held_out), until_s, lambda done, of: rounds.append((done, of))
        )
        assert rounds[-1][0] == rounds[-1][1]
        late = await measurement.run(plan.anchors, time.perf_counter() - 1.0, lambda done, of: None)
    finally:
        await engine.runner.close()
    assert late == []
    assert [step.work for step in steps] == [*plan.anchors, *plan.held_out]
    assert all(step.seconds > 0 and len(step.samples) > 2 for step in steps)
    held_out = set(plan.held_out)
    facts = WorkerFacts(model_shape(str(folder)), 512, 4)
    measured, _ = make_profile(
        facts,
        "cpu",
        "a test",
        [step for step in steps if step.work not in held_out],
        [step for step in steps if step.work in held_out],
    )
    path = tmp_path / "profile.json"
    path.write_text(profile_json(measured))
    cost = cost_model(str(path), str(folder))
    # Tiny steps are all overhead, and a shared machine is noisy: the file must be usable, not good.
    for step in steps:
        assert step.seconds / 5 < cost.step_s(step.work) < 5 * step.seconds


async def test_a_workers_loop_takes_some_microseconds_a_step() -> None:
    step_s, row_s = await measure_loop()
    assert 0 <= row_s < 1e-3
    assert 1e-6 < step_s + row_s < 0.02


async def test_profile_refuses_before_it_loads_anything(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out: .* is no folder"):
        await profile(TandemConfig(), tmp_path / "nowhere" / "f.json")
    with pytest.raises(ConfigError, match="--device: got 'tpu', expected 'auto', 'cpu' or 'cuda'"):
        await profile(TandemConfig(), tmp_path / "f.json", device="tpu")
    two_ranks = TandemConfig.model_validate({"engine": {"tensor_parallel": 2}})
    with pytest.raises(ConfigError, match="expected 1"):
        await profile(two_ranks, tmp_path / "f.json")
    assert not (tmp_path / "f.json").exists()
