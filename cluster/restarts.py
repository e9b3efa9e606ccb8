"""How often a worker that died is started again. Pure."""

from __future__ import annotations

# A worker that lived for so long had started well: what ends it then is no reason to give it up.
STEADY_S = 600.0


class Restarts:
    """At most `most` in a row, of lives shorter than STEADY_S. `now` is when the first life begins."""

    def __init__(self, most: int, now: float) -> None:
        self._most = most
        self._began_s = now
        self.left = most

    def then(self, may_start: bool) -> str:
        """In words."""
        return f"starting it again ({self.left} more)" if may_start else "giving it up"

    def died(self, now: float) -> bool:
        """Whether it may be started again, which it is then."""
        if now - self._began_s >= STEADY_S:
            self.left = self._most
        self._began_s = now
        if self.left == 0:
            return False
        self.left -= 1
        return True
