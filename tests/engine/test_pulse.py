"""Canaries: a worker without work runs a step now and then, in a block of the pool, and nobody notices."""

from __future__ import annotations

import asyncio

import pytest

from cluster.planning import virtual_loop
from decode_worker.config import DecodeConfig
from decode_worker.stream import Done
from decode_worker.worker import DecodeWorker
from engine.batch import Batch, LayerListener, StepOutput
from engine.emulated_runner import EmulatedRunner
from engine.pulse import CANARY, Pulse
from engine.sampling import SamplingParams
from kvtransfer.frames import End
from prefill_worker.config import PrefillConfig
from prefill_worker.worker import PrefillWorker
from tests.decode_worker.scripted import Gateway, ScriptedTransport
from tests.emulated import call, cost, layout, running, submit
from tests.planning.linear_cost import LinearCost

# A canary of one token takes so long by tests.emulated.cost.
CANARY_STEP_S = 0.011


class SeenRunner(EmulatedRunner):
    """Notes when canaries began, and every other step."""

    def __init__(self, num_blocks: int = 16) -> None:
        super().__init__(layout(num_blocks), cost, layer_group=2)
        self.canaries: list[float] = []
        self.steps: list[float] = []

    async def run(self, batch: Batch, on_layers: LayerListener | None = None) -> StepOutput:
        is_canary = batch.rows[0].seq_id == CANARY
        (self.canaries if is_canary else self.steps).append(asyncio.get_running_loop().time())
        return await super().run(batch, on_layers)


def prefill_worker(runner: EmulatedRunner, pulse: Pulse) -> PrefillWorker:
    return PrefillWorker(
        runner, PrefillConfig(token_budget=8), worker_id="p", max_context=1 << 16, cost=LinearCost(), pulse=pulse
    )


def decode_worker(runner: EmulatedRunner, pulse: Pulse, transport: ScriptedTransport | None = None) -> DecodeWorker:
    return DecodeWorker(
        runner,
        DecodeConfig(),
        transport or ScriptedTransport(),
        worker_id="d",
        eos_token_ids=frozenset({0}),
        max_context=256,
        cost=LinearCost(),
        pulse=pulse,
    )


@pytest.mark.parametrize("make", [prefill_worker, decode_worker])
def test_an_idle_worker_runs_one_at_once_and_then_now_and_then(make) -> None:
    async def main() -> None:
        runner, pulse = SeenRunner(), Pulse(5.0)
        worker = make(runner, pulse)
        free = worker.stats().blocks_free
        async with running(worker.run()):
            assert not pulse.is_proven.is_set()
            await asyncio.sleep(0.005)
            assert pulse.work is not None, "it runs"
            assert worker.stats().blocks_free == free - 1
            await asyncio.sleep(20.0)
            assert pulse.is_proven.is_set()
            assert runner.canaries == pytest.approx([n * (5.0 + CANARY_STEP_S) for n in range(4)])
            stats = worker.stats()
            assert (stats.blocks_free, stats.steps, stats.running) == (free, 0, 0)
            assert stats.decode_step_s == stats.prefill_tokens_per_s == 0.0, "nothing is learned from it"
            assert worker._cost.seen == []
            assert worker.is_idle
            worker.check_empty()

    virtual_loop.run(main())


def test_steps_of_requests_are_canaries_too() -> None:
    async def main() -> None:
        runner, pulse = SeenRunner(64), Pulse(0.5)
        worker = decode_worker(runner, pulse)
        async with running(worker.run()):
            await asyncio.sleep(0.1)
            assert len(runner.canaries) == 1
            gateway = Gateway(worker)
            gateway.send(submit(9, params=SamplingParams(temperature=0.0, max_tokens=100)))
            await asyncio.sleep(1.4)
            assert isinstance(gateway.events[-1], Done)
            assert len(runner.canaries) == 1
            await asyncio.sleep(1.0)
            assert len(runner.canaries) > 1
            assert min(runner.canaries[1:]) >= runner.steps[-1] + 0.5
            await gateway.detach()

    virtual_loop.run(main())


def test_a_request_that_comes_during_a_canary_waits_for_it_and_no_longer() -> None:
    async def main() -> None:
        runner, pulse = SeenRunner(64), Pulse(5.0)
        worker = decode_worker(runner, pulse)
        async with running(worker.run()):
            gateway = Gateway(worker)
            await asyncio.sleep(0.001)
            gateway.send(submit(9))
            await asyncio.sleep(1.0)
            assert isinstance(gateway.events[-1], Done)
            assert runner.steps[0] == pytest.approx(CANARY_STEP_S)
            await gateway.detach()

    virtual_loop.run(main())


def test_a_pool_that_is_full_of_what_is_to_be_fetched_is_no_reason_to_worry() -> None:
    """The prompt is computed, holds every block, and its reader takes its time."""

    async def main() -> None:
        runner, pulse = SeenRunner(8), Pulse(5.0)
        worker = prefill_worker(runner, pulse)
        async with running(worker.run()):
            await asyncio.sleep(0.1)
            frames = worker.prefill(call(32))
            await anext(frames)
            await asyncio.sleep(1.0)
            assert worker.stats().blocks_free == 0
            signs = pulse.signs
            await asyncio.sleep(60.0)
            assert len(runner.canaries) == 1, "there is no block for one"
            assert pulse.signs >= signs + 10, "and yet the loop shows that it lives"
            assert isinstance([frame async for frame in frames][-1], End)
            await asyncio.sleep(6.0)
            assert len(runner.canaries) == 2

    virtual_loop.run(main())


def test_a_loop_that_is_cancelled_gives_the_canarys_block_back() -> None:
    async def main() -> None:
        worker = prefill_worker(SeenRunner(), Pulse(5.0))
        loop = asyncio.create_task(worker.run())
        await asyncio.sleep(0.005)
        loop.cancel()
        await asyncio.wait([loop])
        worker.check_empty()

    virtual_loop.run(main())


@pytest.mark.parametrize("make", [prefill_worker, decode_worker])
def test_blocks_that_nobody_holds_and_nobody_can_have_end_the_worker(make) -> None:
    async def main() -> None:
        worker = make(SeenRunner(), Pulse())
        loop = asyncio.create_task(worker.run())
        await asyncio.sleep(0.1)
        worker._pool.new("nobody")
        worker._pool.append("nobody", 16)
        worker.drain()  # any message makes it look
        with pytest.raises(AssertionError, match=r"blocks are held by nobody who is here: \('nobody',\)"):
            await loop

    virtual_loop.run(main())


def test_prompts_that_wait_for_lost_blocks_end_the_worker() -> None:
    async def main() -> None:
        worker = prefill_worker(SeenRunner(), Pulse())
        loop = asyncio.create_task(worker.run())
        worker._pool.new("nobody")
        worker._pool.append("nobody", 16 * 4)
        reader = asyncio.ensure_future(anext(worker.prefill(call(9))))
        with pytest.raises(AssertionError, match="p: blocks are held by nobody who is here"):
            await loop
        reader.cancel()
        await asyncio.wait([reader])

    virtual_loop.run(main())
