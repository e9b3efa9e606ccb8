"""Damage on the wire: a bit of a KV frame that is flipped after its checksum was computed."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

from kvtransfer.frames import Frame
from kvtransfer.grpc_transport import frame_to_message

# Streams that are remembered as hit; far more than run at a time.
STREAMS = 4096


class Corruption:
    """Flips one bit of one of `every_frames` messages on average, at random; `flipped` is called for each.

    Of one stream at most one message is hit, so of long streams fewer: who reads a stream whose first frame came
    damaged leaves it, and would never see a second one.
    """

    def __init__(self, rng: random.Random, flipped: Callable[[], None]) -> None:
        self._rng = rng
        self._flipped = flipped
        self._every_frames = 0
        self._left = 0
        self._hit: deque[int] = deque(maxlen=STREAMS)

    def set(self, every_frames: int) -> None:
        """0: nothing is flipped any more."""
        self._every_frames = every_frames
        self._left = self._draw() if every_frames else 0

    def has_hit(self, lease: int) -> bool:
        """Whether a message of this stream was hit, lately."""
        return lease in self._hit

    def encode(self, frame: Frame, lease: int = 0) -> bytes:
        """In place of kvtransfer.grpc_transport.frame_to_message."""
        message = frame_to_message(frame, lease)
        if not self._every_frames:
            return message
        self._left -= 1
        if self._left > 0:
            return message
        self._left = self._draw()
        if lease in self._hit:
            return message
        self._hit.append(lease)
        self._flipped()
        damaged, bit = bytearray(message), self._rng.randrange(8 * len(message))
        damaged[bit // 8] ^= 1 << bit % 8
        return bytes(damaged)

    def _draw(self) -> int:
        """Frames up to and including the next that is hit: `every_frames` on average."""
        return self._rng.randint(1, 2 * self._every_frames - 1)
