"""The requests that ended last."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest

from cluster.outcomes import Reason
from cluster.recent_requests import MAX_PROBLEM_CHARS, MAX_RECENT, VERDICTS, RecentRequests
from engine.sampling import SamplingParams
from engine.structure import Structure
from tests.cluster.ended import ended


def ids(found: list) -> list[str]:
    return [recent.ended.request_id for recent in found]


def filled(*requests) -> RecentRequests:
    recent = RecentRequests()
    for request in requests:
        recent.ended(request)
    return recent


def test_the_newest_come_first() -> None:
    recent = filled(*(ended(f"r{number}") for number in range(5)))
    assert ids(recent.newest(3)) == ["r4", "r3", "r2"]
    assert [each.number for each in recent.newest(100)] == [5, 4, 3, 2, 1]


@pytest.mark.parametrize(
    ("reason", "ttft_s", "tpot_s", "verdict"),
    [
        ("finished", 0.5, 0.05, "met"),
        ("finished", 1.5, 0.05, "missed"),
        ("finished", 0.5, 0.2, "missed"),
        ("finished", None, 0.05, "missed"),
        ("rejected", None, None, "rejected"),
        ("failed", 0.5, None, "failed"),
        ("expired", 0.5, None, "expired"),
        ("cancelled", 0.5, None, "cancelled"),
        ("invalid", None, None, "invalid"),
    ],
)
def test_verdicts(reason: Reason, ttft_s: float | None, tpot_s: float | None, verdict: str) -> None:
    recent = filled(ended(reason=reason, ttft_s=ttft_s, tpot_s=tpot_s))
    assert [each.verdict for each in recent.newest(1)] == [verdict]
    assert verdict in VERDICTS


def test_some_are_asked_for() -> None:
    recent = filled(
        ended("chat-1", tenant="acme"),
        ended("chat-2", tenant="umbrella"),
        ended("job-1", reason="failed", tenant="acme"),
        ended("chat-3", reason="failed", tenant="acme"),
    )
    assert ids(recent.newest(9, part="chat")) == ["chat-3", "chat-2", "chat-1"]
    assert ids(recent.newest(9, verdict="failed")) == ["chat-3", "job-1"]
    assert ids(recent.newest(9, tenant="acme", part="chat", verdict="met")) == ["chat-1"]
    assert ids(recent.newest(9, tenant="")) == [], "no tenant is not every tenant"
    assert ids(recent.newest(1, tenant="acme", part="chat")) == ["chat-3"]


def test_an_id_may_have_been_had_more_than_once() -> None:
    recent = filled(ended("r", tenant="acme"), ended("r", tenant="umbrella"), ended("rr"), ended("r", tenant="acme"))
    assert [each.number for each in recent.with_id("r")] == [4, 2, 1]
    assert [each.number for each in recent.with_id("r", tenant="acme")] == [4, 1]
    assert recent.with_id("r", tenant="nobody") == recent.with_id("s") == []


def test_the_oldest_are_forgotten() -> None:
    recent = filled(*(ended(f"r{number}") for number in range(MAX_RECENT + 3)))
    assert len(recent.newest(10**6)) == MAX_RECENT
    assert recent.with_id("r2") == []
    assert recent.count == MAX_RECENT + 3


def test_a_long_problem_is_cut() -> None:
    [recent] = filled(ended(reason="failed", problem="x" * 10_000)).newest(1)
    assert recent.ended.problem == "x" * (MAX_PROBLEM_CHARS - 1) + "…"


def test_its_memory_is_bounded() -> None:
    tracemalloc.start()
    try:
        recent = RecentRequests()
        for number in range(2 * MAX_RECENT):
            name = f"{number:>0256}"
            request = ended(name, reason="failed", tenant=name[:128], problem=name * 40)
            recent.ended(replace(request, params=SamplingParams(structure=Structure("regex", name * 250))))
        size = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert size < 3 << 20
