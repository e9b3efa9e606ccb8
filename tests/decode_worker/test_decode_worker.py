"""The decode loop on the virtual clock: every phase of a request's life meets every way to end it."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

import pytest

from cluster.planning import virtual_loop
from decode_worker.stream import Cancel, ChoiceSoFar, Delta, Done, Failed
from decode_worker.worker import DecodeWorker
from engine.emulated_runner import EmulatedRunner
from engine.errors import CorruptFrame, DeadlineExceeded, InvalidArgument, LayoutMismatch, Overloaded, Unavailable
from engine.request import FinishReason
from engine.sampling import SamplingParams
from tests.decode_worker import scripted
from tests.decode_worker.scripted import PHASES, Gateway, ScriptedTransport
from tests.emulated import submit

LONG = SamplingParams(temperature=0.0, max_tokens=100)
Scene = Callable[..., AbstractAsyncContextManager[tuple[ScriptedTransport, DecodeWorker, Gateway, EmulatedRunner]]]


@pytest.fixture(params=[False, True], ids=["step by step", "ahead"])
def scene(request: pytest.FixtureRequest) -> Scene:
    """Everything holds whether or not steps are scheduled ahead."""
    return functools.partial(scripted.scene, schedule_ahead=request.param)


def tokens_of(gateway: Gateway, request_id: str = "r", choice: int = 0) -> tuple[int, ...]:
    deltas = [e for e in gateway.events if isinstance(e, Delta) and (e.request_id, e.choice) == (request_id, choice)]
    return tuple(token.token_id for delta in deltas for token in delta.tokens)


def ends_of(gateway: Gateway) -> list[Done | Failed]:
    return [event for event in gateway.events if isinstance(event, Done | Failed)]


@pytest.mark.parametrize("address", ["p", ""], ids=["pulled", "local"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 30])
def test_the_right_tokens_come(scene: Scene, address: str, n: int, length: int) -> None:
    async def main() -> None:
        params = SamplingParams(temperature=1.0, n=n, max_tokens=9)
        async with scene() as (_, _, gateway, runner):
            gateway.send(submit(length, params=params, seed=5, prefill_address=address))
            await asyncio.sleep(3)
            for choice in range(n):
                right = runner.expected_tokens(tuple(range(length)), params, 5, choice, 9)
                assert tokens_of(gateway, choice=choice) == tuple(right)
            assert len(ends_of(gateway)) == 1

    virtual_loop.run(main())


@pytest.mark.parametrize("ending", ["cancel", "deadline", "detach"])
@pytest.mark.parametrize("phase", PHASES)
def test_ending_a_request_in_any_phase_frees_both_sides(scene: Scene, phase: str, ending: str) -> None:
    async def main() -> None:
        async with scene() as (transport, worker, gateway, _):
            transport.hold = PHASES[phase]
            gateway.send(submit(30, params=LONG, prefill_address="p", deadline_s=0.5 if ending == "deadline" else None))
            await asyncio.sleep(0.4)
            assert worker.stats().running + worker.stats().waiting == 1
            if ending == "cancel":
                gateway.send(Cancel("r"))
            elif ending == "detach":
                await gateway.detach()
            await asyncio.sleep(0.3)
            worker.check_empty()
            transport.prefill.check_empty()
            if ending == "deadline":
                (end,) = ends_of(gateway)
                assert isinstance(end, Failed)
                assert isinstance(end.error, DeadlineExceeded)
            elif ending == "cancel":
                (end,) = ends_of(gateway)
                assert isinstance(end, Done), "it says how far it got"
                assert (end.receipt.kv_bytes > 0) == (phase == "decoding")
            else:
                assert ends_of(gateway) == []

    virtual_loop.run(main())


@pytest.mark.parametrize("fault", [Unavailable("gone"), CorruptFrame("bad"), LayoutMismatch("other")], ids=repr)
@pytest.mark.parametrize("phase", [phase for phase, hold in PHASES.items() if hold is not None])
def test_a_broken_stream_fails_its_request_and_no_other(scene: Scene, phase: str, fault: Exception) -> None:
    async def main() -> None:
        async with scene() as (transport, _, gateway, runner):
            gateway.send(submit(10, "good", prefill_address="p"))
            await asyncio.sleep(0.1)
            transport.hold, transport.fault = PHASES[phase], fault  # type: ignore[assignment]
            gateway.send(submit(30, "bad", prefill_address="p"))
            await asyncio.sleep(2)
            assert {end.request_id: type(end) for end in ends_of(gateway)} == {"good": Done, "bad": Failed}
            assert next(end.error for end in ends_of(gateway) if isinstance(end, Failed)) is fault
            right = runner.expected_tokens(tuple(range(10)), submit(1).params, 0, 0, 8)
            assert tokens_of(gateway, "good") == tuple(right)

    virtual_loop.run(main())


def test_an_unreachable_prefill_worker_fails_the_request(scene: Scene) -> None:
    async def main() -> None:
        async with scene() as (_, _, gateway, _):
            gateway.send(submit(5, prefill_address="nowhere"))
            await asyncio.sleep(1)
            (end,) = ends_of(gateway)
            assert isinstance(end, Failed)
            assert isinstance(end.error, Unavailable)
            assert end.error.is_of_prefill, "the decode worker itself stands"

    virtual_loop.run(main())


def test_what_is_cached_here_is_named_in_the_call_and_not_sent(scene: Scene) -> None:
    async def main() -> None:
        async with scene() as (transport, _, gateway, _):
            for request_id in ("a", "b"):
                gateway.send(submit(30, request_id, prefill_address="p"))
                await asyncio.sleep(1)
            assert [call.have_tokens for call in transport.calls] == [0, 28]
            first, second = (end.receipt.kv_bytes for end in ends_of(gateway) if isinstance(end, Done))
            assert (first, second) == (30 * 4 * 16, 2 * 4 * 16)
            assert tokens_of(gateway, "a") == tokens_of(gateway, "b")

    virtual_loop.run(main())


@pytest.mark.parametrize("n", [1, 3])
def test_of_an_answer_of_one_token_no_kv_moves(scene: Scene, n: int) -> None:
    async def main() -> None:
        params = SamplingParams(temperature=1.0, n=n, max_tokens=1)
        async with scene() as (transport, _, gateway, runner):
            gateway.send(submit(30, params=params, seed=5, prefill_address="p"))
            await asyncio.sleep(1)
            (end,) = ends_of(gateway)
            assert isinstance(end, Done)
            assert (end.receipt.kv_bytes, transport.prefill.stats().kv_orphan_bytes) == (0, 0)
            assert transport.prefill.stats().kv_streams_broken == 0
            for choice in range(n):
                assert tokens_of(gateway, choice=choice) == tuple(
                    runner.expected_tokens(tuple(range(30)), params, 5, choice, 1)
                )

    virtual_loop.run(main())


def test_another_tenants_salt_shares_nothing(scene: Scene) -> None:
    async def main() -> None:
        async with scene() as (transport, _, gateway, _):
            for request_id in ("a", "b"):
                gateway.send(submit(30, request_id, prefill_address="p", salt=request_id.encode()))
                await asyncio.sleep(1)
            assert [call.have_tokens for call in transport.calls] == [0, 0]

    virtual_loop.run(main())


def test_one_frame_a_step_carries_all_sequences_of_a_gateway(scene: Scene) -> None:
    async def main() -> None:
        async with scene(num_blocks=256) as (_, worker, gateway, _):
            for number in range(5):
                gateway.send(submit([number, 1, 2], f"r{number}", params=LONG))
            await asyncio.sleep(3)
            steady = [frame for frame in gateway.frames if len(frame.events) == 5]
            assert len(steady) > 90
            assert len({frame.step for frame in gateway.frames}) == len(gateway.frames) <= worker.stats().steps

    virtual_loop.run(main())


def test_too_few_blocks_preempt_the_youngest_and_all_answers_stay_right(scene: Scene) -> None:
    async def main() -> None:
        # 20 blocks of 4 tokens; four answers of 40 tokens need 48 blocks.
        params = SamplingParams(temperature=0.0, max_tokens=40)
        async with scene(num_blocks=20) as (_, worker, gateway, runner):
            for number in range(4):
                gateway.send(submit([number, 1, 2, 3, 4, 5], f"r{number}", params=params, prefill_address="p"))
            await asyncio.sleep(20)
            preemptions = {end.request_id: end.receipt.preemptions for end in ends_of(gateway) if isinstance(end, Done)}
            assert preemptions["r0"] == 0, "the oldest is never preempted"
            assert worker.stats().preemptions == sum(preemptions.values()) > 0
            for number in range(4):
                right = runner.expected_tokens((number, 1, 2, 3, 4, 5), params, 0, 0, 40)
                assert tokens_of(gateway, f"r{number}") == tuple(right)

    virtual_loop.run(main())


def test_pinned_prefixes_give_way_to_the_oldest_that_waits(scene: Scene) -> None:
    async def main() -> None:
        # "warm" leaves 10 cached blocks of 14; the next three pin them between them, so "big" could never have its 11.
        async with scene(num_blocks=14) as (_, _, gateway, runner):
            shared = list(range(40))
            gateway.send(submit(shared, "warm", prefill_address="p"))
            await asyncio.sleep(1)
            for number in range(3):
                gateway.send(submit([*shared[: 12 * number + 12], 99, number], f"r{number}", prefill_address="p"))
            gateway.send(submit([7] * 44, "big", prefill_address="p"))
            await asyncio.sleep(10)
            assert {type(end) for end in ends_of(gateway)} == {Done}
            assert len(ends_of(gateway)) == 5
            right = runner.expected_tokens((7,) * 44, submit(1).params, 0, 0, 8)
            assert tokens_of(gateway, "big") == tuple(right)

    virtual_loop.run(main())


@pytest.mark.parametrize("address", ["p", ""], ids=["pulled", "local"])
def test_a_first_token_that_ends_the_answer_ends_everything(scene: Scene, address: str) -> None:
    async def main() -> None:
        async with scene() as (transport, worker, gateway, runner):
            stop = runner.expected_tokens(tuple(range(9)), LONG, 0, 0, 1)[0]
            params = SamplingParams(temperature=0.0, max_tokens=9, stop_token_ids=(stop,))
            gateway.send(submit(9, params=params, prefill_address=address))
            await asyncio.sleep(1)
            (delta,) = (event for event in gateway.events if isinstance(event, Delta))
            assert (delta.finish_reason, delta.matched_token_id) == (FinishReason.STOP, stop)
            assert len(ends_of(gateway)) == 1
            worker.check_empty()
            transport.prefill.check_empty()

    virtual_loop.run(main())


def test_bad_submits_are_refused_by_name_and_others_go_on(scene: Scene) -> None:
    async def main() -> None:
        async with scene(num_blocks=8, max_queued=2) as (_, _, gateway, _):
            gateway.send(submit([], "empty"))
            gateway.send(submit(30, "large"))
            gateway.send(submit(4, "same"))
            gateway.send(submit(4, "same"))
            gateway.send(submit(4, "second"))
            gateway.send(submit(4, "third"))
            await asyncio.sleep(3)
            failures = [(end.request_id, type(end.error)) for end in ends_of(gateway) if isinstance(end, Failed)]
            assert failures == [
                ("empty", InvalidArgument),
                ("large", InvalidArgument),
                ("same", InvalidArgument),
                ("third", Overloaded),
            ]
            assert [end.request_id for end in ends_of(gateway) if isinstance(end, Done)] == ["same", "second"]

    virtual_loop.run(main())


@pytest.mark.parametrize("address", ["", "p"])
def test_prompts_beyond_the_models_context_are_refused(scene: Scene, address: str) -> None:
    """Positions beyond it are in none of the model's tables. Also where some of it was drawn elsewhere."""

    async def main() -> None:
        async with scene(num_blocks=100) as (_, _, gateway, _):
            params = SamplingParams(temperature=0.0, max_tokens=100)
            gateway.send(submit(256, "long", params=params, prefill_address=address))
            gateway.send(submit(256, "drawn", params=params, prefill_address=address, prompt_tokens=250))
            so_far = (ChoiceSoFar((5,) * 10), ChoiceSoFar())
            gateway.send(submit(246, "choices", params=replace(params, n=2), resumed=so_far))
            gateway.send(submit(255, "longest", params=params, prefill_address=address))
            await asyncio.sleep(5)
            failed = [end for end in ends_of(gateway) if isinstance(end, Failed)]
            assert [end.request_id for end in failed] == ["long", "drawn", "choices"]
            assert {str(end.error) for end in failed} == {
                "prompt: got '256 tokens', expected at most 255: the model's context is 256"
            }
            assert [end.request_id for end in ends_of(gateway) if isinstance(end, Done)] == ["longest"]

    virtual_loop.run(main())


def test_a_receipt_accounts_for_the_whole_time(scene: Scene) -> None:
    async def main() -> None:
        async with scene() as (_, _, gateway, _):
            gateway.send(submit(30, prefill_address="p"))
            started = asyncio.get_running_loop().time()
            while not ends_of(gateway):  # noqa: ASYNC110 - polling virtual time costs nothing
                await asyncio.sleep(0.0001)
            whole = asyncio.get_running_loop().time() - started
            (done,) = ends_of(gateway)
            assert isinstance(done, Done)
            receipt = done.receipt
            phases = receipt.prefill_queue_s + receipt.prefill_s + receipt.kv_exposed_s
            phases += receipt.decode_queue_s + receipt.decode_s
            assert phases == pytest.approx(whole, rel=0.01)
            # Four chunks of 8, 8, 8 and 6 tokens: 10 ms each and 1 ms a token.
            assert receipt.prefill_s == pytest.approx(0.07, rel=0.01)

    virtual_loop.run(main())
