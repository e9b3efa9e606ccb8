"""Frames of the KV stream, and their bytes on the wire.

One stream carries one request's prefill, in this order:

    Begin              the prompt is about to run: its size and the sender's KV layout
    KVBlocks …         runs of blocks × runs of layers, while prefill still runs
    FirstToken         as soon as it is sampled, ahead of any KV still waiting
    KVBlocks …         the rest
    End                totals; nothing follows

On the wire a frame is  magic "TKV1" | header size, u32 | checksum, u64 | header, msgpack | payload, raw  (little
endian). The checksum is xxh3-64 over header and payload, so a flipped bit anywhere is seen. Each header also names the
lease that its stream was opened with: a frame of another stream is not taken, wherever it comes from. Keys of a header
that are not known are passed over: a later release may add some. What it cannot add so has another magic.
"""

from __future__ import annotations

import math
import struct
from dataclasses import asdict, dataclass, fields
from typing import Any

import msgpack
import xxhash

from engine.batch import KVLayout, Sampled
from engine.errors import CorruptFrame

MAGIC = b"TKV1"
PREFIX = struct.Struct("<4sIQ")
MAX_HEADER_BYTES = 64 * 1024
# Of anything that a header counts, in bytes or in tokens: what an int64 holds. Whoever takes a count checks it against
# what it counts: most fields of the messages that may tell it further hold less.
MAX_COUNT = (1 << 63) - 1
MAX_TEXT_CHARS = 1024


@dataclass(frozen=True, slots=True)
class Begin:
    """Opens a stream. KV of tokens [first_token, prompt_tokens) follows; `cached_tokens` hit the sender's cache."""

    prompt_tokens: int
    first_token: int
    cached_tokens: int
    layout: KVLayout


@dataclass(frozen=True, slots=True)
class KVBlocks:
    """KV of tokens [first_token, end_token) in `layers`.

    `payload` is [num_layers, num_blocks, 2, block_tokens, kv_heads, head_dim] in the dtype that Begin named. A frame
    holds whole blocks of the sender, or a single block's first `block_tokens` tokens (a prompt's tail).
    """

    first_token: int
    num_blocks: int
    block_tokens: int
    first_layer: int
    num_layers: int
    payload: bytes | memoryview

    @property
    def end_token(self) -> int:
        return self.first_token + self.num_blocks * self.block_tokens

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.first_layer + self.num_layers)


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The prompt's first output token, one per choice, and how long the prefill worker took to get there (seconds)."""

    sampled: tuple[Sampled, ...]
    queue_s: float
    prefill_s: float


@dataclass(frozen=True, slots=True)
class End:
    """Totals of the stream: KV payload bytes, and how many of them the transport had taken before the first token."""

    kv_bytes: int
    kv_bytes_before_first_token: int


Frame = Begin | KVBlocks | FirstToken | End


@dataclass(frozen=True, slots=True)
class Damaged:
    """Stands where a frame came that is not what was sent. What it held is unknown; the stream goes on."""

    problem: str


# What the receiving end of a stream sees.
Arrival = Frame | Damaged


@dataclass(frozen=True, slots=True)
class KVRange:
    """Part of a prompt's KV: tokens [first_token, end_token) in layers [first_layer, end_layer)."""

    first_token: int
    end_token: int
    first_layer: int
    end_layer: int


_COUNTS: dict[type[Any], tuple[str, ...]] = {
    kind: tuple(each.name for each in fields(kind) if each.type == "int") for kind in (Begin, KVBlocks, End, KVLayout)
}


def encode(frame: Frame, lease: int = 0) -> list[bytes | memoryview]:
    """The frame's wire bytes as pieces to be joined once, so that a payload is copied no more than it must be."""
    header, payload = _to_header(frame)
    header["lease"] = lease
    packed = msgpack.packb(header)
    checksum = xxhash.xxh3_64(packed)
    checksum.update(payload)
    return [PREFIX.pack(MAGIC, len(packed), checksum.intdigest()), packed, payload]


def decode(wire: bytes | memoryview, lease: int = 0) -> Frame:
    """Raises CorruptFrame on anything that `encode` did not write for this lease. A KVBlocks payload is a view into
    `wire`."""
    view = memoryview(wire)
    if len(view) < PREFIX.size:
        raise CorruptFrame(f"KV frame of {len(view)} bytes is shorter than its prefix of {PREFIX.size}")
    magic, header_bytes, checksum = PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise CorruptFrame(f"KV frame starts with {bytes(magic)!r} instead of {MAGIC!r}")
    if header_bytes > min(MAX_HEADER_BYTES, len(view) - PREFIX.size):
        raise CorruptFrame(f"KV frame header claims {header_bytes} bytes")
    body = view[PREFIX.size :]
    if xxhash.xxh3_64_intdigest(body) != checksum:
        raise CorruptFrame("KV frame checksum mismatch")
    try:
        header = msgpack.unpackb(body[:header_bytes], strict_map_key=True)
        if (theirs := header.pop("lease")) != lease:
            raise CorruptFrame(f"KV frame of lease {theirs} in the stream of lease {lease}")
        return _from_header(header, body[header_bytes:])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, msgpack.UnpackException) as error:
        raise CorruptFrame(f"KV frame header cannot be read: {error!r}") from error


def _to_header(frame: Frame) -> tuple[dict[str, Any], bytes | memoryview]:
    match frame:
        case KVBlocks(payload=payload):
            header = {
                "kind": "kv",
                "first_token": frame.first_token,
                "num_blocks": frame.num_blocks,
                "block_tokens": frame.block_tokens,
                "first_layer": frame.first_layer,
                "num_layers": frame.num_layers,
            }
            return header, payload
        case FirstToken():
            drawn = [[token.token_id, token.logprob, list(token.top)] for token in frame.sampled]
            return {"kind": "token", "sampled": drawn, "queue_s": frame.queue_s, "prefill_s": frame.prefill_s}, b""
        case Begin():
            return {"kind": "begin", **asdict(frame)}, b""
        case End():
            return {"kind": "end", **asdict(frame)}, b""


def _from_header(header: dict[str, Any], payload: memoryview) -> Frame:
    """Raises what reading a value of another kind raises. Keys that are not known are passed over."""
    kind = header["kind"]
    if kind == "kv":
        return KVBlocks(**_counts(KVBlocks, header), payload=payload)
    if len(payload):
        raise ValueError(f"a {kind} frame carries no payload")
    if kind == "token":
        sampled = tuple(_sampled(*drawn) for drawn in header["sampled"])
        return FirstToken(sampled, _number(header["queue_s"]), _number(header["prefill_s"]))
    if kind == "begin":
        layout = header["layout"]
        model, dtype = _text(layout["model"]), _text(layout["dtype"])
        return Begin(**_counts(Begin, header), layout=KVLayout(model=model, dtype=dtype, **_counts(KVLayout, layout)))
    if kind == "end":
        return End(**_counts(End, header))
    raise ValueError(f"unknown frame kind {kind!r}")


def _counts(kind: type[Any], header: dict[str, Any]) -> dict[str, int]:
    """The fields of `kind` that are counts."""
    return {name: _count(header[name]) for name in _COUNTS[kind]}


def _sampled(token_id: Any, logprob: Any, top: Any) -> Sampled:  # noqa: ANN401 - whatever msgpack gives
    # A token that the model rules out has a log-probability of minus infinity.
    return Sampled(_count(token_id), _float(logprob), tuple((_count(other), _float(value)) for other, value in top))


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"{value!r:.32} is no count")
    return value


def _number(value: object) -> float:
    if not math.isfinite(number := _float(value)):
        raise ValueError(f"{number} is no number of seconds")
    return number


def _float(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{value!r:.32} is no number")
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT_CHARS:
        raise ValueError(f"{value!r:.32} is no name")
    return value
