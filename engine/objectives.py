"""What a request is to achieve: its latency objectives."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Objectives:
    """Longest time to first token, and longest mean time per token after it, in seconds. None: any time will do."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def validate(self) -> None:
        """Raises InvalidArgument for a time that cannot be met or is no time at all."""
        for field, value in (("objectives.ttft_ms", self.ttft_s), ("objectives.tpot_ms", self.tpot_s)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InvalidArgument(field, value * 1e3, "a positive number of milliseconds")

    def over(self, other: Objectives) -> Objectives:
        """These, with `other`'s where these say nothing."""
        ttft_s = other.ttft_s if self.ttft_s is None else self.ttft_s
        tpot_s = other.tpot_s if self.tpot_s is None else self.tpot_s
        return Objectives(ttft_s, tpot_s)

    def has_ttft(self, ttft_s: float) -> bool:
        """Whether a first token after `ttft_s` is in time."""
        return self.ttft_s is None or ttft_s <= self.ttft_s

    def has_tpot(self, tpot_s: float) -> bool:
        return self.tpot_s is None or tpot_s <= self.tpot_s


NO_OBJECTIVES = Objectives()
