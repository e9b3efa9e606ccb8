"""Frames: what is written is read back, and nothing else is."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import KVLayout, Sampled
from engine.errors import CorruptFrame
from kvtransfer.frames import MAGIC, PREFIX, Begin, End, FirstToken, Frame, KVBlocks, decode, encode

COUNTS = st.integers(0, (1 << 63) - 1)
FLOATS = st.floats(allow_nan=False)
LAYOUTS = st.builds(
    KVLayout, st.text(max_size=20), COUNTS, COUNTS, COUNTS, st.sampled_from(["float32", "bfloat16"]), COUNTS, COUNTS
)
TOKENS = st.builds(Sampled, COUNTS, FLOATS, st.lists(st.tuples(COUNTS, FLOATS), max_size=3).map(tuple))
FRAMES = st.one_of(
    st.builds(Begin, COUNTS, COUNTS, COUNTS, LAYOUTS),
    st.builds(KVBlocks, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, st.binary(max_size=100)),
    st.builds(FirstToken, st.lists(TOKENS, max_size=4).map(tuple), FLOATS, FLOATS),
    st.builds(End, COUNTS, COUNTS),
)
BLOCK = KVBlocks(first_token=32, num_blocks=2, block_tokens=16, first_layer=5, num_layers=3, payload=b"0123456789")


def wire_of(frame: Frame) -> bytes:
    return b"".join(encode(frame))


@given(FRAMES)
def test_every_frame_survives_the_wire(frame: Frame):
    read = decode(wire_of(frame))
    if isinstance(read, KVBlocks):
        read = replace(read, payload=bytes(read.payload))
    assert read == frame


@given(FRAMES, st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
def test_a_frame_of_another_lease_is_seen(frame: Frame, lease: int, other: int):
    wire = b"".join(encode(frame, lease))
    assert type(decode(wire, lease)) is type(frame)
    if lease != other:
        with pytest.raises(CorruptFrame, match=f"KV frame of lease {lease} in the stream of lease {other}"):
            decode(wire, other)


@given(FRAMES, st.data())
def test_a_flipped_bit_anywhere_is_seen(frame: Frame, data: st.DataObject):
    wire = bytearray(wire_of(frame))
    bit = data.draw(st.integers(0, 8 * len(wire) - 1))
    wire[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptFrame):
        decode(bytes(wire))


@given(FRAMES, st.data())
def test_a_frame_cut_short_or_lengthened_is_seen(frame: Frame, data: st.DataObject):
    wire = wire_of(frame)
    with pytest.raises(CorruptFrame):
        decode(wire[: data.draw(st.integers(0, len(wire) - 1))])
    with pytest.raises(CorruptFrame):
        decode(wire + data.draw(st.binary(min_size=1, max_size=9)))


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(wire: bytes):
    for candidate in (wire, MAGIC + wire):
        with pytest.raises(CorruptFrame):
            decode(candidate)


def test_a_payload_is_sent_and_read_without_a_copy():
    payload = bytearray(b"x" * 1000)
    pieces = encode(replace(BLOCK, payload=memoryview(payload)))
    assert pieces[-1].obj is payload
    wire = b"".join(pieces)
    frame = decode(wire)
    assert isinstance(frame, KVBlocks)
    assert isinstance(frame.payload, memoryview)
    assert frame.payload.obj is wire


@pytest.mark.parametrize(
    ("wire", "text"),
    [
        (b"", "KV frame of 0 bytes is shorter than its prefix of 16"),
        (b"HTTP" + wire_of(BLOCK)[4:], "KV frame starts with b'HTTP' instead of b'TKV1'"),
        (PREFIX.pack(MAGIC, 1 << 31, 0) + b"abc", "KV frame header claims 2147483648 bytes"),
        (wire_of(BLOCK)[:-1] + b"?", "KV frame checksum mismatch"),
    ],
)
def test_errors_say_what_was_found(wire: bytes, text: str):
    with pytest.raises(CorruptFrame, match=text):
        decode(wire)


def test_ranges_are_half_open():
    assert (BLOCK.end_token, BLOCK.layers) == (64, range(5, 8))
