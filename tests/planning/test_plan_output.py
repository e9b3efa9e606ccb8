"""What a plan is written as: the YAML loads, the picture is one, the numbers agree."""

from __future__ import annotations

import io
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from cluster.config import load
from cluster.planning.arrangement import Arrangement, Parallel, Pool
from cluster.planning.bounds import PlanCost
from cluster.planning.model_shape import BUILT_IN
from cluster.planning.plan import UNSERVED, Arm, Judgement, PhaseArm, Plan, Pruned
from cluster.planning.plan_output import WEIGHTS, plan_json, plan_markdown, plan_table, plan_yaml, weights_of
from cluster.planning.plot_plan import plot_plan
from engine.errors import ConfigError
from tests.planning.plan_cases import cost_of, small_spec


def arm(arrangement: Arrangement, rps: float, tpot_s: float) -> Arm:
    return Arm(arrangement, Judgement(rps, 0.91, 0.31, tpot_s, tpot_s * 0.8), rps * 1.1, rps * 1.3)


PAIR = arm(Arrangement(Pool(Parallel(2), 2), Pool(Parallel(1), 4)), 12.0, 0.012)
UNITS = arm(Arrangement(Pool(Parallel(1), 2), Pool(Parallel(2), 1), units=2), 11.0, 0.010)
SINGLE = arm(Arrangement(colocated=Pool(Parallel(1), 8), chunk_tokens=512), 9.0, 0.028)
WHOLE = arm(Arrangement(colocated=Pool(Parallel(2), 4)), 7.0, 0.025)
NONE = Arm(Arrangement(colocated=Pool(Parallel(4), 2), chunk_tokens=256), Judgement(0.0, note="(x)"), 3.0, 4.0)


def a_plan(chosen: Arm | None = PAIR, arms: tuple[Arm, ...] = (PAIR, UNITS, SINGLE, WHOLE, NONE)) -> Plan:
    return Plan(
        spec=small_spec(model="llama-3.1-8b", profile="h200"),
        affinity="high",
        chosen=chosen,
        arms=arms,
        phases=(PhaseArm("prefill", "prefill worker, tp2", 2, 6.5),),
        pruned=(Pruned("tp8", "tp: got 8, expected a divisor of 4 heads"),),
        trace_requests=60,
        trace_rps=5.0,
        mean_prompt_tokens=800.0,
        mean_output_tokens=60.0,
        transfer_s=0.004,
    )


def of_profile(parallel: Parallel) -> PlanCost:
    return cost_of("test", parallel)


def loaded(chosen: Arm, tmp_path: Path):  # type: ignore[no-untyped-def]
    path = tmp_path / "plan.yaml"
    path.write_text(plan_yaml(a_plan(chosen), of_profile))
    return load(path)


def test_the_configuration_of_two_pools_loads(tmp_path: Path) -> None:
    config = loaded(PAIR, tmp_path)
    assert (config.cluster.prefill, config.cluster.decode, config.cluster.colocated) == (2, 4, 0)
    assert (config.cluster.prefill_parallel, config.cluster.decode_parallel) == ((2, 1), (1, 1))
    assert config.cluster.profile == "h200"
    assert (config.gateway.objectives.ttft_ms, config.gateway.objectives.tpot_ms) == (400.0, 30.0)
    assert config.gateway.router.policy == "goodput"
    assert config.engine.model == "meta-llama/Llama-3.1-8B-Instruct"
    # 50,000 tokens of 100,000 bytes for each GPU.
    assert config.engine.kv_cache_bytes == 5_000_000_000


def test_every_built_in_shape_that_can_be_served_has_weights() -> None:
    assert set(WEIGHTS) == set(BUILT_IN) - set(UNSERVED)
    assert weights_of("/models/mine/config.json") == "/models/mine"
    assert weights_of("someone/a-model") == "someone/a-model"


def test_units_are_added_up(tmp_path: Path) -> None:
    config = loaded(UNITS, tmp_path)
    assert (config.cluster.prefill, config.cluster.decode) == (4, 2)


def test_the_configuration_of_colocated_workers_loads(tmp_path: Path) -> None:
    config = loaded(SINGLE, tmp_path)
    assert (config.cluster.prefill, config.cluster.decode, config.cluster.colocated) == (0, 0, 8)
    assert config.decode.local_token_budget == 512
    assert config.cluster.decode_parallel == (1, 1)
    assert loaded(WHOLE, tmp_path).decode.local_token_budget == 8192


def test_the_configuration_says_why(tmp_path: Path) -> None:
    text = plan_yaml(a_plan(), of_profile)
    assert text.startswith("# Disaggregate: 2P tp2 + 4D tp1 carries 12 req/s (1.5 per GPU)")


def test_nothing_chosen_is_nothing_to_configure() -> None:
    with pytest.raises(ConfigError, match="No arrangement keeps TTFT 400 ms"):
        plan_yaml(a_plan(None, (NONE,)), of_profile)


def test_json_has_what_the_table_has() -> None:
    values = json.loads(json.dumps(plan_json(a_plan())))
    assert values["disaggregate"] is True
    assert values["chosen"]["label"] == "2P tp2 + 4D tp1"
    assert values["chosen"]["goodput_rps_per_gpu"] == 1.5
    assert [each["label"] for each in values["arms"]] == [each.arrangement.label for each in a_plan().arms]
    assert values["arms"][2]["colocated"] == 8
    assert values["pruned"] == [{"label": "tp8", "reason": "tp: got 8, expected a divisor of 4 heads"}]
    assert plan_json(a_plan(None, (NONE,)))["disaggregate"] is None


def test_the_table_names_every_arm_and_what_was_left_out() -> None:
    screen = io.StringIO()
    Console(file=screen, width=160).print(plan_table(a_plan()))
    text = screen.getvalue()
    for wanted in ("2P tp2 + 4D tp1", "2 x (2P tp1 + 1D tp2)", "8C tp1, chunks 512", "tp8: tp: got 8", "1.33 times"):
        assert wanted in text
    page = plan_markdown(a_plan())
    assert "| 8C tp1, chunks 512 | 8 | 9 | 1.12 | 310 ms | 28.0 ms | 91.0% | 11.7 |" in page
    assert "| prefill worker, tp2 | 6.5 | 3.25 |" in page


def test_close_arms_are_no_difference() -> None:
    even = replace(SINGLE, judgement=replace(SINGLE.judgement, goodput_rps=11.8))
    assert a_plan(PAIR, (PAIR, even)).answer.startswith("It makes no difference: ")


def test_one_kind_only() -> None:
    assert "no colocated arrangement keeps" in a_plan(PAIR, (PAIR, NONE)).answer
    dead = replace(PAIR, judgement=Judgement(0.0))
    assert "no disaggregated arrangement keeps" in a_plan(SINGLE, (SINGLE, dead)).answer


@pytest.mark.parametrize("arms", [(PAIR, UNITS, SINGLE, WHOLE, NONE), (NONE,)])
def test_the_picture_is_a_picture(tmp_path: Path, arms: tuple[Arm, ...]) -> None:
    """Large enough to read, and not one colour all over."""
    path = tmp_path / "plan.png"
    plot_plan(a_plan(arms[0] if len(arms) > 1 else None, arms), path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (1500, 810)
    start = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[start - 4 : start])
    # Part of the pixels is enough: the first chunk of them.
    pixels = zlib.decompressobj().decompress(data[start + 4 : start + 4 + length])
    assert len(set(pixels)) > 50
