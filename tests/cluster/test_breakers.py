"""Who failed is shunned, then tried with one request, and trusted again or shunned for longer."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

from cluster.breakers import Breakers
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
    scene.breakers.heard(report)
    assert "d" not in scene.eligible()
    scene.breakers.heard(replace(report, incarnation=report.incarnation + 1))
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


@on_virtual_time
async def test_a_worker_that_is_gone_leaves_nothing_behind() -> None:
    scene = Scene()
    scene.failed("d")
    scene.failed("nobody")
    scene.bench.view.remove("d")
    await asyncio.sleep(1.0)
    assert scene.breakers._breakers == {}
    scene.bench.report("d")
    assert "d" in scene.eligible()
