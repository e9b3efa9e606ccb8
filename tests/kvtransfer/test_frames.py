"""Frames: what is written is read back, and nothing else is."""

from dataclasses import replace

import msgpack
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import KVLayout, Sampled
from engine.errors import CorruptFrame
from kvtransfer.frames import MAGIC, PREFIX, Begin, End, FirstToken, Frame, KVBlocks, decode, encode

COUNTS = st.integers(0, (1 << 63) - 1)
FLOATS = st.floats(allow_nan=False)
SECONDS = st.floats(allow_nan=False, allow_infinity=False)
LAYOUTS = st.builds(
    KVLayout, st.text(max_size=20), COUNTS, COUNTS, COUNTS, st.sampled_from(["float32", "bfloat16"]), COUNTS, COUNTS
)
TOKENS = st.builds(Sampled, COUNTS, FLOATS, st.lists(st.tuples(COUNTS, FLOATS), max_size=3).map(tuple))
FRAMES = st.one_of(
    st.builds(Begin, COUNTS, COUNTS, COUNTS, LAYOUTS),
    st.builds(KVBlocks, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, st.binary(max_size=100)),
    st.builds(FirstToken, st.lists(TOKENS, max_size=4).map(tuple), SECONDS, SECONDS),
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


LAYOUT = {"model": "m", "dtype": "float32"} | dict.fromkeys(
    ("num_layers", "num_kv_heads", "head_dim", "block_size", "num_blocks"), 1
)
TOKEN = {"kind": "token", "lease": 0, "sampled": [[1, -0.5, []]], "queue_s": 0.1, "prefill_s": 0.1}
BEGIN = {"kind": "begin", "lease": 0, "prompt_tokens": 9, "first_token": 0, "cached_tokens": 0, "layout": LAYOUT}


@pytest.mark.parametrize(
    "header",
    [
        [1, 2],
        {"lease": 0},
        {"lease": 0, "kind": ["kv"]},
        BEGIN | {"prompt_tokens": "9"},
        BEGIN | {"first_token": -1},
        BEGIN | {"cached_tokens": 1 << 63},
        BEGIN | {"layout": 3},
        BEGIN | {"layout": LAYOUT | {"model": b"m"}},
        BEGIN | {"layout": LAYOUT | {"dtype": "f" * 9999}},
        TOKEN | {"sampled": [[float("inf"), 0.0, []]]},
        TOKEN | {"sampled": [["9" * 5000, 0.0, []]]},
        TOKEN | {"sampled": [[1, 0.0]]},
        TOKEN | {"queue_s": float("nan")},
        TOKEN | {"prefill_s": True},
        {"kind": "end", "lease": 0, "kv_bytes": 1.5, "kv_bytes_before_first_token": 0},
    ],
)
def test_headers_of_other_types_are_seen(header: object):
    packed = msgpack.packb(header)
    with pytest.raises(CorruptFrame, match="header cannot be read"):
        decode(PREFIX.pack(MAGIC, len(packed), xxhash.xxh3_64_intdigest(packed)) + packed)


def test_keys_of_later_releases_are_passed_over():
    later = TOKEN | {"colour": "blue"}
    packed = msgpack.packb(later)
    wire = PREFIX.pack(MAGIC, len(packed), xxhash.xxh3_64_intdigest(packed)) + packed
    assert decode(wire) == FirstToken((Sampled(1, -0.5),), 0.1, 0.1)


def test_ranges_are_half_open():
    assert (BLOCK.end_token, BLOCK.layers) == (64, range(5, 8))
