"""What is sent: arrivals, lengths and prompts, made before a run from a seed and a rate."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cluster.loadtest.prompts import PromptSource
from cluster.loadtest.request import LoadRequest
from cluster.planning.arrivals import arrivals
from cluster.planning.trace import Trace, TraceRequest
from engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Process:
    """An arrival process of `count` requests. `kind` and `cv` as in cluster/planning/arrivals.py."""

    count: int
    kind: Literal["poisson", "gamma", "fixed"] = "poisson"
    cv: float = 1.0

    def arrivals_s(self, rate_rps: float, seed: int) -> list[float]:
        """Arrivals from 0 on with the very rate asked for: a short draw strays from it, and is stretched. A seed gives
        the same pattern at every rate."""
        drawn = arrivals(1.0, self.count, self.kind, self.cv, random.Random(f"arrivals {seed}"))
        span = drawn[-1] - drawn[0] if self.count > 1 else 0.0
        stretch = (self.count - 1) / span / rate_rps if span > 0 else 1.0 / rate_rps
        return [(time - drawn[0]) * stretch for time in drawn]


@dataclass(frozen=True, slots=True)
class Load:
    """Makes the requests of a run. `rows` (lengths, prefixes, and perhaps arrivals) are a trace's, or all alike; with
    `process` None they arrive as the trace says, its gaps scaled to the rate. Rows whose lengths exceed `max_context`
    together are left out."""

    rows: tuple[TraceRequest, ...]
    process: Process | None
    max_context: int | None = None

    @property
    def left_out(self) -> int:
        """How many rows are too long for the model."""
        return len(self.rows) - len(self._fitting())

    @property
    def count(self) -> int:
        return len(self._fitting())

    @property
    def own_rate_rps(self) -> float:
        """The trace's own mean rate; 0.0 where a process decides, or the trace holds a single moment."""
        return 0.0 if self.process is not None else Trace(self._fitting()).rate_rps

    def fitting(self, max_context: int | None) -> Load:
        """Without the rows that are too long for a model. Raises ConfigError when none is left."""
        load = replace(self, max_context=max_context)
        if not load.count:
            shortest = min(row.prompt_tokens + row.output_tokens for row in self.rows)
            raise ConfigError(
                f"--trace, --input-tokens: the shortest request has {shortest} tokens with its answer, expected one "
                f"that fits the model's context of {max_context}"
            )
        return load

    def head(self, count: int) -> Load:
        """Its first `count` rows that fit."""
        rows = self._fitting()[:count]
        return replace(self, rows=rows)

    def requests(self, rate_rps: float, seed: int, run: str, source: PromptSource) -> tuple[LoadRequest, ...]:
        """The requests of one run. The seed alone decides arrivals; `run` makes its prompts differ from other runs'."""
        rows = self._fitting()
        if not rows:
            return ()
        if self.process is not None:
            # As many arrivals as rows: where some are left out, the rate still holds.
            times: Sequence[float] = replace(self.process, count=len(rows)).arrivals_s(rate_rps, seed)
        else:
            own = self.own_rate_rps
            first_s, *_ = known = Trace(rows).arrivals_s
            scale = rate_rps / own if own > 0 else 1.0
            times = [(time - first_s) / scale for time in known]
        rng = random.Random(f"prompts {seed} {run}")
        # Prompts of one run share what the trace says, and nothing with those of other runs: a cache would know them.
        mark = rng.getrandbits(62)
        made = (source.prompt(row.prompt_tokens, [name ^ mark for name in row.prefix_hashes], rng) for row in rows)
        return tuple(
            LoadRequest(index, time, prompt, tokens, row.output_tokens)
            for index, (time, row, (prompt, tokens)) in enumerate(zip(times, rows, made, strict=True))
        )

    def _fitting(self) -> tuple[TraceRequest, ...]:
        if self.max_context is None:
            return self.rows
        return tuple(row for row in self.rows if row.prompt_tokens + row.output_tokens <= self.max_context)
