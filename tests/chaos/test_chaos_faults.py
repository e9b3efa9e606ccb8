"""Faults come when the plan says so, on whom it says, and none outlasts the run."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cluster.chaos.faults import Injector
from cluster.chaos.plan import Clock, Corrupt, Kill, Partition, Slow, Stop
from cluster.chaos.relay import Weather
from tests.cluster.fake_decode import on_virtual_time


class Workers:
    """Implements Victims; a worker that is killed is gone, and `deaf` ones hear no orders."""

    def __init__(self, *names: str, deaf: str = "") -> None:
        self.names = list(names)
        self.deaf = deaf
        self.got: list[tuple[str, signal.Signals]] = []
        self.told: list[tuple[float, str, Mapping[str, Any]]] = []
        self.links: list[tuple[float, str, str, Weather | None]] = []

    def running(self) -> list[str]:
        return list(self.names)

    def signal(self, worker_id: str, number: signal.Signals) -> bool:
        if worker_id not in self.names:
            return False
        self.got.append((worker_id, number))
        if number is signal.SIGKILL:
            self.names.remove(worker_id)
        return True

    def tell(self, worker_id: str, order: Mapping[str, Any]) -> bool:
        if worker_id == self.deaf:
            return False
        self.told.append((asyncio.get_running_loop().time(), worker_id, order))
        return True

    @contextmanager
    def disturbed(self, worker_id: str, peer: str, weather: Weather) -> Iterator[None]:
        self.links.append((asyncio.get_running_loop().time(), worker_id, peer, weather))
        try:
            yield
        finally:
            self.links.append((asyncio.get_running_loop().time(), worker_id, peer, None))


@on_virtual_time
async def test_a_fault_that_comes_again_and_again() -> None:
    workers = Workers("prefill-0", "decode-0", "decode-1", "decode-2")
    injector = Injector(workers, random.Random(0))
    await injector.run([Kill(target="decode", every_s=2.0)], 11.0)
    assert [(fault.kind, fault.time_s) for fault in injector.happened] == [("kill", 2.0), ("kill", 4.0), ("kill", 6.0)]
    assert workers.names == ["prefill-0"], "nobody else is left to be hit"


@on_virtual_time
async def test_who_was_stopped_goes_on() -> None:
    workers = Workers("prefill-0", "decode-0")
    injector = Injector(workers, random.Random(0))
    faults = [
        Stop(target="decode-0", at_s=1.0, for_s=3.0),
        Stop(target="prefill", at_s=8.0, for_s=30.0),
        Kill(target="decode", at_s=2.0),
    ]
    await injector.run(faults, 10.0)
    assert workers.got == [
        ("decode-0", signal.SIGSTOP),
        ("decode-0", signal.SIGCONT),
        ("prefill-0", signal.SIGSTOP),
        ("prefill-0", signal.SIGCONT),
    ], "the kill found only a worker that was stopped"
    assert [(fault.time_s, fault.until_s) for fault in injector.happened] == [(1.0, 4.0), (8.0, 10.0)]


@on_virtual_time
async def test_links_are_mended_again() -> None:
    workers = Workers("prefill-0", "decode-0")
    injector = Injector(workers, random.Random(0))
    faults = [
        Partition(target="decode", peer="prefill", at_s=1.0, for_s=3.0),
        Stop(target="decode", at_s=2.0),
        Slow(target="decode", at_s=5.0, for_s=2.0, delay_ms=30),
        Slow(target="prefill", at_s=8.0, for_s=60.0, bytes_per_s=1e6),
    ]
    await injector.run(faults, 10.0)
    assert workers.links == [
        (1.0, "decode-0", "prefill", Weather(is_cut=True)),
        (4.0, "decode-0", "prefill", None),
        (5.0, "decode-0", "any", Weather(delay_s=0.03)),
        (7.0, "decode-0", "any", None),
        (8.0, "prefill-0", "any", Weather(bytes_per_s=1e6)),
        (10.0, "prefill-0", "any", None),
    ]
    assert not workers.got, "of a worker that is cut off, who could say what another fault did?"
    assert (injector.happened[0].kind, injector.happened[0].peer) == ("partition", "prefill")


@on_virtual_time
async def test_orders_are_called_off_again() -> None:
    workers = Workers("prefill-0", "prefill-1", "decode-0", deaf="prefill-1")
    injector = Injector(workers, random.Random(0))
    faults = [
        Corrupt(target="prefill-0", at_s=1.0, for_s=3.0, every_frames=7),
        Corrupt(target="prefill-1", at_s=2.0),
        Corrupt(target="prefill", at_s=5.0, for_s=1.0),
        Clock(target="decode", at_s=8.0, jump_s=9.0, rate=2.0),
    ]
    await injector.run(faults, 10.0)
    assert workers.told == [
        (1.0, "prefill-0", {"corrupt": 7}),
        (4.0, "prefill-0", {"corrupt": 0}),
        (5.0, "prefill-0", {"corrupt": 1000}),
        (6.0, "prefill-0", {"corrupt": 0}),
        (8.0, "decode-0", {"jump_s": 9.0, "rate": 2.0}),
        (10.0, "decode-0", {"jump_s": 0.0, "rate": 1.0}),
    ]
    assert [fault.worker_id for fault in injector.happened] == ["prefill-0", "prefill-0", "decode-0"], (
        "the other one is deaf"
    )
