"""The loop with a step scheduled ahead: the runner never waits, newcomers hardly do, and whatever ends it ends both."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.planning import virtual_loop
from decode_worker.config import DecodeConfig
from decode_worker.stream import Cancel, Delta, Done
from decode_worker.worker import DecodeWorker
from engine.batch import Batch, KVLayout, LayerListener, StepOutput
from engine.emulated_runner import EmulatedRunner
from engine.model_source import ModelFiles
from engine.sampling import SamplingParams
from tests.decode_worker.scripted import Gateway, ScriptedTransport, scene
from tests.emulated import cost, layout, running, submit
from tests.tiny_models import make_runner, save_model

STEP_S = 0.011
LONG = SamplingParams(temperature=0.0, max_tokens=60)


class RecordingRunner(EmulatedRunner):
    """Remembers each batch, when it was handed over and when it ended, and fails at step number `fails_at`."""

    def __init__(self, kv_layout: KVLayout) -> None:
        super().__init__(kv_layout, cost, layer_group=2)
        self.batches: list[Batch] = []
        self.spans: list[tuple[float, float]] = []
        self.under_way = 0
        self.fails_at: int | None = None

    async def run(self, batch: Batch, on_layers: LayerListener | None = None) -> StepOutput:
        loop = asyncio.get_running_loop()
        number, handed_over_s = len(self.batches), loop.time()
        self.batches.append(batch)
        self.under_way += 1
        try:
            if number == self.fails_at:
                await asyncio.sleep(0.001)
                raise ArithmeticError("the device is broken")
            return await super().run(batch, on_layers)
        finally:
            self.under_way -= 1
            self.spans.append((handed_over_s, loop.time()))


def tokens_of(gateway: Gateway, request_id: str) -> list[int]:
    deltas = [event for event in gateway.events if isinstance(event, Delta) and event.request_id == request_id]
    return [token.token_id for delta in deltas for token in delta.tokens]


def done_count(gateway: Gateway) -> int:
    return sum(isinstance(event, Done) for event in gateway.events)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - whatever is waited for has no event of its own
            await asyncio.sleep(0.0001)


def test_the_runner_has_the_next_batch_before_a_step_ends() -> None:
    async def main() -> None:
        runner = RecordingRunner(layout(64))
        async with scene(decode_runner=runner, schedule_ahead=True) as (_, _, gateway, _):
            gateway.send(submit(5, params=LONG))
            await asyncio.sleep(2)
        assert len(runner.spans) == 60
        for (_, ended_s), (handed_over_s, _) in itertools.pairwise(runner.spans):
            assert handed_over_s < ended_s
        # The prompt's step, and 59 of one token each, without a gap between them.
        whole_s = runner.spans[-1][1] - runner.spans[0][0]
        assert whole_s == pytest.approx(0.015 + 59 * STEP_S)

    virtual_loop.run(main())


@pytest.mark.parametrize("ahead", [False, True])
def test_a_newcomer_joins_the_next_step_unless_it_is_already_scheduled(ahead: bool) -> None:
    async def main() -> None:
        runner = RecordingRunner(layout(64))
        async with scene(decode_runner=runner, schedule_ahead=ahead) as (_, _, gateway, _):
            gateway.send(submit(5, "old", params=SamplingParams(temperature=0.0, max_tokens=100)))
            waits: list[int] = []
            for number, share in enumerate((0.2, 0.4, 0.95)):
                await asyncio.sleep(0.2)
                seen = len(runner.spans)
                await until(lambda seen=seen: len(runner.spans) > seen)
                # A step has just ended, and the one under way is number `seen` + 1.
                await asyncio.sleep(share * STEP_S)
                gateway.send(submit([7, number], f"new{number}", params=SamplingParams(temperature=0.0, max_tokens=1)))
                await asyncio.sleep(5 * STEP_S)
                joined = next(
                    index
                    for index, batch in enumerate(runner.batches)
                    if any(f"new{number}" in row.seq_id for row in batch.rows)
                )
                waits.append(joined - (seen + 1))
            assert waits == ([1, 1, 2] if ahead else [1, 1, 1])

    virtual_loop.run(main())


@pytest.mark.parametrize("ahead", [False, True])
def test_a_stop_token_costs_one_row_more_and_no_wrong_token(ahead: bool) -> None:
    async def main() -> None:
        runner = RecordingRunner(layout(64))
        right = runner.expected_tokens(range(9), LONG, 0, 0, 12)
        params = SamplingParams(temperature=0.0, max_tokens=60, stop_token_ids=(right[-1],))
        async with scene(decode_runner=runner, schedule_ahead=ahead) as (_, worker, gateway, _):
            gateway.send(submit(9, params=params))
            gateway.send(submit([5, 5, 5], "other", params=LONG))
            await asyncio.sleep(3)
            worker.check_empty()
            # Asked again: what was computed after the end must not be found in the cache.
            again = (*range(9), *right, 77)
            gateway.send(submit(again, "again"))
            await asyncio.sleep(1)
            assert tokens_of(gateway, "again") == runner.expected_tokens(again, LONG, 0, 0, 8)
        assert tokens_of(gateway, "r") == right
        assert tokens_of(gateway, "other") == runner.expected_tokens((5, 5, 5), LONG, 0, 0, 60)
        rows = [row for batch in runner.batches for row in batch.rows if ":r#" in row.seq_id]
        assert len(rows) == len(right) + ahead

    virtual_loop.run(main())


def test_a_cancel_is_computed_for_in_two_steps_at_most_and_then_all_is_free() -> None:
    async def main() -> None:
        for delay_s in (0.2, 0.2 + 0.3 * STEP_S, 0.2 + 0.6 * STEP_S, 0.2 + 0.9 * STEP_S):
            runner = RecordingRunner(layout(64))
            async with scene(decode_runner=runner, schedule_ahead=True) as (_, worker, gateway, _):
                gateway.send(submit(5, params=LONG))
                await asyncio.sleep(delay_s)
                before = len(runner.spans)
                gateway.send(Cancel("r"))
                await asyncio.sleep(2 * STEP_S + 0.0001)
                assert runner.under_way == 0
                assert len(runner.spans) - before <= 2
                worker.check_empty()

    virtual_loop.run(main())


@pytest.mark.parametrize("ahead", [False, True])
def test_a_broken_step_ends_the_loop_with_its_own_error(ahead: bool) -> None:
    async def main() -> None:
        runner = RecordingRunner(layout(64))
        runner.fails_at = 5
        config = DecodeConfig(schedule_ahead=ahead)
        worker = DecodeWorker(
            runner, config, ScriptedTransport(), worker_id="d", eos_token_ids=frozenset({0}), max_context=256
        )
        loop = asyncio.create_task(worker.run())
        gateway = Gateway(worker)
        gateway.send(submit(5, params=LONG))
        with pytest.raises(ArithmeticError, match="the device is broken"):
            await loop
        assert runner.under_way == 0
        await gateway.detach()

    virtual_loop.run(main())


def test_cancelling_the_loop_waits_for_both_steps() -> None:
    async def main() -> None:
        runner = StubbornRunner(layout(64))
        config = DecodeConfig(schedule_ahead=True)
        worker = DecodeWorker(
            runner, config, ScriptedTransport(), worker_id="d", eos_token_ids=frozenset({0}), max_context=256
        )
        loop = asyncio.create_task(worker.run())
        gateway = Gateway(worker)
        gateway.send(submit(5, params=LONG))
        await asyncio.sleep(0.1)
        await until(lambda: runner.under_way == 2)
        loop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loop
        assert runner.under_way == 0, "a step still writes blocks after the loop has let go of them"
        await gateway.detach()

    virtual_loop.run(main())


class StubbornRunner(RecordingRunner):
    """Like a real device: a step that was begun is finished, cancelled or not."""

    async def run(self, batch: Batch, on_layers: LayerListener | None = None) -> StepOutput:
        step = asyncio.ensure_future(super().run(batch, on_layers))
        try:
            return await asyncio.shield(step)
        except asyncio.CancelledError:
            await asyncio.wait([step])
            raise


async def test_a_real_model_says_the_same_ahead_and_step_by_step(tmp_path: Path) -> None:
    files = ModelFiles("hf", save_model("llama", tmp_path))
    params = [
        SamplingParams(temperature=0.0, max_tokens=20),
        SamplingParams(temperature=0.9, max_tokens=13, n=2),
        SamplingParams(temperature=0.9, max_tokens=20, stop_token_ids=tuple(range(0, 97, 12))),
        SamplingParams(temperature=0.0, max_tokens=9, repetition_penalty=1.3),
    ]
    answers: list[dict[tuple[str, int], list[int]]] = []
    for ahead in (False, True):
        runner = make_runner(files)
        config = DecodeConfig(schedule_ahead=ahead, local_token_budget=8)
        worker = DecodeWorker(
            runner, config, ScriptedTransport(), worker_id="d", eos_token_ids=frozenset({0}), max_context=64
        )
        async with running(worker.run()):
            gateway = Gateway(worker)
            # One by one, then all at once, with penalties or without.
            for wave in ([0], [1], [2], [3], [0, 1, 2], [0, 1, 2, 3]):
                name = "".join(map(str, wave))
                for index in wave:
                    gateway.send(submit([3 + index, 5, 7, 11, 13], f"{name}/{index}", params=params[index], seed=index))
                wanted = done_count(gateway) + len(wave)
                await until(lambda gateway=gateway, wanted=wanted: done_count(gateway) == wanted)
            await asyncio.sleep(0.05)
            worker.check_empty()
            await gateway.detach()
        await runner.close()
        said: dict[tuple[str, int], list[int]] = {}
        for event in gateway.events:
            if isinstance(event, Delta):
                said.setdefault((event.request_id, event.choice), []).extend(t.token_id for t in event.tokens)
        answers.append(said)
    assert answers[0] == answers[1]
