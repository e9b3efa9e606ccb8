"""Faults come when the plan says so, on whom it says, and nobody is left stopped."""

from __future__ import annotations

import random
import signal

from cluster.chaos.faults import Injector
from cluster.chaos.plan import Fault
from tests.cluster.fake_decode import on_virtual_time


class Workers:
    """Implements Victims; a worker that is killed is gone."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self.got: list[tuple[str, signal.Signals]] = []

    def running(self) -> list[str]:
        return list(self.names)

    def signal(self, worker_id: str, number: signal.Signals) -> bool:
        if worker_id not in self.names:
            return False
        self.got.append((worker_id, number))
        if number is signal.SIGKILL:
            self.names.remove(worker_id)
        return True


@on_virtual_time
async def test_a_fault_that_comes_again_and_again() -> None:
    workers = Workers("prefill-0", "decode-0", "decode-1", "decode-2")
    injector = Injector(workers, random.Random(0))
    await injector.run([Fault(kind="kill", target="decode", every_s=2.0)], 11.0)
    assert [(fault.kind, fault.time_s) for fault in injector.happened] == [("kill", 2.0), ("kill", 4.0), ("kill", 6.0)]
    assert workers.names == ["prefill-0"], "nobody else is left to be hit"


@on_virtual_time
async def test_who_was_stopped_goes_on() -> None:
    workers = Workers("prefill-0", "decode-0")
    injector = Injector(workers, random.Random(0))
    faults = [
        Fault(kind="stop", target="decode-0", at_s=1.0, for_s=3.0),
        Fault(kind="stop", target="prefill", at_s=8.0, for_s=30.0),
        Fault(kind="kill", target="decode", at_s=2.0),
    ]
    await injector.run(faults, 10.0)
    assert workers.got == [
        ("decode-0", signal.SIGSTOP),
        ("decode-0", signal.SIGCONT),
        ("prefill-0", signal.SIGSTOP),
        ("prefill-0", signal.SIGCONT),
    ], "the kill found only a worker that was stopped"
