"""Frames that come damaged, or again: what is missing is asked for once more, and nobody sees a difference."""

from __future__ import annotations

import asyncio
import logging

import pytest

from cluster.planning import virtual_loop
from decode_worker.pull import REFETCHES_MAX
from decode_worker.stream import Delta, Done, Failed
from engine.batch import Sampled
from engine.errors import TransferFailed
from engine.sampling import SamplingParams
from kvtransfer.frames import Begin, End, FirstToken, Frame, KVBlocks
from tests.decode_worker.scripted import Gateway, scene
from tests.emulated import submit

PARAMS = SamplingParams(temperature=1.0, n=2, max_tokens=9)


def answer(gateway: Gateway, choice: int) -> list[int]:
    deltas = [event for event in gateway.events if isinstance(event, Delta) and event.choice == choice]
    return [token.token_id for delta in deltas for token in delta.tokens]


@pytest.mark.parametrize("kind", [Begin, KVBlocks, FirstToken, End], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("rounds", [1, REFETCHES_MAX])
def test_whatever_is_damaged_comes_again(kind: type[Frame], rounds: int, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with scene() as (transport, worker, gateway, runner):
            damaged: list[Frame] = []

            def damages(call: int, frame: Frame) -> bool:
                is_hit = call <= rounds and isinstance(frame, kind)
                damaged.extend([frame] if is_hit else [])
                return is_hit

            transport.damages = damages
            gateway.send(submit(30, params=PARAMS, seed=5, prefill_address="p"))
            await asyncio.sleep(3)
            for choice in range(2):
                assert answer(gateway, choice) == runner.expected_tokens(tuple(range(30)), PARAMS, 5, choice, 9)
            done = gateway.events[-1]
            assert isinstance(done, Done)
            assert done.receipt.kv_bytes_before_first_token <= done.receipt.kv_bytes
            assert worker.stats().kv_faults == len(damaged), "each is counted once"
            # Without its word of the end, a stream may still have brought everything.
            assert len(transport.calls) == (1 if kind is End else 1 + rounds)
            assert len({call.lease for call in transport.calls}) == len(transport.calls)

    with caplog.at_level(logging.WARNING):
        virtual_loop.run(main())
    assert "KV from prefill worker p: KV frame checksum mismatch" in caplog.text


def test_only_what_is_missing_is_asked_for() -> None:
    async def main() -> None:
        async with scene() as (transport, worker, gateway, _):
            damaged: list[KVBlocks] = []

            def damages(call: int, frame: Frame) -> bool:
                if call == 1 and isinstance(frame, KVBlocks) and not damaged:
                    damaged.append(frame)
                    return True
                return False

            transport.damages = damages
            gateway.send(submit(30, prefill_address="p"))
            await asyncio.sleep(3)
            [lost] = damaged
            _, again = transport.calls
            [part] = again.wanted
            assert (part.first_token, part.end_token) == (lost.first_token, lost.end_token)
            assert range(part.first_layer, part.end_layer) == lost.layers
            assert isinstance(gateway.events[-1], Done)
            assert worker.stats().kv_faults == 1

    virtual_loop.run(main())


def test_many_missing_parts_are_asked_for_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes again with them was asked for: it is no fault."""
    monkeypatch.setattr("decode_worker.pull.MAX_WANTED", 1)

    async def main() -> None:
        async with scene() as (transport, worker, gateway, _):
            damaged: list[KVBlocks] = []

            def damages(call: int, frame: Frame) -> bool:
                is_hit = call == 1 and isinstance(frame, KVBlocks) and frame.first_token in (0, 16)
                if is_hit and isinstance(frame, KVBlocks):
                    damaged.append(frame)
                return is_hit

            transport.damages = damages
            gateway.send(submit(30, prefill_address="p"))
            await asyncio.sleep(3)
            [part] = transport.calls[1].wanted
            assert part.first_token == min(frame.first_token for frame in damaged)
            assert part.end_token == max(frame.end_token for frame in damaged)
            assert isinstance(gateway.events[-1], Done)
            assert worker.stats().kv_faults == len(damaged)

    virtual_loop.run(main())


def test_frames_that_come_twice_are_counted_and_not_taken() -> None:
    async def main() -> None:
        async with scene() as (transport, worker, gateway, runner):
            transport.twice = True
            gateway.send(submit(30, params=PARAMS, seed=5, prefill_address="p"))
            await asyncio.sleep(3)
            assert answer(gateway, 0) == runner.expected_tokens(tuple(range(30)), PARAMS, 5, 0, 9)
            assert worker.stats().kv_faults > 0
            assert len(transport.calls) == 1

    virtual_loop.run(main())


def test_a_link_that_damages_everything_fails_the_request() -> None:
    async def main() -> None:
        async with scene() as (transport, _, gateway, _):
            transport.damages = lambda call, frame: isinstance(frame, KVBlocks)
            gateway.send(submit(30, prefill_address="p"))
            await asyncio.sleep(3)
            assert len(transport.calls) == 1 + REFETCHES_MAX
            failed = gateway.events[-1]
            assert isinstance(failed, Failed)
            assert isinstance(failed.error, TransferFailed)
            assert "KV did not come whole in 4 streams: KV frame checksum mismatch" in str(failed.error)
            assert failed.error.is_of_prefill

    virtual_loop.run(main())


@pytest.mark.parametrize(
    "drawn", [Sampled(32000), Sampled(5, -0.5, ((1, -0.7), (1 << 40, -0.9)))], ids=["drawn", "top"]
)
def test_first_tokens_that_no_model_draws_are_not_computed_with(drawn: Sampled) -> None:
    """Nor passed on: a frame of tokens has no room for such a number."""

    async def main() -> None:
        async with scene() as (transport, _, gateway, _):
            wrong = FirstToken((drawn,), 0.0, 0.0)
            transport.change = lambda frame: wrong if isinstance(frame, FirstToken) else frame
            gateway.send(submit(30, prefill_address="p"))
            await asyncio.sleep(1)
            [failed] = gateway.events
            assert isinstance(failed, Failed)
            assert isinstance(failed.error, TransferFailed)
            assert str(failed.error) == "first tokens came that are none of 32000"

    virtual_loop.run(main())
