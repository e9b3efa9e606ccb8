"""Requests that another worker had begun: the draws go on where they were."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cluster.planning import virtual_loop
from decode_worker.stream import ChoiceSoFar, Delta, Done, Failed, Submit
from engine.errors import InvalidArgument
from engine.sampling import SamplingParams
from tests.decode_worker.scripted import Gateway, scene
from tests.emulated import submit

LENGTH = 12


def answer(gateway: Gateway, choice: int = 0) -> list[int]:
    deltas = [event for event in gateway.events if isinstance(event, Delta) and event.choice == choice]
    return [token.token_id for delta in deltas for token in delta.tokens]


@pytest.mark.parametrize("ahead", [False, True], ids=["step by step", "ahead"])
@pytest.mark.parametrize("address", ["p", ""], ids=["pulled", "local"])
@pytest.mark.parametrize("params", [{}, {"frequency_penalty": 0.5}, {"temperature": 0.0}, {"min_tokens": 6}], ids=str)
@pytest.mark.parametrize("drawn", [1, 2, 7, 11])
def test_one_choice_goes_on(ahead: bool, address: str, params: dict[str, float], drawn: int) -> None:
    async def main() -> None:
        sampling = SamplingParams(**{"temperature": 1.0, "max_tokens": LENGTH, **params})  # type: ignore[arg-type]
        async with scene(schedule_ahead=ahead) as (_, _, gateway, runner):
            prompt = tuple(range(10))
            right = runner.expected_tokens(prompt, sampling, 5, 0, LENGTH)
            gateway.send(
                submit([*prompt, *right[:drawn]], params=sampling, seed=5, prefill_address=address, prompt_tokens=10)
            )
            await asyncio.sleep(3)
            assert answer(gateway) == right[drawn:]
            assert isinstance(gateway.events[-1], Done)

    virtual_loop.run(main())


@pytest.mark.parametrize("ahead", [False, True], ids=["step by step", "ahead"])
@pytest.mark.parametrize("address", ["p", ""], ids=["pulled", "local"])
def test_several_choices_go_on_each_where_it_was(ahead: bool, address: str) -> None:
    async def main() -> None:
        sampling = SamplingParams(temperature=1.0, n=4, max_tokens=LENGTH)
        async with scene(schedule_ahead=ahead) as (transport, _, gateway, runner):
            prompt = tuple(range(10))
            right = [runner.expected_tokens(prompt, sampling, 5, choice, LENGTH) for choice in range(4)]
            counts = (0, 3, 7, LENGTH)
            so_far = [ChoiceSoFar(tuple(right[i][:count]), count == LENGTH) for i, count in enumerate(counts)]
            asked = submit(prompt, params=sampling, seed=5, prefill_address=address, resumed=tuple(so_far))
            gateway.send(asked)
            await asyncio.sleep(3)
            for choice, count in enumerate(counts):
                assert answer(gateway, choice) == right[choice][count:]
            assert isinstance(gateway.events[-1], Done)
            assert transport.calls == [], "their tokens differ: each is computed here"

    virtual_loop.run(main())


GOOD = Submit("r", (1, 2, 3), SamplingParams(max_tokens=4), 0)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (replace(GOOD, token_ids=()), "prompt"),
        (replace(GOOD, prompt_tokens=4), "prompt_tokens"),
        (replace(GOOD, resumed=(ChoiceSoFar(),) * 2), "resumed"),
        (replace(GOOD, resumed=(ChoiceSoFar((1, 2, 3, 4)),)), "resumed"),
        (replace(GOOD, resumed=(ChoiceSoFar(is_finished=True),)), "resumed"),
        (replace(GOOD, token_ids=(1, 2, 3, 4, 5), prompt_tokens=1), "resumed"),
        # Each of these would end the worker, or take all of its memory, were anything made of it first.
        (replace(GOOD, params=SamplingParams(n=1 << 30)), "sampling_params.n"),
        (replace(GOOD, params=SamplingParams(n=3), resumed=(ChoiceSoFar(),)), "resumed"),
        (replace(GOOD, token_ids=(1, 32_000)), "prompt"),
        (replace(GOOD, resumed=(ChoiceSoFar((32_000,)),)), "resumed"),
        (replace(GOOD, deadline_s=float("nan")), "deadline_s"),
        (replace(GOOD, tpot_s=float("inf")), "tpot_s"),
    ],
)
def test_what_cannot_go_on_is_refused(bad: Submit, field: str) -> None:
    async def main() -> None:
        async with scene() as (_, _, gateway, _):
            gateway.send(bad)
            await asyncio.sleep(1)
            [failed] = gateway.events
            assert isinstance(failed, Failed)
            assert isinstance(failed.error, InvalidArgument)
            assert failed.error.field == field

    virtual_loop.run(main())
