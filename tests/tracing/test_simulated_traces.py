"""Traces of whole clusters in virtual time, with and without faults: every request has one, and what it says of the
time agrees with the receipt that the client got."""

from __future__ import annotations

import random
from typing import TypeVar

from cluster.gateway import Gateway
from cluster.links import DecodeLinks
from cluster.messages import Complete
from cluster.tracing.decode_spans import DecodeSpans
from cluster.tracing.gateway_spans import GatewaySpans
from cluster.tracing.prefill_spans import PrefillSpans
from cluster.tracing.sampler import Sampler
from tests.sim.faults import FaultWorld
from tests.sim.one_run import to_its_end
from tests.sim.world import MODEL, World
from tests.tracing.collected import Collector, Trace

SomeWorld = TypeVar("SomeWorld", bound=World)


class _Traced:
    """A world whose requests are all traced."""

    collector: Collector

    def watch(self: World) -> None:
        # The virtual clock is the wall clock.
        self.collector = Collector(zero_ns=lambda: 0)
        self.sampler = Sampler(1.0, random.Random(1))
        self.prefill_observer = PrefillSpans(self.collector.sink_of("prefill"))
        self.decode_observer = DecodeSpans(self.collector.sink_of("decode"))


class TracedWorld(World, _Traced):
    def __init__(self, seed: int) -> None:
        super().__init__(seed, 40)
        self.watch()

    def _gateway(self, links: DecodeLinks) -> Gateway:
        gateway = super()._gateway(links)
        gateway.endings.observe(GatewaySpans(self.collector.sink_of("gateway"), MODEL))
        return gateway


class TracedFaults(FaultWorld, _Traced):
    def __init__(self, seed: int) -> None:
        super().__init__(seed, 40)
        self.watch()

    def _gateway(self, links: DecodeLinks) -> Gateway:
        gateway = super()._gateway(links)
        gateway.endings.observe(GatewaySpans(self.collector.sink_of("gateway"), MODEL))
        return gateway


def run(make: type[TracedWorld] | type[TracedFaults], seed: int) -> list[tuple[Trace, Complete]]:
    """Runs a world; returns what was answered whole, with its trace."""
    world = to_its_end(lambda: make(seed), f"seed {seed}", lambda world: str(world.shape))
    traces = {trace.request_id: trace for trace in world.collector.traces()}
    # None is left out, and none has two.
    assert set(traces) == {client.request.request_id for client in world.clients}
    return [(traces[each.request.request_id], each.complete) for each in world.clients if each.complete is not None]


def test_traces_nest_and_sum_up_to_the_receipts() -> None:
    answered = [each for seed in range(24) for each in run(TracedWorld, seed)]
    for trace, complete in answered:
        trace.check_tree()
        trace.check_receipt(complete.receipt)
    # With and without a prefill worker, each often enough to mean something.
    assert sum(bool(trace.named("pull")) for trace, _ in answered) > 20
    assert sum(not trace.named("pull") for trace, _ in answered) > 20


def test_what_is_tried_again_is_further_attempts_of_the_same_trace() -> None:
    answered = [each for seed in range(3000, 3012) for each in run(TracedFaults, seed)]
    for trace, complete in answered:
        receipt = complete.receipt
        last = trace.below(trace.named("attempt")[-1])
        # Of a prompt that was computed again for what had come damaged, a receipt knows the first time only. And where
        # only the word was lost that all is there, nobody knows how long the worker took.
        is_once = [span.name for span in last].count("prefill worker") <= 1
        if is_once and (receipt.prefill_s or receipt.decode_s):
            trace.check_receipt(receipt)
        failed = [span for span in trace.named("attempt") if "error.type" in span.attributes]
        assert len(failed) >= receipt.retries
    assert sum(complete.receipt.retries > 0 for _, complete in answered) > 20
