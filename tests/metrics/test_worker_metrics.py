"""Workers' series: what is shown of each, and that counts do not go down when a worker starts again."""

from __future__ import annotations

from dataclasses import replace

from prometheus_client.metrics_core import Metric

from cluster.messages import WorkerStatus
from cluster.metrics.worker_metrics import Lives, worker_families

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


def shown(lives: Lives, *workers: WorkerStatus) -> dict[tuple[str, ...], float]:
    return series(list(worker_families("m", workers, lives.totals(workers))))


def test_blocks_are_used_cached_or_free() -> None:
    page = shown(Lives(), DECODE)
    blocks = {state: page["worker_kv_blocks", "decode", "d0", state] for state in ("used", "cached", "free")}
    assert blocks == {"used": 16, "cached": 16, "free": 32}
    assert page["kv_cache_usage_perc", "decode", "d0"] == 0.25


def test_a_pool_without_workers_is_shown_as_empty() -> None:
    page = shown(Lives(), DECODE, replace(PREFILL, draining=True), replace(PREFILL, worker_id="p1", fresh=False))
    assert page["workers", "prefill"] == 0
    assert page["workers", "decode"] == 1
    assert (page["worker_draining", "prefill", "p0"], page["worker_fresh", "prefill", "p1"]) == (1, 0)


def test_a_restarted_worker_goes_on_counting() -> None:
    lives = Lives()
    assert shown(lives, DECODE)["worker_steps_total", "decode", "d0"] == 100
    assert shown(lives, replace(DECODE, steps=120))["worker_steps_total", "decode", "d0"] == 120
    again = replace(DECODE, incarnation=2, steps=5, prefix_queries=0, prefix_hits=0)
    page = shown(lives, again)
    assert page["worker_steps_total", "decode", "d0"] == 125
    assert page["prefix_cache_queries_total", "decode", "d0"] == 1000
    # One that has done more by the next scrape than its predecessor had.
    assert shown(lives, replace(again, incarnation=3, steps=500))["worker_steps_total", "decode", "d0"] == 625


def test_a_worker_of_an_earlier_release_counts_each_of_its_roles_anew() -> None:
    lives = Lives()
    shown(lives, DECODE)
    page = shown(lives, replace(DECODE, role="prefill", steps=1, prefix_queries=0, prefix_hits=0))
    assert page["worker_steps_total", "prefill", "d0"] == 101
    assert ("worker_steps_total", "decode", "d0") not in page


def test_a_worker_that_has_left_is_forgotten() -> None:
    lives = Lives()
    shown(lives, DECODE, PREFILL)
    assert not [labels for labels in shown(lives, DECODE) if "p0" in labels]
    # Somebody else, as far as anybody can know.
    assert shown(lives, DECODE, replace(PREFILL, steps=7))["worker_steps_total", "prefill", "p0"] == 7
