"""A step that does not come back is noticed within its limit; load, slowness and a stopped process are not mistaken."""

from __future__ import annotations

import asyncio

import pytest

from cluster.planning.virtual_loop import VirtualLoop
from cluster.step_watch import PATIENCE, TICK_S, Hung, watch_steps
from decode_worker.config import DecodeConfig
from decode_worker.stream import Done, Failed
from decode_worker.worker import DecodeWorker
from engine.batch import Batch, LayerListener, StepOutput
from engine.emulated_runner import EmulatedRunner
from engine.errors import Unavailable
from engine.pulse import Pulse
from engine.sampling import SamplingParams
from engine.step_cost import StepWork
from prefill_worker.config import PrefillConfig
from prefill_worker.worker import PrefillWorker
from tests.cluster.fake_decode import on_virtual_time
from tests.decode_worker.scripted import Gateway, ScriptedTransport
from tests.emulated import call, layout, running, submit
from tests.planning.linear_cost import LinearCost

LIMIT_S = 2.0


class SlowRunner(EmulatedRunner):
    """Takes as long as it is told to, from when it is told."""

    def __init__(self, step_s: float = 0.01, num_blocks: int = 64) -> None:
        super().__init__(layout(num_blocks), lambda batch: step_s, layer_group=4)
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def run(self, batch: Batch, on_layers: LayerListener | None = None) -> StepOutput:
        await self.goes_on.wait()
        return await super().run(batch, on_layers)


def decode_worker(runner: EmulatedRunner, pulse: Pulse, **limits: int) -> DecodeWorker:
    return DecodeWorker(
        runner,
        DecodeConfig(**limits),
        ScriptedTransport(),
        worker_id="d",
        eos_token_ids=frozenset({0}),
        max_context=256,
        pulse=pulse,
    )


@pytest.mark.parametrize("schedule_ahead", [False, True])
@on_virtual_time
async def test_a_step_that_never_comes_back(schedule_ahead: bool) -> None:
    runner, pulse = SlowRunner(), Pulse(1.0)
    worker = decode_worker(runner, pulse, schedule_ahead=schedule_ahead)
    loop = asyncio.get_running_loop()
    async with running(worker.run()):
        watch = asyncio.create_task(watch_steps(pulse, LIMIT_S))
        gateway = Gateway(worker)
        gateway.send(submit(9, params=SamplingParams(temperature=0.0, max_tokens=100)))
        await asyncio.sleep(0.5)
        runner.goes_on.clear()
        began_s = loop.time()
        with pytest.raises(Hung, match=r"a step of 1 tokens has not come back for 2 s"):
            await watch
        assert LIMIT_S <= loop.time() - began_s <= LIMIT_S + 3 * TICK_S
        # Its gateway is told at once, though the step is still under way.
        worker.let_go(Unavailable("d: hung"))
        await asyncio.sleep(0.001)
        assert isinstance(gateway.events[-1], Failed)
        assert str(gateway.events[-1].error) == "d: hung"
        await gateway.detach()
        runner.goes_on.set()
        await asyncio.sleep(0.1)
        worker.check_empty()


@on_virtual_time
async def test_an_idle_worker_that_hangs_is_found_by_its_canary() -> None:
    runner, pulse = SlowRunner(), Pulse(5.0)
    worker = PrefillWorker(runner, PrefillConfig(), worker_id="p", max_context=1 << 16, pulse=pulse)
    loop = asyncio.get_running_loop()
    async with running(worker.run()):
        watch = asyncio.create_task(watch_steps(pulse, LIMIT_S))
        await asyncio.sleep(1.0)
        runner.goes_on.clear()
        began_s = loop.time()
        with pytest.raises(Hung):
            await watch
        assert loop.time() - began_s <= 5.0 + LIMIT_S + 3 * TICK_S
        runner.goes_on.set()


@on_virtual_time
async def test_a_loop_that_stands_though_no_step_does() -> None:
    pulse = Pulse(5.0)
    loop = asyncio.get_running_loop()
    with pytest.raises(Hung, match="the worker's loop has begun no step for 7 s"):
        await watch_steps(pulse, LIMIT_S)
    assert loop.time() <= 5.0 + LIMIT_S + 3 * TICK_S


@on_virtual_time
async def test_a_worker_under_load_is_never_taken_for_hung() -> None:
    """Batches of dozens, prompts in many chunks, a pool too small for them: steps as long as the limit lets them be."""
    runner, pulse = SlowRunner(LIMIT_S - 0.1, num_blocks=64), Pulse(1.0)
    worker = decode_worker(runner, pulse, local_token_budget=32)
    prefill_pulse = Pulse(1.0)
    prefill = PrefillWorker(
        SlowRunner(LIMIT_S - 0.1),
        PrefillConfig(token_budget=16),
        worker_id="p",
        max_context=1 << 16,
        pulse=prefill_pulse,
    )
    async with running(worker.run(), prefill.run()):
        watches = [asyncio.create_task(watch_steps(each, LIMIT_S)) for each in (pulse, prefill_pulse)]
        gateway = Gateway(worker)
        for index in range(40):
            gateway.send(submit(range(100 * index, 100 * index + 60), f"r{index}"))
        prompts = [asyncio.create_task(read(prefill, index)) for index in range(20)]
        await asyncio.sleep(2000.0)
        assert not any(watch.done() for watch in watches)
        assert sum(isinstance(event, Done) for event in gateway.events) == 40
        await asyncio.gather(*prompts)
        for watch in watches:
            watch.cancel()
        await asyncio.wait(watches)
        await gateway.detach()


async def read(prefill: PrefillWorker, index: int) -> None:
    async for _ in prefill.prefill(call(range(200 * index, 200 * index + 150), f"p{index}")):
        await asyncio.sleep(3.0)


@on_virtual_time
async def test_a_step_that_was_to_be_long_may_be() -> None:
    """On a slow machine a prompt's chunk takes minutes, and the cost model knows."""
    pulse, cost = Pulse(1.0), LinearCost(fixed_s=0.0, token_s=1.0)
    watch = asyncio.create_task(watch_steps(pulse, LIMIT_S, cost))
    pulse.begins(StepWork(prompts=((10, 0),)))
    await asyncio.sleep(10 * PATIENCE - 1.0)
    assert not watch.done()
    with pytest.raises(Hung, match="a step of 10 tokens has not come back for 200 s"):
        await watch


@on_virtual_time
async def test_a_process_that_was_stopped_and_goes_on_has_not_hung() -> None:
    runner, pulse = SlowRunner(0.5), Pulse(1.0)
    worker = decode_worker(runner, pulse)
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    async with running(worker.run()):
        watch = asyncio.create_task(watch_steps(pulse, LIMIT_S))
        gateway = Gateway(worker)
        gateway.send(submit(9, params=SamplingParams(temperature=0.0, max_tokens=20)))
        await asyncio.sleep(2.3)
        assert pulse.work is not None
        # SIGSTOP, and SIGCONT an hour later: every timer is late, and so is the step.
        loop._now += 3600.0
        await asyncio.sleep(20.0)
        assert not watch.done()
        assert isinstance(gateway.events[-1], Done)
        watch.cancel()
        await asyncio.wait([watch])
        await gateway.detach()
