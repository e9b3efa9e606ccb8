"""Who failed is shunned, then tried with one request, and trusted again or shunned for longer."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from cluster.breakers import Breakers
from cluster.routing.booking import Booking
from cluster.routing.query import Route
from tests.cluster.fake_decode import on_virtual_time
from tests.cluster.routing_bench import Bench

ROUTE = Route("p", "p:1", "d", "d:1")
OTHER = Route("p2", "p2:1", "d2", "d2:1")


class Scene:
    """Two workers of each role. `readmitted` counts how often somebody came back."""

    def __init__(self, *workers: str) -> None:
        self.bench = Bench(*(workers or ("p", "p2", "d", "d2")))
        self.readmitted = 0
        self.breakers = Breakers(self.bench.view, random.Random(0), 1.0, 4.0, self._note)

    def failed(self, worker_id: str) -> None:
        now = asyncio.get_running_loop().time()
        self.breakers.failed(worker_id, self.bench.book(ROUTE, now=now))

    def pull(self, decode_id: str, prefill_id: str) -> Booking:
        route = Route(prefill_id, f"{prefill_id}:1", decode_id, f"{decode_id}:1")
        return self.bench.book(route, now=asyncio.get_running_loop().time())

    def pull_failed(self, decode_id: str, prefill_id: str) -> None:
        self.breakers.pull_failed(self.pull(decode_id, prefill_id))

    def eligible(self) -> set[str]:
        view = self.bench.view
        return {name for order in (view.prefill_order, view.decode_order) for name in order.least(9)}

    def _note(self) -> None:
        self.readmitted += 1


@on_virtual_time
async def test_one_that_failed_is_shunned_and_comes_back_for_one_request() -> None:
    scene = Scene()
    scene.failed("d")
    assert scene.eligible() == {"p", "p2", "d2"}
    scene.bench.report("d")
    assert "d" not in scene.eligible(), "whatever it says of itself"
    await asyncio.sleep(1.0)
    assert "d" in scene.eligible()
    assert scene.readmitted == 1
    probe = scene.bench.book(ROUTE)
    scene.breakers.booked(probe)
    assert "d" not in scene.eligible(), "one request is enough to see"
    scene.breakers.succeeded(scene.bench.book(ROUTE))
    assert "d" not in scene.eligible(), "one that was sent before says nothing"
    scene.breakers.succeeded(probe)
    assert "d" in scene.eligible()
    scene.breakers.booked(scene.bench.book(ROUTE))
    assert "d" in scene.eligible(), "it is trusted again"


@on_virtual_time
async def test_who_fails_again_is_shunned_for_longer_up_to_a_limit() -> None:
    scene = Scene()
    loop = asyncio.get_running_loop()
    shunned_s = []
    for _ in range(6):
        scene.failed("d")
        # All that were there fail in the same moment: one failure.
        for _ in range(20):
            scene.failed("d")
        began_s = loop.time()
        while "d" not in scene.eligible():  # noqa: ASYNC110 - looking on changes nothing
            await asyncio.sleep(0.01)
        shunned_s.append(loop.time() - began_s)
        scene.breakers.booked(scene.bench.book(ROUTE))
    for seconds, longest_s in zip(shunned_s, (1, 2, 4, 4, 4, 4), strict=True):
        assert longest_s / 2 <= seconds <= longest_s + 0.02


@on_virtual_time
async def test_what_was_sent_before_says_nothing_of_what_it_can_now() -> None:
    scene = Scene()
    early = scene.bench.book(ROUTE, now=0.0)
    await asyncio.sleep(0.5)
    scene.failed("d")
    await asyncio.sleep(1.0)
    scene.breakers.failed("d", early)
    assert "d" in scene.eligible()


@on_virtual_time
async def test_a_probe_that_ends_without_a_token_lets_another_try() -> None:
    scene = Scene()
    scene.failed("d")
    await asyncio.sleep(1.0)
    probe = scene.bench.book(ROUTE)
    scene.breakers.booked(probe)
    scene.breakers.ended(scene.bench.book(OTHER))
    assert "d" not in scene.eligible()
    scene.breakers.ended(probe)
    assert "d" in scene.eligible()


@on_virtual_time
async def test_a_new_incarnation_is_trusted_at_once() -> None:
    scene = Scene()
    scene.failed("d")
    report = scene.bench.view.decodes["d"].report
    scene.bench.view.report(report, 0.0)
    assert "d" not in scene.eligible()
    scene.bench.view.report(replace(report, incarnation=report.incarnation + 1), 0.0)
    assert "d" in scene.eligible()
    await asyncio.sleep(5.0)
    assert scene.readmitted == 1


@on_virtual_time
async def test_where_there_is_nobody_else_all_may_try() -> None:
    scene = Scene("p", "d")
    scene.failed("d")
    await asyncio.sleep(1.0)
    scene.breakers.booked(scene.bench.book(ROUTE))
    assert "d" in scene.eligible()


@pytest.mark.parametrize("after_s", [0.0, 2.0], ids=["while it is shunned", "when it may try again"])
@on_virtual_time
async def test_a_worker_that_is_gone_leaves_nothing_behind(after_s: float) -> None:
    scene = Scene()
    scene.failed("d")
    scene.failed("nobody")
    scene.pull_failed("d2", "p2")
    await asyncio.sleep(after_s)
    for name in ("d", "d2", "p2"):
        scene.bench.view.remove(name)
    scene.pull_failed("d2", "p")
    assert scene.breakers._breakers == {}
    assert scene.breakers._complaints._named == scene.breakers._complaints._witnesses == {}
    scene.bench.report("d")
    assert "d" in scene.eligible()


@on_virtual_time
async def test_who_alone_complains_of_one_after_the_other_is_at_fault_itself() -> None:
    scene = Scene("p1", "p2", "p3", "d1", "d2")
    scene.pull_failed("d1", "p1")
    assert scene.eligible() == {"p2", "p3", "d1", "d2"}
    scene.pull_failed("d1", "p2")
    assert scene.eligible() == {"p1", "p2", "p3", "d2"}
    scene.pull_failed("d1", "p3")
    assert scene.eligible() == {"p1", "p2", "p3", "d2"}
    await asyncio.sleep(1.0)
    assert "d1" in scene.eligible()
    scene.pull_failed("d1", "p1")
    assert scene.eligible() == {"p1", "p2", "p3", "d2"}, "what it said before counts until it has pulled well"
    await asyncio.sleep(2.0)
    probe = scene.pull("d1", "p1")
    scene.breakers.booked(probe)
    scene.breakers.succeeded(probe)
    scene.breakers.pulled(probe)
    scene.pull_failed("d1", "p2")
    assert scene.eligible() == {"p1", "p3", "d1", "d2"}


@on_virtual_time
async def test_a_lost_node_of_prefill_workers_does_not_cost_the_decode_workers() -> None:
    """Two die at once, and every decode worker complains of both."""
    scene = Scene("p1", "p2", "p3", "d1", "d2", "d3")
    for prefill_id in ("p1", "p2"):
        for decode_id in ("d1", "d2", "d3"):
            scene.pull_failed(decode_id, prefill_id)
    assert scene.eligible() == {"p3", "d1", "d2", "d3"}
    # Where all that one says comes first, it is its word alone: it has to show that it can, and no other has.
    scene = Scene("p1", "p2", "p3", "d1", "d2", "d3")
    for decode_id in ("d1", "d2", "d3"):
        for prefill_id in ("p1", "p2"):
            scene.pull_failed(decode_id, prefill_id)
    assert scene.eligible() == {"p3", "d2", "d3"}


@on_virtual_time
async def test_who_has_served_another_since_is_not_at_fault() -> None:
    scene = Scene("p1", "p2", "p3", "d1", "d2", "d3")
    scene.pull_failed("d1", "p1")
    scene.pull_failed("d2", "p1")
    scene.breakers.pulled(scene.pull("d3", "p1"))
    scene.pull_failed("d1", "p2")
    assert scene.eligible() == {"p1", "p2", "p3", "d2", "d3"}


@on_virtual_time
async def test_the_only_decode_worker_is_believed() -> None:
    scene = Scene("p1", "p2", "p3", "d")
    scene.pull_failed("d", "p1")
    scene.pull_failed("d", "p2")
    assert scene.eligible() == {"p3", "d"}
