"""What a worker's loop says about itself, for heartbeats, routing and status."""

from __future__ import annotations

from dataclasses import dataclass, replace

# What only grows while a worker lives.
COUNTS = (
    "steps",
    "kv_faults",
    "prefix_queries",
    "prefix_hits",
    "preemptions",
    "kv_bytes",
    "kv_streams_broken",
    "kv_orphan_bytes",
    "lease_expiries",
)


@dataclass(frozen=True, slots=True)
class LoopStats:
    """One worker's load at one moment. Rates are running averages of its own steps, 0.0 before the first.

    `queued_tokens`: prompt tokens that are accepted but not yet computed, `queued_s` what they will take by the
    worker's own cost model (0.0 without one). `context_tokens`: tokens of KV that a decode step reads now.
    `blocks_free` counts blocks that can be had now, cached ones included; `blocks_cached` those among them that still
    hold a reusable prefix. `prefill_scale` and `decode_scale`: how many times longer than its profile says this worker
    takes, as refitted from its own steps; `cost_error_*`: median and 90th percentile of |predicted − actual| / actual
    over its last steps (0.0 before the first). `local_only`: takes prompts that are computed here, and no others.

    Since its start, whatever roles it has had:
    `kv_faults`: KV frames that came damaged, or again. `prefix_queries`: prompt tokens that were looked up in its
    prefix cache, `prefix_hits` those that were there. `preemptions`: sequences that gave their blocks back to be
    computed anew. `kv_bytes`: KV taken in from prefill workers. `kv_streams_broken`: KV streams to decode workers that
    ended before all was sent, `kv_orphan_bytes` the KV that was computed for them. `lease_expiries`: prompts and
    requests whose blocks were taken back because their time was up.
    """

    running: int
    waiting: int
    queued_tokens: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    block_size: int
    steps: int
    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0
    draining: bool = False
    queued_s: float = 0.0
    context_tokens: int = 0
    prefill_scale: float = 1.0
    decode_scale: float = 1.0
    cost_error_median: float = 0.0
    cost_error_p90: float = 0.0
    local_only: bool = False
    kv_faults: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    kv_bytes: int = 0
    kv_streams_broken: int = 0
    kv_orphan_bytes: int = 0
    lease_expiries: int = 0

    def plus(self, before: LoopStats | None) -> LoopStats:
        """With what was counted before, by a loop that this one has replaced."""
        if before is None:
            return self
        return replace(self, **{name: getattr(self, name) + getattr(before, name) for name in COUNTS})
