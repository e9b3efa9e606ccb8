"""The registry: who is fresh, who is stale, and which restart of a worker counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.registry import KVEvents, Registry, WorkerReport
from engine.errors import InvalidArgument, Overloaded, TandemError, Unavailable
from engine.stats import LoopStats

STATS = LoopStats(
    running=0, waiting=0, queued_tokens=0, blocks_total=8, blocks_free=8, blocks_cached=0, block_size=16, steps=0
)
REPORT = WorkerReport("w", "decode", "host:1", incarnation=2, model="m", stats=STATS)


def registry() -> Registry:
    return Registry(fresh_s=3.0, expire_s=10.0, max_workers=3)


def named(name: str, **changes: object) -> WorkerReport:
    return replace(REPORT, worker_id=name, address=f"{name}:1", **changes)


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
        known.heartbeat(named(name, role=role), 0.0)
    assert [worker.report.worker_id for worker in known.fresh("decode", 0.0)] == ["a", "b"]
    assert [worker.report.worker_id for worker in known.fresh("prefill", 0.0)] == ["p"]


def test_a_restarted_worker_replaces_its_predecessor_whose_reports_are_then_refused() -> None:
    known = registry()
    known.heartbeat(REPORT, 0.0)
    known.heartbeat(replace(REPORT, incarnation=3, address="host:2"), 4.0)
    with pytest.raises(Unavailable, match="incarnation 2 was replaced by incarnation 3"):
        known.heartbeat(REPORT, 4.5)
    [worker] = known.all(4.5)
    assert (worker.report.address, worker.heard_s) == ("host:2", 4.0)


def test_nobody_takes_the_id_of_a_worker_that_reports_whatever_incarnation_they_say_they_have() -> None:
    known = registry()
    known.heartbeat(REPORT, 0.0)
    with pytest.raises(InvalidArgument, match="the worker at host:1 has this one"):
        known.heartbeat(replace(REPORT, incarnation=(1 << 64) - 1, address="evil:1"), 1.0)
    known.heartbeat(REPORT, 2.0)
    assert [worker.report for worker in known.all(2.0)] == [REPORT]
    known.heartbeat(replace(REPORT, incarnation=3), 2.5)


@pytest.mark.parametrize("how", ["draining", "lost"])
def test_a_successor_need_not_wait_where_the_end_of_its_predecessor_is_known(how: str) -> None:
    known = registry()
    known.heartbeat(replace(REPORT, stats=replace(STATS, draining=how == "draining")), 0.0)
    known.heartbeat(replace(REPORT, incarnation=3, address="host:2"), 1.0, is_lost=how == "lost")
    assert [worker.report.address for worker in known.all(1.0)] == ["host:2"]


def test_nobody_takes_the_address_of_a_worker_that_reports() -> None:
    known = registry()
    known.heartbeat(REPORT, 0.0)
    thief = replace(REPORT, worker_id="thief")
    with pytest.raises(InvalidArgument, match="one that no other worker has: 'w' reports it") as caught:
        known.heartbeat(thief, 3.0)
    assert caught.value.field == "address"
    # Its owner is gone, and the port another's.
    known.heartbeat(thief, 3.5)
    with pytest.raises(InvalidArgument, match="'thief' reports it"):
        known.heartbeat(REPORT, 4.0)
    known.remove("thief")
    known.heartbeat(REPORT, 4.0)


def test_reports_that_come_too_often_are_refused_and_those_of_others_are_not() -> None:
    known = registry()
    for _ in range(100):
        known.heartbeat(REPORT, 0.0)
    with pytest.raises(Overloaded, match="worker 'w' reports too often"):
        known.heartbeat(REPORT, 0.0)
    known.heartbeat(named("x"), 0.0)
    known.heartbeat(REPORT, 0.1)


@pytest.mark.parametrize(
    ("change", "field", "expected"),
    [
        ({"worker_id": "a\nERROR b"}, "worker_id", "printable"),
        ({"worker_id": "x" * 257}, "worker_id", "at most 256"),
        ({"address": "x" * 257}, "address", "at most 256"),
        *(
            ({"stats": replace(STATS, **{name: value})}, name, r"a number in \[")
            for name, value in (
                ("queued_s", float("nan")),
                ("queued_s", float("inf")),
                ("queued_s", -1.0),
                ("decode_step_s", float("nan")),
                ("prefill_tokens_per_s", float("inf")),
                ("prefill_scale", 0.0),
                ("decode_scale", 1e300),
                ("cost_error_p90", float("nan")),
                ("running", (1 << 32) - 1),
                ("waiting", -1),
                ("context_tokens", (1 << 64) - 1),
                ("blocks_free", 9),
                ("blocks_cached", -1),
            )
        ),
        ({"links": (("p:1", float("nan")),)}, "links.bytes_per_s", "a number in"),
        ({"links": (("p:1", 1.0),) * 1025}, "links", "at most 1024"),
        ({"kv_events": KVEvents(1, True, tuple(range(1 << 16)))}, "kv_events", "at most 32768 in a report"),
        ({"model": "other"}, "model", "'m', which worker 'w' serves already"),
        ({"model": "other", "incarnation": 3}, "model", "'m', which worker 'w' serves already"),
        ({"address": "host:2"}, "worker_id", "the worker at host:1 has this one"),
        ({"worker_id": ""}, "worker_id", "at least one character"),
        ({"worker_id": "x", "address": ""}, "address", "at least one character"),
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
        known.heartbeat(named(name), 0.0)
    with pytest.raises(Overloaded):
        known.heartbeat(named("d"), 1.0)
    known.heartbeat(named("a"), 1.0)
    known.heartbeat(named("d"), 10.5)
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
