"""What the log says of callers that are refused or cut off: enough to find them, and never more however many they are.
Pure: `now` is an argument."""

from __future__ import annotations

import math

PERIOD_S = 60.0
MAX_LINES = 10


class RefusalLog:
    """Each problem of each peer once in PERIOD_S, and MAX_LINES lines in that time at most."""

    def __init__(self) -> None:
        self._until_s = -math.inf
        self._told: set[tuple[str, str]] = set()
        self._untold = 0

    def line(self, peer: str, problem: str, now: float, detail: str = "") -> str | None:
        """The line to log, None for none. `peer` is an address as gRPC writes it. `problem` says what kind of thing
        it was; `detail` may be another one each time, and makes no line of its own."""
        more = ""
        if now >= self._until_s:
            if self._untold:
                more = f" ({self._untold} more since the last line)"
            self._until_s, self._untold = now + PERIOD_S, 0
            self._told.clear()
        # Without the port: every connection has one of its own.
        told = (peer.rpartition(":")[0] or peer or "somebody who has gone", problem)
        if told in self._told or len(self._told) >= MAX_LINES:
            self._untold += 1
            return None
        self._told.add(told)
        return f"{told[0]}: {problem}{': ' if detail else ''}{detail}{more}"
