"""What workers say of themselves, and how they are emptied: stats, link rates, cache events, draining."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from cluster.planning import virtual_loop
from decode_worker.config import DecodeConfig
from decode_worker.links import MAX_ADDRESSES, MIN_BYTES, PrefillLinks
from decode_worker.stream import Done, Failed
from decode_worker.worker import DecodeWorker
from engine.batch import Batch, KVLayout
from engine.emulated_runner import EmulatedRunner
from engine.errors import HandedBack
from engine.learned_cost import Learned, learned, learner
from engine.sampling import SamplingParams
from engine.step_cost import StepWork
from kvtransfer.frames import Begin, End
from kvtransfer.memory import Link, MemoryNetwork, MemoryPrefillTransport
from kvtransfer.transport import PrefillService
from prefill_worker.config import PrefillConfig
from prefill_worker.worker import PrefillWorker
from tests.decode_worker.scripted import Gateway, ScriptedTransport
from tests.emulated import call, cost, layout, runner, running, submit
from tests.planning.linear_cost import LinearCost

LONG = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)


def decode(transport: ScriptedTransport | MemoryPrefillTransport, decode_runner: EmulatedRunner, **more: object):
    """A decode worker; `more` are its own arguments, or limits."""
    limits = {name: more.pop(name) for name in ("max_steps", "local_token_budget") if name in more}
    return DecodeWorker(
        decode_runner,
        DecodeConfig(**limits),  # type: ignore[arg-type]
        transport,
        worker_id="d",
        eos_token_ids=frozenset({0}),
        max_context=256,
        **more,  # type: ignore[arg-type]
    )


def test_a_draining_decode_worker_gives_back_what_it_has_not_begun_and_serves_the_others() -> None:
    async def main() -> None:
        transport = ScriptedTransport()
        worker = decode(transport, runner(64))
        async with running(transport.prefill.run(), worker.run()):
            gateway = Gateway(worker)
            gateway.send(submit(9, "old", prefill_address="p"))
            await asyncio.sleep(0.02)
            # Nothing has come of this one's prompt: no prefill worker has begun it.
            transport.hold = Begin
            gateway.send(submit(9, "waits", prefill_address="p"))
            await asyncio.sleep(0.001)
            worker.drain()
            assert worker.stats().draining
            assert not worker.is_idle
            gateway.send(submit(9, "new", prefill_address="p"))
            await asyncio.sleep(1)
            ends = {event.request_id: event for event in gateway.events if isinstance(event, Done | Failed)}
            assert isinstance(ends["old"], Done)
            for name in ("waits", "new"):
                assert isinstance(ends[name], Failed)
                assert isinstance(ends[name].error, HandedBack)
            assert worker.is_idle
            worker.check_empty()
            worker.resume()
            transport.hold = None
            gateway.send(submit(9, "later", prefill_address="p"))
            await asyncio.sleep(1)
            assert isinstance(gateway.events[-1], Done)
            await gateway.detach()

    virtual_loop.run(main())


def test_a_draining_decode_worker_gives_back_local_prompts_that_it_has_not_computed_yet() -> None:
    async def main() -> None:
        transport = ScriptedTransport()
        worker = decode(transport, runner(64), local_token_budget=8)
        async with running(transport.prefill.run(), worker.run()):
            gateway = Gateway(worker)
            for index, name in enumerate(("first", "second", "third")):
                gateway.send(submit(range(40 * index, 40 * index + 40), name))
            # In the first one's second chunk of five; all three have their blocks.
            await asyncio.sleep(0.03)
            worker.drain()
            await asyncio.sleep(1)
            ends = {event.request_id: event for event in gateway.events if isinstance(event, Done | Failed)}
            assert isinstance(ends["first"], Done)
            for name in ("second", "third"):
                assert isinstance(ends[name], Failed)
                assert isinstance(ends[name].error, HandedBack)
            assert worker.is_idle
            worker.check_empty()
            await gateway.detach()

    virtual_loop.run(main())


def test_a_decode_worker_is_not_idle_while_a_pull_is_open() -> None:
    async def main() -> None:
        transport = ScriptedTransport()
        worker = decode(transport, runner(64))
        async with running(transport.prefill.run(), worker.run()):
            gateway = Gateway(worker)
            transport.hold = End
            gateway.send(submit(9, prefill_address="p", deadline_s=0.5))
            await asyncio.sleep(0.3)
            assert not worker.is_idle
            await asyncio.sleep(0.3)
            assert worker.is_idle, "the deadline has ended the request and its stream"
            await gateway.detach()

    virtual_loop.run(main())


def test_a_draining_prefill_worker_is_idle_when_its_last_stream_has_been_read() -> None:
    async def main() -> None:
        prefill = PrefillWorker(runner(64), PrefillConfig(token_budget=8), worker_id="p", max_context=1 << 16)
        async with running(prefill.run()):
            assert prefill.is_idle
            stream = prefill.prefill(call(30))
            await anext(stream)
            prefill.drain()
            with pytest.raises(HandedBack, match="prefill worker p drains and takes no new prompts"):
                await anext(prefill.prefill(call(5)))
            await asyncio.sleep(5)
            assert not prefill.is_idle, "the prompt is done, and its KV is yet to be pulled"
            assert isinstance([frame async for frame in stream][-1], End)
            await asyncio.sleep(0.1)
            assert prefill.is_idle
            prefill.check_empty()

    virtual_loop.run(main())


def test_both_tell_what_the_cost_model_takes_for_what_waits() -> None:
    async def main() -> None:
        model = LinearCost(fixed_s=0.01, token_s=0.001, row_s=0.001, context_s=0.0)
        transport = ScriptedTransport()
        transport.prefill = PrefillWorker(
            runner(64), PrefillConfig(token_budget=8), worker_id="p", max_context=1 << 16, cost=model
        )
        seen = LinearCost()
        worker = decode(transport, runner(64), cost=seen, max_steps=16, local_token_budget=8)
        async with running(transport.prefill.run(), worker.run()):
            gateway = Gateway(worker)
            stream = transport.prefill.prefill(call(20))
            reader = asyncio.ensure_future(anext(stream))
            gateway.send(submit(20, params=LONG))
            await asyncio.sleep(0.001)
            assert transport.prefill.stats().queued_s == pytest.approx(0.03)
            assert worker.stats().queued_s == pytest.approx(2e-3 + 20 * 5e-5)
            assert worker.stats().queued_tokens == 20
            await asyncio.sleep(2)
            assert (worker.stats().queued_s, transport.prefill.stats().queued_s) == (0.0, 0.0)
            reader.cancel()
            await asyncio.wait([reader])
            await stream.aclose()  # type: ignore[attr-defined]
            await asyncio.sleep(0.1)
            await gateway.detach()
        assert model.seen == [(StepWork(((8, 0),)), pytest.approx(0.018)), *model.seen[1:]]
        assert [work.prompts for work, _ in model.seen] == [((8, 0),), ((8, 8),), ((4, 16),)]
        chunks = [work.prompts for work, _ in seen.seen if work.prompts]
        assert chunks == [((8, 0),), ((8, 8),), ((4, 16),)]
        # A run of 16 steps reads 21 … 36 tokens, 28 on average, and each step takes 11 ms.
        runs = [(work.decode_rows, work.decode_context, seconds) for work, seconds in seen.seen if work.decode_rows]
        assert runs[0] == (1, 28, pytest.approx(0.011))
        assert len(runs) == 4

    virtual_loop.run(main())


def test_stats_count_the_context_that_a_step_reads() -> None:
    async def main() -> None:
        transport = ScriptedTransport()
        worker = decode(transport, runner(64))
        async with running(worker.run()):
            gateway = Gateway(worker)
            for number in range(2):
                gateway.send(submit([number, *range(8)], f"r{number}", params=LONG))
            await asyncio.sleep(0.3)
            stats = worker.stats()
            assert stats.running == 2
            # Prompts of 9; the steps since the prompts' are one fewer than the tokens given.
            given = sum(len(event.tokens) for event in gateway.events if not isinstance(event, Done | Failed))
            assert stats.context_tokens == 2 * 9 + given
            await asyncio.sleep(2)
            assert worker.stats().context_tokens == 0
            await gateway.detach()

    virtual_loop.run(main())


def test_a_prefill_worker_hears_at_once_and_when_the_first_token_is_due() -> None:
    async def main() -> None:
        transport = ScriptedTransport()
        worker = decode(transport, runner(64), max_steps=1)
        async with running(transport.prefill.run(), worker.run()):
            gateway = Gateway(worker)
            # A step of 30 ms is under way: nobody waits for its end to be computed elsewhere.
            gateway.send(submit(20, "busy"))
            await asyncio.sleep(0.01)
            gateway.send(submit(5, "next", prefill_address="p", ttft_due_s=0.5))
            gateway.send(submit(5, "free", prefill_address="p"))
            await asyncio.sleep(2)
            due = {asked.request_id: asked.ttft_due_s for asked in transport.calls}
            assert due == {"next": pytest.approx(0.5), "free": None}
            await gateway.detach()

    virtual_loop.run(main())


def test_cache_events_are_told_once() -> None:
    async def main() -> None:
        transport = ScriptedTransport()
        worker = decode(transport, runner(64), note_events=True)
        assert worker.kv_events() is None
        async with running(transport.prefill.run(), worker.run()):
            gateway = Gateway(worker)
            gateway.send(submit(9, prefill_address="p", params=SamplingParams(temperature=0.0, max_tokens=2)))
            await asyncio.sleep(1)
            events = worker.kv_events()
            assert events is not None
            assert len(events.stored) == 2
            assert worker.kv_events() is None
            assert set(worker.kv_snapshot().stored) == set(events.stored)
            await gateway.detach()

    virtual_loop.run(main())


# ── link rates ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_short_measurements_say_nothing_and_long_ones_are_averaged() -> None:
    rates = PrefillLinks()
    rates.moved("p", MIN_BYTES, 1.0)
    rates.moved("p", MIN_BYTES + 1, 0.0)
    assert rates.rates() == ()
    rates.moved("p", 1_000_000, 1.0)
    rates.moved("p", 2_000_000, 1.0)
    rates.moved("q", 1_000_000, 0.5)
    assert dict(rates.rates()) == {"p": pytest.approx(1.2e6), "q": 2e6}
    for number in range(MAX_ADDRESSES):
        rates.moved(f"w{number}", 1_000_000, 1.0)
    assert len(rates.rates()) == MAX_ADDRESSES
    assert "p" not in dict(rates.rates())


def wide_cost(batch: Batch) -> float:
    return cost(batch) / 10


def test_a_pull_measures_the_link_that_it_comes_by() -> None:
    async def main() -> None:
        def wide() -> EmulatedRunner:
            return EmulatedRunner(KVLayout("m", 64, 1, 1, "uint64", 4, 128), wide_cost, layer_group=64)

        # 200 tokens are 200 · 64 · 16 bytes; a chunk's KV comes with its end, and most of it after the first token.
        network: MemoryNetwork[PrefillService] = MemoryNetwork(Link(latency_s=0.001, bandwidth_bytes_s=2e6))
        config = PrefillConfig(token_budget=200, max_frame_bytes=8192)
        prefill = PrefillWorker(wide(), config, worker_id="p", max_context=1 << 16)
        network.register("p", prefill)
        worker = decode(MemoryPrefillTransport(network), wide())
        async with running(prefill.run(), worker.run()):
            gateway = Gateway(worker)
            gateway.send(submit(200, prefill_address="p"))
            await asyncio.sleep(3)
            ((address, rate),) = worker.link_rates()
            assert address == "p"
            assert rate == pytest.approx(2e6, rel=0.05)
            await gateway.detach()

    virtual_loop.run(main())


# ── what a cost model has learned ────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Error:
    median: float = 0.04
    p90: float = 0.11
    count: int = 7


@dataclass
class Learning(LinearCost):
    scales: tuple[float, float] = (1.5, 0.9)
    found: Error = field(default_factory=Error)

    def error(self) -> Error:
        return self.found


def test_stats_carry_what_a_cost_model_has_learned() -> None:
    assert learner(None) is None
    assert learner(LinearCost()) is None
    assert learned(learner(Learning())) == Learned(1.5, 0.9, 0.04, 0.11)
    stats = decode(ScriptedTransport(), EmulatedRunner(layout(4), cost, 2), cost=Learning()).stats()
    assert (stats.prefill_scale, stats.decode_scale) == (1.5, 0.9)
    assert (stats.cost_error_median, stats.cost_error_p90) == (0.04, 0.11)
