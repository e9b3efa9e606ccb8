"""Bits flipped on the wire: as many as were asked for, one in a stream at most, and the receiver sees every one."""

from __future__ import annotations

import random

import pytest

from cluster.chaos.corruption import Corruption
from engine.batch import KVLayout, Sampled
from engine.errors import CorruptFrame
from kvtransfer.frames import Begin, End, FirstToken, Frame, KVBlocks
from kvtransfer.grpc_transport import frame_from_message, frame_to_message

FRAMES: tuple[Frame, ...] = (
    Begin(8, 0, 0, KVLayout("m", 2, 1, 2, "float32", 4, 8)),
    KVBlocks(0, 2, 4, 0, 1, bytes(range(128))),
    KVBlocks(0, 2, 4, 1, 1, bytes(range(128))),
    FirstToken((Sampled(3, -0.5, ()),), 0.1, 0.2),
    End(256, 128),
)


def damaged(messages: list[tuple[int, bytes]]) -> list[int]:
    """The leases of messages that the receiving end refuses."""
    found = []
    for lease, message in messages:
        try:
            frame_from_message(message, lease)
        except CorruptFrame:
            found.append(lease)
    return found


@pytest.mark.parametrize("every_frames", [2, 10, 100])
def test_every_flip_is_seen_and_no_stream_has_two(every_frames: int) -> None:
    flips: list[None] = []
    corruption = Corruption(random.Random(every_frames), lambda: flips.append(None))
    corruption.set(every_frames)
    streams = 4000
    messages = [(lease, corruption.encode(frame, lease)) for lease in range(streams) for frame in FRAMES]
    hit = damaged(messages)
    assert len(hit) == len(flips)
    assert len(set(hit)) == len(hit)
    expected = min(streams, streams * len(FRAMES) / every_frames)
    assert 0.75 * expected < len(hit) < 1.25 * expected


def test_nothing_is_flipped_unless_it_was_ordered() -> None:
    corruption = Corruption(random.Random(0), lambda: pytest.fail("nobody asked for that"))
    for frame in FRAMES:
        assert corruption.encode(frame, 7) == frame_to_message(frame, 7)
    corruption.set(1)
    corruption.set(0)
    for frame in FRAMES:
        assert corruption.encode(frame, 7) == frame_to_message(frame, 7)


def test_one_bit_differs() -> None:
    corruption = Corruption(random.Random(0), lambda: None)
    corruption.set(1)
    frame = FRAMES[1]
    sent, meant = corruption.encode(frame, 7), frame_to_message(frame, 7)
    assert len(sent) == len(meant)
    assert sum((a ^ b).bit_count() for a, b in zip(sent, meant, strict=True)) == 1
