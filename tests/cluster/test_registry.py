"""The registry: who is fresh, who is stale, and which restart of a worker counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.registry import Registry, WorkerReport
from engine.errors import InvalidArgument, Overloaded, TandemError, Unavailable
from engine.stats import LoopStats

STATS = LoopStats(
    running=0, waiting=0, queued_tokens=0, blocks_total=8, blocks_free=8, blocks_cached=0, block_size=16, steps=0
)
REPORT = WorkerReport("w", "decode", "host:1", incarnation=2, model="m", stats=STATS)


def registry() -> Registry:
    return Registry(fresh_s=3.0, expire_s=10.0, max_workers=3)


def ids(registry: Registry, now: float) -> tuple[list[str], list[str]]:
    """(fresh, all)"""
    fresh = [*registry.fresh("prefill", now), *registry.fresh("decode", now)]
    return [worker.report.worker_id for worker in fresh], [worker.report.worker_id for worker in registry.all(now)]


def test_a_worker_is_fresh_then_stale_then_forgotten() -> None:
    known = registry()
    known.heartbeat(REPORT, 100.0)
    assert ids(known, 103.0) == (["w"], ["w"])
    assert ids(known, 103.1) == ([], ["w"])
    assert ids(known, 110.1) == ([], [])
    known.heartbeat(REPORT, 200.0)
    assert ids(known, 200.0) == (["w"], ["w"])


def test_fresh_asks_for_a_role_and_keeps_the_order_of_ids() -> None:
    known = registry()
    for name, role in (("b", "decode"), ("p", "prefill"), ("a", "decode")):
        known.heartbeat(replace(REPORT, worker_id=name, role=role), 0.0)
    assert [worker.report.worker_id for worker in known.fresh("decode", 0.0)] == ["a", "b"]
    assert [worker.report.worker_id for worker in known.fresh("prefill", 0.0)] == ["p"]


def test_a_restarted_worker_replaces_its_predecessor_whose_reports_are_then_refused() -> None:
    known = registry()
    known.heartbeat(REPORT, 0.0)
    known.heartbeat(replace(REPORT, incarnation=3, address="host:2"), 1.0)
    with pytest.raises(Unavailable, match="incarnation 2 was replaced by incarnation 3"):
        known.heartbeat(REPORT, 1.5)
    [worker] = known.all(1.5)
    assert (worker.report.address, worker.heard_s) == ("host:2", 1.0)


@pytest.mark.parametrize(
    ("change", "field", "expected"),
    [
        ({"model": "other"}, "model", "'m', which worker 'w' serves already"),
        ({"model": "other", "incarnation": 3}, "model", "'m', which worker 'w' serves already"),
        ({"address": "host:2"}, "worker_id", "the worker at host:1 has this one"),
        ({"worker_id": ""}, "worker_id", "at least one character"),
        ({"worker_id": "x", "address": ""}, "address", "the address at which the worker can be reached"),
        ({"role": "both"}, "role", "prefill or decode"),
        ({"stats": replace(STATS, block_size=0)}, "blocks_total, block_size", "at least one block"),
    ],
)
def test_a_report_that_cannot_be_true_is_refused_and_changes_nothing(
    change: dict[str, object], field: str, expected: str
) -> None:
    known = registry()
    known.heartbeat(REPORT, 0.0)
    with pytest.raises(InvalidArgument, match=expected) as caught:
        known.heartbeat(replace(REPORT, **change), 1.0)
    assert caught.value.field == field
    assert [worker.heard_s for worker in known.all(1.0)] == [0.0]


def test_a_role_may_change_within_one_life() -> None:
    known = registry()
    known.heartbeat(REPORT, 0.0)
    known.heartbeat(replace(REPORT, role="prefill"), 1.0)
    assert (len(known.fresh("prefill", 1.0)), len(known.fresh("decode", 1.0))) == (1, 0)


def test_remove_forgets_at_once_and_ignores_strangers() -> None:
    known = registry()
    known.heartbeat(REPORT, 0.0)
    known.remove("w")
    known.remove("w")
    assert known.all(0.0) == []


def test_the_number_of_workers_is_bounded_until_some_expire() -> None:
    known = registry()
    for name in "abc":
        known.heartbeat(replace(REPORT, worker_id=name), 0.0)
    with pytest.raises(Overloaded):
        known.heartbeat(replace(REPORT, worker_id="d"), 1.0)
    known.heartbeat(replace(REPORT, worker_id="a"), 1.0)
    known.heartbeat(replace(REPORT, worker_id="d"), 10.5)
    assert ids(known, 10.5)[1] == ["a", "d"]


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3), st.sampled_from("mn"), st.floats(0, 4)), max_size=40)
)
def test_the_largest_incarnation_wins_and_nobody_silent_is_fresh(
    history: list[tuple[str, int, str, float]],
) -> None:
    known, now, heard = registry(), 0.0, dict[str, tuple[int, float]]()
    for name, incarnation, model, pause_s in history:
        now += pause_s
        report = replace(REPORT, worker_id=name, incarnation=incarnation, model=model, address=f"{name}:{incarnation}")
        try:
            known.heartbeat(report, now)
        except TandemError:
            continue
        before = heard.get(name)
        assert before is None or incarnation >= before[0] or now - before[1] > 10.0
        heard[name] = (incarnation, now)
        fresh = {worker.report.worker_id for role in ("prefill", "decode") for worker in known.fresh(role, now)}
        assert fresh == {other for other, (_, at) in heard.items() if now - at <= 3.0}
