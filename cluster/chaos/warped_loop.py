"""An event loop whose clock leaps, or runs at another rate than the world's, when it is told to.

    time()   ── rate 1 ──▶ │ + jump_s │ ── rate ──▶ │ ── rate 1 ──▶
                          warp(jump_s, rate)       warp(rate=1)

It never goes back, as no loop's clock does. Sockets stay on the world's time; timers are on this one.
"""

from __future__ import annotations

import asyncio
import selectors


class _Selector(selectors.DefaultSelector):
    """Waits for as long as the loop means, in the world's time."""

    rate = 1.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(None if timeout is None else timeout / self.rate)


class WarpedLoop(asyncio.SelectorEventLoop):
    """asyncio's own loop until `warp` is called."""

    def __init__(self) -> None:
        self._since_s = super().time()
        self._at_s = self._since_s
        self._waits = _Selector()
        super().__init__(self._waits)

    def time(self) -> float:
        return self._at_s + (super().time() - self._since_s) * self._waits.rate

    def warp(self, jump_s: float = 0.0, rate: float = 1.0) -> None:
        """Call in the loop's own thread. What is due by now at the new time is called in the loop's next turn."""
        assert jump_s >= 0, "a loop's clock never goes back"
        assert rate > 0, "nor does it stand still"
        self._at_s, self._since_s = self.time() + jump_s, super().time()
        self._waits.rate = rate
