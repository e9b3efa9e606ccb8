"""DistServe's fits, against values worked out by hand from its files.

tests/data/distserve holds the rows of OPT-13B on one and two GPUs out of LLMServe/DistServe,
simdistserve/estimators/profile_data (Apache-2.0), unchanged but for the layout of the JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.planning.capacity import kv_capacity_tokens
from cluster.planning.cost_model import CostModel, cost_model
from cluster.planning.distserve_profile import A100_BYTES, is_distserve
from cluster.planning.model_shape import BUILT_IN, model_shape
from engine.errors import ConfigError
from engine.step_cost import StepWork

COPY = Path(__file__).parents[1] / "data" / "distserve" / "opt-13b.json"
SHARED = Path(__file__).parents[3] / "shared" / "data" / "profiles"


def opt_13b(tp: int = 1, pp: int = 1) -> CostModel:
    return cost_model(str(COPY), "opt-13b", tp, pp)


def test_prefill_by_hand() -> None:
    # 18.10254647486372 + 0.1019122572698738 · 755 + 7.122264314252114e-06 · 755² ms
    assert opt_13b().prefill_s(755) == pytest.approx(0.0991061, rel=1e-6)
    # Two prompts in one step: the fixed part once, squares apart.
    both = opt_13b().step_s(StepWork(((100, 0), (200, 0))))
    assert both == pytest.approx(1e-3 * (18.10254647486372 + 0.1019122572698738 * 300 + 7.122264314252114e-06 * 50_000))


def test_decode_by_hand_on_both_sides_of_the_switch() -> None:
    cost = opt_13b()
    small = 19.934702624895458 + 0.0006269356524350583 * 94_000 + 0.03850697740828398 * 94
    large = 7.1661889468253595 + 0.0005798000403396046 * 95_000 + 0.15831096191764046 * 95
    assert cost.decode_s(94, 94_000) == pytest.approx(small * 1e-3)
    assert cost.decode_s(95, 95_000) == pytest.approx(large * 1e-3)
    assert cost.step_s(StepWork((), 95, 95_000)) == cost.decode_s(95, 95_000)


def test_chunks_share_a_prompts_squares() -> None:
    whole, halves = opt_13b().prefill_s(1000), opt_13b().prefill_s(1000, chunk_tokens=500)
    # The second chunk pays for the pairs with the first, and both for the fixed part.
    assert halves - whole == pytest.approx(18.10254647486372e-3)


def test_a_mixed_step_has_one_fixed_part() -> None:
    cost = opt_13b()
    mixed = cost.step_s(StepWork(((128, 0),), 16, 8000))
    prompt, decode = cost.prefill_s(128), cost.decode_s(16, 8000)
    assert mixed == pytest.approx(prompt + decode - 18.10254647486372e-3)


def test_stages_change_the_memory_and_not_the_step() -> None:
    assert opt_13b(1, 2).prefill_s(755) == opt_13b().prefill_s(755)
    assert [opt_13b(1, pp).kv_capacity_tokens for pp in (1, 2, 4)] == [66144, 163008, 356752]
    assert opt_13b(1, 4).gpus == 4
    # Not in the file: by arithmetic, and near its neighbours.
    odd = opt_13b(1, 3).kv_capacity_tokens
    assert odd == kv_capacity_tokens(model_shape("opt-13b"), A100_BYTES, 1, 3)
    assert 163008 < odd < 356752


def test_two_gpus_have_their_own_fit() -> None:
    assert opt_13b(2).prefill_s(512) == pytest.approx(
        1e-3 * (14.742973695171262 + 0.06857720739764 * 512 + 2.4495727400243586e-06 * 512**2)
    )


def test_what_the_file_has_not_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no fit of llama-3.1-8b; known: opt-13b"):
        cost_model(str(COPY), "llama-3.1-8b")
    with pytest.raises(ConfigError, match=r"no fit of opt-13b with tp 4; known: tp 1, 2"):
        cost_model(str(COPY), "opt-13b", 4)
    with pytest.raises(ConfigError, match="tp: got 3"):
        cost_model(str(COPY), "opt-13b", 3)
    values = json.loads(COPY.read_text())
    assert is_distserve(values)
    assert not is_distserve({})
    assert not is_distserve({"format": "tandem-device-1"})
    del values["facebook/opt-13b"]["1"]["decoding_smallbs"]
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="cannot be read: KeyError"):
        cost_model(str(broken), "opt-13b")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here")
@pytest.mark.parametrize("engine", ["distserve", "vllm"])
def test_every_published_fit_loads(engine: str) -> None:
    path = SHARED / f"profiler-a100-80g.{engine}.json"
    for name, by_tp in json.loads(path.read_text()).items():
        for tp in by_tp:
            model = name.removeprefix("facebook/")
            assert model in BUILT_IN
            cost = cost_model(str(path), model, int(tp))
            times = [cost.prefill_s(tokens) for tokens in range(1, 2049, 16)]
            assert times == sorted(times)
            assert cost.decode_s(8, 8000) < cost.decode_s(90, 90_000)
            assert cost.kv_capacity_tokens > 10_000
