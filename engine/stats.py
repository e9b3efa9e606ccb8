"""What a worker's loop says about itself, for heartbeats, routing and status."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoopStats:
    """One worker's load at one moment. Rates are running averages of its own steps, 0.0 before the first.

    `queued_tokens`: prompt tokens that are accepted but not yet computed. `blocks_free` counts blocks that can be had
    now, cached ones included; `blocks_cached` those among them that still hold a reusable prefix.
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
