"""Requests that end before their end: nothing is held anywhere afterwards, however it happened."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from dataclasses import replace

import pytest

from cluster.failures import PLACEMENTS_MAX
from cluster.messages import Complete
from cluster.routing.answer_length import AnswerLength
from decode_worker.stream import Failed
from engine.errors import DeadlineExceeded, HandedBack, Unavailable
from engine.objectives import Objectives
from engine.sampling import SamplingParams
from tests.cluster.fake_decode import STEP_S, FakeDecode, on_virtual_time
from tests.cluster.serving import (
    ANSWER,
    CONFIG,
    LENGTH,
    REQUEST,
    TO_THE_END,
    TOKENIZER,
    collect,
    report,
    serving,
    start,
)


@pytest.mark.parametrize("chunk_count", [1, 3])
@on_virtual_time
async def test_closing_the_generator_cancels_the_request(chunk_count: int) -> None:
    fake = FakeDecode(ANSWER)
    async with serving(fake) as gateway:
        async with aclosing(gateway.generate(REQUEST)) as parts:
            for _ in range(chunk_count):
                await anext(parts)
        gateway.check_empty()
        await asyncio.sleep(STEP_S)
        assert fake.cancels == ["r#1"]


@pytest.mark.parametrize("after_s", [0.0, 0.3 * STEP_S, 1.05 * STEP_S, 1.5 * STEP_S, 5 * STEP_S])
@pytest.mark.parametrize("workers", [("p", "d"), ("p",)])
@on_virtual_time
async def test_cancelling_at_any_moment_frees_everything(after_s: float, workers: tuple[str, ...]) -> None:
    fake = FakeDecode(ANSWER)
    async with serving(fake, workers) as gateway:
        tasks = [start(gateway, name) for name in "abc"]
        await asyncio.sleep(after_s)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        gateway.check_empty()


@on_virtual_time
async def test_what_a_draining_worker_gives_back_is_placed_anew() -> None:
    fake = FakeDecode(ANSWER)
    fake.draining = {"d1:1", "d2:1"}
    async with serving(fake, ("p", "d1", "d2", "d3")) as gateway:
        for _ in range(4):
            chunks, complete = await collect(gateway, replace(TO_THE_END, objectives=Objectives(5.0)))
            assert "".join(chunk.text for chunk in chunks) == TOKENIZER.decode(ANSWER)
            assert complete.receipt.decode_worker == "d3"
        tried = [address for address, _ in fake.submits]
        assert tried.count("d3:1") == 4
        assert 0 < tried.count("d1:1") + tried.count("d2:1") <= 2, "a worker that gave one back is sent no other"
        assert fake.cancels == []
        promise = gateway.router.calibration.promise
        assert promise.count == 0, "nobody was put off: being given back says nothing of such promises"


@on_virtual_time
async def test_what_everybody_gives_back_fails_after_some_time() -> None:
    fake = FakeDecode(ANSWER)
    fake.draining = {f"d{index}:1" for index in range(PLACEMENTS_MAX)}
    async with serving(fake, ("p", *(f"d{index}" for index in range(PLACEMENTS_MAX)))) as gateway:
        with pytest.raises(Unavailable, match="8 workers in a row"):
            await collect(gateway, TO_THE_END)


@on_virtual_time
async def test_whom_every_worker_brought_on_is_given_back_as_often_as_they_drain() -> None:
    """A long answer outlives more workers than one, where all are replaced or change their roles."""
    fake = FakeDecode([5] * 80)
    async with serving(fake, ("p", "d1", "d2")) as gateway:
        task = start(gateway, "r", params=SamplingParams(max_tokens=80))
        for count in range(1, PLACEMENTS_MAX + 2):
            await asyncio.sleep(4.5 * STEP_S)
            address = fake.submits[-1][0]
            fake.push(address, Failed(f"r#{count}", HandedBack("this worker drains")))
            await asyncio.sleep(STEP_S)
            gateway.heartbeat(report(address[:2], incarnation=count + 1))
        _, complete = await task
        assert complete.usage.completion_tokens == 80
        assert len(fake.submits) == PLACEMENTS_MAX + 2


@pytest.mark.parametrize(
    ("answer", "workers", "running", "phase"),
    [
        ((), ("p", "d"), 2, "gateway queue"),
        ((), ("p",), 0, "routing"),
        ((), ("p", "d"), 0, "prefill"),
        ((9, 9), ("p", "d"), 0, "decode"),
    ],
)
@on_virtual_time
async def test_a_deadline_names_the_phase_in_which_it_passed(
    answer: tuple[int, ...], workers: tuple[str, ...], running: int, phase: str
) -> None:
    async with serving(FakeDecode(answer), workers) as gateway:
        others = [start(gateway, f"other{index}") for index in range(running)]
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded, match=f"during {phase}$"):
            await start(gateway, "r", deadline_s=2.0)
        assert asyncio.get_running_loop().time() == 2.0
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others)


@on_virtual_time
async def test_a_slow_readers_own_time_is_not_interrupted_by_the_deadline() -> None:
    async with serving(FakeDecode(ANSWER)) as gateway:
        parts = []
        async for part in gateway.generate(replace(TO_THE_END, deadline_s=1.0)):
            parts.append(part)
            await asyncio.sleep(3.0)
    assert isinstance(parts[-1], Complete)


@on_virtual_time
async def test_a_reader_that_stops_holds_no_place() -> None:
    """Its answer is computed and waits to be read; others are served meanwhile."""
    fake = FakeDecode(ANSWER)
    async with serving(fake, config=CONFIG.model_copy(update={"max_running": 1})) as gateway:
        async with aclosing(gateway.generate(TO_THE_END)) as parts:
            await anext(parts)
            for name in ("a", "b"):
                assert await start(gateway, name, params=TO_THE_END.params)
            assert asyncio.get_running_loop().time() < 1.0
            seen = AnswerLength(CONFIG.router.typical_answer_tokens)
            for _ in range(3):
                seen.drew(LENGTH)
                seen.ended(1)
            assert gateway.view.answer_tokens == pytest.approx(seen.mean), "it counts as answered, read or not"
            rest = [part async for part in parts]
        complete = rest[-1]
        assert isinstance(complete, Complete)
        assert complete.choices[0].text == "One, two, three."
        assert complete.receipt.tpot_s == pytest.approx(STEP_S), "when they came, not when they were read"


@pytest.mark.parametrize("asked_s", [None, 1e11])
@on_virtual_time
async def test_no_request_lives_longer_than_a_stream_may(asked_s: float | None) -> None:
    fake = FakeDecode(ANSWER)
    config = CONFIG.model_copy(update={"default_deadline_s": None, "max_stream_s": 30.0})
    async with serving(fake, config=config) as gateway:
        await collect(gateway, replace(TO_THE_END, deadline_s=asked_s))
    assert fake.submits[0][1].deadline_s == 30.0


@pytest.mark.parametrize("seed", range(10))
@on_virtual_time
async def test_a_crowd_that_comes_and_goes_leaves_nothing_behind(seed: int) -> None:
    rng = random.Random(seed)
    fake = FakeDecode([*ANSWER, 0], eos=0)
    config = CONFIG.model_copy(update={"max_running": 8, "max_waiting": 100})
    async with serving(fake, ("p", "d0", "d1"), config) as gateway:
        tasks = []
        for number in range(60):
            params = SamplingParams(n=rng.randint(1, 3), max_tokens=40, stop=rng.choice([(), ("two",)]))
            tasks.append(start(gateway, f"r{number}", params=params, deadline_s=rng.choice([0.05, 10.0])))
            await asyncio.sleep(rng.random() * 3 * STEP_S)
            if rng.random() < 0.3:
                rng.choice(tasks).cancel()
            if rng.random() < 0.05 and fake.sessions:
                fake.break_link(rng.choice(sorted(fake.sessions)))
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled() and task.exception() is None:
                _, complete = task.result()
                assert all(choice.text in ("One, two, three.", "One, ") for choice in complete.choices)
            elif not task.cancelled():
                assert isinstance(task.exception(), DeadlineExceeded | Unavailable)
