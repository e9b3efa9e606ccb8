"""Goodput: found where a queue that can be worked out by hand says it is."""

from __future__ import annotations

import dataclasses
import random

import pytest

from cluster.gateway_config import FailureConfig, GatewayConfig
from cluster.planning.arrivals import arrivals
from cluster.planning.emulated_cluster import ONE_FRAME
from cluster.planning.emulation_spec import EmulationSpec
from cluster.planning.goodput import Goodput, attains, find_goodput
from cluster.planning.trace import Trace, TraceRequest
from engine.errors import ConfigError
from engine.objectives import Objectives
from prefill_worker.config import PrefillConfig
from tests.planning.linear_cost import LinearCost

# Every request is one prompt that fills a step, and one token: one server, a fixed time of service, and room for one
# that waits. Whoever finds the place taken is refused; nobody who is served can be late.
SERVICE_S = 0.1
COST = LinearCost(fixed_s=SERVICE_S, token_s=0.0, row_s=0.0, context_s=0.0, kv_capacity_tokens=1 << 13)
SPEC = EmulationSpec(
    prefill=1,
    decode=1,
    router="round_robin",
    prefill_cost=COST,
    decode_cost=COST,
    objectives=Objectives(1.0, 1.0),
    block_size=64,
    prefill_config=PrefillConfig(
        token_budget=COST.saturation_tokens, max_batch_prompts=1, max_queued=1, max_frame_bytes=ONE_FRAME
    ),
    # Refused is refused: nobody tries again.
    gateway_config=GatewayConfig(max_running=1000, default_deadline_s=None, failures=FailureConfig(on_failure="fail")),
)
TRACE = Trace(
    tuple(TraceRequest(time, COST.saturation_tokens, 1) for time in arrivals(5.0, 80, "poisson", 1.0, random.Random(2)))
)


def attainment(trace: Trace) -> float:
    """The share that is served. `free_s`: when the server has done all it took; `begins_s`: when the last one it took
    leaves the waiting place."""
    free_s = begins_s = float("-inf")
    served = 0
    for arrival_s in trace.arrivals_s:
        if begins_s <= arrival_s:
            begins_s = max(free_s, arrival_s)
            free_s = begins_s + SERVICE_S
            served += 1
    return served / len(trace)


def check_bracket(found: Goodput, tolerance: float) -> None:
    at = found.rps / TRACE.rate_rps
    assert attainment(TRACE.scaled(at)) >= 0.9
    assert attainment(TRACE.scaled(at * (1 + tolerance))) < 0.9
    assert found.result.attainment == pytest.approx(attainment(TRACE.scaled(at)))
    assert found.rps_per_gpu == found.rps / 2


def test_it_is_the_highest_rate_that_the_queue_bears() -> None:
    found = find_goodput(SPEC, TRACE, tolerance=0.05, start_rps=4.0, min_span_s=1.0)
    check_bracket(found, 0.05)
    rates = [probe.rate_rps for probe in found.probes]
    assert rates == sorted(rates)
    # Below all was well, the next one up was not.
    place = rates.index(found.rps)
    assert all(probe.is_attained for probe in found.probes[: place + 1])
    assert not found.probes[place + 1].is_attained


def test_one_rate_is_judged_as_the_search_judges_it() -> None:
    found = find_goodput(SPEC, TRACE, tolerance=0.05, start_rps=4.0, min_span_s=1.0)
    failed = next(probe for probe in found.probes if not probe.is_attained)
    assert attains(SPEC, TRACE, found.rps, min_span_s=1.0)
    assert not attains(SPEC, TRACE, failed.rate_rps, min_span_s=1.0)
    with pytest.raises(ConfigError, match="rate"):
        attains(SPEC, Trace((TraceRequest(0.0, 8, 1),) * 2), 1.0)


@pytest.mark.nightly
@pytest.mark.parametrize("start_rps", [0.3, 60.0])
def test_it_is_found_from_wherever_the_search_begins(start_rps: float) -> None:
    check_bracket(find_goodput(SPEC, TRACE, start_rps=start_rps, min_span_s=1.0), 0.02)


def test_two_processes_find_it_too() -> None:
    check_bracket(find_goodput(SPEC, TRACE, tolerance=0.2, start_rps=4.0, min_span_s=1.0, processes=2), 0.2)


def test_a_short_trace_is_played_several_times() -> None:
    found = find_goodput(SPEC, Trace(TRACE.requests[:6]), start_rps=4.0, tolerance=0.5, min_span_s=4.0)
    assert found.result.offered >= 4.0 * found.rps
    assert found.result.offered % 6 == 0


def test_objectives_that_nothing_can_meet_have_no_goodput() -> None:
    hopeless = dataclasses.replace(SPEC, objectives=Objectives(0.05, 1.0))
    found = find_goodput(hopeless, Trace(TRACE.requests[:3]))
    assert (found.rps, found.rps_per_gpu) == (0.0, 0.0)
    assert found.result.attainment == 0.0


def test_what_has_no_rate_is_named() -> None:
    with pytest.raises(ConfigError, match="have no rate"):
        find_goodput(SPEC, Trace((TraceRequest(0.0, 5, 1), TraceRequest(0.0, 5, 1))))
    with pytest.raises(ConfigError, match="target"):
        find_goodput(SPEC, TRACE, target=0.0)
