"""What is counted of requests when they end."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cluster.endings import Ended
from cluster.messages import Usage
from cluster.metrics.request_metrics import RequestMetrics
from cluster.outcomes import Outcome
from engine.objectives import Objectives
from engine.request import FinishReason, Receipt
from tests.metrics.test_worker_metrics import series

RECEIPT = Receipt(
    gateway_queue_s=0.1,
    prefill_queue_s=0.2,
    prefill_s=0.4,
    kv_exposed_s=0.03,
    decode_queue_s=0.05,
    decode_s=1.0,
    ttft_s=0.8,
    tpot_s=0.1,
    kv_bytes=1000,
    kv_bytes_before_first_token=900,
    retries=1,
    retry_s=0.02,
    predicted_ttft_s=0.6,
)
OUTCOME = Outcome(12.0, Objectives(1.0, 0.05), 0.8, 0.1, was_local=False, reason="finished")
FINISHED = Ended("r", "acme", 10.0, OUTCOME, "", Usage(40, 11, 16), (FinishReason.LENGTH,), RECEIPT)


def counted(*requests: Ended) -> dict[tuple[str, ...], float]:
    metrics = RequestMetrics(2048)
    for request in requests:
        metrics.ended(request)
    return series(list(metrics.families("m")))


def test_a_finished_request() -> None:
    page = counted(FINISHED)
    assert page["requests_total", "finished"] == page["request_success_total", "length"] == 1
    attained = [page["requests_attained_total", objective] for objective in ("both", "ttft", "tpot")]
    assert attained == [0, 1, 0]
    assert page["requests_routed_total", "split"] == 1
    assert page["request_retries_total",] == 1
    assert page["cached_prompt_tokens_total",] == 16
    sums = {
        "e2e_request_latency_seconds": 2.0,
        "request_time_per_output_token_seconds": 0.1,
        "request_queue_time_seconds": 0.35,
        "request_prefill_time_seconds": 0.4,
        "request_decode_time_seconds": 1.0,
        "kv_exposed_seconds": 0.03,
        "request_prompt_tokens": 40,
        "request_generation_tokens": 11,
        "ttft_prediction_error_ratio": 0.25,
    }
    for name, value in sums.items():
        assert page[f"{name}_count",] == 1, name
        assert page[f"{name}_sum",] == pytest.approx(value), name
    assert page["tpot_prediction_error_ratio_count",] == 0, "nothing was predicted"
    assert page["request_phase_seconds_total", "kv_exposed"] == 0.03
    phases = [value for labels, value in page.items() if labels[0] == "request_phase_seconds_total"]
    assert sum(phases) == pytest.approx(1.8)
    assert (page["request_kv_bytes_total",], page["request_kv_bytes_before_first_token_total",]) == (1000, 900)


def test_what_no_worker_told_is_no_zero() -> None:
    page = counted(FINISHED, replace(FINISHED, receipt=Receipt(ttft_s=0.5, tpot_s=0.1), worker_told=False))
    assert page["e2e_request_latency_seconds_count",] == page["request_prompt_tokens_count",] == 2
    for name in ("queue", "prefill", "decode"):
        assert page[f"request_{name}_time_seconds_count",] == 1, name
    assert page["kv_exposed_seconds_count",] == 1


def test_tokens_have_vllms_classes() -> None:
    """What its build_1_2_5_buckets makes of the longest context: panels for the one show the other."""
    page = counted(FINISHED)
    for name in ("request_prompt_tokens", "request_generation_tokens"):
        bounds = [float(labels[1]) for labels in page if labels[0] == f"{name}_bucket"]
        assert bounds == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, math.inf]
    assert page["request_prompt_tokens_bucket", "20.0"] == 0
    assert page["request_prompt_tokens_bucket", "50.0"] == 1


@pytest.mark.parametrize("reason", ["rejected", "failed", "expired"])
def test_who_got_nothing_attains_nothing(reason: str) -> None:
    outcome = replace(OUTCOME, ttft_s=None, tpot_s=None, reason=reason)
    page = counted(replace(FINISHED, outcome=outcome, receipt=None, finish_reasons=(FinishReason.ABORT,)))
    assert page["requests_total", reason] == 1
    assert page["e2e_request_latency_seconds_count",] == 0
    others = {labels: value for labels, value in page.items() if labels != ("requests_total", reason)}
    assert not any(others.values()), "of a request that no worker had there is nothing else to count"


def test_a_client_that_left_counts_as_abort_and_misses_nothing() -> None:
    outcome = replace(OUTCOME, tpot_s=None, reason="cancelled")
    reasons = (FinishReason.STOP, FinishReason.ABORT)
    page = counted(replace(FINISHED, outcome=outcome, finish_reasons=reasons))
    assert [page["request_success_total", reason] for reason in ("stop", "length", "abort")] == [1, 0, 1]
    assert page["requests_attained_total", "ttft"] == 0
    assert page["request_retries_total",] == 1
    assert page["request_prompt_tokens_count",] == 0


@pytest.mark.parametrize("lie", [-1.0, math.nan, math.inf])
def test_a_worker_that_lies_spoils_no_sum(lie: float) -> None:
    page = counted(replace(FINISHED, receipt=replace(RECEIPT, prefill_s=lie, decode_s=lie)), FINISHED)
    assert page["request_phase_seconds_total", "prefill"] == page["request_prefill_time_seconds_sum",] == 0.4
    assert page["request_decode_time_seconds_sum",] == 1.0


def test_an_answer_of_one_token_has_no_time_between_tokens() -> None:
    outcome = replace(OUTCOME, was_local=True)
    page = counted(replace(FINISHED, outcome=outcome, usage=Usage(40, 1, 0)))
    assert page["request_time_per_output_token_seconds_count",] == 0
    assert page["kv_exposed_seconds_count",] == 0, "nothing was moved"
    assert page["requests_routed_total", "local"] == 1
