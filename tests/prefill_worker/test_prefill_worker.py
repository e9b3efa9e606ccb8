"""The prefill loop on the virtual clock: what leaves by the stream, and what is left when the stream ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import cast

import pytest

from cluster.planning import virtual_loop
from engine.errors import DeadlineExceeded, InvalidArgument, LayoutMismatch
from engine.sampling import SamplingParams
from kvtransfer.frames import Begin, End, FirstToken, Frame, KVBlocks
from kvtransfer.transport import PrefillCall
from prefill_worker.config import PrefillConfig
from prefill_worker.worker import PrefillWorker
from tests.emulated import call, layout, runner, running

# The pool holds 64 tokens.
MAX_CONTEXT = 80


def worker(**limits: int) -> PrefillWorker:
    return PrefillWorker(
        runner(), PrefillConfig(**{"token_budget": 8, **limits}), worker_id="p", max_context=MAX_CONTEXT
    )


async def read(prefill: PrefillWorker, asked: PrefillCall) -> list[Frame]:
    return [frame async for frame in prefill.prefill(asked)]


def test_kv_that_nobody_wants_is_not_sent() -> None:
    """Two tokens may be drawn, of which one was drawn elsewhere: the one to come is the last."""

    async def main() -> None:
        prefill = worker()
        async with running(prefill.run()):
            asked = call(30, params=SamplingParams(temperature=0.0, max_tokens=2), prompt_tokens=29)
            frames = await read(prefill, asked)
            await asyncio.sleep(1)
            prefill.check_empty()
        assert [type(frame) for frame in frames] == [Begin, FirstToken, End]
        assert frames[-1] == End(0, 0)

    virtual_loop.run(main())


def tokens_sent(frames: list[Frame]) -> set[tuple[int, int]]:
    """(layer, token) pairs, each of which must come once."""
    pairs = [
        (layer, token)
        for frame in frames
        if isinstance(frame, KVBlocks)
        for layer in frame.layers
        for token in range(frame.first_token, frame.end_token)
    ]
    assert len(pairs) == len(set(pairs)), "KV was sent twice"
    return set(pairs)


def test_the_stream_carries_all_kv_once_and_most_of_it_before_the_first_token() -> None:
    async def main() -> None:
        prefill = worker()
        async with running(prefill.run()):
            frames = await read(prefill, call(30))
            await asyncio.sleep(1)
            prefill.check_empty()
        assert isinstance(frames[0], Begin)
        assert frames[0].prompt_tokens == 30
        assert tokens_sent(frames) == {(layer, token) for layer in range(4) for token in range(30)}
        end = frames[-1]
        assert isinstance(end, End)
        # Chunks of 8, 8, 8 and 6 tokens: everything but the last layer group of the last chunk leaves early.
        assert end.kv_bytes_before_first_token >= 0.75 * end.kv_bytes
        assert sum(isinstance(frame, FirstToken) for frame in frames) == 1

    virtual_loop.run(main())


@pytest.mark.parametrize("have", [0, 4, 8, 28])
def test_tokens_that_the_caller_has_are_never_sent(have: int) -> None:
    async def main() -> None:
        prefill = worker()
        async with running(prefill.run()):
            await read(prefill, call(30))  # warms the worker's own cache: hits must be sent as well
            frames = await read(prefill, call(30, have_tokens=have))
        assert {token for _, token in tokens_sent(frames)} == set(range(have, 30))
        assert cast(Begin, frames[0]).cached_tokens == 28

    virtual_loop.run(main())


def test_the_first_token_overtakes_kv_that_waits() -> None:
    async def main() -> None:
        prefill = worker(max_frame_bytes=4096)
        async with running(prefill.run()):
            stream = prefill.prefill(call(30))
            begin = await anext(stream)
            await asyncio.sleep(5)  # the reader stalls; the prompt is long done
            rest = [frame async for frame in stream]
        assert isinstance(begin, Begin)
        assert isinstance(rest[0], FirstToken)
        assert tokens_sent(rest) == {(layer, token) for layer in range(4) for token in range(30)}

    virtual_loop.run(main())


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.02, 0.05, 1.0])
def test_closing_the_stream_at_any_time_frees_everything(after_s: float) -> None:
    async def main() -> None:
        prefill = worker()
        async with running(prefill.run()):
            stream = cast(AsyncGenerator[Frame, None], prefill.prefill(call(30)))
            reader = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(after_s)
            reader.cancel()
            await asyncio.wait([reader])
            await stream.aclose()
            await asyncio.sleep(0.1)
            prefill.check_empty()

    virtual_loop.run(main())


def test_a_deadline_ends_the_stream_and_frees_everything() -> None:
    async def main() -> None:
        prefill = worker()
        async with running(prefill.run()):
            with pytest.raises(DeadlineExceeded, match="during prefill"):
                await read(prefill, call(30, deadline_s=0.03))
            await asyncio.sleep(0.1)
            prefill.check_empty()

    virtual_loop.run(main())


@pytest.mark.parametrize(
    ("asked", "error", "text"),
    [
        (call([]), InvalidArgument, "prompt"),
        (call(4, have_tokens=4), InvalidArgument, "have_tokens"),
        (call(4, layout=layout(model="other")), LayoutMismatch, "other"),
        (call(65), InvalidArgument, "at most 64"),
        (call(80), InvalidArgument, "prompt: got '80 tokens', expected at most 79: the model's context is 80"),
        (call([5, 32_000]), InvalidArgument, r"prompt: got 32000, expected a token id in \[0, 32000\)"),
        (call(4, params=SamplingParams(n=1 << 30)), InvalidArgument, "sampling_params.n"),
        (call(4, deadline_s=float("nan")), InvalidArgument, "deadline_s"),
        (call(4, ttft_due_s=float("inf")), InvalidArgument, "ttft_due_s"),
    ],
)
def test_bad_calls_are_refused_and_the_next_one_is_served(asked: PrefillCall, error: type, text: str) -> None:
    async def main() -> None:
        prefill = worker()
        async with running(prefill.run()):
            with pytest.raises(error, match=text):
                await read(prefill, asked)
            assert isinstance((await read(prefill, call(4)))[-1], End)
            await asyncio.sleep(0.1)
            prefill.check_empty()

    virtual_loop.run(main())
