"""The cost runner: steps take what the cost model says, many at once as long as one by one."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable

import pytest

from cluster.planning import virtual_loop
from cluster.planning.cost_runner import PARTS, CostRunner, StepNoise, cost_layout
from engine.batch import Batch, KVLayout, Row, SampleSpec
from engine.errors import ConfigError
from engine.multi_step import MultiStepRunner
from engine.sampling import SamplingParams
from engine.step_cost import StepWork
from tests.planning.linear_cost import LinearCost

COST = LinearCost(fixed_s=2e-3, token_s=5e-5, row_s=1e-4, context_s=3e-6)
LAYOUT = cost_layout("m", COST, 16)
PARAMS = SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True)


class Bent(LinearCost):
    """A cost that bends, as rooflines do: two straight lines with a corner at `CORNER` tokens of context."""

    CORNER = 500

    def step_s(self, work: StepWork) -> float:
        return super().step_s(work) + 1e-5 * max(0, work.decode_context - self.CORNER)


def runner(cost: LinearCost = COST, noise: StepNoise | None = None) -> CostRunner:
    return CostRunner(LAYOUT, cost, noise)


def decode_batch(*ends: int) -> Batch:
    return Batch(
        tuple(Row(f"s{i}", (7,), end - 1, tuple(range(64)), SampleSpec(PARAMS, 0, 3)) for i, end in enumerate(ends))
    )


def prompt_batch(tokens: int, start: int = 0) -> Batch:
    return Batch((Row("p", (7,) * tokens, start, tuple(range(64)), SampleSpec(PARAMS, 0, 0)),))


def timed(work: Callable[[CostRunner], Awaitable[object]], cost: LinearCost = COST) -> float:
    async def main() -> float:
        await work(runner(cost))
        return asyncio.get_running_loop().time()

    return virtual_loop.run(main())


def ends_of_single_steps(cost: LinearCost, ends: tuple[int, ...], steps: int) -> list[float]:
    """When each of `steps` steps ends, by running them one by one."""

    async def main() -> list[float]:
        one, times = runner(cost), []
        for step in range(steps):
            await one.run(decode_batch(*(end + step for end in ends)))
            times.append(asyncio.get_running_loop().time())
        return times

    return virtual_loop.run(main())


def test_it_is_a_multi_step_runner() -> None:
    assert isinstance(runner(), MultiStepRunner)


def test_a_step_takes_what_the_cost_model_says() -> None:
    assert timed(lambda one: one.run(decode_batch(100, 300))) == COST.step_s(StepWork((), 2, 400))
    assert timed(lambda one: one.run(prompt_batch(200, 64))) == COST.step_s(StepWork(((200, 64),)))


def test_kv_is_handed_out_while_the_step_runs() -> None:
    async def main() -> tuple[list[tuple[int, int, float]], float]:
        loop, said = asyncio.get_running_loop(), []
        await runner().run(prompt_batch(160), lambda first, last: said.append((first, last, loop.time())))
        return said, loop.time()

    said, end_s = virtual_loop.run(main())
    assert [(first, last) for first, last, _ in said] == [(0, 4), (4, 7), (7, 8)]
    assert [when for _, _, when in said] == pytest.approx([end_s / 2, end_s * 7 / 8, end_s])


def test_a_batch_handed_in_early_waits_for_its_turn() -> None:
    step_s = COST.step_s(StepWork((), 1, 50))
    assert timed(lambda one: asyncio.gather(one.run(decode_batch(50)), one.run(decode_batch(50)))) == 2 * step_s


@pytest.mark.parametrize("steps", [1, 2, 32, 33, 64, 200])
def test_many_steps_take_as_long_as_one_by_one(steps: int) -> None:
    async def main() -> tuple[int, float]:
        out = await runner().run_many(decode_batch(30, 70), steps)
        assert all(len(step.sampled) == 2 for step in out)
        return len(out), asyncio.get_running_loop().time()

    count, end_s = virtual_loop.run(main())
    assert count == steps
    assert end_s == pytest.approx(ends_of_single_steps(COST, (30, 70), steps)[-1], rel=1e-12)


def test_a_corner_in_the_cost_is_off_by_less_than_a_thousandth() -> None:
    bent = Bent(context_s=3e-6)
    singly = ends_of_single_steps(bent, (400,), 300)[-1]
    assert timed(lambda one: one.run_many(decode_batch(400), 300), bent) == pytest.approx(singly, rel=1e-3)


def cut_at(when_s: float, steps: int = 200, times: int = 1) -> tuple[list[int], int, float]:
    """What `cut_short` says when called at `when_s`, how many outputs come, and when."""

    async def main() -> tuple[list[int], int, float]:
        loop, one = asyncio.get_running_loop(), runner()
        said: list[int] = []
        for _ in range(times):
            loop.call_at(when_s, lambda: said.append(one.cut_short()))
        out = await one.run_many(decode_batch(30, 70), steps)
        return said, len(out), loop.time()

    return virtual_loop.run(main())


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("step", [0, 1, 31, 32, 33, 130, 199])
def test_a_cut_run_ends_with_the_step_that_runs(step: int, share: float) -> None:
    ends = ends_of_single_steps(COST, (30, 70), 200)
    began = ends[step - 1] if step else 0.0
    said, count, end_s = cut_at(began + share * (ends[step] - began), times=2)
    assert said == [step + 1] * 2
    assert count == step + 1
    assert end_s == pytest.approx(ends[step], rel=1e-12)


def test_a_cut_before_anything_ran_leaves_one_step() -> None:
    assert cut_at(0.0)[:2] == ([1], 1)


def test_runs_follow_one_another_without_a_gap() -> None:
    async def main() -> float:
        one = runner()
        await one.run_many(decode_batch(30), 10)
        await one.run(decode_batch(40))
        return asyncio.get_running_loop().time()

    assert virtual_loop.run(main()) == pytest.approx(ends_of_single_steps(COST, (30,), 11)[-1], rel=1e-12)


def test_a_cancelled_run_leaves_the_runner_free() -> None:
    async def main() -> float:
        one = runner()
        task = asyncio.create_task(one.run_many(decode_batch(30), 500))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await one.close()
        began_s = asyncio.get_running_loop().time()
        await one.run(decode_batch(30))
        return asyncio.get_running_loop().time() - began_s

    assert virtual_loop.run(main()) == pytest.approx(COST.step_s(StepWork((), 1, 30)))


def test_noise_multiplies_each_step_by_its_kind() -> None:
    noise = StepNoise((2.0,), (3.0,), random.Random(0))

    async def main() -> list[float]:
        loop, one, times = asyncio.get_running_loop(), runner(noise=noise), [0.0]
        for work in (one.run(prompt_batch(100)), one.run(decode_batch(30)), one.run_many(decode_batch(30), 5)):
            await work
            times.append(loop.time())
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    prompt_s, step_s = COST.step_s(StepWork(((100, 0),))), COST.step_s(StepWork((), 1, 30))
    many_s = sum(COST.step_s(StepWork((), 1, 30 + step)) for step in range(5))
    assert virtual_loop.run(main()) == pytest.approx([2 * prompt_s, 3 * step_s, 3 * many_s])


def test_payloads_have_their_size_and_nothing_in_it() -> None:
    payload = runner().export_blocks(range(4096), range(PARTS), 16)
    assert len(payload) == 4096 * 16 * PARTS * LAYOUT.token_bytes
    assert len(memoryview(payload)[:5]) == 5


def test_a_layout_holds_what_the_memory_holds() -> None:
    cost = LinearCost(token_bytes=131_072, kv_capacity_tokens=100_000)
    layout = cost_layout("llama", cost, 16)
    assert layout == KVLayout("llama", PARTS, 1, 4096, "bfloat16", 16, 6250)
    assert layout.token_bytes * layout.num_layers == cost.kv_bytes(1)
    with pytest.raises(ConfigError, match="model: llama leaves memory for 3 tokens"):
        cost_layout("llama", LinearCost(kv_capacity_tokens=3), 16)
