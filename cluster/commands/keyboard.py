"""Single keys of a terminal, without waiting for a line to end."""

from __future__ import annotations

import asyncio
import os
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def pressed(key: str) -> Iterator[asyncio.Event]:
    """An event that is set when `key` is pressed, in either case. Where stdin is no terminal it never is."""
    event = asyncio.Event()
    if not sys.stdin.isatty():
        yield event
        return
    file = sys.stdin.fileno()
    before = termios.tcgetattr(file)
    loop = asyncio.get_running_loop()

    def read() -> None:
        keys = os.read(file, 64)
        # Nothing to read is the terminal's end.
        if not keys or key.encode() in keys.lower():
            loop.remove_reader(file)
            event.set()

    # Ctrl-C stays a signal.
    tty.setcbreak(file)
    loop.add_reader(file, read)
    try:
        yield event
    finally:
        loop.remove_reader(file)
        termios.tcsetattr(file, termios.TCSADRAIN, before)
