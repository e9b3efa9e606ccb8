"""What a KV sender cuts and in which order it leaves."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import Unavailable
from kvtransfer.frames import Begin, End, FirstToken, Frame, KVBlocks, KVRange
from kvtransfer.send import KVSender
from tests.emulated import runner

LAYERS = 4
FIRST = FirstToken((), 0.0, 0.0)


def begin(tokens: int) -> Begin:
    return Begin(tokens, 0, 0, runner().layout)


async def read(sender: KVSender) -> list[Frame]:
    return [frame async for frame in sender.frames()]


@given(
    tokens=st.integers(1, 40),
    chunk_blocks=st.integers(1, 4),
    group=st.integers(1, 4),
    max_frame_bytes=st.sampled_from([16, 64, 200, 1024, 1 << 20]),
)
def test_frames_cover_everything_once_and_keep_to_the_limit(
    tokens: int, chunk_blocks: int, group: int, max_frame_bytes: int
) -> None:
    async def main() -> None:
        sender = KVSender(runner(), max_frame_bytes)
        block_size, token_bytes = sender_shape()
        sender.begin(begin(tokens))
        for start in range(0, tokens, chunk_blocks * block_size):
            end = min(tokens, start + chunk_blocks * block_size)
            blocks = range(start // block_size, -(-end // block_size))
            for layer in range(0, LAYERS, group):
                sender.publish(blocks, start, end, range(layer, min(LAYERS, layer + group)))
        sender.first_token(FIRST)
        frames = await read(sender)
        assert [type(frame) for frame in frames[:2]] == [Begin, FirstToken]
        cells = [
            (layer, token)
            for frame in frames
            if isinstance(frame, KVBlocks)
            for layer in frame.layers
            for token in range(frame.first_token, frame.end_token)
        ]
        assert sorted(cells) == [(layer, token) for layer in range(LAYERS) for token in range(tokens)]
        sizes = [len(frame.payload) for frame in frames if isinstance(frame, KVBlocks)]
        assert max(sizes) <= max(max_frame_bytes, block_size * token_bytes)
        assert frames[-1] == End(sum(sizes), 0)

    asyncio.run(main())


@given(
    tokens=st.integers(1, 40),
    group=st.integers(1, 4),
    wanted=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, unique=True),
)
def test_only_what_is_wanted_is_sent(tokens: int, group: int, wanted: list[tuple[int, int]]) -> None:
    async def main() -> None:
        size, _ = sender_shape()
        blocks = -(-tokens // size)
        cells = {(layer, block % blocks) for block, layer in wanted}
        ranges = [KVRange(b * size, min(tokens, (b + 1) * size), layer, layer + 1) for layer, b in cells]
        sender = KVSender(runner(), 64, ranges)
        sender.begin(begin(tokens))
        for layer in range(0, LAYERS, group):
            sender.publish(range(blocks), 0, tokens, range(layer, min(LAYERS, layer + group)))
        sender.first_token(FIRST)
        sent = [
            (layer, token)
            for frame in await read(sender)
            if isinstance(frame, KVBlocks)
            for layer in frame.layers
            for token in range(frame.first_token, frame.end_token)
        ]
        expected = [(layer, t) for layer, b in cells for t in range(b * size, min(tokens, (b + 1) * size))]
        assert sorted(sent) == sorted(expected)

    asyncio.run(main())


def sender_shape() -> tuple[int, int]:
    layout = runner().layout
    return layout.block_size, layout.token_bytes


async def test_only_what_the_transport_took_counts_as_sent() -> None:
    sender = KVSender(runner(), 64)
    sender.begin(begin(8))
    sender.publish([0, 1], 0, 8, range(0, 2))
    frames = sender.frames()
    assert isinstance(await anext(frames), Begin)
    taken = [await anext(frames), await anext(frames)]
    # The second frame is still being written when the first token comes.
    sender.publish([0, 1], 0, 8, range(2, 4))
    sender.first_token(FIRST)
    rest = [frame async for frame in frames]
    assert isinstance(taken[0], KVBlocks)
    assert rest[0] is FIRST
    end = rest[-1]
    assert isinstance(end, End)
    assert end.kv_bytes_before_first_token == len(taken[0].payload)


async def test_a_failed_stream_raises_its_error_to_the_transport() -> None:
    sender = KVSender(runner(), 64)
    reading = asyncio.ensure_future(read(sender))
    await asyncio.sleep(0)
    sender.fail(Unavailable("the worker stops"))
    with pytest.raises(Unavailable, match="the worker stops"):
        await reading
