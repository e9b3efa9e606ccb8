"""One HTTP/2 connection written by hand: what no gRPC library would send, and windows that never open.

connection = await RawConnection.open("127.0.0.1:50051", window=0)
stream = connection.call("/tandem.v1.Inference/Generate", request.SerializeToString())
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterable
from dataclasses import dataclass

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
INITIAL_WINDOW = 4
CANCEL = struct.pack(">I", 8)
# The largest frame that a peer must take.
FRAME_BYTES = 16_384

Headers = Iterable[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class RawFrame:
    kind: int
    flags: int
    stream: int
    payload: bytes = b""

    def to_bytes(self) -> bytes:
        size = struct.pack(">I", len(self.payload))[1:]
        return size + bytes((self.kind, self.flags)) + struct.pack(">I", self.stream) + self.payload


class RawConnection:
    """`frames` holds what came, in order. Settings and pings are answered as long as `answers`; nothing else is, and
    windows stay as they are. `keeps` False forgets what came: for floods."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: bool, keeps: bool) -> None:
        self.frames: list[RawFrame] = []
        self.is_closed = asyncio.Event()
        self._reader = reader
        self._writer = writer
        self._answers = answers
        self._keeps = keeps
        self._next_stream = 1
        self._task = asyncio.create_task(self._read())

    @classmethod
    async def open(
        cls, address: str, *, window: int = 65_535, answers: bool = True, keeps: bool = True, silent: bool = False
    ) -> RawConnection:
        """`window`: bytes that the peer may send on a stream before it waits, for good. `silent`: nothing is sent."""
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        if not silent:
            settings = RawFrame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW, window))
            writer.write(PREFACE + settings.to_bytes())
        return cls(reader, writer, answers, keeps)

    def call(self, path: str, request: bytes | None, more: Headers = ()) -> int:
        """Starts a call and returns its stream. `request` None: its message never comes."""
        stream = self._next_stream
        self._next_stream += 2
        self.send(*header_frames(stream, call_headers(path, more)))
        if request is not None:
            message = b"\0" + struct.pack(">I", len(request)) + request
            parts = range(0, len(message), FRAME_BYTES)
            for start in parts:
                flags = END_STREAM if start == parts[-1] else 0
                self.send(RawFrame(DATA, flags, stream, message[start : start + FRAME_BYTES]))
        return stream

    def send(self, *frames: RawFrame) -> None:
        self.send_bytes(b"".join(frame.to_bytes() for frame in frames))

    def send_bytes(self, data: bytes) -> None:
        self._writer.write(data)

    async def drain(self) -> None:
        await self._writer.drain()

    def of(self, stream: int, kind: int) -> list[RawFrame]:
        return [frame for frame in self.frames if frame.stream == stream and frame.kind == kind]

    def status(self, stream: int) -> int | None:
        """The gRPC status that ended a call, None while there is none. Only the first on a connection can be read so:
        later ones are shortened by what came before."""
        for frame in self.of(stream, HEADERS):
            _, name, rest = frame.payload.partition(b"grpc-status")
            if name:
                return int(rest[1 : 1 + rest[0]])
        return None

    def says(self, stream: int, text: bytes) -> bool:
        """Whether the headers or trailers of a call hold `text`."""
        return any(text in frame.payload for frame in self.of(stream, HEADERS))

    async def close(self) -> None:
        self._writer.close()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self) -> None:
        try:
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                frame = RawFrame(head[3], head[4], int.from_bytes(head[5:], "big"), payload)
                if self._answers and frame.kind in (SETTINGS, PING) and not frame.flags & ACK:
                    self.send(RawFrame(frame.kind, ACK, 0, payload if frame.kind == PING else b""))
                if self._keeps:
                    self.frames.append(frame)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.is_closed.set()


def call_headers(path: str, more: Headers = ()) -> bytes:
    """The headers of a gRPC call as HPACK literals, each in full."""
    usual = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    )
    return b"".join(literal(name, value) for name, value in (*usual, *more))


def literal(name: str, value: str, first: int = 0x00) -> bytes:
    """`first` 0x40 also puts it into the peer's table, where it is entry 62."""
    return bytes((first,)) + _text(name) + _text(value)


def header_frames(stream: int, block: bytes, flags: int = 0) -> list[RawFrame]:
    """A header block as one HEADERS frame and as many CONTINUATIONs as it needs."""
    starts = range(0, len(block), FRAME_BYTES)
    return [
        RawFrame(
            CONTINUATION if start else HEADERS,
            (0 if start else flags) | (END_HEADERS if start == starts[-1] else 0),
            stream,
            block[start : start + FRAME_BYTES],
        )
        for start in starts
    ]


def _text(text: str) -> bytes:
    raw = text.encode()
    size, prefix = len(raw), bytearray()
    if size < 127:
        return bytes((size,)) + raw
    prefix.append(127)
    size -= 127
    while size >= 128:
        prefix.append(size & 127 | 128)
        size >>= 7
    prefix.append(size)
    return bytes(prefix) + raw
