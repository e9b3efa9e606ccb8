"""What a fuzz target is. Each takes any bytes, and may say no to them by the errors that are meant for that; whatever
else it raises is a bug, and so is taking long or a lot of memory.

Where a reader needs several pieces, bytes are cut into them by `pieces`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Of what is said about bad input.
MESSAGE_CHARS_MAX = 4096


@dataclass(frozen=True, slots=True)
class Target:
    """`run` returns, or raises one of `refusals`. `seeds` are good examples, which it takes."""

    name: str
    run: Callable[[bytes], object]
    seeds: Callable[[], Sequence[bytes]]
    refusals: tuple[type[Exception], ...]

    def __call__(self, data: bytes) -> None:
        try:
            self.run(data)
        except self.refusals as error:
            size = len(str(error))
            assert size <= MESSAGE_CHARS_MAX, f"{size} characters are said of bad input"


def pieces(data: bytes, count: int = 0) -> list[bytes]:
    """Cuts bytes up: before each piece stands its size, in two bytes. With `count`, so many, empty ones at the end."""
    found: list[bytes] = []
    while data:
        size = int.from_bytes(data[:2], "little")
        found.append(data[2 : 2 + size])
        data = data[2 + size :]
    return (found + [b""] * count)[:count] if count else found


def joined(*parts: bytes) -> bytes:
    """What `pieces` cuts into `parts`."""
    return b"".join(len(part).to_bytes(2, "little") + part for part in parts)
