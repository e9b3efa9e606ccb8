"""Which requests are traced: those of traced clients, and a share of the others. As OpenTelemetry's samplers
`ParentBased` and `TraceIdRatioBased` say it, so that others decide alike of the same trace."""

from __future__ import annotations

import random

from engine.trace_context import TraceContext

_ID_BITS = 64


class Sampler:
    """`ratio` of the requests whose clients say nothing are traced. Ids are drawn from `rng`."""

    def __init__(self, ratio: float, rng: random.Random) -> None:
        self._rng = rng
        self._below = round(ratio * (1 << _ID_BITS))

    def begin(self, client: TraceContext | None) -> TraceContext:
        """The span of a request that has come. `client`: the span that it was sent from, None for none."""
        span_id = self._id(_ID_BITS)
        if client is not None:
            return TraceContext(client.trace_id, span_id, client.is_sampled, client.state, client.span_id)
        trace_id = self._id(2 * _ID_BITS)
        return TraceContext(trace_id, span_id, trace_id % (1 << _ID_BITS) < self._below)

    def _id(self, bits: int) -> int:
        # An id of zeros is none.
        return self._rng.getrandbits(bits) or 1
