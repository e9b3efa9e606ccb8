"""Workers' series: what is shown of each."""

from __future__ import annotations

from dataclasses import replace

from prometheus_client.metrics_core import Metric

from cluster.messages import WorkerStatus
from cluster.metrics.worker_metrics import COUNTERS, worker_families
from engine.stats import COUNTS

DECODE = WorkerStatus(
    worker_id="d0",
    role="decode",
    address="d0:1",
    incarnation=1,
    heartbeat_age_s=0.5,
    fresh=True,
    draining=False,
    running=3,
    waiting=1,
    queued_tokens=0,
    blocks_total=64,
    blocks_free=48,
    blocks_cached=16,
    steps=100,
    prefix_queries=1000,
    prefix_hits=250,
)
PREFILL = replace(DECODE, worker_id="p0", role="prefill", address="p0:1")


def series(families: list[Metric]) -> dict[tuple[str, ...], float]:
    return {
        (
            sample.name.removeprefix("tandem:"),
            *(value for name, value in sample.labels.items() if name != "model_name"),
        ): (sample.value)
        for family in families
        for sample in family.samples
    }


def shown(*workers: WorkerStatus) -> dict[tuple[str, ...], float]:
    return series(list(worker_families("m", workers)))


def test_blocks_are_used_cached_or_free() -> None:
    page = shown(DECODE)
    blocks = {state: page["worker_kv_blocks", "decode", "d0", state] for state in ("used", "cached", "free")}
    assert blocks == {"used": 16, "cached": 16, "free": 32}
    assert page["kv_cache_usage_perc", "decode", "d0"] == 0.25


def test_a_pool_without_workers_is_shown_as_empty() -> None:
    page = shown(DECODE, replace(PREFILL, draining=True), replace(PREFILL, worker_id="p1", fresh=False))
    assert page["workers", "prefill"] == 0
    assert page["workers", "decode"] == 1
    assert (page["worker_draining", "prefill", "p0"], page["worker_fresh", "prefill", "p1"]) == (1, 0)


def test_counts_are_those_of_the_workers_process() -> None:
    page = shown(DECODE, replace(PREFILL, kv_orphan_bytes=7))
    assert page["worker_steps_total", "decode", "d0"] == 100
    assert page["prefix_cache_hits_total", "decode", "d0"] == 250
    assert page["kv_orphan_bytes_total", "prefill", "p0"] == 7


def test_every_count_of_a_worker_is_shown() -> None:
    assert COUNTERS.keys() == set(COUNTS)
