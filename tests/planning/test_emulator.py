"""The emulator: what one request takes on an idle cluster is known exactly; what counts as missed is counted."""

from __future__ import annotations

import dataclasses
import random

import pytest

from cluster.controller import Flip
from cluster.controller_config import ControllerConfig
from cluster.planning.arrivals import arrivals
from cluster.planning.emulated_cluster import ONE_FRAME, decode_config
from cluster.planning.emulation_result import EmulationResult, Ending, percentile
from cluster.planning.emulation_spec import EmulationSpec
from cluster.planning.emulator import emulate, may_miss
from cluster.planning.trace import Trace, TraceRequest
from engine.errors import ConfigError
from engine.objectives import Objectives
from engine.step_cost import StepWork
from prefill_worker.config import PrefillConfig
from tests.planning.linear_cost import LinearCost

COST = LinearCost(fixed_s=2e-3, token_s=5e-5, row_s=1e-4, context_s=2e-7, kv_capacity_tokens=1 << 14)
LATENCY_S = 1e-3
OBJECTIVES = Objectives(0.5, 0.05)
SPEC = EmulationSpec(
    prefill=1,
    decode=1,
    router="round_robin",
    prefill_cost=COST,
    decode_cost=COST,
    link_latency_s=LATENCY_S,
    objectives=OBJECTIVES,
    block_size=32,
)
COLOCATED = dataclasses.replace(SPEC, prefill=0, decode=0, colocated=1)


def trace_of(*lengths: tuple[int, int], gap_s: float = 10.0, hashes: tuple[tuple[int, ...], ...] = ()) -> Trace:
    names = hashes or ((),) * len(lengths)
    requests = (
        TraceRequest(index * gap_s, prompt, output, shared)
        for index, ((prompt, output), shared) in enumerate(zip(lengths, names, strict=True))
    )
    return Trace(tuple(requests))


def busy_trace(rate: float, count: int = 60, seed: int = 5) -> Trace:
    rng = random.Random(seed)
    times = arrivals(rate, count, "poisson", 1.0, rng)
    return Trace(tuple(TraceRequest(time, rng.randint(50, 400), rng.randint(1, 60)) for time in times))


def decode_s(prompt: int, output: int) -> float:
    """All decode steps of one sequence alone: the first reads the prompt and the first token."""
    return sum(COST.step_s(StepWork((), 1, prompt + 1 + step)) for step in range(output - 1))


def test_one_request_on_an_idle_pair_takes_what_its_parts_take() -> None:
    record = emulate(SPEC, trace_of((300, 25))).records[0]
    prefill_s = COST.step_s(StepWork(((300, 0),)))
    # Submit and Prefill go there, the first token comes back the same way.
    assert record.ttft_s == pytest.approx(prefill_s + 4 * LATENCY_S, rel=1e-9)
    assert record.tpot_s == pytest.approx(decode_s(300, 25) / 24, rel=1e-9)
    assert record.ending is Ending.DONE
    assert record.receipt is not None
    assert (record.receipt.prefill_worker, record.receipt.decode_worker) == ("prefill-0", "decode-0")
    assert record.receipt.kv_bytes == 300 * COST.token_bytes


def test_kv_takes_the_time_of_its_link() -> None:
    bytes_s = 1e6
    record = emulate(dataclasses.replace(SPEC, link_bytes_s=bytes_s), trace_of((300, 25))).records[0]
    prefill_s, kv_s = COST.step_s(StepWork(((300, 0),))), 300 * COST.token_bytes / bytes_s
    # Half of the KV leaves at half of the step, the rest follows on a line that is never idle again.
    assert kv_s > prefill_s
    expected_s = prefill_s / 2 + kv_s + decode_s(300, 25)
    assert record.ended_s == pytest.approx(expected_s + 4 * LATENCY_S, abs=0.001)


def test_one_request_on_an_idle_colocated_worker_takes_what_its_parts_take() -> None:
    record = emulate(COLOCATED, trace_of((200, 25))).records[0]
    assert record.ttft_s == pytest.approx(COST.step_s(StepWork(((200, 0),))) + 2 * LATENCY_S, rel=1e-9)
    assert record.tpot_s == pytest.approx(decode_s(200, 25) / 24, rel=1e-9)
    assert record.receipt is not None
    assert (record.receipt.prefill_worker, record.receipt.decode_worker) == ("", "colocated-0")


def test_a_shared_prefix_is_computed_once() -> None:
    trace = trace_of((1100, 2), (1300, 2), (1100, 2), hashes=((1, 2, 3), (1, 2, 4), (5, 6, 7)))
    result = emulate(SPEC, trace)
    assert [record.cached_tokens for record in result.records] == [0, 1024, 0]
    off = emulate(dataclasses.replace(SPEC, prefix_cache=False), trace)
    assert [record.cached_tokens for record in off.records] == [0, 0, 0]
    assert result.records[1].ttft_s < off.records[1].ttft_s  # type: ignore[operator]


def test_the_same_seed_gives_the_same_run() -> None:
    spec = dataclasses.replace(SPEC, prefill=2, decode=2, router="random")
    trace = busy_trace(20.0)
    one, other = emulate(spec, trace), emulate(spec, trace)
    assert one.records == other.records
    assert (one.events, one.virtual_s) == (other.events, other.virtual_s)
    reseeded = emulate(dataclasses.replace(spec, seed=1), trace)
    assert [record.receipt for record in reseeded.records] != [record.receipt for record in one.records]


@pytest.mark.parametrize("spec", [SPEC, COLOCATED])
def test_many_steps_at_once_give_what_single_steps_give(spec: EmulationSpec) -> None:
    trace = busy_trace(25.0)
    singly = dataclasses.replace(spec, decode_config=decode_config(COST).model_copy(update={"max_steps": 1}))
    many, single = emulate(spec, trace), emulate(singly, trace)
    assert many.events < single.events
    for one, other in zip(many.records, single.records, strict=True):
        assert (one.ttft_s, one.tpot_s) == pytest.approx((other.ttft_s, other.tpot_s), rel=1e-9)


def test_attainment_falls_when_more_comes_than_can_be_served() -> None:
    light, heavy = emulate(SPEC, busy_trace(2.0)), emulate(SPEC, busy_trace(1000.0, 150))
    assert light.attainment == 1.0
    assert heavy.attainment < 0.5
    assert heavy.attainment_ttft < light.attainment_ttft
    assert light.rate_rps == pytest.approx(2.0, rel=0.2)


def test_a_run_may_end_as_soon_as_the_target_is_lost() -> None:
    whole, part = emulate(SPEC, busy_trace(400.0)), emulate(SPEC, busy_trace(400.0), stop_below=0.9)
    assert whole.is_whole
    assert not part.is_whole
    assert part.offered == 60
    assert part.attainment <= whole.attainment < 0.9
    assert part.virtual_s < whole.virtual_s


def test_a_controller_moves_workers_to_where_the_work_is() -> None:
    slow = dataclasses.replace(COST, row_s=1e-3)
    times = arrivals(30.0, 200, "poisson", 1.0, random.Random(1))
    trace = Trace(tuple(TraceRequest(time, 30, 60) for time in times))
    spec = dataclasses.replace(
        SPEC,
        prefill=3,
        prefill_cost=slow,
        decode_cost=slow,
        router="goodput",
        objectives=Objectives(0.2, 0.02),
        controller=ControllerConfig(enabled=True, interval_s=0.5, window_s=3.0, cooldown_s=1.0),
    )
    result = emulate(spec, trace)
    flips = [action for _, action in result.actions if isinstance(action, Flip)]
    assert flips
    assert {flip.role for flip in flips} == {"decode"}
    helpers = {record.receipt.decode_worker for record in result.records if record.receipt is not None}
    assert helpers & {flip.worker_id for flip in flips}


def test_who_is_turned_away_has_missed() -> None:
    narrow = PrefillConfig(token_budget=512, max_queued=1, max_frame_bytes=ONE_FRAME)
    result = emulate(dataclasses.replace(SPEC, prefill_config=narrow), busy_trace(400.0))
    assert 0 < result.rejected < 60
    assert result.endings["done"] == 60 - result.rejected
    assert result.attainment <= 1 - result.rejected / 60 + 1e-9


def test_a_client_gives_up_after_its_deadline() -> None:
    spec = dataclasses.replace(SPEC, deadline_factor=0.01, min_deadline_s=0.05)
    result = emulate(spec, trace_of((300, 1), (400, 400)))
    assert [record.ending for record in result.records] == [Ending.DONE, Ending.LATE]
    assert result.records[1].ended_s - result.records[1].arrival_s == pytest.approx(0.01 * (0.5 + 399 * 0.05))
    assert result.attainment == 0.5
    assert result.records[1].tpot_s is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"decode": 0}, "decode"),
        ({"prefill": 0}, "prefill"),
        ({"colocated": -1}, "colocated"),
        ({"block_size": 24}, "block_size"),
        ({"prefill_cost": None}, "profile"),
        ({"decode_cost": LinearCost(token_bytes=7)}, "prefill_cost, decode_cost"),
    ],
)
def test_what_cannot_be_built_is_named(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}:"):
        emulate(dataclasses.replace(SPEC, **changes), trace_of((10, 1)))  # type: ignore[arg-type]


def test_how_many_may_miss() -> None:
    assert [may_miss(1000, 0.9), may_miss(1001, 0.9), may_miss(10, 1.0)] == [100, 100, 0]


def test_percentiles_lie_between_their_neighbours() -> None:
    assert [percentile([1.0, 2.0, 4.0], percent) for percent in (0, 50, 75, 100)] == [1.0, 2.0, 3.0, 4.0]


def test_a_result_in_json_has_what_was_agreed() -> None:
    result = emulate(SPEC, busy_trace(2.0, 20))
    values = result.as_json()
    assert set(values) >= {
        *("attainment", "attainment_ttft", "attainment_tpot", "goodput_rps_per_gpu", "rejected"),
        *("ttft_ms", "tpot_ms", "virtual_s", "wall_s", "events"),
    }
    assert values["ttft_ms"].keys() == values["tpot_ms"].keys() == {"p50", "p90", "p99"}
    assert values["goodput_rps_per_gpu"] == pytest.approx(result.attainment * result.rate_rps / 2)
    assert result.as_json(7.5)["goodput_rps_per_gpu"] == 7.5
    empty = EmulationResult((), OBJECTIVES, 3, 1.0, 1, 0.0, 0.0, 0)
    assert empty.as_json()["ttft_ms"] == {"p50": None, "p90": None, "p99": None}
    assert empty.attainment == 0.0
